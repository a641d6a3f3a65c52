"""The real command with a pipeline that needs no model, in every process of a sweep."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
FIXED = ("paths.runs=runs", "tracker=none")

Completed = subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def light_environment(
    replaced: Callable[[Path, str], dict[str, str]],
) -> Callable[[Path], dict[str, str]]:
    """The environment in which ``morphoquant.pipeline`` is ``light_pipeline``, in a new folder."""
    source = HERE / "light_pipeline.py"
    made = runpy.run_path(str(source))

    def make(folder: Path) -> dict[str, str]:
        environment = replaced(folder, source.read_text())
        for right in range(85, 98):
            made["samples"](right).to_parquet(folder / made["samples_name"](right))
        return {k: v for k, v in environment.items() if not k.startswith("OMP_")}

    return make


def start(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """``run.py`` in a folder of its own, with a relative ``paths.runs``."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments, *FIXED],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[str]) -> Completed:
    out, err = process.communicate(timeout=280)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture
def light(light_environment: Callable[[Path], dict[str, str]], tmp_path: Path) -> dict[str, str]:
    """:func:`light_environment` of this test."""
    return light_environment(tmp_path / "site")


@pytest.fixture
def command(tmp_path: Path, light: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Starts ``run.py``."""
    return lambda *arguments: start(tmp_path, light, *arguments)


@pytest.fixture
def done(command: Callable[..., subprocess.Popen[str]]) -> Callable[..., Completed]:
    """The same, to its end."""
    return lambda *arguments: finish(command(*arguments))


@pytest.fixture(scope="session")
def here(
    command_lines: Callable[..., Any],
    light_environment: Callable[[Path], dict[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Completed]]:
    """``here(folder, *arguments)``: commands that start no other process, all in the same one."""
    with command_lines(light_environment(tmp_path_factory.mktemp("light") / "site")) as command:
        yield lambda folder, *arguments: command(folder, *arguments, *FIXED)


@pytest.fixture(scope="session")
def serial(here: Callable[..., Completed], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep whose jobs ran one after the other."""
    folder = tmp_path_factory.mktemp("serial")
    found = here(folder, "-m", "method=morphoquant,rtn")
    assert found.returncode == 0, found.stderr
    (sweep,) = (folder / "runs" / "sweeps").iterdir()
    return sweep
