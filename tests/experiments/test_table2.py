"""Table 2: what is timed is what is simulated, and published rows are shown as printed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import latency, table2
from morphoquant.analysis.published import published_table

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    shape = latency.LayerShape(hidden=128, intermediate=200, heads=4, kv_heads=2, head_dim=32)
    monkeypatch.setitem(latency.SHAPES, "small", shape)
    return "small"


def test_groups_are_those_of_the_models() -> None:
    assert latency.SHAPES["7b"].groups() == {
        "attn_in": (3584 + 2 * 512, 3584),
        "attn_out": (3584, 3584),
        "mlp_in": (2 * 18944, 3584),
        "mlp_out": (3584, 18944),
    }


def test_measured_rows(small: str) -> None:
    phases = {"prefill": 16, "decode": 1}
    found = table2.measure(small, phases, "float32", CPU, rounds=2, bits=4, seconds=0.001)
    assert list(found["phase"].unique()) == ["prefill", "decode"]
    for _, rows in found.groupby("phase"):
        assert list(rows["execution"]) == ["float32", "simulated", "integer", "integer product"]
        assert rows["speedup"].iloc[0] == 1
        assert (
            (rows["low_ms"] <= rows["latency_ms"]) & (rows["latency_ms"] <= rows["high_ms"])
        ).all()
    assert (found["low_ms"] > 0).all()
    assert found["panel"].iloc[0] == pytest.approx((2 + 2 + 2 + 2) / (128 + 128 + 128 + 200))


def test_published_rows_stand_beside_as_printed(small: str) -> None:
    found = table2.measure(small, {"decode": 1}, "float32", CPU, rounds=1, bits=4, seconds=0.001)
    report = table2.table2(found, 4)
    printed = report.frame[report.frame["source"] == "published"]
    assert list(printed["latency_ms"]) == list(published_table("table2")["layer_latency_ms"])
    assert printed[["phase", "tokens", "shape"]].isna().all().all(), "the paper does not say"
    assert len(report.cells) == len(report.frame)
    missing = any("No GPU here" in note for note in report.notes)
    assert missing == (not torch.cuda.is_available())


def test_eight_bits_have_no_integer_row_on_a_cpu(small: str) -> None:
    """Where the product could saturate, nothing is timed in its name."""
    found = table2.measure(small, {"decode": 1}, "float32", CPU, rounds=1, bits=8, seconds=0.001)
    assert "integer" not in set(found["execution"])
    assert any("no integer row" in note for note in table2.table2(found, 8).notes)


def test_executions_that_disagree_are_not_timed() -> None:
    with pytest.raises(RuntimeError, match="differ by"):
        latency.agree(torch.ones(4), torch.full((4,), 1.01))


def test_bad_arguments_are_refused() -> None:
    command = [sys.executable, "-m", "experiments.table2", "--tokens", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--tokens 0: at least 1" in done.stderr
