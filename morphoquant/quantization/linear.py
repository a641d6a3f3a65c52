"""The quantized linear, and the input it shares with its group.

Fake quantization: weights are stored dequantized in the compute dtype, activations are rounded
to their grid and come back in the compute dtype. Counters prove that the quantizers ran.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from morphoquant.errors import HarnessError
from morphoquant.models.structure import TokenLabels
from morphoquant.quantization.low_rank import LowRank
from morphoquant.quantization.modality import ModalityBranches, ModalityScale

Show = Callable[[torch.Tensor], None]


class GroupInput(nn.Module):
    """What happens to an activation before the linears of one input group read it.

    The linears of a group (q, k, v; gate, up) are called with the same tensor object, so the work
    is done for the first and handed to the others; the result is dropped after the last.

    Attributes:
        online: function-preserving rewrite of the input (an online rotation, scales of every
            modality), or None.
        quantizer: fake quantizer of the activation, or None to leave it bit for bit.
        compensation: ``(x, x_hat, labels) -> (x_tilde, bypassed)`` or None.
        labels: the modality of the tokens that go through, where that is known.
        only: the modalities whose tokens are quantized (all others pass as they are, and count as
            bypassed), or None for all tokens.
        keeps_input, input: whether the activation is kept as it was before its quantizer, for
            branches in high precision that read it; the one of the last call, behind ``online``.
        tokens, elements, bypassed: what went through the quantizer since the last reset;
            ``bypassed`` counts elements that stayed in high precision.
        passed: tokens since the last reset that no quantizer touched.
    """

    def __init__(self, readers: int, online: nn.Module | None = None) -> None:
        super().__init__()
        self.readers = readers
        self.online = online
        self.quantizer: nn.Module | None = None
        self.compensation: nn.Module | None = None
        self.labels: TokenLabels | None = None
        self.only: frozenset[int] | None = None
        self.enabled = True
        self.observer: Show | None = None
        self._source: torch.Tensor | None = None
        self._result: torch.Tensor | None = None
        self._reads = 0
        self.keeps_input = False
        self.input: torch.Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Set the counters to zero (before evaluation)."""
        self.tokens = self.passed = 0
        self.elements = 0
        self._bypassed: torch.Tensor | int = 0
        self._quantized: torch.Tensor | int = 0  # tokens, counted where some are spared

    @property
    def bypassed(self) -> int:
        return int(self._bypassed)

    @property
    def spared_all(self) -> bool:
        """Whether no token was quantized, because none was of the modalities in ``only``."""
        return self.only is not None and int(self._quantized) == 0

    @property
    def quantizes(self) -> bool:
        return self.quantizer is not None and self.enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., channels] -> [..., channels]."""
        if self._source is x and self._result is not None:
            result = self._result
        else:
            result = self._compute(x)
            self._source, self._result, self._reads = x, result, 0
        self._reads += 1
        if self._reads >= self.readers:
            self._source = self._result = None
        return result

    def _compute(self, x: torch.Tensor) -> torch.Tensor:
        if self.online is not None:
            x = self._rewritten(x)
        if self.keeps_input:
            self.input = x
        if self.observer is not None:
            self.observer(x)
        if not self.quantizes:
            self.passed += x.numel() // x.shape[-1]
            return x
        assert self.quantizer is not None
        rounded = self.round(x)
        self.tokens += x.numel() // x.shape[-1]
        self.elements += x.numel()
        if self.compensation is None and self.only is None:
            return rounded
        chosen = self.chosen(x)
        if chosen is not None:
            self._quantized = self._quantized + chosen.sum()
        result, bypassed = self.compensate(x, rounded)
        self._bypassed = self._bypassed + bypassed
        return result

    def _rewritten(self, x: torch.Tensor) -> torch.Tensor:
        assert self.online is not None
        if isinstance(self.online, ModalityScale):
            return self.online(x, self.labels_of(x))
        found: torch.Tensor = self.online(x)
        return found

    def undone(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """``x`` [..., channels] without the scales of its tokens' modalities ``labels`` [...]."""
        return self.online.undo(x, labels) if isinstance(self.online, ModalityScale) else x

    def labels_of(self, x: torch.Tensor) -> torch.Tensor | None:
        """The modality of the rows of ``x`` [..., channels], where that is known."""
        return None if self.labels is None else self.labels.matching(x)

    def chosen(self, x: torch.Tensor) -> torch.Tensor | None:
        """bool [...], the tokens that are quantized; None where all are.

        Raises:
            HarnessError: it depends on the tokens' modality, and that is not known.
        """
        if self.only is None:
            return None
        labels = self.labels_of(x)
        if labels is None:
            raise HarnessError(
                f"tokens of some modalities only are to be quantized, and the modality of an "
                f"activation {tuple(x.shape)} is not known"
            )
        wanted = torch.tensor(sorted(self.only), device=labels.device, dtype=labels.dtype)
        return torch.isin(labels, wanted).to(x.device)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """x_hat [..., channels] on the quantizer's grid; counts nothing."""
        if self.quantizer is None:
            return x
        found: torch.Tensor = self.quantizer(x, self.labels_of(x))
        chosen = self.chosen(x)
        return found if chosen is None else torch.where(chosen[..., None], found, x)

    def bounds(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest level at every element of ``x``; infinite without a quantizer."""
        if self.quantizer is None:
            edge = torch.full((1,), torch.inf, device=x.device)
            return -edge, edge
        bounds: Any = self.quantizer.bounds
        found: tuple[torch.Tensor, torch.Tensor] = bounds(x, self.labels_of(x))
        chosen = self.chosen(x)
        if chosen is None:
            return found
        gate = chosen[..., None]
        return torch.where(gate, found[0], -torch.inf), torch.where(gate, found[1], torch.inf)

    def compensate(
        self, x: torch.Tensor, rounded: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """(x, x_hat) [..., channels] -> x_tilde and how many elements bypassed; counts nothing."""
        chosen = self.chosen(x)
        if chosen is not None:
            return self._compensate_some(x, rounded, chosen)
        if self.compensation is None:
            return rounded, 0
        found: tuple[torch.Tensor, torch.Tensor | int] = self.compensation(
            x, rounded, self.labels_of(x)
        )
        return found

    def _compensate_some(
        self, x: torch.Tensor, rounded: torch.Tensor, chosen: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``compensate`` for ``chosen`` tokens; all elements of the others bypass."""
        bypassed = (~chosen).sum() * x.shape[-1]
        if self.compensation is None:
            return rounded, bypassed
        labels = self.labels_of(x)
        part, some = self.compensation(
            x[chosen], rounded[chosen], None if labels is None else labels.to(x.device)[chosen]
        )
        result = x.clone()
        result[chosen] = part
        return result, bypassed + some


class QuantizedLinear(nn.Module):
    """Takes the place of an ``nn.Linear``: ``Y = x_tilde W_hat^T + b`` (SPEC 2.4).

    Attributes:
        weight: dequantized weight [out, in], compute dtype.
        bias: [out] or None, never quantized.
        branch_up, branch_down: [out, rank] and [rank, in] of a branch in high precision that reads
            the activation before its quantizer, or None.
        branches: one such branch for every kind of token, or None. They make up for scales that
            a kind does not share with the weight; without them those scales are undone.
        calls: forward calls since the last reset.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, source: GroupInput) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.source = source
        self.branch_up: torch.Tensor | None
        self.branch_down: torch.Tensor | None
        self.register_buffer("branch_up", None)
        self.register_buffer("branch_down", None)
        self.branches: ModalityBranches | None = None
        self.calls = 0

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        value = self.source(x)
        labels = self.source.labels_of(x)
        out = self.product(value, labels, self.bias)
        if self.branch_up is None and self.branches is None:
            return out
        assert self.source.input is not None
        return out + self.branch(self.source.input, labels)

    def product(
        self,
        value: torch.Tensor,
        labels: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x_tilde [..., in], labels [...] -> what the stored weight makes of it, [..., out]."""
        if self.branches is None:
            value = self.source.undone(value, labels)
        return F.linear(value, self.weight, bias)

    def branch(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """What the branch adds: [..., in], labels [...] -> [..., out]; zero without one."""
        if self.branches is not None:
            found: torch.Tensor = self.branches(x, labels)
            return found
        if self.branch_up is None or self.branch_down is None:
            return x.new_zeros((*x.shape[:-1], self.out_features))
        return F.linear(F.linear(x, self.branch_down), self.branch_up)

    def set_branch(self, branch: LowRank | ModalityBranches) -> None:
        """Put a low-rank branch beside the weight, or one for every kind of token."""
        if isinstance(branch, ModalityBranches):
            self.branches = branch
        else:
            self.branch_up, self.branch_down = branch.up, branch.down
        self.source.keeps_input = True

    @contextmanager
    def observe_input(self, show: Show) -> Iterator[None]:
        """Show the group's activation as it reaches the quantizer (behind an online rotation)."""
        self.source.observer = show
        try:
            yield
        finally:
            self.source.observer = None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def plain(module: nn.Module) -> Any:
    """The linear itself, without a wrapper that rewrites its input first."""
    return getattr(module, "linear", module)
