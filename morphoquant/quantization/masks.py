"""Which channels of an input group are long-tailed outliers (SPEC 2.2, 2.3)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.config.schema import MaskConfig

POOLED = "all"
"""The view over all tokens, beside one view for every modality."""


@dataclass(frozen=True)
class ScoreMoments:
    """Mean and standard deviation of the scores of all layers."""

    mean: float
    std: float


def score_moments(scores: Sequence[tuple[torch.Tensor, int]], config: MaskConfig) -> ScoreMoments:
    """What the global rule compares with.

    Args:
        scores: per input group its scores [channels] and how many linears read it.
        config: ``pooling`` says which of the two readings of the paper is meant: ``channels``
            concatenates the channels of all linears (wide layers weigh more, and q, k, v count
            three times), ``layers`` averages the moments of the linears.
    """
    if config.pooling == "layers":
        readers = sum(count for _, count in scores)
        mean = sum(float(s.mean()) * count for s, count in scores) / readers
        return ScoreMoments(mean, sum(_std(s) * count for s, count in scores) / readers)
    joined = torch.cat([s for s, count in scores for _ in range(count)])
    return ScoreMoments(float(joined.mean()), _std(joined))


def score_of(statistics: ChannelStatistics, config: MaskConfig) -> torch.Tensor:
    """What channels are ranked by, float64 [channels]."""
    return statistics.dispersion("log1p" if config.score == "random" else config.score)


def _std(score: torch.Tensor) -> float:
    return float(score.std(unbiased=score.numel() > 1))


def views(statistics: ModalityStatistics, config: MaskConfig) -> dict[str, ChannelStatistics]:
    """What is scored: all tokens together, or each modality by itself."""
    if config.modalities == "pooled":
        return {POOLED: statistics.pooled()}
    return {m.name.lower(): part for m, part in statistics.present.items()}


def _marked(score: torch.Tensor, config: MaskConfig, moments: ScoreMoments | None) -> torch.Tensor:
    """Union of the rules, before any cap; bool [channels]."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for rule in config.rules:
        if rule == "local":
            mask |= score >= score.mean() + config.std_threshold * _std(score)
        elif rule == "top_share":
            mask |= _best(score, round(config.top_share * score.numel()))
        elif rule == "global":
            assert moments is not None, "the global rule needs the scores of all layers"
            mask |= score >= moments.mean + config.std_threshold * moments.std
    if "global" not in config.rules:
        # Where all channels are alike the threshold is their mean, and none of them stands out.
        mask &= score.max() > score.min()
    return mask


def _best(score: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` highest scores, bool [channels]."""
    best = torch.zeros_like(score, dtype=torch.bool)
    # A stable sort: of equal scores the lower channel number stays, on every device.
    best[torch.sort(score, descending=True, stable=True).indices[:count]] = True
    return best


def _capped(mask: torch.Tensor, score: torch.Tensor, config: MaskConfig) -> torch.Tensor:
    allowed = int(config.max_share * mask.numel())
    if int(mask.sum()) <= allowed:
        return mask
    return mask & _best(score.masked_fill(~mask, -torch.inf), allowed)


def outlier_mask(
    statistics: ChannelStatistics, config: MaskConfig, moments: ScoreMoments | None = None
) -> torch.Tensor:
    """Long-tailed channels seen by one view, bool [channels].

    Args:
        statistics: of the tokens that are scored.
        config: score, rules, thresholds and cap.
        moments: over all layers; needed by the global rule.
    """
    score = score_of(statistics, config)
    return _capped(_marked(score, config, moments), score, config)


def group_mask(
    statistics: ModalityStatistics,
    linears: Iterable[str],
    config: MaskConfig,
    moments: Mapping[str, ScoreMoments] | None = None,
    by_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask of an input group: rules, union over modalities, cap, named layers, blind draw.

    Args:
        statistics: of the group's input.
        linears: full names of the linears that read it, for ``all_channels``.
        config: the choice.
        moments: view -> moments over all layers; needed by the global rule.
        by_weights: bool [channels], marked by the weights already, past the cap; or None.
    """
    names = list(linears)
    if any(fnmatchcase(name, pattern) for name in names for pattern in config.all_channels):
        channels = next(iter(statistics.parts.values())).lo
        return torch.ones_like(channels, dtype=torch.bool)
    mask = _by_scores(views(statistics, config), config, moments or {})
    return drawn(mask if by_weights is None else mask | by_weights, names, config)


def _by_scores(
    seen: Mapping[str, ChannelStatistics], config: MaskConfig, known: Mapping[str, ScoreMoments]
) -> torch.Tensor:
    """What the rules mark in all views together, capped: bool [channels]."""
    if list(seen) == [POOLED]:
        return outlier_mask(seen[POOLED], config, known.get(POOLED))
    joined: torch.Tensor | None = None
    ranks: torch.Tensor | None = None
    for name, part in seen.items():
        score = score_of(part, config)
        mask = _marked(score, config, known.get(name))
        # Modalities differ in scale: a channel ranks by how far it stands out in its best one.
        rank = (score - score.mean()) / max(_std(score), torch.finfo(torch.float64).tiny)
        joined = mask if joined is None else joined | mask
        ranks = rank if ranks is None else torch.maximum(ranks, rank)
    assert joined is not None
    assert ranks is not None
    return _capped(joined, ranks, config)


def drawn(mask: torch.Tensor, names: Sequence[str], config: MaskConfig) -> torch.Tensor:
    """The mask itself; for the blind control as many channels at random, by layer and seed."""
    if config.score != "random":
        return mask
    salt = zlib.crc32("\n".join(names).encode()) + (config.seed << 32)
    order = torch.randperm(mask.numel(), generator=torch.Generator().manual_seed(salt))
    return mask[order.to(mask.device)]
