"""From lmms-eval's requests to batches for the model, and back, with every answer stored.

Two passes over the questions. The first builds each prompt, takes its hash and a rough size and
lets the media go again; the second builds the prompts of one batch at a time. So memory holds one
batch of media, and batches are made of questions of the same kind and about the same length.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from morphoquant.errors import HarnessError
from morphoquant.evaluation.answers import Answer, AnswerStore
from morphoquant.evaluation.data import doc_name
from morphoquant.evaluation.errors import DataError, StorageError
from morphoquant.evaluation.protocol import Generator, Progress
from morphoquant.evaluation.tasks import Task
from morphoquant.models.messages import Conversation
from morphoquant.ranks import Ranks

MEDIA = ("image", "video", "audio")
HEAD = 1 << 20  # bytes of a video file that enter its hash


@dataclass(frozen=True)
class Request:
    """What lmms-eval asks for: a question by its number, read anew whenever it is needed."""

    doc_id: int
    read: Callable[[], Any]
    """Gives the row, media decoded."""
    to_messages: Callable[[Any], Any]
    """The task's ``doc_to_messages``."""
    settings: dict[str, Any]
    """The task's generation settings."""


@dataclass(frozen=True)
class Question:
    """What is known of a question once its prompt was built."""

    doc_id: int
    id: str
    modality: str
    """``text``, ``image``, ``video`` or ``audio``; several are joined by ``+``."""
    sha256: str
    max_new_tokens: int
    until: tuple[str, ...]
    size: float
    """Rough number of tokens, for putting questions of one length together."""


def conversation(messages: Any) -> list[dict[str, Any]]:
    """Messages of lmms-eval (media under ``url``) in the neutral form that models take."""
    from morphoquant.calibration.readers import read_audio

    turns = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            kind = part["type"]
            value = part["text"] if kind == "text" else part["url"]
            if kind == "audio":
                value = read_audio(value)
            elif kind == "video":
                value = os.path.realpath(value)  # error messages name the file, not our link to it
            parts.append({"type": kind, kind: value})
        turns.append({"role": message["role"], "content": parts})
    return turns


def _media_bytes(kind: str, value: Any) -> Iterator[bytes]:
    """What identifies a medium, without decoding sound or reading whole clips."""
    if kind == "image":
        yield f"{value.mode} {value.size}".encode()
        yield value.tobytes()
    elif kind == "video":
        yield f"{os.path.basename(value)} {os.path.getsize(value)}".encode()
        with open(value, "rb") as file:
            yield file.read(HEAD)
    elif isinstance(value, Mapping) and value.get("bytes") is not None:
        yield value["bytes"]
    elif isinstance(value, Mapping) and value.get("path") is not None:
        yield from _media_bytes("video", value["path"])
    else:
        raise DataError(f"an audio column holds {type(value).__name__} without bytes or path")


def _rough_tokens(kind: str, value: Any) -> float:
    if kind == "text":
        return len(value) / 4
    if kind == "image":
        return value.width * value.height / 784  # 28 x 28 pixels make a token
    if kind == "audio" and value.get("bytes") is not None:
        return len(value["bytes"]) / 1280  # 16-bit PCM at 16 kHz, 25 tokens a second
    return 0.0


def describe(task: Task, request: Request) -> Question:
    """Build one prompt and say what it is.

    The hash covers the text, the media, their order and the generation settings: an answer to
    anything else is never taken for an answer to this.

    Raises:
        DataError: the row or its media cannot be read, or the stock code cannot build a prompt.
    """
    until = tuple(request.settings.get("until") or ())
    if "max_new_tokens" not in request.settings:
        raise DataError(f"task {task.name}: {task.stock} sets no max_new_tokens")
    limit = int(request.settings["max_new_tokens"])
    digest = hashlib.sha256(json.dumps([limit, until]).encode())
    kinds, size = [], 0.0
    with _naming(task, request):
        doc = request.read()
        messages = request.to_messages(doc)
        name = doc_name(task, doc)
        pieces = [(message["role"], part) for message in messages for part in message["content"]]
        for role, part in pieces:
            kind = part["type"]
            value = part["text"] if kind == "text" else part["url"]
            digest.update(f"\0{role} {kind}\0".encode())
            if kind == "text":
                digest.update(value.encode(errors="surrogatepass"))
            else:
                kinds.append(kind)
                for piece in _media_bytes(kind, value):
                    digest.update(piece)
            size += _rough_tokens(kind, value)
    modality = "+".join(kind for kind in MEDIA if kind in kinds) or "text"
    return Question(request.doc_id, name, modality, digest.hexdigest(), limit, until, size)


@contextlib.contextmanager
def _naming(task: Task, request: Request) -> Iterator[None]:
    """Say which question it was when its row or its media cannot be read."""
    try:
        yield
    except HarnessError:
        raise
    except (OSError, ValueError, EOFError, LookupError, SystemExit) as error:
        # SystemExit: the stock Video-MME code, for a missing clip. The others: a picture or sound
        # that does not decode, or a row that check() would have refused.
        kind = "" if isinstance(error, SystemExit) else f"{type(error).__name__}: "
        raise DataError(f"task {task.name}, question {request.doc_id}: {kind}{error}") from error


def _digest(described: Sequence[Question], batches: Sequence[Sequence[int]]) -> str:
    """What is left to ask, and in which batches."""
    asked = [[described[i].sha256 for i in batch] for batch in batches]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def cut(text: str, until: Sequence[str]) -> str:
    """The text up to the first stop string, as lmms-eval's own models cut it."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


class Asker:
    """Asks one task's questions; answers found in the store are not asked again."""

    def __init__(
        self,
        task: Task,
        generator: Generator,
        store: AnswerStore,
        batch_size: int,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.task = task
        self.generator = generator
        self.store = store
        self.batch_size = batch_size
        self.progress = progress
        self.ranks = ranks or Ranks()
        self.questions: dict[int, Question] = {}
        self.answers: dict[int, Answer] = {}

    def ask(self, requests: Sequence[Request]) -> list[tuple[str, Answer]]:
        """(text to score, answer) for every request, in order; batches are shared with other ranks.

        Raises:
            RankError: another rank failed, or has other questions left.
            DataError: a prompt cannot be built.
            StorageError: answers cannot be written.
        """
        described = [describe(self.task, request) for request in requests]
        self.questions = {question.doc_id: question for question in described}
        pending = []
        for index, question in enumerate(described):
            stored = self.store.get(question.doc_id, question.sha256)
            if stored is None:
                pending.append(index)
            else:
                self.answers[question.doc_id] = stored
        known, total = len(described) - len(pending), len(described)
        self._report(known, total)
        batches = list(self._batches(described, pending))
        # Nobody writes before everybody has read what is there.
        self.ranks.agree(f"questions left of {self.task.name}", _digest(described, batches))
        done = 0
        for number in self.ranks.draw(len(batches)):
            batch = batches[number]
            self._answer([requests[i] for i in batch], [described[i] for i in batch])
            done += len(batch)
            self._report(known + self.ranks.count(len(batch), done), total)
        self.ranks.gather(f"answers to {self.task.name}")
        self.store.read_others()
        for question in described:
            if question.doc_id not in self.answers:
                self.answers[question.doc_id] = self._elsewhere(question)
        return [
            (cut(self.answers[question.doc_id].text, question.until), self.answers[question.doc_id])
            for question in described
        ]

    def _elsewhere(self, question: Question) -> Answer:
        """An answer that another rank wrote."""
        answer = self.store.get(question.doc_id, question.sha256)
        if answer is None:
            raise StorageError(
                f"{self.store.first.parent}: no rank's file holds an answer to question "
                f"{question.doc_id} of {self.task.name}. All ranks must see the same folder; set "
                f"paths.runs to one that they share"
            )
        return answer

    def _report(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total, self.task.name)

    def _batches(self, described: Sequence[Question], pending: list[int]) -> Iterator[list[int]]:
        """Groups of one kind of media; longest first, so that too little memory shows at once."""
        groups: dict[tuple[str, int], list[int]] = {}
        for index in pending:
            question = described[index]
            groups.setdefault((question.modality, question.max_new_tokens), []).append(index)
        for key in sorted(groups):
            group = sorted(groups[key], key=lambda i: (-described[i].size, described[i].doc_id))
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size]

    def _answer(self, requests: Sequence[Request], questions: Sequence[Question]) -> None:
        conversations: list[Conversation] = []
        for request in requests:
            with _naming(self.task, request):
                conversations.append(conversation(request.to_messages(request.read())))
        start = time.perf_counter()
        generations = self.generator.generate(conversations, questions[0].max_new_tokens)
        seconds = (time.perf_counter() - start) / len(questions)
        if len(generations) != len(questions):
            raise RuntimeError(
                f"the model gave {len(generations)} answers to {len(questions)} questions"
            )
        answers = [
            Answer(
                task=self.task.name,
                doc_id=question.doc_id,
                id=question.id,
                prompt_sha256=question.sha256,
                text=generation.text,
                input_tokens=generation.input_tokens,
                output_tokens=generation.output_tokens,
                seconds=round(seconds, 6),
            )
            for question, generation in zip(questions, generations, strict=True)
        ]
        self.store.append(answers)
        self.answers.update({answer.doc_id: answer for answer in answers})
