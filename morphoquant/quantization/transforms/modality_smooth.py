"""Modality-aware smoothing: scales of its own for every kind of token (SPEC 4.13).

One scale for all modalities follows the loudest of them and leaves the others with little of the
grid (MASQuant, arXiv 2603.04800, Sec. 4). Here every kind (text, vision, audio) starts at
SmoothQuant's formula over its own tokens, eq. 12, and learns from there, eq. 13-14. The scales of
text are folded into the network as :mod:`.smooth` does; what the others differ by stays online, in
front of the linears, and is undone there until branches make up for it
(:class:`morphoquant.quantization.modality.ModalityBranches`). So the unquantized network's function
does not change, for tokens of any kind.

The decoder is walked block by block with unquantized hidden states. A kind that no prompt holds,
and a channel that a kind only ever saw at zero, have the scales of text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from morphoquant.calibration.moments import ChannelStatistics
from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.calibration.walk import Segment, enter, observing, run_block
from morphoquant.config.schema import BitsConfig, WeightConfig
from morphoquant.models.adapter import Batch, OmniAdapter
from morphoquant.models.structure import DecoderLayer, InputGroup, TokenLabels
from morphoquant.quantization.activation import DynamicQuantizer
from morphoquant.quantization.linear import plain
from morphoquant.quantization.modality import (
    TEXT,
    ModalityScale,
    RescaledInputLinear,
    is_kind,
    kinds_of,
)
from morphoquant.quantization.transforms.modality_learn import LearnedScale, Round, learn_scale
from morphoquant.quantization.transforms.report import TransformReport
from morphoquant.quantization.transforms.scales import Heads, fold_scales, readers
from morphoquant.quantization.transforms.smooth import scales_from
from morphoquant.quantization.transforms.smooth_settings import GROUPS, Formula
from morphoquant.quantization.weights import quantize_weight


@dataclass(frozen=True)
class ModalitySmoothSettings:
    """Where the scales start, and how they are learned.

    Attributes:
        formula, alpha: of the start, see :class:`.SmoothSettings`; published: SmoothQuant's at 0.5.
        groups: those to smooth.
        skip_grouped_attn_out: leave ``attn_out`` alone under grouped-query attention.
        joint_vision: pictures and clips are one kind (published), or two.
        steps: of Adam, per group and kind; 0 keeps the start.
        learning_rate: in natural logarithms of a scale.
        tokens: of every kind that are learned from, spread evenly over prompts; at least one of
            every prompt that holds the kind.
        quantize_activations: round activations while learning, per token.

    Raises:
        ValueError: a field is out of range.
    """

    formula: Formula = "smoothquant"
    alpha: float = 0.5
    groups: tuple[str, ...] = ("attn_in", "mlp_in")
    skip_grouped_attn_out: bool = True
    joint_vision: bool = True
    steps: int = 25
    learning_rate: float = 0.05
    tokens: int = 256
    quantize_activations: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: exponents lie between 0 and 1")
        if not self.groups or set(self.groups) - set(GROUPS):
            raise ValueError(f"groups={self.groups}: choose some of {GROUPS}")
        if self.steps < 0 or self.tokens < 1 or self.learning_rate <= 0:
            raise ValueError("steps must not be negative, tokens and learning_rate be positive")


@dataclass(frozen=True)
class KindSmoothing:
    """The scales of one kind of token at one input group.

    Attributes:
        layer, group, kind: where.
        smallest, largest: of the scales.
        spread: standard deviation of ``log2(S_m / S_t)`` over channels: 0 where smoothing for text
            serves the kind as well.
        loss_before, loss_after: mean absolute error of the group's outputs at the start of the
            learning and at its end, on the tokens that were learned from.
    """

    layer: str
    group: str
    kind: str
    smallest: float
    largest: float
    spread: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class ModalitySmoothReport(TransformReport):
    """What :func:`modality_smooth` did.

    Attributes:
        settings: what was asked for.
        groups: every smoothed group and kind, in order of depth.
        skipped: groups that were asked for and left alone, because attention is grouped.
    """

    settings: ModalitySmoothSettings
    groups: tuple[KindSmoothing, ...]
    skipped: tuple[str, ...]


def spread_out(labels: torch.Tensor, members: torch.Tensor, each: int) -> torch.Tensor:
    """Positions of at most ``each`` marked tokens of every prompt, evenly spaced.

    What is taken of a prompt depends neither on its padding nor on the prompts beside it.

    Args:
        labels: [prompts, tokens], for the shape alone.
        members: bool [prompts, tokens], which may be taken.
        each: of a prompt.

    Returns:
        int64 rows of the flattened [prompts * tokens].
    """
    found = []
    for prompt, marked in enumerate(members):
        places = marked.nonzero().flatten()
        if len(places) > each:
            places = places[torch.arange(each, device=places.device) * len(places) // each]
        found.append(places + prompt * labels.shape[1])
    return torch.cat(found)


@dataclass
class _Seen:
    """Statistics of a group's input, and some of its tokens by kind."""

    statistics: ModalityStatistics
    tokens: dict[str, list[torch.Tensor]]


class _Observer:
    """Watches the chosen groups of one block after the other."""

    def __init__(
        self, segments: Sequence[Segment], groups: Sequence[str], settings: ModalitySmoothSettings
    ) -> None:
        self.segments, self.groups = segments, groups
        self.taken: list[dict[str, torch.Tensor]] = [{} for _ in segments]
        for name, members in kinds_of(settings.joint_vision).items():
            marks = [is_kind(segment.labels, members) for segment in segments]
            prompts = sum(int(marked.any(1).sum()) for marked in marks)
            each = math.ceil(settings.tokens / max(prompts, 1))
            for taken, segment, marked in zip(self.taken, segments, marks, strict=True):
                taken[name] = spread_out(segment.labels, marked, each)

    def watch(self, layer: DecoderLayer, index: int) -> dict[str, _Seen]:
        """Run all prompts through a block, and on to its output."""
        found: dict[str, _Seen] = {}
        for segment, taken in zip(self.segments, self.taken, strict=True):

            def see(
                group: InputGroup,
                x: torch.Tensor,
                labels: torch.Tensor,
                taken: Mapping[str, torch.Tensor] = taken,
            ) -> None:
                if group.name not in self.groups:
                    return
                if group.name not in found:
                    empty = ModalityStatistics(x.shape[-1], x.device, histograms=False)
                    found[group.name] = _Seen(empty, {})
                seen = found[group.name]
                seen.statistics.update(x, labels)
                rows = x.reshape(-1, x.shape[-1])
                for name, chosen in taken.items():
                    if len(chosen):
                        seen.tokens.setdefault(name, []).append(rows.index_select(0, chosen))

            labels = segment.labels
            with observing(layer.block, lambda labels=labels: labels, see):  # type: ignore[misc]
                segment.hidden = run_block(layer.block, index, segment)
        return found


def _starts(
    layer: DecoderLayer, group: str, seen: _Seen, settings: ModalitySmoothSettings, heads: Heads
) -> dict[str, torch.Tensor]:
    """The formula over the tokens of every kind that occurred, text first."""
    starts: dict[str, torch.Tensor] = {}
    for name, members in kinds_of(settings.joint_vision).items():
        if name not in seen.tokens:
            continue
        found = ChannelStatistics.merged(seen.statistics.parts[m] for m in members)
        size = found.absmax if settings.formula == "smoothquant" else found.abs_mean
        exponents = (settings.alpha,)
        scale = scales_from(layer, group, size, settings.formula, exponents, heads)[0]
        if name != TEXT:
            silent = found.absmax == 0
            if group == "attn_out":
                silent = heads.split(silent).all(1).reshape(-1)
            scale = torch.where(silent, starts[TEXT], scale)
        starts[name] = scale
    return starts


@torch.no_grad()
def modality_smooth(
    adapter: OmniAdapter,
    batches: Sequence[Batch],
    settings: ModalitySmoothSettings,
    weight: WeightConfig,
    bits: BitsConfig,
    progress: Callable[[int], object] | None = None,
) -> ModalitySmoothReport:
    """Smooth the decoder in place; its unquantized outputs stay what they were.

    Linears of smoothed groups become :class:`RescaledInputLinear`, and the adapter follows the
    modality of tokens from now on.

    Args:
        adapter: the unquantized model.
        batches: encoded calibration prompts.
        settings: see :class:`ModalitySmoothSettings`.
        weight, bits: how learning rounds weights and activations.
        progress: called with 1 after every block.

    Raises:
        ValueError: the decoder is rewritten online already. Nothing has been changed then.
        CalibrationError: no prompts. Nothing has been changed then.
        ActivationError: activations are NaN or infinite.
    """
    stream = adapter.residual_stream()
    linears = [
        linear for layer in stream.layers for part in readers(layer).values() for linear in part
    ]
    if any(not isinstance(linear, torch.nn.Linear) for linear in linears):
        raise ValueError("the decoder is rewritten online already: smooth an untouched one")
    if not batches:
        raise CalibrationError("smoothing needs calibration prompts, there are none")
    heads = Heads.of(stream)
    skips = settings.skip_grouped_attn_out and heads.grouped
    skipped = ("attn_out",) if skips and "attn_out" in settings.groups else ()
    chosen = [name for name in GROUPS if name in settings.groups and name not in skipped]

    def round_weight(matrix: torch.Tensor) -> torch.Tensor:
        return quantize_weight(matrix, weight, bits.weight).dequantized

    round_activation: Round = lambda x: x  # noqa: E731
    if settings.quantize_activations and bits.activation < 16:
        round_activation = DynamicQuantizer(bits.activation, True, 1.0, None)

    def learn(
        layer: DecoderLayer, group: str, x: torch.Tensor, start: torch.Tensor
    ) -> LearnedScale:
        return learn_scale(
            x,
            [linear.weight for linear in readers(layer)[group]],
            start,
            round_weight,
            round_activation,
            settings.steps,
            settings.learning_rate,
            heads.expand if group == "attn_out" else lambda scale: scale,
        )

    observer = _Observer(enter(adapter, "decoder", batches), chosen, settings)
    labels = TokenLabels()
    adapter.follow_labels(labels)
    records: list[KindSmoothing] = []
    for index, layer in enumerate(stream.layers):
        seen = observer.watch(layer, index)
        found: dict[str, dict[str, LearnedScale]] = {}
        for group in chosen:
            starts = _starts(layer, group, seen[group], settings, heads)
            found[group] = {
                kind: learn(layer, group, torch.cat(seen[group].tokens[kind]), start)
                for kind, start in starts.items()
            }
            records += _records(layer, group, found[group])
        _install(layer, found, settings, heads, labels)
        if progress is not None:
            progress(1)
    return ModalitySmoothReport("modality_smooth", settings, tuple(records), skipped)


def _records(
    layer: DecoderLayer, group: str, learned: Mapping[str, LearnedScale]
) -> list[KindSmoothing]:
    text = learned[TEXT].scale
    return [
        KindSmoothing(
            layer=layer.block.name,
            group=group,
            kind=kind,
            smallest=float(found.scale.min()),
            largest=float(found.scale.max()),
            spread=float((found.scale / text).log2().std(correction=0)),
            loss_before=found.before,
            loss_after=found.after,
        )
        for kind, found in learned.items()
    ]


def _install(
    layer: DecoderLayer,
    learned: Mapping[str, Mapping[str, LearnedScale]],
    settings: ModalitySmoothSettings,
    heads: Heads,
    labels: TokenLabels,
) -> None:
    """Fold the scales of text, and put what others differ by in front of the linears."""
    fold_scales(layer, {group: found[TEXT].scale for group, found in learned.items()}, heads)
    for group in layer.block.groups:
        found = learned.get(group.name, {})
        ratios = {k: f.scale / found[TEXT].scale for k, f in found.items() if k != TEXT}
        if not ratios:
            continue
        if group.name == "attn_out":
            ratios = {kind: heads.expand(ratio) for kind, ratio in ratios.items()}
        scale = ModalityScale(ratios, settings.joint_vision)
        for name in group.linears:
            linear = plain(layer.block.linear(name))
            layer.block.replace(name, RescaledInputLinear(linear, scale, labels))
