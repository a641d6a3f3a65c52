"""What lies in the folders given: finished runs, unfinished ones, and jobs that failed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from morphoquant.analysis import paired
from morphoquant.analysis.notebook import MACHINE
from morphoquant.analysis.sweeps import ABOUT, JOBS, Sweep, read_notes, read_sweep
from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import IDENTITY, RESULT, read_result

SWEEPS = "sweeps"  # folder of a runs folder that holds the sweeps
MANIFEST = "manifest.json"
COLUMNS = [*paired.COLUMNS, "answer", "parsed", "unparsed"]
"""Of ``samples.parquet``."""


@dataclass(frozen=True)
class Run:
    """A finished run, read whole."""

    path: Path
    result: dict[str, Any]
    """``result.json``, and its ``path``."""
    identity: dict[str, Any]
    manifest: dict[str, Any]
    samples: pd.DataFrame
    command: str = ""
    """What started it, where a sweep's note says so."""

    @property
    def key(self) -> str:
        """Names it in links: the start of its fingerprint."""
        return str(self.result["fingerprint"])[:10]

    @property
    def quantizes(self) -> bool:
        return bool(self.result["method"] != "fp16")


@dataclass(frozen=True)
class Unfinished:
    """A run directory without a readable result."""

    name: str
    method: str
    scheme: str
    answers: dict[str, int]
    """Task -> questions answered so far."""
    reason: str
    """Why it is not among the finished ones."""


@dataclass(frozen=True)
class Failure:
    """A job of a sweep that left a reason instead of a run."""

    sweep: str
    overrides: str
    method: str
    scheme: str
    error: str


@dataclass(frozen=True)
class Gathered:
    """Everything that a report is made of. Runs by name, the unquantized ones first."""

    runs: list[Run]
    unfinished: list[Unfinished] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    """Those that were given, and those below a runs folder that was given."""


def gather(folders: Sequence[Path]) -> Gathered:
    """Read run directories, sweep folders and runs folders, in any mixture.

    The unquantized reference of a run is added where it lies beside it.

    Raises:
        HarnessError: a folder does not exist, or holds neither runs nor a sweep; no finished run
            in all of them.
    """
    directories: dict[Path, None] = {}
    sweeps: dict[Path, Sweep] = {}
    for folder in map(Path, folders):
        _check(folder)
        if is_run(folder):
            directories[folder] = None
        elif is_sweep(folder):
            sweep = _sweep(folder)
            sweeps[folder] = sweep
            directories |= dict.fromkeys(sweep.runs)
        else:
            found = [p for p in sorted(folder.iterdir()) if is_run(p)]
            below = [p for p in sorted((folder / SWEEPS).glob("*")) if is_sweep(p)]
            if not found and not below:
                raise HarnessError(
                    f"{folder}: neither runs nor a sweep here (no {RESULT}, {IDENTITY} or "
                    f"{JOBS}/). Give the folder that holds run directories (paths.runs, by default "
                    f"runs/), one or more run directories, or a sweep's folder "
                    f"(runs/{SWEEPS}/<time>)"
                )
            directories |= dict.fromkeys(found)
            sweeps |= {p: _sweep(p) for p in below}
    commands = {path.name: told for path, told in _commands(sweeps.values())}
    runs: list[Run] = []
    unfinished: list[Unfinished] = []
    for path in _with_references(list(directories)):
        read = _read(path, commands.get(path.name, ""))
        if isinstance(read, Run):
            runs.append(read)
        else:
            unfinished.append(read)
    if not runs:
        listed = "".join(f"\n  {u.name}: {u.reason}" for u in unfinished)
        raise HarnessError(
            f"no finished run in {', '.join(map(str, folders))}; a report needs one. An "
            f"interrupted run goes on when its command is given again.{listed}"
        )
    runs.sort(key=lambda run: (run.quantizes, run.path.name))
    return Gathered(runs, unfinished, _failures(sweeps.values()), list(sweeps.values()))


def is_run(folder: Path) -> bool:
    """Whether a run was begun there."""
    return any((folder / name).is_file() for name in (RESULT, IDENTITY))


def is_sweep(folder: Path) -> bool:
    """Whether jobs of a sweep left notes there."""
    return (folder / ABOUT).is_file() or (folder / JOBS).is_dir()


def _check(folder: Path) -> None:
    if not folder.exists():
        raise HarnessError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise HarnessError(
            f"{folder}: not a folder; a report is made of run directories, a sweep's folder or "
            f"the folder that holds them"
        )


def _sweep(folder: Path) -> Sweep:
    """A sweep, finished or not, with its runs where they lie now."""
    if (folder / ABOUT).is_file():
        sweep = read_sweep(folder)
    else:
        sweep = Sweep(folder, "comparison", (), read_notes(folder))
    # A copied folder: its notes still name the place where the runs were made.
    root = folder.resolve().parent.parent
    notes = [
        {**note, "run": str(_moved(Path(note["run"]), root))} if "run" in note else note
        for note in sweep.notes
    ]
    return replace(sweep, notes=notes)


def _moved(run: Path, root: Path) -> Path:
    beside = root / run.name
    return beside if is_run(beside) else run


def _with_references(directories: Sequence[Path]) -> list[Path]:
    """The directories, and the unquantized runs beside them that they refer to; each once."""
    found: dict[Path, Path] = {}
    for directory in directories:
        found.setdefault(directory.resolve(), directory)
        wanted = (read_result(directory) or {}).get("reference")
        for beside in sorted(directory.parent.glob(f"*-{wanted[:10]}")) if wanted else ():
            found.setdefault(beside.resolve(), beside)
    return list(found.values())


def _read(path: Path, told: str) -> Run | Unfinished:
    result = read_result(path)
    if result is None:
        return _unfinished(path)
    try:
        identity = json.loads((path / IDENTITY).read_text(encoding="utf-8"))
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        result = {**result, "path": str(path)}
        samples = pd.read_parquet(path / paired.SAMPLES, columns=COLUMNS)
        return Run(path, result, identity, manifest, samples, told)
    except (OSError, ValueError) as error:
        lacking = str(error).replace(f"{path}/", "")  # no absolute path in the report
        return replace(_unfinished(path), reason=f"finished, but unreadable: {lacking}")


def _unfinished(path: Path) -> Unfinished:
    try:
        config = json.loads((path / IDENTITY).read_text(encoding="utf-8"))["config"]
        method = config["method"]["name"]
        scheme = f"w{config['bits']['weight']}a{config['bits']['activation']}"
    except (OSError, ValueError, KeyError, TypeError):
        method = scheme = ""
    damaged = (path / RESULT).is_file()
    answers = {p.stem: _answered(p) for p in sorted((path / "answers").glob("*.jsonl"))}
    reason = f"{RESULT} is damaged" if damaged else "interrupted, or still running"
    return Unfinished(path.name, method, scheme, answers, reason)


def _answered(path: Path) -> int:
    """Questions with a whole record."""
    asked = set()
    for line in path.read_bytes().splitlines():
        try:
            asked.add(json.loads(line)["doc_id"])
        except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
            continue
    return len(asked)


def _told(overrides: str) -> str:
    """A job's overrides without the folders of the machine it ran on."""
    return " ".join(o for o in overrides.split() if not o.startswith(MACHINE))


def _commands(sweeps: Iterable[Sweep]) -> list[tuple[Path, str]]:
    """(run directory, command that does the same) of every job that came through."""
    return [
        (Path(note["run"]), f"python run.py {_told(note['overrides'])}")
        for sweep in sweeps
        for note in sweep.notes
        if "run" in note
    ]


def _failures(sweeps: Iterable[Sweep]) -> list[Failure]:
    """Jobs whose latest attempt failed: what came through later is no failure any more.

    Neither is a job that only began: it runs, or was killed and left an unfinished run.
    """
    latest: dict[str, Failure | None] = {}
    for sweep in sorted(sweeps, key=lambda s: s.path.name):
        for note in sweep.notes:
            told = _told(note["overrides"])
            latest[told] = None
            if "error" in note:
                method, scheme = note.get("method", ""), note.get("scheme", "")
                latest[told] = Failure(sweep.path.name, told, method, scheme, note["error"])
    return [failure for failure in latest.values() if failure is not None]
