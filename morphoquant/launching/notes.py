"""The notes that jobs leave in their sweep's folder: ``jobs/<number>.json``, one each.

A note says ``overrides`` and ``began`` (host, process) once its job runs, and ends with either
``run`` (a run directory; ``objective`` where there is one) or ``error``. They are how a sweep
knows its jobs, on whichever host these ran: the folder has to be on a file system they all share.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from morphoquant.tracking.rundir import write_atomic

JOBS = "jobs"  # folder of a sweep: one note per job
LAG_S = 60.0  # network file systems show another host's files after up to a minute

Note = dict[str, Any]


def path_of(sweep: Path, number: int) -> Path:
    return Path(sweep) / JOBS / f"{number:04d}.json"


def leave(sweep: Path, number: int, note: Note) -> None:
    """Write the note of one job, in the place of an earlier one.

    Raises:
        StorageError: the sweep's folder cannot be written.
    """

    def write(path: Path) -> None:
        path.write_text(json.dumps(note), encoding="utf-8")

    write_atomic(path_of(sweep, number), write)


def begin(sweep: Path, number: int, overrides: str) -> None:
    """The note of a job that has begun."""
    where = f"{socket.gethostname()}, process {os.getpid()}"
    leave(sweep, number, {"overrides": overrides, "began": where})


def read(sweep: Path, number: int) -> Note | None:
    """The note of one job, or None."""
    try:
        found = json.loads(path_of(sweep, number).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_settled(note: Note | None) -> bool:
    """Whether a job has come to its end, good or bad."""
    return note is not None and ("run" in note or "error" in note)


def unsettled(sweep: Path) -> dict[int, str]:
    """Number -> overrides of the jobs that began and did not come to an end."""
    numbers = (int(path.stem) for path in (Path(sweep) / JOBS).glob("*.json"))
    found = {number: read(sweep, number) for number in numbers}
    return {n: note["overrides"] for n, note in found.items() if note and not is_settled(note)}


def wait_for(sweep: Path, numbers: Iterable[int], seconds: float = LAG_S) -> None:
    """Give the notes of finished jobs time to arrive from other hosts."""
    deadline = time.monotonic() + seconds
    waiting = list(numbers)
    while waiting and time.monotonic() < deadline:
        os.scandir(Path(sweep) / JOBS).close()  # makes NFS look again
        waiting = [n for n in waiting if not is_settled(read(sweep, n))]
        if waiting:
            time.sleep(0.5)


def bury(sweep: Path, number: int, overrides: str, reason: str) -> None:
    """The note of a job that ended without leaving one itself; settled notes stay as they are."""
    note = read(sweep, number)
    if is_settled(note):
        return
    began = f" It ran on {note['began']}." if note and "began" in note else " It never began."
    leave(
        sweep, number, {"overrides": overrides, "error": f"died without a word: {reason}.{began}"}
    )
