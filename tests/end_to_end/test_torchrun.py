"""``torchrun``: two processes give what one gives, and one goes on where two were killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
QUESTIONS = 24
FIXED = [
    "method=rtn",
    "reference=false",
    "benchmark=mini_scienceqa",
    f"limit={QUESTIONS}",
    "benchmark.batch_size=1",
    "calibration.samples=10",
    "calibration.search_samples=5",
    "statistics.enabled=false",
    "tracker=none",
]


def command(folder: Path, processes: int) -> list[str]:
    """The argument vector of a run below ``folder`` by so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = [f"paths.runs={folder / 'runs'}", f"paths.cache={folder.parent / 'cache'}"]
    started = launcher if processes > 1 else []
    return [sys.executable, *started, str(ROOT / "run.py"), *FIXED, *paths]


def answered(folder: Path) -> list[tuple[str, int]]:
    """(file, question) of every whole answer on disk."""
    found = []
    for path in sorted((folder / "runs").glob("*/answers/*.jsonl")):
        whole = path.read_text().rpartition("\n")[0].splitlines()
        found += [(path.name, json.loads(line)["doc_id"]) for line in whole]
    return found


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, Any], pd.DataFrame]:
    """What must not depend on who asked which question: result, manifest, samples."""
    (run,) = [path.parent for path in (folder / "runs").glob("*/result.json")]
    result = json.loads((run / "result.json").read_text())
    kept = {key: result[key] for key in ("fingerprint", "accuracy", "mean", "bits")}
    manifest = json.loads((run / "manifest.json").read_text())
    return kept, manifest, pd.read_parquet(run / "samples.parquet")


def calls(manifest: dict[str, Any]) -> set[int]:
    return {linear.pop("calls") for linear in manifest["linears"]}


@pytest.mark.timeout(900)  # three cold starts of the whole command
def test_two_processes_share_the_questions_and_one_goes_on_alone(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    done = subprocess.run(
        command(whole, 2), cwd=whole, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run: ") == 1, "one rank speaks"
    files = answered(whole)
    assert sorted(question for _, question in files) == list(range(QUESTIONS)), "each once"
    assert {name for name, _ in files} == {"mini_scienceqa.jsonl", "mini_scienceqa.rank1.jsonl"}
    assert {path.name for path in whole.iterdir()} == {"runs"}, "nothing is left outside"

    process = subprocess.Popen(
        command(broken, 2), cwd=broken, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 250
    while len(answered(broken)) < 4:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()  # torchrun passes it on; neither rank says goodbye
    process.wait(60)
    before = answered(broken)
    assert len(before) < QUESTIONS
    again = subprocess.run(
        command(broken, 1), cwd=broken, capture_output=True, text=True, timeout=280, check=False
    )
    assert again.returncode == 0, again.stderr
    after = answered(broken)
    assert set(before) <= set(after), "an answer was lost"
    assert sorted(question for _, question in after) == list(range(QUESTIONS)), "each once"

    result, manifest, samples = outcome(whole)
    resumed, its_manifest, its_samples = outcome(broken)
    assert result == resumed
    pd.testing.assert_frame_equal(samples, its_samples)
    # The counters of both ranks were added up: more ran than in what was left for one process.
    assert min(calls(manifest)) > max(calls(its_manifest))
