"""The real command, as a user types it: a sweep, bad input."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["limit=10", "calibration.samples=20", "calibration.search_samples=5"]


def command(folder: Path, *overrides: str, tracker: str = "none") -> list[str]:
    """The argument vector of a run whose files stay below ``folder``."""
    return [
        sys.executable,
        str(ROOT / "run.py"),
        *overrides,
        f"paths.runs={folder / 'runs'}",
        f"paths.cache={folder / 'cache'}",
        f"tracker={tracker}",
    ]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, timeout=280, check=False
    )


def test_sweep_ends_in_a_table(tmp_path: Path) -> None:
    """What interrupts one, and what comes of it: ``tests/faults``."""
    sweep = ["-m", "method=rtn,quarot", *SMALL]
    done = run(command(tmp_path, *sweep, tracker="wandb"), tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("fp16", "rtn", "quarot", "mmmu", "W bits"):
        assert word in done.stdout
    (table,) = (tmp_path / "runs" / "sweeps").glob("*/table.csv")
    frame = pd.read_csv(table)
    assert list(frame["method"]) == ["fp16", "rtn", "quarot"]
    assert (table.with_suffix(".md")).is_file()
    assert list((tmp_path / "runs").glob("*/wandb/offline-run-*")), "wandb mirrors, offline"
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "cache"}, (
        "nothing is left outside"
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=magic"], ["method=magic", "morphoquant", "quarot"]),
        (["bits=w5a99"], ["bits=w5a99", "w4a4"]),
        (["bits.weight=99"], ["bits.weight", "99", "16"]),
        (["method.activation.granularity=per_tokne"], ["granularity", "per_tokne", "per_token"]),
        (["benchmark.limit=-1"], ["benchmark.limit", "-1", "at least 1"]),
        (["model.path=./nowhere"], ["model.path", "nowhere", "does not exist"]),
        (["-m", "method=rtn,morphoquant", "bits.weight=4,99"], ["bits.weight", "99"]),
    ],
)
def test_bad_input_is_refused_by_name(
    command_line: Callable[..., Any], tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    done = command_line(tmp_path, *command(tmp_path, *overrides)[2:])
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "Traceback" not in said
    for word in words:
        assert word in said, said


def test_damaged_weights_are_refused_before_loading(
    command_line: Callable[..., Any], tmp_path: Path
) -> None:
    from morphoquant.models.loading import embedded_folder

    model = tmp_path / "model"
    model.mkdir()
    for path in embedded_folder("tiny_omni").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = command_line(tmp_path, *command(tmp_path, f"model.path={model}")[2:])
    assert done.returncode == 1
    assert "truncated" in done.stderr
    assert str(weights) in done.stderr
