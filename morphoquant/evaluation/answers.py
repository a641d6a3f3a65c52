"""Answers, kept as they come: an append-only JSON-lines file per task and rank.

A killed run loses at most the batch it was working on. The last line of such a file may be torn;
it is cut off when the file is opened again, so nothing is ever appended to half a record. Every
rank appends to a file of its own and reads those of all: it does not matter how many there are,
nor how many there were when an answer was written.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

from morphoquant.evaluation.errors import StorageError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """One generated answer. ``seconds`` is the question's share of its batch's time."""

    task: str
    doc_id: int
    id: str
    prompt_sha256: str
    text: str
    input_tokens: int
    output_tokens: int
    seconds: float


_TYPES: dict[object, type | tuple[type, ...]] = {"str": str, "int": int, "float": (int, float)}
_KINDS = {field.name: _TYPES[field.type] for field in fields(Answer)}


def _parse(line: bytes) -> Answer | None:
    """The record in a line, or None if it holds no whole record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or set(record) != set(_KINDS):
        return None
    if not all(isinstance(record[name], kind) for name, kind in _KINDS.items()):
        return None
    return Answer(**record)


class AnswerStore:
    """The answers of one task on disk; a context manager."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        """Open a rank's file, reading what is there and cutting off a torn last line.

        Args:
            path: ``<task>.jsonl``, the file of rank 0; rank 1 has ``<task>.rank1.jsonl`` beside it.
            rank: whose file is appended to.

        Raises:
            StorageError: the file cannot be opened for writing.
        """
        self.first = path
        self.path = path = path if rank == 0 else path.with_suffix(f".rank{rank}{path.suffix}")
        self._answers: dict[tuple[int, str], Answer] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = not path.exists()
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            if fresh:  # or a power cut could forget the file that holds synced lines
                folder = os.open(path.parent, os.O_RDONLY)
                os.fsync(folder)
                os.close(folder)
            self._size = self._read()
            self.read_others()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(
            f"{self.path}: {error.strerror or error}. The {len(self._answers)} answers written "
            f"before are safe; mend the cause (space, permissions) and run the same command again "
            f"to go on from there"
        )

    def _read(self) -> int:
        end, size = self._take(self.path)
        if end < size:
            os.ftruncate(self._file, end)
            os.fsync(self._file)
        return end

    def read_others(self) -> None:
        """Read what other ranks wrote, up to its last whole line; call it while none writes."""
        for path in sorted(self.first.parent.glob(f"{self.first.stem}.rank*{self.first.suffix}")):
            if path != self.path:
                self._take(path)
        if self.path != self.first and self.first.exists():
            self._take(self.first)

    def _take(self, path: Path) -> tuple[int, int]:
        """Take the records of a file; where its last whole line ends, and its size."""
        data = path.read_bytes()
        end = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
            answer = _parse(line)
            if answer is None:
                log.warning("%s, line %d: not a whole record; it is asked again", path, number)
            else:
                self._keep(answer)
        return end, len(data)

    def _keep(self, answer: Answer) -> None:
        self._answers[answer.doc_id, answer.prompt_sha256] = answer

    def get(self, doc_id: int, prompt_sha256: str) -> Answer | None:
        """The stored answer to exactly this prompt, if there is one."""
        return self._answers.get((doc_id, prompt_sha256))

    def append(self, answers: Iterable[Answer]) -> None:
        """Write answers and wait until they are on the disk.

        Raises:
            StorageError: they could not be written; the file still holds whole records only.
        """
        answers = list(answers)
        data = b"".join(json.dumps(asdict(a)).encode() + b"\n" for a in answers)
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            try:
                os.ftruncate(self._file, self._size)
            except OSError:  # the next start cuts the torn line off
                log.debug("%s: could not cut off a torn line", self.path)
            raise self._failure(error) from error
        self._size += len(data)
        for answer in answers:
            self._keep(answer)

    def __len__(self) -> int:
        return len(self._answers)

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._file)
