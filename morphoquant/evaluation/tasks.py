"""Which tasks there are, and which stock lmms-eval task each of them is.

One table. A task is a stock task (its YAML is found in the installed package and used as it is)
plus the place of its data. Hub ids, splits and prompts are read from the stock YAML, never
repeated here. Nothing in this module imports lmms-eval.
"""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from morphoquant.evaluation.errors import DataError

Benchmark = Literal["mmmu", "scienceqa", "videomme", "air_bench"]
Kind = Literal["text", "optional text", "integer", "texts", "image", "audio"]


@dataclass(frozen=True)
class Task:
    """One evaluated task."""

    name: str
    stock: str
    """The stock YAML, relative to ``lmms_eval/tasks``."""
    benchmark: Benchmark
    set: str
    """First half of a question id ``<set>/<id>``; the same word that calibration uses."""
    folder: str
    """Name of the local copy, below ``data_root``."""
    embedded: bool = False
    """Data come from the embedded sets when ``data_root`` is null."""
    split: str | None = None
    """Another split than the stock task scores: questions to choose hyper-parameters by."""
    held_out: bool = False
    """Embedded: the sets that are neither evaluated nor calibrated on."""


@dataclass(frozen=True)
class Schema:
    """The columns that a benchmark's stock task code reads, and the one that names a question."""

    id: str
    columns: dict[str, Kind]
    id_required: bool = True


SCHEMAS: dict[Benchmark, Schema] = {
    "mmmu": Schema(
        "id",
        {
            "id": "text",
            "question": "text",
            "options": "text",
            "answer": "text",
            "question_type": "text",
            **{f"image_{i}": "image" for i in range(1, 8)},
        },
    ),
    # The published ScienceQA has no id column: such rows are named by a hash of their content.
    "scienceqa": Schema(
        "id",
        {
            "image": "image",
            "question": "text",
            "choices": "texts",
            "answer": "integer",
            "hint": "optional text",
        },
        id_required=False,
    ),
    "videomme": Schema(
        "question_id",
        {
            "duration": "text",
            "domain": "text",
            "sub_category": "text",
            "task_type": "text",
            "videoID": "text",
            "question_id": "text",
            "question": "text",
            "options": "texts",
            "answer": "text",
        },
    ),
    "air_bench": Schema(
        "uniq_id",
        {
            "audio": "audio",
            "uniq_id": "text",
            "task_name": "text",
            "question": "text",
            "choice_a": "text",
            "choice_b": "text",
            "choice_c": "optional text",
            "choice_d": "optional text",
            "answer_gt": "text",
        },
    ),
}


def _table() -> dict[str, Task]:
    mmmu, sqa, video = "mmmu/mmmu_val.yaml", "scienceqa/scienceqa.yaml", "videomme/videomme.yaml"
    sqa_img = "scienceqa/scienceqa_img.yaml"
    air = "air_bench/air_bench_foundation_{}.yaml".format
    sound, music = "air_bench_sound", "air_bench_music"
    sci, vid = "scienceqa", "videomme"
    rows = (
        #    name, stock YAML, benchmark, set, folder, embedded
        Task("mini_mmmu", mmmu, "mmmu", "mmmu", "mmmu", True),
        Task("mini_scienceqa", sqa, "scienceqa", "scienceqa", "scienceqa", True),
        Task("mini_videomme", video, "videomme", "videomme", "videomme", True),
        Task("mini_air_bench_sound", air("sound"), "air_bench", sound, sound, True),
        Task("mini_air_bench_music", air("music"), "air_bench", music, music, True),
        Task("mini_held_out_mmmu", mmmu, "mmmu", "mmmu", "mmmu", True, held_out=True),
        Task("mini_held_out_scienceqa", sqa, "scienceqa", sci, sci, True, held_out=True),
        Task("mini_held_out_videomme", video, "videomme", vid, vid, True, held_out=True),
        Task("mini_held_out_sound", air("sound"), "air_bench", sound, sound, True, held_out=True),
        Task("mini_held_out_music", air("music"), "air_bench", music, music, True, held_out=True),
        Task("mmmu_val", mmmu, "mmmu", "mmmu", "mmmu"),
        Task("scienceqa", sqa, "scienceqa", "scienceqa", "scienceqa"),
        Task("scienceqa_validation", sqa, "scienceqa", sci, sci, split="validation"),
        Task("scienceqa_img", sqa_img, "scienceqa", "scienceqa", "scienceqa_img"),
        Task("videomme", video, "videomme", "videomme", "videomme"),
        Task("air_bench_foundation_sound", air("sound"), "air_bench", "air_bench", "air_bench"),
        Task("air_bench_foundation_music", air("music"), "air_bench", "air_bench", "air_bench"),
        Task("air_bench_foundation_speech", air("speech"), "air_bench", "air_bench", "air_bench"),
    )
    return {task.name: task for task in rows}


TASKS: dict[str, Task] = _table()


def find(name: str) -> Task:
    """The task called ``name``.

    Raises:
        DataError: no such task; lists those there are.
    """
    if name not in TASKS:
        raise DataError(f"benchmark.tasks: unknown task {name!r}; known are {', '.join(TASKS)}")
    return TASKS[name]


def stock_folder() -> Path:
    """Folder of the installed lmms-eval's own tasks (found without importing it).

    Raises:
        DataError: lmms-eval is not installed.
    """
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("lmms-eval is not installed; install this package with its requirements")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def stock_yaml(task: Task) -> Path:
    """The stock YAML of a task.

    Raises:
        DataError: the installed lmms-eval has no such file.
    """
    path = stock_folder() / task.stock
    if not path.is_file():
        raise DataError(f"task {task.name}: the installed lmms-eval has no {task.stock} ({path})")
    return path


@dataclass(frozen=True)
class StockData:
    """Where the stock task takes its data from."""

    hub: str
    config: str | None
    split: str


@lru_cache(maxsize=64)
def _plain_yaml(path: Path) -> dict[str, Any]:
    """A stock YAML with its includes, functions left out."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    with path.open() as file:
        values: dict[str, Any] = yaml.load(file, Loader)
    includes = values.pop("include", [])
    merged: dict[str, Any] = {}
    for name in [includes] if isinstance(includes, str) else includes:
        merged.update(_plain_yaml(path.parent / name))
    return {**merged, **values}


def stock_data(task: Task) -> StockData:
    """Hub id, config and split of a task, as the stock YAML names them."""
    values = _plain_yaml(stock_yaml(task))
    split = task.split or values.get("test_split") or values["validation_split"]
    return StockData(str(values["dataset_path"]), values.get("dataset_name"), str(split))


@lru_cache(maxsize=1)
def videomme_labels() -> dict[str, tuple[str, ...]]:
    """Column -> legal values of Video-MME, read from the stock source without running it.

    The stock code looks a row's labels up in a table built from these lists and stops with a
    ``KeyError`` on anything else, after all answers were generated.
    """
    names = {
        "VIDEO_TYPE": "duration",
        "CATEGORIES": "domain",
        "SUB_CATEGORIES": "sub_category",
        "TASK_CATEGORIES": "task_type",
    }
    source = (stock_folder() / "videomme" / "utils.py").read_text()
    labels: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            column = names.get(node.targets[0].id)
            if column is not None:
                labels[column] = tuple(ast.literal_eval(node.value))
    return labels
