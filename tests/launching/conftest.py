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


@pytest.fixture
def light(tmp_path: Path) -> dict[str, str]:
    """The environment in which ``morphoquant.pipeline`` is ``light_pipeline``.

    Python imports ``sitecustomize`` first in every process, so workers of any launcher get it too.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    shutil.copy(HERE / "light_pipeline.py", folder)
    (folder / "sitecustomize.py").write_text(
        "import sys\nimport light_pipeline\nsys.modules['morphoquant.pipeline'] = light_pipeline\n"
    )
    path = os.pathsep.join((str(folder), str(ROOT)))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    return {**kept, "PYTHONPATH": path}


@pytest.fixture
def command(tmp_path: Path, light: dict[str, str]) -> Callable[..., subprocess.Popen[str]]:
    """Starts ``run.py`` in a folder of its own, with a relative ``paths.runs``."""

    def start(*arguments: str, runs: str = "runs") -> subprocess.Popen[str]:
        fixed = (f"paths.runs={runs}", "tracker=none")
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *arguments, *fixed],
            cwd=tmp_path,
            env=light,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


@pytest.fixture
def done(command: Callable[..., subprocess.Popen[str]]) -> Callable[..., Completed]:
    """The same, to its end."""

    def finish(*arguments: str, runs: str = "runs") -> Completed:
        process = command(*arguments, runs=runs)
        out, err = process.communicate(timeout=200)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return finish
