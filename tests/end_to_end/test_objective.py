"""Objectives by real runs: measured without a benchmark, and handed to wandb's own agent."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from morphoquant.objective import divergence

ROOT = Path(__file__).parents[2]
TINY = [
    "calibration.samples=10",
    "calibration.search_samples=5",
    "calibration.held_out_samples=10",
    "statistics.enabled=false",
    "tracker.mode=offline",
]


@given(st.integers(0, 10**6), st.floats(0.0, 20.0))
def test_divergence_is_scipys_relative_entropy(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = scale * torch.randn(3, 17, generator=generator)
    after = scale * torch.randn(3, 17, generator=generator)
    found, agree = divergence(before, after)
    p, q = (x.double().softmax(-1).numpy() for x in (before, after))
    torch.testing.assert_close(found, torch.from_numpy(entropy(p, q, axis=-1)))
    assert agree.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    same, _ = divergence(before, before)
    assert same.abs().max() == 0.0


def summary(folder: Path) -> dict[str, Any]:
    """The last summary in an offline run's file, read with wandb's own reader."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (path,) = folder.glob("**/offline-run-*/run-*.wandb")
    store, found = DataStore(), {}
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        for item in record.summary.update:
            name = item.key or "/".join(item.nested_key)
            found[name] = json.loads(item.value_json)
    return found


def test_wandbs_agent_runs_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sampled set, started by the agent's code; the sweep's metric is in the run's summary."""
    from wandb.wandb_agent import Agent

    sweep = yaml.safe_load((ROOT / "experiments" / "wandb_sweep.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # the agent sets both: monkeypatch takes them away again
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcdefgh")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    agent = Agent(None, None, sweep_id="abcdefgh")
    folders = [f"paths.runs={tmp_path / 'runs'}", f"paths.cache={tmp_path / 'cache'}"]
    agent._sweep_command = [*sweep["command"], *TINY, *folders]
    sampled = {name: {"value": spec["max"]} for name, spec in sweep["parameters"].items()}
    given = {"type": "run", "run_id": "trial001", "args": sampled}
    for _ in range(2):  # the second finds the run finished, and still reports to its agent
        agent._command_run(given | {"program": str(ROOT / sweep["program"])})
        assert agent._run_processes["trial001"].wait() == 0
        (path,) = tmp_path.glob("runs/*-none-*/result.json")
        result = json.loads(path.read_text())
        assert result["accuracy"] == {}
        assert result["mean"] is None
        assert result["held_out"]["samples"] == 10
        assert result["held_out"]["kl"] > 0
        wandb_folder = path.parent / "wandb"
        found = summary(wandb_folder)
        assert found[sweep["metric"]["name"]] == pytest.approx(result["held_out"]["kl"])
        assert "mean_accuracy" not in found
        wandb_folder.rename(tmp_path / f"seen-{len(list(tmp_path.iterdir()))}")
