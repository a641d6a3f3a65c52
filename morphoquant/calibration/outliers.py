"""Outlier statistics as tables: per layer, input group and modality (SPEC 6).

A quotient whose denominator is zero, and anything that was not observed, is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch

from morphoquant.calibration.histogram import LayerDistribution
from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics, Score
from morphoquant.models.structure import Modality

Key = tuple[str, str]
"""(block name, input group name)."""

POOLED = "all"

View = tuple[str, ChannelStatistics, LayerDistribution | None]


def outlier_set(statistics: ChannelStatistics, share: float, by: Score = "log1p") -> set[int]:
    """The ``share`` of channels (at least one) that score highest.

    Args:
        statistics: of the tokens in question.
        share: 0.01 is the 1 % of SPEC 6.
        by: the score; ``absmax`` ranks by the largest magnitude alone.
    """
    count = max(1, round(share * statistics.lo.numel()))
    return set(statistics.dispersion(by).topk(count).indices.tolist())


def _views(statistics: ModalityStatistics) -> Iterator[View]:
    for modality, part in statistics.present.items():
        yield modality.name.lower(), part, statistics.distributions.get(modality)
    yield POOLED, statistics.pooled(), statistics.pooled_distribution()


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else math.nan


def _summary(part: ChannelStatistics) -> dict[str, float]:
    log1p, mean = part.dispersion("log1p"), part.dispersion("mean")
    kurtosis, absmax, crest = part.excess_kurtosis, part.absmax, part.crest
    deviation = log1p.std(unbiased=log1p.numel() > 1)
    flagged = log1p >= log1p.mean() + 2 * deviation
    return {
        "tokens": part.n,
        "channels": log1p.numel(),
        "absmax": float(absmax.max()),
        "absmax_median": float(absmax.median()),
        "max_over_median": _ratio(float(absmax.max()), float(absmax.median())),
        "dispersion_log1p_mean": float(log1p.mean()),
        "dispersion_log1p_std": float(deviation),
        "dispersion_log1p_max": float(log1p.max()),
        "dispersion_mean_mean": float(mean.mean()),
        "dispersion_mean_max": float(mean.max()),
        "share_above_2_sigma": float(flagged.double().mean()),
        "kurtosis_median": float(kurtosis.median()),
        "kurtosis_p99": float(kurtosis.quantile(0.99)),
        "kurtosis_layer": part.layer_kurtosis,
        "crest_median": float(crest.median()),
        "crest_max": float(crest.max()),
    }


def _tails(absmax: float, found: LayerDistribution | None) -> dict[str, float]:
    """Quantiles of |x| over the whole layer, their ratios, and the energy of single tokens."""
    magnitudes = None if found is None else found.magnitudes

    def quantile(share: float) -> float:
        return math.nan if magnitudes is None else magnitudes.quantile(share)

    q50, q99, q999, q9999 = (quantile(share) for share in (0.5, 0.99, 0.999, 0.9999))
    return {
        "abs_q50": q50,
        "abs_q99": q99,
        "abs_q999": q999,
        "abs_q9999": q9999,
        "max_over_median_layer": _ratio(absmax, q50),
        "tail_max_q999": _ratio(absmax, q999),
        "tail_q999_q50": _ratio(q999, q50),
        "tail_q9999_q99": _ratio(q9999, q99),
        "massive_share": math.nan if found is None else found.tokens.massive_share(),
        "first_token_share": math.nan if found is None else found.tokens.first_share,
    }


def outlier_rows(collected: Mapping[Key, ModalityStatistics]) -> list[dict[str, Any]]:
    """One row per (layer, group, modality) and one for all modalities together.

    ``massive_share`` is the share of energy in the 0.1 % most energetic tokens;
    ``first_token_share`` that in the first tokens of prompts, of the row's modality.
    """
    rows = []
    for (layer, group), statistics in collected.items():
        for name, part, distribution in _views(statistics):
            summary = _summary(part)
            tails = _tails(summary["absmax"], distribution)
            rows.append({"layer": layer, "group": group, "modality": name, **summary, **tails})
    return rows


def _jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def _weighted_overlap(a: ChannelStatistics, b: ChannelStatistics) -> float:
    """sum(min) / sum(max) of dispersions normalised to sum one; 1 for equal profiles."""
    tiny = torch.finfo(torch.float64).tiny
    first, second = (s / s.sum().clamp_min(tiny) for s in (a.dispersion(), b.dispersion()))
    return _ratio(
        float(torch.minimum(first, second).sum()), float(torch.maximum(first, second).sum())
    )


def _scale_mismatch(a: ChannelStatistics, b: ChannelStatistics) -> dict[str, float]:
    """Distribution over channels of log2(max|x| in a / max|x| in b), where both are nonzero."""
    both = (a.absmax > 0) & (b.absmax > 0)
    names = ("median", "p05", "p95", "abs_mean")
    if not bool(both.any()):
        return {f"log2_scale_{name}": math.nan for name in names}
    log2 = a.absmax[both].log2() - b.absmax[both].log2()
    levels = torch.tensor([0.5, 0.05, 0.95], dtype=log2.dtype, device=log2.device)
    values = [*log2.quantile(levels).tolist(), float(log2.abs().mean())]
    return {f"log2_scale_{name}": value for name, value in zip(names, values, strict=True)}


def overlap_rows(collected: Mapping[Key, ModalityStatistics], share: float) -> list[dict[str, Any]]:
    """How far two modalities share their outlier channels, per (layer, group, pair).

    ``jaccard`` (sets by dispersion) and ``jaccard_absmax`` (by largest magnitude) are compared
    with ``expected``, the value for independent sets of that size; ``weighted`` compares whole
    dispersion profiles. ``log2_scale_*`` say how far apart the two ranges of a channel are: a
    range that serves both costs the smaller one about as many bits.
    """
    rows = []
    for (layer, group), statistics in collected.items():
        present = statistics.present
        sets: dict[Modality, set[int]] = {m: outlier_set(p, share) for m, p in present.items()}
        largest = {m: outlier_set(p, share, by="absmax") for m, p in present.items()}
        for first, second in combinations(present, 2):
            one, other = present[first], present[second]
            size, channels = len(sets[first]), one.lo.numel()
            rows.append(
                {
                    "layer": layer,
                    "group": group,
                    "modality_a": first.name.lower(),
                    "modality_b": second.name.lower(),
                    "outlier_channels": size,
                    "jaccard": _jaccard(sets[first], sets[second]),
                    "jaccard_absmax": _jaccard(largest[first], largest[second]),
                    "expected": size / (2 * channels - size),
                    "weighted": _weighted_overlap(one, other),
                    **_scale_mismatch(one, other),
                }
            )
    return rows


def channel_columns(collected: Mapping[Key, ModalityStatistics]) -> dict[str, list[Any]]:
    """Per-channel statistics in columns: layer, group, modality, channel, moments, dispersion."""
    columns: dict[str, list[Any]] = {}

    def extend(name: str, values: list[Any]) -> None:
        columns.setdefault(name, []).extend(values)

    for (layer, group), statistics in collected.items():
        for name, part, _ in _views(statistics):
            count = part.lo.numel()
            extend("layer", [layer] * count)
            extend("group", [group] * count)
            extend("modality", [name] * count)
            extend("channel", list(range(count)))
            extend("tokens", [part.n] * count)
            extend("lo", part.lo.tolist())
            extend("hi", part.hi.tolist())
            extend("absmax", part.absmax.tolist())
            extend("mean", part.mean.tolist())
            extend("std", part.std.tolist())
            extend("abs_mean", part.abs_mean.tolist())
            extend("kurtosis", part.excess_kurtosis.tolist())
            extend("crest", part.crest.tolist())
            extend("dispersion_log1p", part.dispersion("log1p").tolist())
            extend("dispersion_mean", part.dispersion("mean").tolist())
    return columns
