"""One directory per run: everything that a table is made of, written so that a crash loses nothing.

::

    <runs>/<name>-<fingerprint>/
        config.yaml       the configuration, every field
        identity.json     what makes this run this run; under "about": files' hashes, git commit
        answers/          <task>.jsonl, one line per answered question, as they come
        manifest.json     every linear in scope: what was done to it, how often it ran
        samples.parquet   every question with its answer and verdict
        outliers.parquet  statistics per layer, input group and modality
        overlap.parquet   shared outlier channels of two modalities
        channels.parquet  statistics per channel
        result.json       written last; a run with one is finished
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from morphoquant.errors import HarnessError
from morphoquant.tracking.differences import ABOUT, IDENTITY, RESULT, explain
from morphoquant.tracking.fingerprint import fingerprint

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

TEMPORARY = re.compile(r"\..+-\d+-[0-9a-f]{8}")  # see write_atomic
CONFIG = "config.yaml"
UNLOCKED = (f".{CONFIG}-", f".{IDENTITY}-")  # temporaries of files that are written before the lock
ABANDONED = 3600.0  # seconds after which such a one is taken for a killed process's
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
NAME_DIGITS = 10  # of the fingerprint, in the directory's name


class StorageError(HarnessError, OSError):
    """The run directory cannot be written: full disk, no permission."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Let an ``OSError`` say which place cannot be written, and what to do."""
    try:
        yield
    except (OSError, NotImplementedError) as error:  # the latter: a disk without locks
        if isinstance(error, StorageError):
            raise
        raise _unwritable(path, error) from error


def _unwritable(path: Path | str, error: BaseException) -> StorageError:
    reason = getattr(error, "strerror", None) or error
    return StorageError(
        f"{path}: cannot be written ({reason}). Nothing that was finished is lost: make room (or "
        f"set paths.runs=FOLDER) and give the same command again"
    )


def as_storage_error(error: BaseException) -> BaseException:
    """The error of a full disk as a :class:`StorageError`, whoever met it; others as they are."""
    if isinstance(error, HarnessError) or getattr(error, "errno", None) not in FULL:
        return error
    found = _unwritable(getattr(error, "filename", None) or "a file", error)
    found.__cause__ = error
    return found


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then put it in its place.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not mkstemp: its files are private, and run directories are shared.
        temporary = path.with_name(f".{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what killed processes left half written; for whoever holds the folder's lock.

    Another process may this very moment open the directory that we hold, perhaps on another host:
    what is written without the lock goes when it is old.
    """
    for path in folder.rglob(".*"):
        if not TEMPORARY.fullmatch(path.name) or not path.is_file():
            continue
        with suppress(FileNotFoundError):
            if path.name.startswith(UNLOCKED) and time.time() - path.stat().st_mtime < ABANDONED:
                continue
            path.unlink()


def read_result(path: Path) -> dict[str, Any] | None:
    """The result of a run directory, or None where the run is not finished."""
    try:
        found = json.loads((path / RESULT).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "fingerprint" in found else None


class RunDirectory:
    """The directory of one run; see the module's text for what lies in it.

    Where several processes work on a run, one of them ``writes``; for the others every method that
    would write does nothing.
    """

    def __init__(self, path: Path, identity: dict[str, Any], writes: bool = True) -> None:
        self.path = path
        self.identity = identity
        self.writes = writes
        self.fingerprint = fingerprint(identity)

    @classmethod
    def open(
        cls,
        root: Path,
        name: str,
        identity: dict[str, Any],
        about: Callable[[], dict[str, Any]] | None = None,
        writes: bool = True,
    ) -> RunDirectory:
        """Make the directory, or take it up again; say what a new one has new.

        Args:
            root: the folder of all runs.
            name: of the run; the fingerprint is put behind it.
            identity: what makes this run this run.
            about: what else ``identity.json`` tells, outside of the fingerprint; asked once.
            writes: whether this process may write: of several ranks, the first.

        Raises:
            StorageError: it cannot be made.
        """
        path = Path(root) / f"{name}-{fingerprint(identity)[:NAME_DIGITS]}"
        directory = cls(path, identity, writes)
        if not writes:
            return directory
        with storing(path):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / IDENTITY).is_file():
            told = identity if about is None else identity | {ABOUT: about()}
            reason = explain(path.parent, name, told)
            if reason is not None:
                log.info("new: %s is %s", path.name, reason)
            directory.write_text(CONFIG, OmegaConf.to_yaml(identity.get("config", {})))
            directory.write_json(IDENTITY, told)
        return directory

    @property
    def answers(self) -> Path:
        return self.path / "answers"

    @property
    def finished(self) -> bool:
        return read_result(self.path) is not None

    def result(self) -> dict[str, Any]:
        """The finished run's result.

        Raises:
            FileNotFoundError: the run is not finished.
        """
        found = read_result(self.path)
        if found is None:
            raise FileNotFoundError(f"{self.path / RESULT}: this run is not finished")
        return found

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory; a second process waits until the first is done.

        The lock dies with its process, so a killed run leaves none behind.
        """
        if not self.writes:
            yield
            return
        from filelock import FileLock, Timeout

        with storing(self.path):
            lock = FileLock(self.path / ".lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.info("waiting: another process works on %s", self.path)
                lock.acquire()
        try:
            with storing(self.path):
                if not os.access(self.path, os.W_OK):  # said now, not after an hour of work
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                tidy(self.path)
            yield
        finally:
            lock.release()

    # ------------------------------------------------------------------- writing

    def write(self, name: str, fill: Callable[[Path], None]) -> None:
        """A file that ``fill`` writes to the path it is given; see :func:`write_atomic`."""
        if self.writes:
            write_atomic(self.path / name, fill)

    def write_text(self, name: str, text: str) -> None:
        self.write(name, lambda path: _write_text(path, text))

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_table(self, name: str, frame: pd.DataFrame) -> None:
        """A table as ``<name>.parquet``."""
        self.write(f"{name}.parquet", lambda path: frame.to_parquet(path, index=False))

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result: from now on the run counts as finished."""
        self.write_json(RESULT, result)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
