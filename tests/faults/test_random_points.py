"""A sweep that is killed, or finds the disk full, again and again ends as if nothing had been."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from morphoquant.tracking.rundir import UNLOCKED

PARTS = {
    "note of a job": r"sweep/jobs/",
    "hashes and encoded prompts": r"cache/artifacts/(content|checkpoint|inputs)/",
    "what a run is": r"runs/.*/(identity|config)\.",
    "answers": r"write runs/.*/answers/",
    "activation statistics": r"cache/artifacts/statistics/",
    "tables of a run": r"runs/.*\.parquet|runs/.*\.safetensors|runs/.*/manifest\.json",
    "result": r"runs/.*/result\.json",
    "tables of the sweep": r"sweep/(table|pairs|cost|sweep)\.",
}


def draw(points: list[str], seed: int, kills: dict[str, int]) -> list[str]:
    """Some points of every part, at random, in the order of an uninterrupted sweep.

    Who dies at one of them has not come to the next: that one is met again by whoever goes on.
    """
    chance = random.Random(seed)
    names = list(dict.fromkeys(points))
    chosen: set[str] = set()
    for part, count in kills.items():
        there = [name for name in names if re.search(PARTS[part], name)]
        chosen |= set(chance.sample(there, count))
    return sorted(chosen, key=names.index)


def answers(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run and task -> the whole records of its file, without their seconds."""
    found = {}
    for path in sorted(folder.glob("runs/*/answers/*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        kept = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        found[f"{path.parents[1].name}/{path.name}"] = kept
    return found


def record(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on what happened: bytes of files, fields of JSON."""
    found: dict[str, Any] = dict(answers(folder))
    once = ("fingerprint", "accuracy", "modality", "mean", "bits", "logits", "reference")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name.startswith("cache") or path.suffix in (".jsonl", ".lock"):
            continue
        if path.name.startswith(UNLOCKED):  # half of one stays for an hour
            continue
        if path.name == "result.json":
            found[name] = {k: json.loads(path.read_text())[k] for k in once}
        elif path.name == "manifest.json":  # its counters tell what was left to ask
            found[name] = [linear["name"] for linear in json.loads(path.read_text())["linears"]]
        elif not path.name.startswith(("cost.", ".lock", "multirun.")):
            found[name] = path.read_bytes()
    return found


def check_kept(before: dict[str, Any], folder: Path) -> None:
    """No answer is lost, none is asked for twice."""
    after = answers(folder)
    for name, kept in before.items():
        assert after[name][: len(kept)] == kept, f"{name}: an answer was lost"
    for name, kept in after.items():
        asked = [one["doc_id"] for one in kept]
        assert len(asked) == len(set(asked)), f"{name}: a question was asked twice"


@pytest.mark.timeout(900)  # a dozen commands
def test_killed_at_random_points(command: Any, whole: Any, tmp_path: Path) -> None:
    """One SIGKILL in every part of the work, twice among the answers."""
    sound, done = whole
    points = draw(done.points, 1, dict.fromkeys(PARTS, 1) | {"answers": 2})
    folder = tmp_path / "killed"
    for seed, point in enumerate(points):
        before = answers(folder)
        fate = {"at": point, "kind": "kill", "seed": seed}
        killed = command.sweep(folder, fate=fate)
        assert killed.code == -9, f"{point}: {killed.said}"
        check_kept(before, folder)
    before = answers(folder)
    last = command.sweep(folder)
    assert last.code == 0, last.said
    check_kept(before, folder)
    assert record(folder) == record(sound)


@pytest.mark.timeout(900)
def test_disk_full_from_random_points_on(command: Any, whole: Any, tmp_path: Path) -> None:
    """The kernel lets no file grow from there on (``RLIMIT_FSIZE``), whoever writes it."""
    sound, done = whole
    parts = ("note of a job", "answers", "activation statistics", "tables of the sweep")
    before_writing = [p for p in done.points if p.startswith(("mkdir", "open", "write"))]
    folder = tmp_path / "full"
    for point in draw(before_writing, 2, dict.fromkeys(parts, 1)):
        before = answers(folder)
        full = command.sweep(folder, fate={"at": point, "kind": "full"})
        assert full.code == 1, f"{point}: {full.said}"
        for words in ("File too large", "same command again", "cannot be written"):
            assert words in full.said, f"{point}: {full.said}"
        assert "Traceback" not in full.said, f"{point}: {full.said}"
        check_kept(before, folder)
    last = command.sweep(folder)
    assert last.code == 0, last.said
    assert record(folder) == record(sound)
