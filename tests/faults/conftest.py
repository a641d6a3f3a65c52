"""The real command, many times, at the price of one start; see ``server.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

METHODS = ("method=fp16,rtn_static", "bits.weight=3")
SERVER = Path(__file__).parent / "server.py"


@dataclass(frozen=True)
class Done:
    """What became of a command.

    Attributes:
        code: of its exit, the negative signal that ended it, or None where it stopped itself.
        said: on stdout and stderr.
        points: where it touched the disk; see ``points.py``.
    """

    pid: int
    code: int | None
    said: str
    points: list[str]


class Command:
    """``run.py`` on small sets, with ``runs`` and ``cache`` in the folder that it is given."""

    def __init__(self, sets: Path) -> None:
        self._server = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        read = {"scienceqa": "scienceqa", "mmmu": "mmmu", "air_bench": "air_bench_sound"}
        sources = [f"{{reader: {kind}, path: '{sets / name}'}}" for kind, name in read.items()]
        self._fixed = [
            f"benchmark.data_root={sets}",
            "benchmark.tasks=[mini_scienceqa, mini_videomme]",
            "benchmark.batch_size=1",
            "limit=2",
            f"calibration.sources=[{', '.join(sources)}]",
            "calibration.samples=3",
            "calibration.search_samples=0",
            "statistics.figures=false",
            "statistics.probes=1",
            "tracker=none",
            "paths.runs=runs",
            "paths.cache=cache",
        ]

    def __call__(
        self,
        folder: Path,
        *arguments: str,
        fate: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Done:
        """Run it to its end, or to the point at which ``fate`` stops it."""
        folder.mkdir(exist_ok=True)
        flags = [one for one in arguments if one.startswith("-")]
        given = [one for one in arguments if one not in flags]
        return self._ask(
            folder=str(folder),
            arguments=[*flags, *self._fixed, *given],
            fate=fate,
            environment=environment or {},
        )

    def sweep(self, folder: Path, fate: dict[str, Any] | None = None) -> Done:
        """The sweep of these tests: two methods, one of them the original, into ``sweep``."""
        return self(folder, "-m", *METHODS, "hydra.sweep.dir=sweep", fate=fate)

    def go_on(self, stopped: Done) -> Done:
        return self._ask(go_on=stopped.pid)

    def _ask(self, **request: Any) -> Done:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Done(**json.loads(self._server.stdout.readline()))

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="session")
def command(mini_root: Path) -> Iterator[Command]:
    found = Command(mini_root)
    yield found
    found.close()


@pytest.fixture(scope="session")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The folder of a sweep that nothing happened to, and what it did."""
    folder = tmp_path_factory.mktemp("whole")
    done = command.sweep(folder)
    assert done.code == 0, done.said
    return folder, done
