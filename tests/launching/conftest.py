"""The real command with a pipeline that needs no model, in every process of a sweep."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

Completed = subprocess.CompletedProcess[str]


def light_environment(folder: Path) -> dict[str, str]:
    """The environment in which ``morphoquant.pipeline`` is ``light_pipeline``.

    Python imports ``sitecustomize`` first in every process, so workers of any launcher get it too.
    """
    site = folder / "site"
    site.mkdir()
    shutil.copy(HERE / "light_pipeline.py", site)
    (site / "sitecustomize.py").write_text(
        "import sys\nimport light_pipeline\nsys.modules['morphoquant.pipeline'] = light_pipeline\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    return {**kept, "PYTHONPATH": os.pathsep.join((str(site), str(ROOT)))}


def start(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """``run.py`` in a folder of its own, with a relative ``paths.runs``."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *arguments, "paths.runs=runs", "tracker=none"],
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
def light(tmp_path: Path) -> dict[str, str]:
    """:func:`light_environment` of this test."""
    return light_environment(tmp_path)


@pytest.fixture
def command(tmp_path: Path, light: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Starts ``run.py``."""
    return lambda *arguments: start(tmp_path, light, *arguments)


@pytest.fixture
def done(command: Callable[..., subprocess.Popen[str]]) -> Callable[..., Completed]:
    """The same, to its end."""
    return lambda *arguments: finish(command(*arguments))


@pytest.fixture(scope="session")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep whose jobs ran one after the other."""
    folder = tmp_path_factory.mktemp("serial")
    found = finish(start(folder, light_environment(folder), "-m", "method=morphoquant,rtn"))
    assert found.returncode == 0, found.stderr
    (sweep,) = (folder / "runs" / "sweeps").iterdir()
    return sweep
