"""Finding what sweeps and runs left on disk: what notebooks start from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import read_result

ABOUT = "sweep.json"
JOBS = "jobs"
TABLES = ("outliers", "overlap", "channels", "ranges", "errors", "depth", "samples")


@dataclass(frozen=True)
class Sweep:
    """A sweep that came to its end."""

    path: Path
    report: str
    """``comparison``, ``ablation``, ``table3`` or ``sensitivity``."""
    overrides: tuple[str, ...]
    """What was given on the command line."""
    notes: list[dict[str, Any]]
    """What every job left: ``overrides`` with either ``run`` or ``error``."""

    @property
    def command(self) -> str:
        """The command that made it."""
        many = [] if any(o.startswith("experiment=") for o in self.overrides) else ["-m"]
        return " ".join(["python run.py", *many, *self.overrides])

    @property
    def runs(self) -> list[Path]:
        """Directories of the jobs that came through, each once."""
        return list(dict.fromkeys(Path(note["run"]) for note in self.notes if "run" in note))


def read_notes(sweep: Path) -> list[dict[str, Any]]:
    """The notes of a sweep's jobs, in order."""
    return [json.loads(p.read_text()) for p in sorted((Path(sweep) / JOBS).glob("*.json"))]


def read_sweep(path: Path) -> Sweep:
    """The sweep in a folder.

    Raises:
        HarnessError: no finished sweep is there.
    """
    try:
        about = json.loads((Path(path) / ABOUT).read_text())
    except (OSError, ValueError):
        raise HarnessError(f"{path}: no finished sweep here ({ABOUT} is missing)") from None
    notes = read_notes(path)
    return Sweep(Path(path), about["report"], tuple(about["overrides"]), notes)


def find_sweep(runs: Path, *overrides: str) -> Sweep:
    """The latest sweep below ``runs/sweeps`` whose command had all of ``overrides``.

    Raises:
        HarnessError: there is none; says what to run.
    """
    for folder in sorted((Path(runs) / "sweeps").glob("*"), reverse=True):
        if (folder / ABOUT).is_file():
            found = read_sweep(folder)
            if set(overrides) <= set(found.overrides):
                return found
    wanted = " ".join(overrides)
    raise HarnessError(
        f"{runs}: no finished sweep with {wanted}. Make one: python run.py {wanted} "
        f"paths.runs={runs}"
    )


def find_runs(runs: Path, **wanted: Any) -> list[dict[str, Any]]:
    """Results of all finished runs below ``runs`` whose fields are as ``wanted``, by name.

    Each has its ``path``. Fields are those of ``result.json``: ``method``, ``scheme``, ``model``,
    ``benchmark``, ``limit`` and others.

    Raises:
        HarnessError: there is none.
    """
    found = []
    for folder in sorted(p for p in Path(runs).glob("*") if p.is_dir()):
        result = read_result(folder)
        if result is not None and all(result.get(k) == v for k, v in wanted.items()):
            found.append({**result, "path": str(folder)})
    if not found:
        raise HarnessError(f"{runs}: no finished run with {wanted}")
    return found


def read_tables(run: Path, names: Iterable[str] = TABLES) -> dict[str, pd.DataFrame]:
    """The parquet tables of a run directory; those it does not have are left out."""
    paths = {name: Path(run) / f"{name}.parquet" for name in names}
    return {name: pd.read_parquet(path) for name, path in paths.items() if path.is_file()}
