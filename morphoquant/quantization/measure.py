"""Errors by layer, input group and modality, measured on a few calibration prompts (SPEC 6).

Two streams of hidden states walk beside the calibration: one through the original blocks, one
through the finished quantized blocks. The first gives every linear the activations it was trained
on, so that what its own quantizers lose can be told apart (weights, clipping, rounding); the
difference between the two is the error as it grows over depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from morphoquant.calibration.walk import Segment, labels_for, observing, run_block
from morphoquant.models.structure import MODALITIES, Block, InputGroup, TokenLabels
from morphoquant.quantization.linear import GroupInput, QuantizedLinear, plain
from morphoquant.quantization.mdqfo import Search

TINY = torch.finfo(torch.float64).tiny

SUMS = (
    "tokens",
    "elements",
    "signal",  # x^2
    "error",  # (x - x~)^2, after compensation
    "residual",  # (x - x^)^2, before it
    "clipping",  # (x - clip(x))^2
    "rounding",  # (clip(x) - x^)^2
    "below",  # elements under the lowest level
    "above",
    "bypassed",  # elements that stayed in 16 bits
    "touched",  # tokens with at least one of them
    "output",  # |x W|^2
    "output_error",  # |x W - x~ W_Q|^2
    "output_activation",  # |x W_Q - x~ W_Q|^2
    "output_weight",  # |x W - x W_Q|^2
)


@dataclass
class ErrorMeter:
    """Collects two tables while the walk goes on.

    Attributes:
        errors: rows of layer, group, modality and what was lost there.
        depth: rows of block number, layer, tower, modality and the distance of the streams.
    """

    errors: list[dict[str, Any]] = field(default_factory=list)
    depth: list[dict[str, Any]] = field(default_factory=list)

    def visit(
        self,
        index: int,
        block: Block,
        originals: Mapping[str, nn.Module],
        reference: Sequence[Segment],
        quantized: Sequence[Segment],
        labels: TokenLabels,
        make_search: Callable[[InputGroup], Search] | None = None,
    ) -> None:
        """Measure one finished block and move both streams on.

        Args:
            index: number of the block in its tower.
            block: with its quantized linears in place.
            originals: the modules that those replaced, by name.
            reference: the stream through the original blocks.
            quantized: the same prompts through the quantized ones.
            labels: told the modality of the tokens under way.
            make_search: a fresh range search of a group, to see which ratio every modality by
                itself would choose; None where nothing is searched.
        """
        replaced = {name: block.linear(name) for name in originals}
        found = {g.name: _GroupErrors(g, originals, replaced, make_search) for g in block.groups}
        current: list[torch.Tensor] = []
        decoder = block.tower == "decoder"

        def see(group: InputGroup, x: torch.Tensor, kinds: torch.Tensor) -> None:
            found[group.name].update(x, kinds)

        distances = _Distances()
        for exact, rounded in zip(reference, quantized, strict=True):
            current[:] = [exact.labels]
            labels.current = exact.labels if decoder else None
            with _in_place(block, originals), observing(block, lambda: current[0], see):
                exact.hidden = run_block(block, index, exact)
            rounded.hidden = run_block(block, index, rounded)
            labels.current = None
            distances.update(exact.hidden, rounded.hidden, labels_for(exact.labels, exact.hidden))
        for group in block.groups:
            for row in found[group.name].rows():
                self.errors.append({"layer": block.name, "group": group.name, **row})
        place = {"block": index, "layer": block.name, "tower": block.tower}
        self.depth += [{**place, **row} for row in distances.rows()]


@contextmanager
def _in_place(block: Block, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Have ``modules`` in the block for a while."""
    before = {name: block.linear(name) for name in modules}
    for name, module in modules.items():
        block.replace(name, module)
    try:
        yield
    finally:
        for name, module in before.items():
            block.replace(name, module)


class _GroupErrors:
    """Sums of one input group; rows of a token are added into its modality's row."""

    def __init__(
        self,
        group: InputGroup,
        originals: Mapping[str, nn.Module],
        replaced: Mapping[str, nn.Module],
        make_search: Callable[[InputGroup], Search] | None,
    ) -> None:
        self.searches = [make_search(group) for _ in MODALITIES] if make_search else []
        first = replaced[group.linears[0]]
        assert isinstance(first, QuantizedLinear)
        self.source: GroupInput = first.source
        self.linears = [(plain(originals[n]).weight, plain(replaced[n])) for n in group.linears]
        self.sums = {name: torch.zeros(len(MODALITIES), dtype=torch.float64) for name in SUMS}
        self.channel_residual: torch.Tensor | None = None  # sums of x - x^ and of its square

    def update(self, x: torch.Tensor, kinds: torch.Tensor) -> None:
        """Add activations [..., channels] with modality labels [...]; padding is skipped."""
        source = self.source
        rounded = source.round(x)
        value, _ = source.compensate(x, rounded)
        gate = getattr(source.compensation, "gate", None)
        opened = None if gate is None else gate(x).expand_as(x)
        flat = kinds.reshape(-1)
        keep = flat >= 0
        rows, slot = x.reshape(-1, x.shape[-1])[keep], flat[keep].long()
        rounded, value = (t.reshape(-1, x.shape[-1])[keep] for t in (rounded, value))
        low, high = (b.expand_as(x).reshape(-1, x.shape[-1])[keep] for b in source.bounds(x))
        clipped = torch.minimum(torch.maximum(rows, low), high)
        self._add("below", slot, (rows < low).sum(-1))
        self._add("above", slot, (rows > high).sum(-1))
        self._add("tokens", slot, torch.ones_like(slot))
        self._add("elements", slot, torch.full_like(slot, x.shape[-1]))
        self._add("signal", slot, _energy(rows))
        self._add("error", slot, _energy(rows - value))
        self._add("residual", slot, _energy(rows - rounded))
        self._add("clipping", slot, _energy(rows - clipped))
        self._add("rounding", slot, _energy(clipped - rounded))
        if opened is not None:
            opened = opened.reshape(-1, x.shape[-1])[keep]
            self._add("bypassed", slot, opened.sum(-1))
            self._add("touched", slot, opened.any(-1))
        self._add_channels(rows - rounded, slot)
        for i, search in enumerate(self.searches):
            if bool((slot == i).any()):
                search.update(rows[slot == i], slot[slot == i])
        for weight, linear in self.linears:
            added = linear.branch(rows, slot)
            exact = F.linear(source.undone(rows, slot), weight)
            rough = linear.product(rows, slot) + added
            final = linear.product(value, slot) + added
            self._add("output", slot, _energy(exact))
            self._add("output_error", slot, _energy(exact - final))
            self._add("output_activation", slot, _energy(rough - final))
            self._add("output_weight", slot, _energy(exact - rough))

    def _add(self, name: str, slot: torch.Tensor, values: torch.Tensor) -> None:
        self.sums[name].index_add_(0, slot.cpu(), values.double().cpu())

    def _add_channels(self, residual: torch.Tensor, slot: torch.Tensor) -> None:
        if self.channel_residual is None:
            shape = (2, len(MODALITIES), residual.shape[-1])
            self.channel_residual = torch.zeros(shape, dtype=torch.float64, device=residual.device)
        self.channel_residual[0].index_add_(0, slot, residual.double())
        self.channel_residual[1].index_add_(0, slot, residual.double().square())

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per modality that occurred."""
        mask = getattr(self.source.compensation, "mask", None)
        for i, modality in enumerate(MODALITIES):
            s = {name: float(values[i]) for name, values in self.sums.items()}
            if not s["tokens"]:
                continue
            lost = max(s["residual"], TINY)
            yield {
                "modality": modality.name.lower(),
                "tokens": int(s["tokens"]),
                "activation_sqnr_db": decibel(s["signal"], s["error"]),
                "output_sqnr_db": decibel(s["output"], s["output_error"]),
                "output_sqnr_activation_db": decibel(s["output"], s["output_activation"]),
                "output_sqnr_weight_db": decibel(s["output"], s["output_weight"]),
                "clip_rate_low": s["below"] / s["elements"],
                "clip_rate_high": s["above"] / s["elements"],
                "clip_energy_share": s["clipping"] / lost,
                "rounding_energy_share": s["rounding"] / lost,
                "bypass_rate": s["bypassed"] / s["elements"],
                "tokens_with_bypass": s["touched"] / s["tokens"],
                "residual_bias_share": self._bias_share(i, s["tokens"], mask),
                **self._own_ratio(i),
            }

    def _own_ratio(self, i: int) -> dict[str, float]:
        """Median over channels of the ratio that this modality alone would choose."""
        if not self.searches:
            return {}
        return {"own_ratio_median": float(self.searches[i].best_ratios().median())}

    def _bias_share(self, i: int, tokens: float, mask: torch.Tensor | None) -> float:
        """(E r)^2 / E r^2 over masked channels (or all): what a static bias can win back."""
        assert self.channel_residual is not None
        mean, square = self.channel_residual[:, i] / tokens
        if mask is not None:
            mean, square = mean[mask], square[mask]
        total = float(square.sum())
        return float(mean.square().sum()) / total if total > 0 else 0.0


class _Distances:
    """How far two streams are apart, by modality."""

    def __init__(self) -> None:
        self.sums = torch.zeros((4, len(MODALITIES)), dtype=torch.float64)

    def update(self, plain: torch.Tensor, rounded: torch.Tensor, labels: torch.Tensor) -> None:
        """Add outputs [..., channels] of both with modality labels [...]; padding is skipped."""
        kinds = labels.reshape(-1)
        keep = kinds >= 0
        slot = kinds[keep].long().cpu()
        a, b = (t.reshape(-1, t.shape[-1])[keep].double() for t in (plain, rounded))
        cosine = torch.cosine_similarity(a, b, dim=-1, eps=TINY)
        parts = (torch.ones_like(cosine), _energy(a), _energy(a - b), cosine)
        for total, values in zip(self.sums, parts, strict=True):
            total.index_add_(0, slot, values.double().cpu())

    def rows(self) -> Iterator[dict[str, Any]]:
        for i, modality in enumerate(MODALITIES):
            tokens, energy, error, cosine = self.sums[:, i].tolist()
            if tokens:
                yield {
                    "modality": modality.name.lower(),
                    "tokens": int(tokens),
                    "relative_error": (error / max(energy, TINY)) ** 0.5,
                    "sqnr_db": decibel(energy, error),
                    "cosine": cosine / tokens,
                }


def _energy(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of every row, float64 [rows]."""
    return x.double().square().sum(-1)


def decibel(signal: float, error: float) -> float:
    """``10 log10(signal / error)``; infinite where nothing was lost."""
    if error <= 0:
        return float("inf")
    return 10 * float(torch.log10(torch.tensor(max(signal, TINY) / error, dtype=torch.float64)))
