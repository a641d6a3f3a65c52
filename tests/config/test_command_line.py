"""``run.py`` as a user meets it: quick answers, one message, the right exit code, no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Completed = subprocess.CompletedProcess[str]
HEAVY = ("torch", "transformers", "lmms_eval", "pandas", "wandb")


@cache
def run(*arguments: str, **environment: str) -> Completed:
    """A process of its own, and what it imported in its errors."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1", **environment},
        check=False,
    )


def imported(trace: str) -> set[str]:
    """Top-level modules named in the output of ``-X importtime``."""
    names = (line.rpartition("|")[2].strip() for line in trace.splitlines() if "|" in line)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--cfg", "job"], ["bits=w5a99"], ["benchmark.limit=-1"]]
)
def test_answers_before_anything_heavy_is_imported(arguments: list[str]) -> None:
    found = run(*arguments)
    modules = imported(found.stderr)
    assert "hydra" in modules
    assert not modules & set(HEAVY)


def test_help_lists_groups_and_examples() -> None:
    found = run("--help")
    assert found.returncode == 0
    for part in ("method: atom, ", "bits: ", "method/compensation", "python run.py -m"):
        assert part in found.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bits=w5a99"], ["bits=w5a99: no such choice", "w4a4", "w8a8"]),
        (["method=qurot"], ["method=qurot", "Did you mean 'quarot'?", "rtn_static"]),
        (["method/compensation=foo"], ["method/compensation=foo", "dabc, dabc_element,"]),
        (["method.activation.granularity=per_tokne"], ["granularity='per_tokne'", "per_token"]),
        (["benchmark.limit=-1"], ["benchmark.limit=-1", "at least 1"]),
        (["methd=rtn"], ["methd", "Did you mean 'method'?"]),
        (["method.foo=1"], ["method.foo", "Known in method"]),
        (["+method.foo=1"], ["method.foo", "no such field"]),
        (["method=["], ["method=[: cannot be read"]),
        (["-m", "method=rtn,morphoquant", "bits.weight=4,99"], ["bits.weight=99", "in the job"]),
        (["-m", "method=rtn,foo"], ["method=foo", "no job was started"]),
        (["experiment=widths", "bits.activation=9"], ["bits.activation=9", "in the job"]),
    ],
)
def test_refused(
    command_line: Callable[..., Completed],
    arguments: list[str],
    expected: list[str],
    tmp_path: Path,
) -> None:
    found = command_line(tmp_path, *arguments, f"paths.runs={tmp_path}")
    assert found.returncode == 2
    for part in expected:
        assert part in found.stderr
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.rglob("*.json"))  # nothing was started


def test_traceback_on_request() -> None:
    assert "Traceback" in run("bits=w5a99", HYDRA_FULL_ERROR="1").stderr
