"""The real command, as a user types it: a sweep, a crash in the middle, bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
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


def answered(folder: Path) -> dict[str, list[int]]:
    """Run directory and task -> the documents answered, in the order of the file."""
    found = {}
    for path in sorted((folder / "runs").glob("*/answers/*.jsonl")):
        ids = []
        for line in path.read_text().splitlines():
            try:
                ids.append(json.loads(line)["doc_id"])
            except ValueError:  # a line torn by the kill
                continue
        found[f"{path.parents[1].name}/{path.stem}"] = ids
    return found


def results(folder: Path) -> dict[str, dict[str, object]]:
    """Run directory -> what must not depend on a crash."""
    keep = ("fingerprint", "accuracy", "modality", "bits", "reference", "mean")
    return {
        path.parent.name: {key: json.loads(path.read_text())[key] for key in keep}
        for path in (folder / "runs").glob("*/result.json")
    }


def test_sweep_ends_in_a_table_and_survives_a_kill(tmp_path: Path) -> None:
    """SIGKILL in the middle of evaluation; the second start repeats no question."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    sweep = ["-m", "method=rtn,quarot", *SMALL]

    done = run(command(whole, *sweep, tracker="wandb"), whole)
    assert done.returncode == 0, done.stderr
    for word in ("fp16", "rtn", "quarot", "mmmu", "W bits"):
        assert word in done.stdout
    (table,) = (whole / "runs" / "sweeps").glob("*/table.csv")
    frame = pd.read_csv(table)
    assert list(frame["method"]) == ["fp16", "rtn", "quarot"]
    assert (table.with_suffix(".md")).is_file()
    assert list((whole / "runs").glob("*/wandb/offline-run-*")), "wandb mirrors, offline"
    assert {path.name for path in whole.iterdir()} == {"runs", "cache"}, "nothing is left outside"

    process = subprocess.Popen(
        command(broken, *sweep),
        cwd=broken,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while sum(map(len, answered(broken).values())) < 15:
        assert process.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = answered(broken)
    assert not results(broken), "killed before the first run was finished"

    again = run(command(broken, *sweep), broken)
    assert again.returncode == 0, again.stderr
    after = answered(broken)
    for name, ids in after.items():
        assert len(ids) == len(set(ids)), f"{name}: a question was asked twice"
        kept = before.get(name, [])
        assert ids[: len(kept)] == kept, f"{name}: an answer was lost"
    assert results(broken) == results(whole)
    (finished,) = [p.parent for p in (broken / "runs" / "sweeps").glob("*/table.csv")]
    for name in ("table.csv", "table.md", "pairs.csv", "pairs.md"):
        assert (finished / name).read_bytes() == table.with_name(name).read_bytes(), name


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
