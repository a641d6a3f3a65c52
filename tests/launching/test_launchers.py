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


def table(sweep: Path) -> pd.DataFrame:
    """Without its columns of seconds."""
    frame = pd.read_csv(sweep / "table.csv")
    return frame[[c for c in frame.columns if not c.endswith(" s")]]


@pytest.mark.parametrize(
    ("launcher", "limits"),
    [
        ("joblib", ["hydra.launcher.n_jobs=2", "hydra.launcher.threads=3"]),
        ("submitit_local", ["hydra.launcher.n_jobs=2", "hydra.launcher.threads=3"]),
        # Ray itself takes about ten seconds to start and to stop: the dearest of the three.
        pytest.param("ray", ["hydra.launcher.ray.init.num_cpus=2"], marks=pytest.mark.slow),
    ],
)
def test_the_serial_table_whatever_becomes_of_single_jobs(
    tmp_path: Path, done: Done, serial: Path, launcher: str, limits: list[str]
) -> None:
    """Two jobs come through, one is refused, one is killed."""
    # A killed worker breaks joblib's pool: there it dies while another job runs.
    order = ("morphoquant", "rtn", "rtn_static", "quarot")
    if launcher == "joblib":
        order = ("morphoquant", "quarot", "rtn", "rtn_static")
    methods = f"method={','.join(order)}"
    found = done("-m", methods, f"hydra/launcher={launcher}", *limits)
    assert found.returncode == 1, found.stderr
    assert "Traceback" not in found.stderr
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    notes = dict(zip(order, read_notes(sweep), strict=True))
    assert all(note["overrides"].startswith(f"method={m} ") for m, note in notes.items())
    refused, killed = notes["rtn_static"], notes["quarot"]
    assert refused["error"] == "no room for rtn_static"
    assert killed["error"].startswith("died without a word: ")
    assert "It ran on" in killed["error"]

    expected, whole = table(serial), table(sweep)
    # Rows without numbers make floats of counts.
    pd.testing.assert_frame_equal(whole.iloc[: len(expected)], expected, check_dtype=False)
    assert {row.split()[0] for row in whole["method"][len(expected) :]} == {
        "rtn_static",
        "method=quarot",
    }
    text = (sweep / "table.md").read_text()
    assert "no room for rtn_static" in text
    assert "died without a word" in text
    assert "#0 method=morphoquant: done" in found.stdout

    results = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/result.json")]
    assert {one["folder"] for one in results} == {str(tmp_path)}, "relative paths mean the same"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "site"}, "nothing outside"
    assert {one["threads"] for one in results} == {"1" if launcher == "ray" else "3"}
    # Two jobs at a time needed the same reference: one computed it, the other waited.
    (began,) = tmp_path.glob("runs/fp16-*/answers/began.txt")
    tries = 2 if launcher == "joblib" else 1  # there the kill came in between
    assert len(began.read_text().split()) <= tries


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


def test_a_launcher_that_is_not_installed(tmp_path: Path, done: Done) -> None:
    hidden = (
        "import importlib.abc, sys\n"
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
    with (tmp_path / "site" / "sitecustomize.py").open("a") as site:
        site.write(hidden)
    for arguments, words in (
        (("-m", "method=rtn,morphoquant", "hydra/launcher=ray"), "pip install -e '.[ray]'"),
        (("experiment=tune",), "pip install -e '.[tune]'"),
    ):
        found = done(*arguments)
        assert found.returncode == 2, found.stderr
        assert words in found.stderr
        assert "Traceback" not in found.stderr
    assert not list(tmp_path.rglob("result.json"))
