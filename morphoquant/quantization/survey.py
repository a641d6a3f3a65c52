"""A look at all layers before any mask is chosen, for the global rule (SPEC 2.3).

The global threshold needs the scores of every layer, while the walk finishes one block after the
other. So the calibration prompts pass once more, with weights rounded for the moment in which
their block runs; nothing stays changed. (Where a tower in front of the decoder is quantized too,
the survey's decoder reads the tower as it still is.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.calibration.walk import Segment, observing, run_block, walk
from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.models.adapter import Batch, OmniAdapter
from morphoquant.models.structure import Block, Tower
from morphoquant.quantization.gather import gathers
from morphoquant.quantization.linear import GroupInput, QuantizedLinear, plain
from morphoquant.quantization.masks import ScoreMoments, score_moments, score_of, views
from morphoquant.quantization.observation import Observation, Recall
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
        late = rounds_late(self.method, self.bits.lowest)
        originals = {n: block.linear(n) for group in block.groups for n in group.linears}
        for group in block.groups:
            online = getattr(block.linear(group.linears[0]), "transform", None)
            source = GroupInput(len(group.linears), online)
            for name in group.linears:
                linear = plain(originals[name])
                width = 16 if late else self.bits.at(f"{block.name}.{name}").weight
                weight = quantize_weight(linear.weight, self.method.weight, width)
                block.replace(name, QuantizedLinear(weight.dequantized, linear.bias, source))
        see = Observation(histograms=False)
        current: list[torch.Tensor] = []
        for prompts in segments.values():
            for segment in prompts:
                current[:] = [segment.labels]
                with observing(block, lambda: current[0], see):
                    segment.hidden = run_block(block, index, segment)
        for name, module in originals.items():
            block.replace(name, module)
        self.score(block, see.found)

    def score(self, block: Block, found: Mapping[str, ModalityStatistics]) -> None:
        """Take the scores of a block from the statistics of its groups' inputs."""
        config = self.method.compensation.mask
        for group in block.groups:
            if group.name not in found:
                continue
            for view, part in views(found[group.name], config).items():
                score = score_of(part, config).cpu()
                self.scores.setdefault(view, []).append((score, len(group.linears)))

    def moments(self) -> dict[str, ScoreMoments]:
        """Moments of the scores of all layers, per view."""
        config = self.method.compensation.mask
        return {view: score_moments(scores, config) for view, scores in self.scores.items()}


def surveys(method: MethodConfig) -> bool:
    """Whether masks are chosen by the scores of all layers."""
    return method.compensation.name != "none" and "global" in method.compensation.mask.rules


def recalled(
    method: MethodConfig, bits: BitsConfig, blocks: Iterable[Block], recall: Recall
) -> Mapping[str, ScoreMoments]:
    """What :func:`survey` finds, from statistics that were taken behind the same weights.

    Args:
        method, bits: mask rules, and how weights were rounded.
        blocks: of the tower in scope, in order.
        recall: the statistics.
    """
    surveyor = Surveyor(method, bits)
    for block in blocks:
        surveyor.score(block, recall(block))
    return surveyor.moments()


def sees_the_walk(method: MethodConfig, bits: BitsConfig, towers: Sequence[Tower]) -> bool:
    """Whether a survey and the walk's own observation see the same activations.

    They do where weights are rounded as the survey rounds them, and where no tower in front of the
    decoder is quantized meanwhile. (The survey knows no scales per modality.)
    """
    low = bits.lowest
    plain_weights = not gathers(method, low) and not rounds_late(method, low)
    return len(towers) == 1 and plain_weights and method.transform.name != "modality_smooth"


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
    if not surveys(method):
        return None
    surveyor = Surveyor(method, bits)
    walk(adapter, towers, {"statistics": batches}, surveyor)
    return surveyor.moments()
