"""The folder of a sweep: one sweep at a time, and one name for all of its jobs.

The process that the user started holds ``<folder>/.lock`` to its end. The lock dies with that
process, so a killed sweep keeps nobody out; who holds it stands in ``<folder>/.holder.json``.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, open_dict, read_write

from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import storing, tidy, write_atomic

LOCK, HOLDER = ".lock", ".holder.json"
FOLDER = "hydra.sweep.dir"
NAMES = 100  # that are tried where several sweeps begin in the same second


class OccupiedError(HarnessError):
    """Another sweep works in this folder."""


@contextmanager
def claim(config: DictConfig) -> Iterator[Path]:
    """Hold the sweep's folder, and pin its name for all jobs.

    A folder that the clock named and another sweep holds (both began in one second) gets a number
    behind its name; one that the user named is refused.

    Raises:
        OccupiedError: another sweep works in it; nothing of that one is touched.
        StorageError: it cannot be made, or not locked.
    """
    wanted = Path(os.path.abspath(str(config.hydra.sweep.dir)))
    named = any(
        given.lstrip("+").startswith(f"{FOLDER}=") for given in config.hydra.overrides.hydra
    )
    more = [] if named else [wanted.with_name(f"{wanted.name}-{n}") for n in range(2, NAMES)]
    with ExitStack() as held:
        for folder in [wanted, *more]:
            try:
                held.enter_context(_hold(folder))
            except OccupiedError:
                if named:
                    raise
                continue
            pin(config, folder)
            yield folder
            return
        raise OccupiedError(f"{wanted}: {NAMES} sweeps began in this second; start it again")


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise OccupiedError(
                f"{folder}: another sweep works in this folder ({_holder(folder)}); nothing of it "
                f"was touched. Wait for its end, or set {FOLDER} to another folder: the runs of "
                f"both are shared all the same"
            ) from None
    note = folder / HOLDER
    try:
        with storing(folder):
            tidy(folder)
        began = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        who = {"host": socket.gethostname(), "process": os.getpid(), "began": began}
        write_atomic(note, lambda path: _write(path, json.dumps(who)))
        yield
    finally:
        with suppress(OSError):
            note.unlink()
        lock.release()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _holder(folder: Path) -> str:
    try:
        who: dict[str, Any] = json.loads((folder / HOLDER).read_text())
        return f"process {who['process']} on {who['host']}, since {who['began']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "it has just begun"


def pin(config: DictConfig, folder: Path) -> None:
    """One absolute sweep folder for all jobs, wherever they run and whatever they override."""
    pinned = {FOLDER: str(folder), "hydra.callbacks.sweep.folder": os.getcwd()}
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(folder)
        # Every job composes its config anew, from these.
        config.hydra.overrides.hydra.extend([f"{k}={_quoted(v)}" for k, v in pinned.items()])


def _quoted(text: str) -> str:
    """A string as a value in Hydra's override grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
