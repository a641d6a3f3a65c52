"""What differs between modalities behind one shared weight: scales and branches (SPEC 4.13).

MASQuant (arXiv 2603.04800) smooths every kind of token by scales of its own, but stores one
quantized weight, the one of text. With ``x'`` the input divided by the scales of its own kind m,

    ``Y = Q(x') Q(W S_t)^T + x' L_m^T``, where ``L_m`` is near ``W S_m - Q(W S_t)``  (eq. 22-29).

The scales of text fold into the network; what is left for the others is the ratio ``S_m / S_t``,
which :class:`ModalityScale` takes out while the model runs, and the branch of
:class:`ModalityBranches`. Padding and tokens that the model writes itself are text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from morphoquant.models.structure import MODALITIES, Modality, TokenLabels
from morphoquant.quantization.low_rank import LowRank

TEXT = "text"


def kinds_of(joint_vision: bool) -> dict[str, tuple[Modality, ...]]:
    """The kinds of tokens that are told apart, text first.

    Args:
        joint_vision: pictures and clips are one kind, ``vision`` (as published), or two.
    """
    vision: dict[str, tuple[Modality, ...]]
    if joint_vision:
        vision = {"vision": (Modality.IMAGE, Modality.VIDEO)}
    else:
        vision = {"image": (Modality.IMAGE,), "video": (Modality.VIDEO,)}
    return {TEXT: (Modality.TEXT,), **vision, "audio": (Modality.AUDIO,)}


def is_kind(labels: torch.Tensor, members: tuple[Modality, ...]) -> torch.Tensor:
    """Which tokens of ``labels`` [...] are of one of ``members``: bool [...]."""
    return torch.isin(labels, labels.new_tensor([int(m) for m in members]))


def _places(names: tuple[str, ...], joint_vision: bool, otherwise: int) -> torch.Tensor:
    """Position in ``names`` of every label, from padding (as text) on: int64 [1 + modalities]."""
    places = torch.full((1 + len(MODALITIES),), otherwise)
    for name, members in kinds_of(joint_vision).items():
        if name in names:
            for modality in members:
                places[1 + int(modality)] = names.index(name)
    places[0] = places[1 + int(Modality.TEXT)]
    return places


class ModalityScale(nn.Module):
    """Divides every token by the scales of its kind, relative to those of text.

    Args:
        ratios: ``S_m / S_t`` [channels] of the kinds that have their own; other tokens pass.
        joint_vision: see :func:`kinds_of`.
    """

    ratio: torch.Tensor
    places: torch.Tensor

    def __init__(self, ratios: Mapping[str, torch.Tensor], joint_vision: bool) -> None:
        super().__init__()
        self.joint_vision = joint_vision
        self.names = (TEXT, *ratios)
        some = next(iter(ratios.values()))
        rows = [torch.ones_like(some), *ratios.values()]
        self.register_buffer("ratio", torch.stack(rows).double())
        self.register_buffer("places", _places(self.names, joint_vision, 0).to(some.device))

    @property
    def description(self) -> str:
        return f"scales of their own for {', '.join(self.names[1:])}"

    def storage_bits(self, weight: torch.Tensor, readers: int) -> float:
        """What the scales cost in bits per element of one of ``readers`` weights that share them
        (16 per number; those of text are folded)."""
        numbers = (len(self.names) - 1) * self.ratio.shape[1]
        return 16 * numbers / (readers * weight.numel())

    def ratio_of(self, name: str) -> torch.Tensor | None:
        """``S_m / S_t`` of a kind, float64 [channels]; None where it shares the scales of text."""
        return self.ratio[self.names.index(name)] if name in self.names else None

    def _rows(self, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor | None:
        """The ratio at every element of ``x``, in at least float32; None where all are 1."""
        if labels is None:
            return None
        places = self.places[labels.to(x.device).long() + 1]
        if not bool(places.any()):
            return None
        return self.ratio.to(torch.promote_types(x.dtype, torch.float32))[places]

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """[..., channels], labels [...] -> ``x S_t / S_m``; without labels all tokens are text."""
        rows = self._rows(x, labels)
        return x if rows is None else (x / rows).to(x.dtype)

    def undo(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The inverse of :meth:`forward`."""
        rows = self._rows(x, labels)
        return x if rows is None else (x * rows).to(x.dtype)


class RescaledInputLinear(nn.Module):
    """The unquantized linear of a group with a :class:`ModalityScale`.

    ``W S_m`` applied to ``x' = x S_t / S_m`` is ``W S_t`` applied to ``x'`` times the ratio again,
    so the network's function stays what it was for tokens of every kind.

    Attributes:
        linear: its weight [out, in] already smoothed by the scales of text.
        transform: shared by all linears of the group.
        labels: the modality of the tokens under way.
    """

    def __init__(self, linear: nn.Linear, transform: ModalityScale, labels: TokenLabels) -> None:
        super().__init__()
        self.linear, self.transform = linear, transform
        self.labels = labels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        labels = self.labels.matching(x)
        found: torch.Tensor = self.linear(self.transform.undo(self.transform(x, labels), labels))
        return found

    @contextmanager
    def observe_input(self, show: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Show the activation behind the scales, which is what a quantizer will read."""

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            (x,) = args
            show(self.transform(x, self.labels.matching(x)))

        handle = self.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


class ModalityBranches(nn.Module):
    """A 16-bit branch of low rank for every kind of token; a kind without one gets nothing.

    Args:
        branches: by kind, all of one rank.
        joint_vision: see :func:`kinds_of`.
    """

    places: torch.Tensor

    def __init__(self, branches: Mapping[str, LowRank], joint_vision: bool) -> None:
        super().__init__()
        self.joint_vision = joint_vision
        self.names = tuple(branches)
        for name, branch in branches.items():
            self.register_buffer(f"up_{name}", branch.up)
            self.register_buffer(f"down_{name}", branch.down)
        device = next(iter(branches.values())).up.device
        self.register_buffer("places", _places(self.names, joint_vision, -1).to(device))

    def branch(self, name: str) -> LowRank:
        return LowRank(self.get_buffer(f"up_{name}"), self.get_buffer(f"down_{name}"))

    @property
    def rank(self) -> int:
        return self.branch(self.names[0]).rank

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in], labels [...] -> [..., out]: what each token's own branch adds."""
        outputs = self.get_buffer(f"up_{self.names[0]}").shape[0]
        flat = x.reshape(-1, x.shape[-1])
        if labels is None:
            labels = x.new_zeros(x.shape[:-1])
        places = self.places[labels.to(x.device).reshape(-1).long() + 1]
        added = x.new_zeros(len(flat), outputs)
        for place, name in enumerate(self.names):
            chosen = (places == place).nonzero().flatten()
            if len(chosen):
                added.index_copy_(0, chosen, self.branch(name)(flat.index_select(0, chosen)))
        return added.view(*x.shape[:-1], outputs)

    def storage_bits(self) -> float:
        """Bits per weight of the matrix that they stand beside (16 per stored number)."""
        return sum(self.branch(name).storage_bits() for name in self.names)

    def flops_per_token(self) -> int:
        """Operations added for a token whose kind has a branch: it goes through one of them."""
        return self.branch(self.names[0]).flops_per_token()
