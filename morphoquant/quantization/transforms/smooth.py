"""Smoothing: outliers of activations moved into weights, without changing the function.

One transform for three methods (SPEC 4.2, 4.3, 4.7): SmoothQuant, the scale search of AWQ, and
MBQ, which is AWQ's search with errors of media tokens weighed by gradients of the answer. They
differ in the formula of the scales, in how the exponent is found, and in which tokens count how
much; :class:`SmoothSettings` names these choices, so every mixture of them is an ablation.

The decoder is walked block by block with unquantized hidden states: statistics of every group's
input, the search where there is one, then all groups of the block folded together. What a later
block reads did not change, so nothing depends on what was chosen earlier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from morphoquant.calibration.readers import Sample
from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.samples import batches as grouped
from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.calibration.walk import Segment, enter, observing, run_block
from morphoquant.config.schema import BitsConfig, WeightConfig
from morphoquant.models.adapter import Batch, OmniAdapter
from morphoquant.models.structure import (
    MODALITIES,
    Block,
    DecoderLayer,
    InputGroup,
    ResidualStream,
)
from morphoquant.quantization.transforms.balance import (
    KINDS,
    counted_kinds,
    gradient_balance,
    with_answers,
)
from morphoquant.quantization.transforms.scales import (
    Heads,
    awq_scale,
    fold_scales,
    largest_weights,
    readers,
    smoothquant_scale,
)
from morphoquant.quantization.transforms.smooth_search import Losses, rounded, search_losses
from morphoquant.quantization.transforms.smooth_settings import (
    GROUPS,
    Formula,
    GroupSmoothing,
    LayerBalance,
    SmoothReport,
    SmoothSettings,
)

__all__ = [
    "GroupSmoothing",
    "LayerBalance",
    "SmoothReport",
    "SmoothSettings",
    "smooth",
]


def _check(
    stream: ResidualStream, settings: SmoothSettings, weight: WeightConfig, bits: BitsConfig
) -> None:
    if any(not isinstance(layer.down, nn.Linear) for layer in stream.layers):
        raise ValueError(
            "the decoder is rotated online: a channel of down_proj's input is no channel of "
            "up_proj's output any more. Smooth first, or rotate with r4=false"
        )
    rounds = weight.format != "none" and bits.weight < 16
    if settings.search and not (rounds or _rounds_activations(settings, bits)):
        raise ValueError(
            f"a search at {bits.scheme} with weight format {weight.format!r} rounds nothing: every "
            "exponent is as good as any other. Set search=False, or lower the bits"
        )


def _rounds_activations(settings: SmoothSettings, bits: BitsConfig) -> bool:
    return settings.quantize_activations and bits.activation < 16


def _observe(
    block: Block, index: int, segments: Sequence[Segment], move: bool
) -> dict[str, ModalityStatistics]:
    """Statistics of every group's input; with ``move`` the segments go on to the block's output."""
    found: dict[str, ModalityStatistics] = {}
    current: list[torch.Tensor] = []

    def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
        if group.name not in found:
            found[group.name] = ModalityStatistics(x.shape[-1], x.device, histograms=False)
        found[group.name].update(x, labels)

    for segment in segments:
        current[:] = [segment.labels]
        with observing(block, lambda: current[0], see):
            hidden = run_block(block, index, segment)
        if move:
            segment.hidden = hidden
    return found


def group_scales(
    layer: DecoderLayer,
    group: str,
    statistics: ModalityStatistics,
    settings: SmoothSettings,
    heads: Heads,
) -> list[torch.Tensor]:
    """The scales of one group for every exponent of ``settings``.

    Args:
        layer: unsmoothed.
        group: name of the input group.
        statistics: of the group's input.
        settings: formula, exponents, and whether every token or every modality counts the same.
        heads: layout of the attention's channels.

    Returns:
        float64 [in_features] each; of ``attn_out`` [value heads * head_dim], where query heads
        that share values are taken together.
    """
    absolute = settings.formula == "smoothquant"

    def magnitude(part: ChannelStatistics) -> torch.Tensor:
        return part.absmax if absolute else part.abs_mean

    if settings.balance == "mean":
        activation = torch.stack([magnitude(p) for p in statistics.present.values()]).mean(0)
    else:
        activation = magnitude(statistics.pooled())
    return scales_from(layer, group, activation, settings.formula, settings.exponents, heads)


def scales_from(
    layer: DecoderLayer,
    group: str,
    activation: torch.Tensor,
    formula: Formula,
    exponents: Sequence[float],
    heads: Heads,
) -> list[torch.Tensor]:
    """The formula at every exponent.

    Args:
        layer: unsmoothed.
        group: name of the input group.
        activation: largest (``smoothquant``) or mean (``awq``) magnitude of every channel [in].
        formula, exponents: see :class:`SmoothSettings`.
        heads: layout of the attention's channels.

    Returns:
        see :func:`group_scales`.
    """
    absolute = formula == "smoothquant"
    largest = largest_weights(readers(layer)[group])
    if group == "attn_out":
        shared = heads.split(activation)
        activation = (shared.amax(1) if absolute else shared.mean(1)).reshape(-1)
        largest = heads.split(largest).amax(1).reshape(-1)
    if absolute:
        return [smoothquant_scale(activation, largest, a) for a in exponents]
    return [awq_scale(activation, a) for a in exponents]


def _token_weights(group: str, balance: LayerBalance | None) -> torch.Tensor | None:
    """Factors on the errors of every modality, [modalities]; None for ones."""
    if balance is None:
        return None
    own = balance.attn if group.startswith("attn") else balance.mlp
    weights = torch.ones(len(MODALITIES), dtype=torch.float64)
    for kind, members in KINDS.items():
        for modality in members:
            weights[int(modality)] = own.get(kind, 1.0)
    return weights


def _prompts(
    adapter: OmniAdapter,
    batches: Sequence[Batch],
    samples: Sequence[Sample],
    settings: SmoothSettings,
) -> tuple[list[Segment], list[torch.Tensor]]:
    """Segments in front of the first block, and as what their tokens count in the losses."""
    if settings.balance != "gradient":
        segments = enter(adapter, "decoder", batches)
        return segments, [segment.labels for segment in segments]
    segments, kinds = [], []
    for members in grouped(samples, settings.batch_size):
        batch, answers = with_answers(adapter, members)
        segments += enter(adapter, "decoder", [batch])
        kinds.append(counted_kinds(segments[-1].labels, answers))
    return segments, kinds


@torch.no_grad()
def smooth(
    adapter: OmniAdapter,
    batches: Sequence[Batch],
    settings: SmoothSettings,
    weight: WeightConfig,
    bits: BitsConfig,
    samples: Sequence[Sample] | None = None,
) -> SmoothReport:
    """Smooth the decoder in place; its unquantized outputs stay what they were.

    Args:
        adapter: the unquantized model.
        batches: encoded calibration prompts. With ``balance="gradient"`` they are not looked at:
            there the prompts of ``samples`` with their answers take their place.
        settings: see :class:`SmoothSettings`.
        weight, bits: how the search rounds weights and activations.
        samples: with answers, for ``balance="gradient"``.

    Raises:
        ValueError: the decoder is rotated online, or a search would round nothing. Nothing has
            been changed then.
        CalibrationError: no prompts (or, to balance by gradients, no samples), or gradients that
            vanish. Nothing has been changed then.
        ActivationError: activations are NaN or infinite.
    """
    stream = adapter.residual_stream()
    _check(stream, settings, weight, bits)
    by_gradient = settings.balance == "gradient"
    if not (samples if by_gradient else batches):
        what = "samples with answers" if by_gradient else "prompts"
        raise CalibrationError(f"smoothing needs calibration {what}, there are none")
    heads = Heads.of(stream)
    skips = settings.skip_grouped_attn_out and heads.grouped
    skipped = ("attn_out",) if skips and "attn_out" in settings.groups else ()
    chosen = [name for name in GROUPS if name in settings.groups and name not in skipped]
    names = [layer.block.name for layer in stream.layers]
    balance: tuple[LayerBalance, ...] = ()
    if by_gradient:
        balance = gradient_balance(adapter, samples or ()).result(names)
    segments, kinds = _prompts(adapter, batches, samples or (), settings)
    records: list[GroupSmoothing] = []
    for index, layer in enumerate(stream.layers):
        statistics = _observe(layer.block, index, segments, move=not settings.search)
        options = {n: group_scales(layer, n, statistics[n], settings, heads) for n in chosen}
        tried: Mapping[str, Losses] = {}
        if settings.search:
            wide = {
                n: [heads.expand(s) for s in found] if n == "attn_out" else found
                for n, found in options.items()
            }
            rounding = partial(
                rounded,
                layer.block,
                weight=weight,
                bits=bits,
                quantize_activations=_rounds_activations(settings, bits),
            )
            tried = search_losses(
                layer.block,
                index,
                segments,
                kinds,
                wide,
                settings.loss,
                rounding,
                settings.memory_mb,
            )
        taken: dict[str, torch.Tensor] = {}
        for name in chosen:
            losses: list[float] = []
            best = 0
            if name in tried:
                weights = _token_weights(name, balance[index] if balance else None)
                losses = tried[name].result(weights, settings.balance == "mean")
                # Of equals the first; a NaN compares with nothing, so it goes last.
                best = min(range(len(losses)), key=lambda i: (losses[i] != losses[i], losses[i]))
            taken[name] = options[name][best]
            records.append(
                GroupSmoothing(
                    layer=layer.block.name,
                    group=name,
                    exponent=settings.exponents[best],
                    losses=tuple(zip(settings.exponents, losses, strict=False)),
                    smallest=float(taken[name].min()),
                    largest=float(taken[name].max()),
                )
            )
        fold_scales(layer, taken, heads)
    return SmoothReport("smooth", settings, tuple(records), skipped, balance)
