"""Sweeps and runs are found by what they are, or the error says what to run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from morphoquant.analysis.sweeps import find_runs, find_sweep, read_sweep, read_tables
from morphoquant.errors import HarnessError


def leave(runs: Path, name: str, overrides: list[str], jobs: list[dict[str, str]]) -> None:
    folder = runs / "sweeps" / name
    (folder / "jobs").mkdir(parents=True)
    about = {"report": "ablation", "overrides": overrides}
    (folder / "sweep.json").write_text(json.dumps(about))
    for i, job in enumerate(jobs):
        (folder / "jobs" / f"{i:04d}.json").write_text(json.dumps(job))


def test_the_latest_sweep_with_all_overrides(tmp_path: Path) -> None:
    jobs = [{"overrides": "a", "run": "x"}, {"overrides": "b", "error": "no"}]
    jobs.append({"overrides": "c", "run": "x"})
    leave(tmp_path, "2026-01-01", ["experiment=ablation", "limit=8"], jobs)
    leave(tmp_path, "2026-01-02", ["experiment=ablation"], jobs[:1])
    leave(tmp_path, "2026-01-03", ["method=rtn,quarot"], [])
    (tmp_path / "sweeps" / "2026-01-04").mkdir()  # still running
    assert find_sweep(tmp_path, "experiment=ablation").path.name == "2026-01-02"
    small = find_sweep(tmp_path, "limit=8", "experiment=ablation")
    assert small.path.name == "2026-01-01"
    assert [note["overrides"] for note in small.notes] == ["a", "b", "c"]
    assert small.runs == [Path("x")]
    assert small.command == "python run.py experiment=ablation limit=8"
    assert find_sweep(tmp_path).command == "python run.py -m method=rtn,quarot"


def test_missing_sweeps_say_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"python run\.py experiment=table3"):
        find_sweep(tmp_path, "experiment=table3")
    with pytest.raises(HarnessError, match=r"sweep\.json"):
        read_sweep(tmp_path)


def test_runs_by_field(tmp_path: Path) -> None:
    def finish(name: str, **fields: Any) -> None:
        (tmp_path / name).mkdir()
        found = {"fingerprint": name, **fields}
        (tmp_path / name / "result.json").write_text(json.dumps(found))

    finish("b", method="rtn", limit=None)
    finish("a", method="rtn", limit=8)
    (tmp_path / "unfinished").mkdir()
    assert [r["fingerprint"] for r in find_runs(tmp_path, method="rtn")] == ["a", "b"]
    (only,) = find_runs(tmp_path, limit=None)
    assert only["path"] == str(tmp_path / "b")
    with pytest.raises(HarnessError, match="quarot"):
        find_runs(tmp_path, method="quarot")
    pd.DataFrame({"x": [1]}).to_parquet(tmp_path / "b" / "depth.parquet")
    assert list(read_tables(tmp_path / "b")) == ["depth"]
    assert read_tables(tmp_path / "a") == {}
