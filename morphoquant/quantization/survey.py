"""A look at all layers before any mask is chosen, for the global rule (SPEC 2.3).

The global threshold needs the scores of every layer, while the walk finishes one block after the
other. So the calibration prompts pass once more, with weights rounded for the moment in which
their block runs; nothing stays changed. (Where a tower in front of the decoder is quantized too,
the survey's decoder reads the tower as it still is.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.calibration.walk import Segment, observing, run_block, walk
from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.models.adapter import Batch, OmniAdapter
from morphoquant.models.structure import Block, InputGroup, Tower
from morphoquant.quantization.linear import GroupInput, QuantizedLinear, plain
from morphoquant.quantization.masks import ScoreMoments, score_moments, score_of, views
from morphoquant.quantization.rounding import rounds_late
from morphoquant.quantization.weights import quantize_weight


@dataclass
class Surveyor:
    """A :class:`morphoquant.calibration.walk.Visitor` that scores and puts everything back."""

    method: MethodConfig
    bits: BitsConfig
    scores: dict[str, list[tuple[torch.Tensor, int]]] = field(default_factory=dict)

    def visit(self, index: int, block: Block, segments: dict[str, list[Segment]]) -> None:
        """Score the block's groups behind rounded weights and pass the prompts on."""
        config = self.method.compensation.mask
        width = 16 if rounds_late(self.method, self.bits) else self.bits.weight
        originals = {n: block.linear(n) for group in block.groups for n in group.linears}
        for group in block.groups:
            online = getattr(block.linear(group.linears[0]), "transform", None)
            source = GroupInput(len(group.linears), online)
            for name in group.linears:
                linear = plain(originals[name])
                weight = quantize_weight(linear.weight, self.method.weight, width)
                block.replace(name, QuantizedLinear(weight.dequantized, linear.bias, source))
        found: dict[str, ModalityStatistics] = {}
        current: list[torch.Tensor] = []

        def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
            if group.name not in found:
                found[group.name] = ModalityStatistics(x.shape[-1], x.device, histograms=False)
            found[group.name].update(x, labels)

        for prompts in segments.values():
            for segment in prompts:
                current[:] = [segment.labels]
                with observing(block, lambda: current[0], see):
                    segment.hidden = run_block(block, index, segment)
        for name, module in originals.items():
            block.replace(name, module)
        for group in block.groups:
            if group.name not in found:
                continue
            for view, part in views(found[group.name], config).items():
                score = score_of(part, config).cpu()
                self.scores.setdefault(view, []).append((score, len(group.linears)))


def survey(
    adapter: OmniAdapter,
    towers: Sequence[Tower],
    batches: Sequence[Batch],
    method: MethodConfig,
    bits: BitsConfig,
) -> Mapping[str, ScoreMoments] | None:
    """Moments of the scores of all layers in scope, per view; None where no rule asks for them.

    Args:
        adapter: the model; unchanged afterwards.
        towers: those in scope.
        batches: the encoded prompts that statistics are taken from.
        method, bits: mask rules, and how weights are rounded meanwhile.
    """
    if method.compensation.name == "none" or "global" not in method.compensation.mask.rules:
        return None
    surveyor = Surveyor(method, bits)
    walk(adapter, towers, {"statistics": batches}, surveyor)
    config = method.compensation.mask
    return {view: score_moments(scores, config) for view, scores in surveyor.scores.items()}
