"""Whatever folders are given, the same runs are found; what is no run says what it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from morphoquant.analysis.page.gather import gather
from morphoquant.errors import HarnessError


def names(found: Any) -> list[str]:
    return [run.path.name.split("-")[1] for run in found.runs]


def test_a_runs_folder_its_sweep_and_its_runs_give_the_same(compared: Any) -> None:
    directories = sorted(p for p in compared.root.iterdir() if (p / "result.json").is_file())
    by_folder = gather([compared.root])
    assert names(by_folder) == ["fp16", "quarot", "rtn"], "the unquantized first, then by name"
    assert names(gather([compared.root / "sweeps" / "2026-01-01"])) == names(by_folder)
    assert names(gather(directories)) == names(by_folder)
    assert names(gather([directories[1], directories[1]])) == ["fp16", "quarot"]


def test_unfinished_runs_are_counted_and_failed_jobs_told(compared: Any) -> None:
    found = gather([compared.root])
    (unfinished,) = found.unfinished
    assert (unfinished.method, unfinished.scheme) == ("awq", "w4a4")
    assert unfinished.answers == {"mini_mmmu": 5}, "the torn line is not an answer"
    (failure,) = found.failures
    assert (failure.overrides, failure.method) == ("method=gptq", "gptq")
    assert failure.error == "no <b>room</b>"


def test_a_sweep_tells_the_commands_without_the_machine(compared: Any) -> None:
    told = {run.result["method"]: run.command for run in gather([compared.root]).runs}
    assert told["rtn"] == "python run.py method=rtn"
    assert told["fp16"] == ""


def test_a_copied_folder_reads_its_own_runs(compared: Any, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(compared.root, copy)
    found = gather([copy / "sweeps" / "2026-01-01"])
    assert {run.path.parent.resolve() for run in found.runs} == {copy.resolve()}


def test_what_came_through_later_is_no_failure(runs: Any) -> None:
    run = runs.add("gptq")
    job = {"overrides": "method=gptq"}
    runs.sweep("2026-01-01", [{**job, "error": "no room"}])
    assert len(gather([runs.root]).failures) == 1
    runs.sweep("2026-01-02", [{**job, "run": str(run)}])
    assert gather([runs.root]).failures == []
    runs.sweep("2026-01-03", [{**job, "error": "no room again"}])
    (failure,) = gather([runs.root]).failures
    assert failure.sweep == "2026-01-03"


@pytest.mark.parametrize("lost", ["samples.parquet", "manifest.json", "identity.json"])
def test_a_damaged_run_is_told_and_the_others_stay(runs: Any, lost: str) -> None:
    runs.add("rtn")
    folder = runs.add("quarot")
    (folder / lost).write_bytes(b"{")
    found = gather([runs.root])
    assert names(found) == ["rtn"]
    (damaged,) = found.unfinished
    assert damaged.name == folder.name
    assert "finished, but unreadable" in damaged.reason
    assert str(runs.root) not in damaged.reason


def test_a_damaged_result_is_called_so(runs: Any) -> None:
    runs.add("rtn")
    folder = runs.add("quarot")
    (folder / "result.json").write_text('{"finger')
    (damaged,) = gather([runs.root]).unfinished
    assert damaged.reason == "result.json is damaged"


def test_errors_name_the_folder_and_what_it_lacks(runs: Any, tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"nowhere: no such folder"):
        gather([tmp_path / "nowhere"])
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(HarnessError, match="not a folder"):
        gather([file])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(HarnessError, match=r"neither runs nor a sweep"):
        gather([empty])
    folder = runs.add("rtn", finished=False)
    with pytest.raises(HarnessError, match=rf"(?s)no finished run.*{folder.name}: interrupted"):
        gather([runs.root])
