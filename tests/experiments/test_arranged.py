"""AIFS on this machine: three executions of the same sums, and widths that cannot be timed."""

from __future__ import annotations

import pytest
import torch

from experiments import arranged, latency
from morphoquant.models.structure import Modality

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    shape = latency.LayerShape(hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32)
    monkeypatch.setitem(latency.SHAPES, "small", shape)
    return "small"


def test_measured_rows(small: str) -> None:
    found = arranged.measure(small, 150, CPU, rounds=2, bits=4, seconds=0.001)
    assert list(found["execution"]) == ["one scale", "in place", "arranged"]
    assert found["over_one"].iloc[0] == 1
    assert (found["low_ms"] > 0).all()
    report = arranged.table(found, 4)
    assert len(report.cells) == 3
    assert "W4A4" in report.notes[0]


def test_prompts_are_interleaved() -> None:
    (labels,) = arranged.interleaved(300)
    assert set(labels.tolist()) == {int(Modality.TEXT), int(Modality.IMAGE)}
    assert int((labels.diff() != 0).sum()) == 5


def test_widths_without_a_product_are_refused(small: str) -> None:
    with pytest.raises(RuntimeError, match="no 8-bit integer product"):
        arranged.measure(small, 8, CPU, rounds=1, bits=8, seconds=0.001)
