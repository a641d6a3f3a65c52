"""Outlier statistics as tables: per layer, input group and modality (SPEC 6)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import torch

from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.models.structure import Modality

Key = tuple[str, str]
"""(block name, input group name)."""

POOLED = "all"


def outlier_set(statistics: ChannelStatistics, share: float) -> set[int]:
    """The ``share`` of channels (at least one) with the largest dispersion."""
    count = max(1, round(share * statistics.lo.numel()))
    return set(statistics.dispersion("log1p").topk(count).indices.tolist())


def _views(statistics: ModalityStatistics) -> Iterator[tuple[str, ChannelStatistics]]:
    for modality, part in statistics.present.items():
        yield modality.name.lower(), part
    yield POOLED, statistics.pooled()


def _summary(part: ChannelStatistics) -> dict[str, float]:
    log1p, mean = part.dispersion("log1p"), part.dispersion("mean")
    kurtosis, absmax = part.excess_kurtosis, part.absmax
    tiny = torch.finfo(torch.float64).tiny
    flagged = log1p >= log1p.mean() + 2 * log1p.std(unbiased=log1p.numel() > 1)
    return {
        "tokens": part.n,
        "channels": log1p.numel(),
        "absmax": float(absmax.max()),
        "absmax_median": float(absmax.median()),
        "max_over_median": float(absmax.max() / absmax.median().clamp_min(tiny)),
        "dispersion_log1p_mean": float(log1p.mean()),
        "dispersion_log1p_std": float(log1p.std(unbiased=log1p.numel() > 1)),
        "dispersion_log1p_max": float(log1p.max()),
        "dispersion_mean_mean": float(mean.mean()),
        "dispersion_mean_max": float(mean.max()),
        "share_above_2_sigma": float(flagged.double().mean()),
        "kurtosis_median": float(kurtosis.median()),
        "kurtosis_p99": float(kurtosis.quantile(0.99)),
        "crest_median": float(part.crest.median()),
        "crest_max": float(part.crest.max()),
    }


def outlier_rows(collected: Mapping[Key, ModalityStatistics]) -> list[dict[str, Any]]:
    """One row per (layer, group, modality) and one for all modalities together."""
    return [
        {"layer": layer, "group": group, "modality": name, **_summary(part)}
        for (layer, group), statistics in collected.items()
        for name, part in _views(statistics)
    ]


def overlap_rows(collected: Mapping[Key, ModalityStatistics], share: float) -> list[dict[str, Any]]:
    """How far two modalities share their outlier channels, per (layer, group, pair).

    ``jaccard`` is compared with ``expected``, its value for independent sets of that size.
    """
    rows = []
    for (layer, group), statistics in collected.items():
        sets: dict[Modality, set[int]] = {
            m: outlier_set(part, share) for m, part in statistics.present.items()
        }
        for first, second in combinations(sets, 2):
            a, b = sets[first], sets[second]
            channels = statistics.parts[first].lo.numel()
            rows.append(
                {
                    "layer": layer,
                    "group": group,
                    "modality_a": first.name.lower(),
                    "modality_b": second.name.lower(),
                    "outlier_channels": len(a),
                    "jaccard": len(a & b) / len(a | b),
                    "expected": len(a) / (2 * channels - len(a)),
                }
            )
    return rows


def channel_columns(collected: Mapping[Key, ModalityStatistics]) -> dict[str, list[Any]]:
    """Per-channel statistics in columns: layer, group, modality, channel, moments, dispersion."""
    columns: dict[str, list[Any]] = {}

    def extend(name: str, values: list[Any]) -> None:
        columns.setdefault(name, []).extend(values)

    for (layer, group), statistics in collected.items():
        for name, part in _views(statistics):
            count = part.lo.numel()
            extend("layer", [layer] * count)
            extend("group", [group] * count)
            extend("modality", [name] * count)
            extend("channel", list(range(count)))
            extend("tokens", [part.n] * count)
            extend("lo", part.lo.tolist())
            extend("hi", part.hi.tolist())
            extend("mean", part.mean.tolist())
            extend("std", part.std.tolist())
            extend("abs_mean", part.abs_mean.tolist())
            extend("kurtosis", part.excess_kurtosis.tolist())
            extend("dispersion_log1p", part.dispersion("log1p").tolist())
            extend("dispersion_mean", part.dispersion("mean").tolist())
    return columns
