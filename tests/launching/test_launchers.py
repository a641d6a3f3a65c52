"""The same sweep by every launcher: the same table, whatever becomes of single jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from morphoquant.analysis.sweeps import read_notes

Done = Callable[..., subprocess.CompletedProcess[str]]
PARALLEL = ("joblib", "submitit_local", "ray")


def sweep_of(folder: Path, runs: str = "runs") -> Path:
    (found,) = (folder / runs / "sweeps").iterdir()
    return found


def table(sweep: Path) -> pd.DataFrame:
    frame = pd.read_csv(sweep / "table.csv")
    return frame[[c for c in frame.columns if not c.endswith(" s")]]


@pytest.mark.parametrize("launcher", PARALLEL)
def test_same_table_as_one_after_the_other(tmp_path: Path, done: Done, launcher: str) -> None:
    jobs = ("-m", "method=morphoquant,rtn", "bits=w8a8,w4a4")
    few = [] if launcher == "ray" else ["hydra.launcher.n_jobs=2"]
    several = done(*jobs, f"hydra/launcher={launcher}", *few, runs="several")
    assert several.returncode == 0, several.stderr
    one = done(*jobs, runs="one")
    assert one.returncode == 0, one.stderr
    pd.testing.assert_frame_equal(
        table(sweep_of(tmp_path, "several")), table(sweep_of(tmp_path, "one"))
    )
    notes = read_notes(sweep_of(tmp_path, "several"))
    assert [note["overrides"].split()[:2] for note in notes] == [
        ["method=morphoquant", "bits=w8a8"],
        ["method=morphoquant", "bits=w4a4"],
        ["method=rtn", "bits=w8a8"],
        ["method=rtn", "bits=w4a4"],
    ]
    results = [json.loads(p.read_text()) for p in tmp_path.glob("several/*/result.json")]
    assert {found["folder"] for found in results} == {str(tmp_path)}, "paths mean the same"
    assert {path.name for path in tmp_path.iterdir()} == {"one", "several", "site"}
    assert "(4/4 jobs" in several.stdout + several.stderr
    # Two jobs at a time needed the same reference: one computed it, the others waited.
    (began,) = tmp_path.glob("several/fp16-*/answers/began.txt")
    assert len(began.read_text().split()) == 1


@pytest.mark.parametrize("launcher", PARALLEL)
def test_a_killed_job_costs_the_others_nothing(tmp_path: Path, done: Done, launcher: str) -> None:
    found = done("-m", "method=quarot,rtn_static,rtn,morphoquant", f"hydra/launcher={launcher}")
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    sweep = sweep_of(tmp_path)
    killed, refused, *others = read_notes(sweep)
    assert killed["error"].startswith("died without a word: ")
    assert "It ran on" in killed["error"]
    assert refused["error"] == "no room for rtn_static"
    assert all("run" in note for note in others)
    text = (sweep / "table.md").read_text()
    assert "Failed: method=quarot" in text
    assert "died without a word" in text
    assert list(table(sweep)["method"])[:3] == ["fp16", "rtn", "morphoquant"]


def test_a_preempted_job_goes_on_where_it_stopped(
    tmp_path: Path, command: Callable[..., subprocess.Popen[str]]
) -> None:
    """SLURM's warning signal, to a job of the local executor: it is queued again by itself."""
    process = command("-m", "method=rtn", "reference=false", "hydra/launcher=submitit_local")
    deadline = time.monotonic() + 100
    while not (answers := list(tmp_path.glob("runs/rtn-*/answers/2.txt"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first = answers[0].read_text()
    os.kill(int(first), signal.SIGUSR2)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    (folder,) = tmp_path.glob("runs/rtn-*/answers")
    workers = (folder / "began.txt").read_text().split()
    assert len(workers) == 2
    assert workers[0] == first
    assert (folder / "0.txt").read_text() == first, "answered before, not asked again"
    assert (folder / "7.txt").read_text() == workers[1]


def test_threads_are_shared_out(tmp_path: Path, done: Done) -> None:
    several = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.threads=3")
    found = done("-m", "method=rtn", "reference=false", *several)
    assert found.returncode == 0, found.stderr
    (path,) = tmp_path.glob("runs/rtn-*/result.json")
    assert json.loads(path.read_text())["threads"] == "3"


def test_a_launcher_that_is_not_installed(tmp_path: Path, done: Done) -> None:
    hidden = (
        "import importlib.abc, sys\n"
        "import light_pipeline\n"
        "sys.modules['morphoquant.pipeline'] = light_pipeline\n"
        "class Hide(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith(('hydra_plugins.hydra_ray', 'hydra_plugins.hydra_optuna')):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hide())\n"
        "import pkgutil\n"
        "walk = pkgutil.walk_packages\n"
        "pkgutil.walk_packages = lambda *a, **k: (\n"
        "    m for m in walk(*a, **k) if 'hydra_ray' not in m.name and 'optuna' not in m.name\n"
        ")\n"
    )
    (tmp_path / "site" / "sitecustomize.py").write_text(hidden)
    for arguments, words in (
        (("-m", "method=rtn,morphoquant", "hydra/launcher=ray"), "pip install 'morphoquant[ray]'"),
        (("experiment=tune",), "pip install 'morphoquant[tune]'"),
        (("-m", "hydra/sweeper=optuna"), "pip install 'morphoquant[tune]'"),
    ):
        found = done(*arguments)
        assert found.returncode == 2, found.stderr
        assert words in found.stderr
        assert "Traceback" not in found.stderr
    assert not list(tmp_path.rglob("result.json"))
