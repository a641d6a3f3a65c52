"""Outlier statistics as tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

from morphoquant.calibration.outliers import (
    channel_columns,
    outlier_rows,
    outlier_set,
    overlap_rows,
)
from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics

KEY = ("layers.0", "attn_in")
Collected = dict[tuple[str, str], ModalityStatistics]


@pytest.fixture
def collected() -> Collected:
    """Text has outliers in channels 0-4, image in 3-7, audio has no tokens."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 100, generator=draw)
    labels = torch.arange(200) % 2
    x[0, 0:5] = torch.tensor([82.0, 84.0, 86.0, 88.0, 90.0])  # a text token
    x[1, 3:8] = -torch.tensor([82.0, 84.0, 86.0, 88.0, 90.0])  # an image token
    found = ModalityStatistics(100)
    found.update(x, labels)
    return {KEY: found}


def test_outlier_set(collected: Collected) -> None:
    text, image = list(collected[KEY].present.values())
    assert outlier_set(text, 0.05) == {0, 1, 2, 3, 4}
    assert outlier_set(image, 0.05) == {3, 4, 5, 6, 7}
    assert len(outlier_set(text, 1e-6)) == 1


def test_rows(collected: Collected) -> None:
    rows = {r["modality"]: r for r in outlier_rows(collected)}
    assert set(rows) == {"text", "image", "all"}
    assert all((r["layer"], r["group"]) == KEY for r in rows.values())
    assert [rows[m]["tokens"] for m in ("text", "image", "all")] == [100, 100, 200]
    assert rows["text"]["absmax"] == rows["all"]["absmax"] == 90
    assert rows["all"]["share_above_2_sigma"] == pytest.approx(0.08)
    assert rows["text"]["share_above_2_sigma"] == pytest.approx(0.05)
    assert rows["text"]["max_over_median"] == pytest.approx(
        90 / rows["text"]["absmax_median"], rel=1e-6
    )
    assert rows["text"]["kurtosis_p99"] > 50 > rows["text"]["kurtosis_median"]
    assert all(missing(row) == {"first_token_share"} for row in rows.values())


def missing(row: dict[str, Any]) -> set[str]:
    """Columns without a finite number."""
    return {k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}


def test_tails_of_a_layer() -> None:
    """Against the sorted magnitudes of all elements; ratios of what stands beside them."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(500, 40, generator=draw, dtype=torch.float64) ** 3
    found = ModalityStatistics(40)
    found.update(x, torch.zeros(500))
    row = outlier_rows({KEY: found})[0]
    magnitude = x.abs().flatten().numpy()
    for name, share in (("q50", 0.5), ("q99", 0.99), ("q999", 0.999), ("q9999", 0.9999)):
        expected = np.quantile(magnitude, share, method="inverted_cdf")
        assert row[f"abs_{name}"] == pytest.approx(expected, rel=0.01)
    assert row["max_over_median_layer"] == magnitude.max() / row["abs_q50"]
    assert row["tail_max_q999"] == magnitude.max() / row["abs_q999"]
    assert row["tail_q999_q50"] == row["abs_q999"] / row["abs_q50"]
    assert row["tail_q9999_q99"] == row["abs_q9999"] / row["abs_q99"]
    assert row["kurtosis_layer"] == pytest.approx(scipy.stats.kurtosis(x.flatten().numpy()))


def test_massive_and_first_tokens() -> None:
    """A sink at the start of every prompt, and one massive token elsewhere."""
    x = torch.ones(4, 300, 8)
    x[:, 0] = 10.0
    x[2, 100] = 100.0
    found = ModalityStatistics(8)
    found.update(x, torch.zeros(4, 300, dtype=torch.int8))
    row = outlier_rows({KEY: found})[0]
    energy = 8.0 * (4 * 100 + 10000 + 1195)
    assert row["first_token_share"] == pytest.approx(8 * 400 / energy)
    # 0.1 % of 1200 tokens, rounded up, are two: the massive one and one of the sinks.
    assert row["massive_share"] == pytest.approx(8 * 10100 / energy)


def test_without_histograms_their_columns_are_missing(collected: Collected) -> None:
    found = ModalityStatistics(5, histograms=False)
    found.update(torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(20))
    row = outlier_rows({KEY: found})[0]
    assert set(row) == set(outlier_rows(collected)[0])
    assert {name for name in row if name.startswith(("abs_q", "tail_"))} < missing(row)
    assert math.isfinite(row["kurtosis_layer"])


def test_overlap(collected: Collected) -> None:
    (row,) = overlap_rows(collected, 0.05)
    assert (row["modality_a"], row["modality_b"]) == ("text", "image")
    assert row["outlier_channels"] == 5
    assert row["jaccard"] == pytest.approx(2 / 8)  # 3 and 4 of 0..7
    assert row["jaccard_absmax"] == pytest.approx(2 / 8)
    assert row["expected"] == pytest.approx(5 / 195)
    assert 0 < row["weighted"] < 1


def test_outlier_set_by_magnitude() -> None:
    """A large constant channel has no dispersion, and is the first to go by magnitude."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(50, 10, generator=draw)
    x[:, 7] = 1000.0
    part = ChannelStatistics(10)
    part.update(x)
    assert outlier_set(part, 0.1, by="absmax") == {7}
    assert 7 not in outlier_set(part, 0.5)


def modalities(text: torch.Tensor, image: torch.Tensor) -> Collected:
    found = ModalityStatistics(text.shape[1])
    labels = torch.cat([torch.zeros(len(text)), torch.ones(len(image))])
    found.update(torch.cat([text, image]), labels)
    return {KEY: found}


def test_scale_mismatch() -> None:
    """log2 of 8, 1/2, 1, 4 and a silent channel that is left out."""
    text = torch.tensor([[8.0, -1.0, 3.0, 4.0, 0.0]])
    image = torch.tensor([[1.0, 2.0, -3.0, 1.0, 5.0]])
    (row,) = overlap_rows(modalities(text, image), 0.2)
    expected = np.array([3.0, -1.0, 0.0, 2.0])
    assert row["log2_scale_median"] == pytest.approx(np.quantile(expected, 0.5))
    assert row["log2_scale_p05"] == pytest.approx(np.quantile(expected, 0.05))
    assert row["log2_scale_p95"] == pytest.approx(np.quantile(expected, 0.95))
    assert row["log2_scale_abs_mean"] == pytest.approx(6 / 4)


def test_scale_mismatch_of_disjoint_channels() -> None:
    (row,) = overlap_rows(modalities(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])), 0.5)
    assert {k for k in row if k.startswith("log2_scale_")} < missing(row)


def test_weighted_overlap() -> None:
    """Dispersions 4, 0 and 4, 4 (up to their common logarithm): halves and quarters."""
    text = torch.tensor([[2.0, 2.0], [-2.0, 2.0]])
    image = torch.tensor([[2.0, 2.0], [-2.0, -2.0]])
    (row,) = overlap_rows(modalities(text, image), 0.5)
    assert row["weighted"] == pytest.approx(0.5 / 1.5)
    (same,) = overlap_rows(modalities(image, image.flip(0)), 0.5)
    assert same["weighted"] == pytest.approx(1.0)


def test_channel_columns(collected: Collected) -> None:
    table = pd.DataFrame(channel_columns(collected))
    assert len(table) == 3 * 100
    assert table.groupby("modality").channel.apply(list)["text"] == list(range(100))
    text = collected[KEY].present
    part: ChannelStatistics = next(iter(text.values()))
    shown = table[table.modality == "text"]
    assert shown.hi.tolist() == part.hi.tolist()
    assert shown.dispersion_log1p.tolist() == part.dispersion("log1p").tolist()
    assert shown["kurtosis"].tolist() == part.excess_kurtosis.tolist()
    assert shown.absmax.tolist() == part.absmax.tolist()
    assert shown.crest.tolist() == part.crest.tolist()


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.ones(1, 4), torch.full((5, 1), 2.0)])
def test_degenerate_activations(x: torch.Tensor) -> None:
    """All zero: ratios to zero are missing, and nothing else is."""
    found = ModalityStatistics(x.shape[1])
    found.update(x, torch.zeros(len(x)))
    for row in outlier_rows({KEY: found}):
        ratios = {k for k in row if k.startswith(("tail_", "max_over_median", "massive", "first"))}
        assert missing(row) == (ratios if not x.any() else {"first_token_share"})
    assert overlap_rows({KEY: found}, 0.01) == []
