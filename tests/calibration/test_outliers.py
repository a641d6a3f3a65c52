"""Outlier statistics as tables."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from morphoquant.calibration.outliers import (
    channel_columns,
    outlier_rows,
    outlier_set,
    overlap_rows,
)
from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics

KEY = ("layers.0", "attn_in")


@pytest.fixture
def collected() -> dict[tuple[str, str], ModalityStatistics]:
    """Text has outliers in channels 0-4, image in 3-7, audio has no tokens."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 100, generator=draw)
    labels = torch.arange(200) % 2
    x[0, 0:5] = torch.tensor([82.0, 84.0, 86.0, 88.0, 90.0])  # a text token
    x[1, 3:8] = -torch.tensor([82.0, 84.0, 86.0, 88.0, 90.0])  # an image token
    found = ModalityStatistics(100)
    found.update(x, labels)
    return {KEY: found}


def test_outlier_set(collected: dict) -> None:
    text, image = list(collected[KEY].present.values())
    assert outlier_set(text, 0.05) == {0, 1, 2, 3, 4}
    assert outlier_set(image, 0.05) == {3, 4, 5, 6, 7}
    assert len(outlier_set(text, 1e-6)) == 1


def test_rows(collected: dict) -> None:
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
    assert all(math.isfinite(v) for r in rows.values() for v in r.values() if type(v) is float)


def test_overlap(collected: dict) -> None:
    (row,) = overlap_rows(collected, 0.05)
    assert (row["modality_a"], row["modality_b"]) == ("text", "image")
    assert row["outlier_channels"] == 5
    assert row["jaccard"] == pytest.approx(2 / 8)  # 3 and 4 of 0..7
    assert row["expected"] == pytest.approx(5 / 195)


def test_channel_columns(collected: dict) -> None:
    table = pd.DataFrame(channel_columns(collected))
    assert len(table) == 3 * 100
    assert table.groupby("modality").channel.apply(list)["text"] == list(range(100))
    text = collected[KEY].present
    part: ChannelStatistics = next(iter(text.values()))
    shown = table[table.modality == "text"]
    assert shown.hi.tolist() == part.hi.tolist()
    assert shown.dispersion_log1p.tolist() == part.dispersion("log1p").tolist()
    assert shown["kurtosis"].tolist() == part.excess_kurtosis.tolist()


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.ones(1, 4), torch.full((5, 1), 2.0)])
def test_degenerate_activations_give_numbers(x: torch.Tensor) -> None:
    found = ModalityStatistics(x.shape[1])
    found.update(x, torch.zeros(len(x)))
    for row in outlier_rows({KEY: found}):
        assert all(math.isfinite(v) for v in row.values() if isinstance(v, float))
    assert overlap_rows({KEY: found}, 0.01) == []
