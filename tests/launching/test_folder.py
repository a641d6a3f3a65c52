"""The folder of a sweep belongs to one sweep at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from morphoquant.launching.folder import OccupiedError, claim
from morphoquant.tracking.rundir import StorageError

ROOT = Path(__file__).parents[2]
HOLD = """
import os, sys
from omegaconf import OmegaConf
from morphoquant.launching.folder import claim

hydra = {"sweep": {"dir": sys.argv[1]}, "overrides": {"hydra": []}, "callbacks": {"sweep": {}}}
with claim(OmegaConf.create({"hydra": hydra})):
    print("held", flush=True)
    sys.stdin.read()
    os._exit(9)
"""


def config(folder: Path, *overrides: str) -> object:
    hydra = {"sweep": {"dir": str(folder)}, "overrides": {"hydra": list(overrides)}}
    return OmegaConf.create({"hydra": {**hydra, "callbacks": {"sweep": {"folder": None}}}})


def test_the_folder_is_held_by_one_and_pinned_for_its_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "it's one"
    named = f"hydra.sweep.dir={folder}"
    first = config(folder, named)
    with claim(first) as held:
        assert held == folder
        assert first.hydra.sweep.dir == str(folder)
        assert first.hydra.overrides.hydra[1] == f"hydra.sweep.dir='{tmp_path}/it\\'s one'"
        (folder / "mine").touch()
        with pytest.raises(OccupiedError) as caught, claim(config(folder, named)):
            pass
        for word in (str(folder), f"process {os.getpid()}", "hydra.sweep.dir", "Wait"):
            assert word in str(caught.value)
        assert json.loads((folder / ".holder.json").read_text())["process"] == os.getpid()
    with claim(config(folder, named)):
        assert (folder / "mine").exists()


def test_sweeps_that_the_clock_gave_one_name_get_folders_of_their_own(tmp_path: Path) -> None:
    wanted = tmp_path / "2030-01-01_12-00-00"
    third = config(wanted)
    with claim(config(wanted)) as a, claim(config(wanted)) as b, claim(third) as c:
        assert [p.name.removeprefix(wanted.name) for p in (a, b, c)] == ["", "-2", "-3"]
        assert third.hydra.sweep.dir == str(c)
    with claim(config(wanted)) as again:
        assert again == wanted


def test_a_killed_sweep_keeps_nobody_out(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    named = f"++hydra.sweep.dir={folder}"
    with pytest.raises(OccupiedError, match=f"process {process.pid} "):
        claim(config(folder, named)).__enter__()
    litter = folder / ".table.csv-1-0123abcd"
    litter.touch()
    process.communicate()
    assert process.returncode == 9
    assert (folder / ".holder.json").exists(), "it could not say goodbye"
    with claim(config(folder, named)):
        assert json.loads((folder / ".holder.json").read_text())["process"] == os.getpid()
        assert not litter.exists()


def test_a_place_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file/sweep.*paths\.runs"):
        claim(config(tmp_path / "file" / "sweep")).__enter__()
