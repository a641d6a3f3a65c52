"""Which exponent loses least: the parts of a block, run with rounded weights (SPEC 4.3, 4.7).

A group is judged by the part of the block behind it: the attention for q, k and v, the MLP for
gate and up, the linear itself for o and down. One forward pass of the block shows what every part
reads and puts out; candidates then re-run the part alone.

Candidates are compared on the layer's original weights, with the other groups unsmoothed and
unrounded, so no order of groups matters. Of as many prompts as fit the memory bound the readings
are held together, so that a candidate's weights are rounded once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from morphoquant.calibration.walk import Segment, run_block
from morphoquant.config.schema import BitsConfig, WeightConfig
from morphoquant.errors import ActivationError
from morphoquant.models.structure import MODALITIES, Block, InputGroup
from morphoquant.quantization.activation import DynamicQuantizer
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.transforms.smooth_settings import Loss
from morphoquant.quantization.weights import quantize_weight


class Losses:
    """Errors of every candidate, summed by modality in float64: order and padding do not matter.

    Args:
        candidates: how many.
        loss: ``mse`` or ``mae``.
    """

    def __init__(self, candidates: int, loss: Loss) -> None:
        self.loss = loss
        self.error = torch.zeros(candidates, len(MODALITIES), dtype=torch.float64)
        self.elements = torch.zeros(candidates, len(MODALITIES), dtype=torch.float64)

    def add(
        self, candidate: int, exact: torch.Tensor, rough: torch.Tensor, kinds: torch.Tensor
    ) -> None:
        """Count the outputs [..., channels] of tokens labelled ``kinds`` [...]; -1 is left out."""
        flat = kinds.reshape(-1).to(exact.device)
        real = (flat >= 0).nonzero().flatten()
        if not real.numel():
            return
        width = exact.shape[-1]
        rows = (t.reshape(-1, width).index_select(0, real) for t in (rough, exact))
        difference = next(rows) - next(rows)
        if difference.dtype not in (torch.float32, torch.float64):
            difference = difference.float()
        size = difference.square() if self.loss == "mse" else difference.abs()
        slot = flat.index_select(0, real).long().cpu()
        per_token = size.sum(-1, dtype=torch.float64).cpu()
        self.error[candidate].index_add_(0, slot, per_token)
        self.elements[candidate].index_add_(
            0, slot, torch.full(slot.shape, float(width), dtype=torch.float64)
        )

    def result(self, weights: torch.Tensor | None = None, by_modality: bool = False) -> list[float]:
        """Mean error per element of every candidate.

        Args:
            weights: float64 [modalities], factors on the errors of each; None for ones.
            by_modality: the mean of the means of the modalities that occurred, instead of the
                mean over all tokens.

        Raises:
            ActivationError: no token was counted, or no error is finite.
        """
        present = self.elements[0] > 0
        error, elements = self.error[:, present], self.elements[:, present]
        if weights is not None:
            error = error * weights[present]
        found = (error / elements).mean(1) if by_modality else error.sum(1) / elements.sum(1)
        if not bool(torch.isfinite(found).any()):
            raise ActivationError(
                "the search for smoothing scales counted no token, or met only NaN or infinite "
                "outputs; check the calibration samples"
            )
        return found.tolist()


@dataclass(frozen=True)
class Reading:
    """One call of a part: what it was called with, and what it put out without quantization."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    output: torch.Tensor

    @property
    def bytes(self) -> int:
        """Memory held for it. A part without a positional tensor reads as much as it writes."""
        inputs = [x for x in self.positional if isinstance(x, torch.Tensor)]
        return sum(x.nbytes for x in inputs or [self.output]) + self.output.nbytes


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


def part_of(group: InputGroup) -> str:
    """Name of the module whose output judges a group: what holds its linears, or its only one."""
    name = group.linears[0]
    return name.rpartition(".")[0] if len(group.linears) > 1 else name


@contextmanager
def _catching(block: Block, groups: Sequence[InputGroup]) -> Iterator[dict[str, Reading]]:
    """Readings of the groups' parts during the block's next forward pass."""
    caught: dict[str, Reading] = {}
    with ExitStack() as stack:
        for group in groups:

            def catch(
                _module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = group.name
            ) -> None:
                caught[name] = Reading(args, kwargs, _first(out))

            module = block.module.get_submodule(part_of(group))
            stack.callback(module.register_forward_hook(catch, with_kwargs=True).remove)
        yield caught


class _Divide(nn.Module):
    """``x / s``: what the folded producer will put out."""

    def __init__(self, scale: torch.Tensor) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x / self.scale.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


@contextmanager
def rounded(
    block: Block,
    group: InputGroup,
    scale: torch.Tensor,
    weight: WeightConfig,
    bits: BitsConfig,
    quantize_activations: bool,
) -> Iterator[None]:
    """Have the group's linears smoothed by ``scale`` [in] and rounded for a while.

    They compute ``Q_a(x / s) Q_w(W s)``, with the module that quantized networks are made of.
    """
    originals = {name: block.linear(name) for name in group.linears}
    source = GroupInput(len(group.linears), _Divide(scale))
    if quantize_activations:
        source.quantizer = DynamicQuantizer(bits.activation, True, 1.0, None)
    try:
        for name, linear in originals.items():
            assert isinstance(linear, nn.Linear)
            wide = torch.promote_types(linear.weight.dtype, torch.float32)
            scaled = (linear.weight.detach() * scale.to(wide)).to(linear.weight.dtype)
            found = quantize_weight(scaled, weight, bits.weight)
            block.replace(name, QuantizedLinear(found.dequantized, linear.bias, source))
        yield
    finally:
        for name, linear in originals.items():
            block.replace(name, linear)


@torch.no_grad()
def search_losses(
    block: Block,
    index: int,
    segments: Sequence[Segment],
    kinds: Sequence[torch.Tensor],
    candidates: Mapping[str, Sequence[torch.Tensor]],
    loss: Loss,
    rounding: Callable[[InputGroup, torch.Tensor], Any],
    memory_mb: int,
) -> dict[str, Losses]:
    """Try every scale of every group, and move all segments on to the block's own output.

    Args:
        block: a decoder block; unchanged afterwards.
        index: its number.
        segments: hidden states in front of it.
        kinds: int8 [batch, tokens] per segment: in which modality's sum a token's error is
            counted, -1 for none.
        candidates: scales [in] to try, per group.
        loss: how errors are counted.
        rounding: ``(group, scale) ->`` context in which the group is rounded (:func:`rounded`).
        memory_mb: readings held at a time, MiB. At least one segment's are.
    """
    groups = [group for group in block.groups if group.name in candidates]
    losses = {name: Losses(len(scales), loss) for name, scales in candidates.items()}
    held: list[tuple[dict[str, Reading], torch.Tensor]] = []
    size = 0

    def flush() -> None:
        nonlocal size
        for group in groups:
            for i, scale in enumerate(candidates[group.name]):
                with rounding(group, scale):
                    part = block.module.get_submodule(part_of(group))
                    for readings, labels in held:
                        found = readings[group.name]
                        rough = _first(part(*found.positional, **found.keywords))
                        losses[group.name].add(i, found.output, rough, labels)
        held.clear()
        size = 0

    for segment, labels in zip(segments, kinds, strict=True):
        with _catching(block, groups) as readings:
            segment.hidden = run_block(block, index, segment)
        held.append((readings, labels))
        size += sum(reading.bytes for reading in readings.values())
        if size >= memory_mb << 20:
            flush()
    if held:
        flush()
    return losses
