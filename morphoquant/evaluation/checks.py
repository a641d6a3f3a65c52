"""Refuse bad question data by name, before any weight is loaded.

The stock task code meets most of these only after every answer was generated, as a ``KeyError``,
an ``IndexError`` or a ``sys.exit``; some it would score as wrong in silence.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant.evaluation import tasks as registry
from morphoquant.evaluation.data import (
    VIDEO_SUFFIXES,
    LocalData,
    find_video,
    how_to_get,
    locate,
    open_local,
)
from morphoquant.evaluation.errors import DataError
from morphoquant.evaluation.tasks import SCHEMAS, Kind, Task

if TYPE_CHECKING:
    from morphoquant.config.schema import BenchmarkConfig, PathsConfig

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MEDIA: tuple[Kind, ...] = ("image", "audio")

Row = Mapping[str, Any]


class _Bad(Exception):
    """A value that the stock code cannot take: (column, what was found, what is expected)."""

    def __init__(self, column: str, found: Any, expected: str) -> None:
        super().__init__(column)
        shown = found if isinstance(found, str) and found.startswith("no ") else repr(found)
        self.column, self.found, self.expected = column, shown[:200], expected


def check(benchmark: BenchmarkConfig, paths: PathsConfig) -> None:
    """Look at every question that will be asked; builds the embedded sets where they are missing.

    Hub tasks are checked by name only. Nothing of lmms-eval or torch is imported.

    Raises:
        DataError: unknown task, missing data, column or video, or a value that the stock code
            cannot take; the message says where, what was found and what is expected.
        StorageError: the embedded sets could not be written.
    """
    chosen = [registry.find(name) for name in benchmark.tasks]
    twice = {name for name in benchmark.tasks if benchmark.tasks.count(name) > 1}
    if twice:
        raise DataError(f"benchmark.tasks: {', '.join(sorted(twice))} named more than once")
    for task in chosen:
        data = locate(task, benchmark, paths)
        if data is not None:
            _check_local(task, data, benchmark.limit)


def _check_local(task: Task, data: LocalData, limit: int | None) -> None:
    rows = open_local(task, data)
    place = f"{data.folder} (split {registry.stock_data(task).split!r})"
    _check_columns(task, rows.features, place)
    for index, row in enumerate(_light_rows(task, rows, limit)):
        try:
            _ROW_CHECKS[task.benchmark](row)
            if task.benchmark == "videomme":
                _check_video(row, data)
        except _Bad as bad:
            raise DataError(
                f"task {task.name}: {place}, row {index}, column {bad.column!r}: found "
                f"{bad.found}; expected {bad.expected}. Mend the row, or leave it out of the copy."
            ) from None


def _check_columns(task: Task, features: Mapping[str, Any], place: str) -> None:
    schema = SCHEMAS[task.benchmark]
    for column, kind in schema.columns.items():
        if column not in features:
            if column == schema.id and not schema.id_required:
                continue
            raise DataError(
                f"task {task.name}: {place} has no column {column!r} ({kind}); it has "
                f"{', '.join(features)}. {how_to_get(task)}"
            )
        if not _is_kind(features[column], kind):
            raise DataError(
                f"task {task.name}: {place}, column {column!r}: found {features[column]}; "
                f"expected {_KIND_WORDS[kind]}. {how_to_get(task)}"
            )


_KIND_WORDS: dict[Kind, str] = {
    "text": "strings",
    "optional text": "strings or null",
    "integer": "integers",
    "texts": "lists of strings",
    "image": "datasets.Image(decode=True)",
    "audio": "datasets.Audio, or a struct of 'bytes' and 'path'",
}


def _is_kind(feature: Any, kind: Kind) -> bool:
    from datasets import Audio, Image, Value

    def dtype(value: Any) -> str:
        return str(value.dtype) if isinstance(value, Value) else ""

    if kind in ("text", "optional text"):
        nothing = dtype(feature) == "null" and kind == "optional text"
        return dtype(feature) in ("string", "large_string") or nothing
    if kind == "integer":
        return dtype(feature).startswith(("int", "uint"))
    if kind == "texts":
        item = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return dtype(item) in ("string", "large_string")
    if kind == "image":  # an all-empty column is saved as null
        return (isinstance(feature, Image) and feature.decode) or dtype(feature) == "null"
    return isinstance(feature, Audio) or (isinstance(feature, dict) and "bytes" in feature)


def _light_rows(task: Task, rows: Any, limit: int | None) -> Iterable[Row]:
    """Rows with media replaced by True (there) or None, so that nothing is decoded."""
    columns = {
        name: kind
        for name, kind in SCHEMAS[task.benchmark].columns.items()
        if name in rows.features
    }
    count = len(rows) if limit is None else min(limit, len(rows))
    table = rows.select_columns(list(columns)).with_format("arrow")[:count]
    values = {
        name: (
            [there or None for there in table.column(name).is_valid().to_pylist()]
            if kind in MEDIA
            else table.column(name).to_pylist()
        )
        for name, kind in columns.items()
    }
    for i in range(count):
        yield {name: column[i] for name, column in values.items()}


def _need_text(row: Row, *columns: str) -> None:
    for column in columns:
        if not isinstance(row[column], str) or not row[column].strip():
            raise _Bad(column, row[column], "some text")


def _need_one_of(row: Row, column: str, allowed: Iterable[str]) -> None:
    allowed = tuple(allowed)
    if row[column] not in allowed:
        raise _Bad(column, row[column], f"one of {', '.join(allowed)}")


def _check_mmmu(row: Row) -> None:
    _need_text(row, "id", "question", "answer")
    if not re.fullmatch(r"[^_]+_.+?_\d+", row["id"]):
        raise _Bad("id", row["id"], "<split>_<Subject>_<number>")
    _need_one_of(row, "question_type", ("multiple-choice", "open"))
    prompt = row["question"]
    if row["question_type"] == "multiple-choice":
        try:
            options = ast.literal_eval(row["options"] or "")
        except (ValueError, SyntaxError):
            options = None
        if (
            not isinstance(options, list)
            or not 1 <= len(options) <= len(LETTERS)
            or not all(isinstance(option, str) for option in options)
        ):
            raise _Bad("options", row["options"], "the text of a list of strings: \"['a', 'b']\"")
        _need_one_of(row, "answer", LETTERS[: len(options)])
        prompt = "\n".join([prompt, *options])
    for number in re.findall(r"<image (\d+)>", prompt):
        column = f"image_{number}"
        if row.get(column) is None:
            raise _Bad(column, "no image", f"an image, which the question calls <image {number}>")


def _check_scienceqa(row: Row) -> None:
    _need_text(row, "question")
    choices = row["choices"]
    if not choices or None in choices or len(choices) > len(LETTERS):
        raise _Bad("choices", choices, f"1 to {len(LETTERS)} strings")
    answer = row["answer"]
    if answer is None or not 0 <= answer < len(choices):
        raise _Bad("answer", answer, f"an index into the {len(choices)} choices, from 0")


def _check_videomme(row: Row) -> None:
    _need_text(row, "videoID", "question_id", "question")
    for column, allowed in registry.videomme_labels().items():
        _need_one_of(row, column, allowed)
    options = row["options"]
    # The stock parser knows A to D only, and the prompt takes the letters from the options.
    lettered = options and all((o or "").startswith(f"{a}.") for a, o in zip("ABCD", options))  # noqa: B905
    if not lettered or len(options) > 4:
        raise _Bad("options", options, "1 to 4 strings 'A. ...', 'B. ...', in order")
    _need_one_of(row, "answer", "ABCD"[: len(options)])


def _check_air_bench(row: Row) -> None:
    _need_text(row, "uniq_id", "task_name", "question", "choice_a", "choice_b", "answer_gt")
    if row["audio"] is None:
        raise _Bad("audio", "no sound", "a sound")
    choices = [row[f"choice_{letter}"] for letter in "abcd"]
    if row["answer_gt"] not in choices:
        named = ", ".join(repr(choice) for choice in choices if choice)
        raise _Bad("answer_gt", row["answer_gt"], f"the text of one of the choices: {named}")


def _check_video(row: Row, data: LocalData) -> None:
    name = row["videoID"]
    found = find_video(data.videos, name)
    if found is None:
        suffixes = ", ".join(VIDEO_SUFFIXES)
        raise _Bad(
            "videoID", f"no file for {name!r}", f"{data.videos / name} with one of {suffixes}"
        )
    state = found.stat()
    problem = _clip_problem(found, state.st_size, state.st_mtime_ns)
    if problem is not None:
        raise _Bad("videoID", f"no clip in {found} ({problem})", "a file with a video that decodes")


@cache
def _clip_problem(path: Path, size: int, changed: int) -> str | None:
    """Why a clip cannot be used; None where its header is in order and its first frame decodes.

    Remembered for the state of the file: several questions share a clip, and jobs share clips.
    """
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                return "it has no video stream"
            next(container.decode(container.streams.video[0]))
    except StopIteration:
        return "no frame could be decoded"
    except av.error.FFmpegError as error:
        return str(error).split(":", 1)[0]
    return None


_ROW_CHECKS: dict[str, Callable[[Row], None]] = {
    "mmmu": _check_mmmu,
    "scienceqa": _check_scienceqa,
    "videomme": _check_videomme,
    "air_bench": _check_air_bench,
}
