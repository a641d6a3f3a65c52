"""Where a task's questions lie: the embedded sets, a local copy, or the hub."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant.evaluation import tasks as registry
from morphoquant.evaluation.errors import DataError, StorageError
from morphoquant.evaluation.tasks import SCHEMAS, Task

if TYPE_CHECKING:
    from morphoquant.config.schema import BenchmarkConfig, PathsConfig

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv")  # those the stock code tries, in its order


@dataclass(frozen=True)
class LocalData:
    """A task's data on this machine."""

    folder: Path
    """Written by ``datasets.save_to_disk``."""
    videos: Path
    """Folder of ``<videoID>.mp4`` (videomme only)."""


def locate(task: Task, benchmark: BenchmarkConfig, paths: PathsConfig) -> LocalData | None:
    """The task's local data, or None where it comes from the hub.

    Builds the embedded sets where they are wanted and not there yet (some seconds, once).

    Raises:
        StorageError: the embedded sets could not be written.
    """
    if benchmark.data_root is not None:
        root = Path(benchmark.data_root).expanduser()
    elif task.embedded:
        from morphoquant.embedded.benchmarks import build, build_held_out

        root = Path(paths.cache).expanduser() / ("mini_held_out" if task.held_out else "mini")
        try:
            root = build_held_out(root) if task.held_out else build(root)
        except OSError as error:
            raise StorageError(
                f"{root}: the embedded benchmarks could not be written "
                f"({error.strerror or error}); free some 100 MB or set paths.cache elsewhere"
            ) from error
    else:
        return None
    return LocalData(root / task.folder, root / "videos")


def how_to_get(task: Task) -> str:
    """One sentence on where a missing set comes from."""
    if task.embedded:
        return "With benchmark.data_root=null it is built by itself."
    stock = registry.stock_data(task)
    config = f", {stock.config!r}" if stock.config else ""
    return (
        f"It is a copy of {stock.hub} (split {stock.split!r}), made where the hub can be reached "
        f"by datasets.load_dataset({stock.hub!r}{config}).save_to_disk('<data_root>/"
        f"{task.folder}'); then set benchmark.data_root=<data_root>."
    )


def open_local(task: Task, data: LocalData) -> Any:
    """The evaluated split of a local copy.

    Raises:
        DataError: no folder, not a data set, or no such split.
    """
    import datasets

    split = registry.stock_data(task).split
    if not data.folder.is_dir():
        raise DataError(
            f"task {task.name}: no folder {data.folder} (benchmark.data_root + "
            f"{task.folder!r}). {how_to_get(task)}"
        )
    try:
        loaded = datasets.load_from_disk(str(data.folder))
    except Exception as error:  # datasets and arrow raise many kinds on damaged folders
        raise DataError(
            f"task {task.name}: {data.folder} cannot be read as a folder of "
            f"datasets.save_to_disk ({error}). {how_to_get(task)}"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        raise DataError(
            f"task {task.name}: {data.folder} holds a single Dataset; a DatasetDict with the "
            f"split {split!r} is expected. Save DatasetDict({{{split!r}: ...}})."
        )
    if split not in loaded:
        raise DataError(
            f"task {task.name}: {data.folder} has no split {split!r}; it has "
            f"{', '.join(loaded) or 'none'}. {how_to_get(task)}"
        )
    if len(loaded[split]) == 0:
        raise DataError(f"task {task.name}: split {split!r} of {data.folder} has no rows")
    return loaded[split]


def hub_failure(task: Task, error: BaseException) -> DataError:
    """A clear error for questions that did not come from the hub."""
    stock = registry.stock_data(task)
    return DataError(
        f"task {task.name}: {stock.hub} could not be loaded from the hub "
        f"({type(error).__name__}: {error}). {how_to_get(task)}"
    )


def open_hub(task: Task) -> Any:
    """The evaluated split from the hub or its cache.

    Raises:
        DataError: it cannot be loaded.
    """
    import datasets

    stock = registry.stock_data(task)
    try:
        return datasets.load_dataset(stock.hub, stock.config, split=stock.split)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise hub_failure(task, error) from error


def find_video(folder: Path, name: str) -> Path | None:
    """The file of a clip, or None."""
    for suffix in VIDEO_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path.is_file():
            return path
    return None


def doc_name(task: Task, doc: Any) -> str:
    """The second half of a question id; for rows without an id, a hash of their content."""
    column = SCHEMAS[task.benchmark].id
    value = doc.get(column)
    if value is not None:
        return str(value)
    from morphoquant.calibration import readers  # the same hash as calibration's

    return readers.scienceqa(doc).id


def _folder_hash(digest: Any, folder: Path) -> None:
    """What a saved data set holds: its tables by content (paths and times do not count)."""
    for path in sorted(folder.rglob("*.arrow")):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())


def data_hash(benchmark: BenchmarkConfig, paths: PathsConfig) -> str:
    """Identity of the questions' content: tables by content, clips by name and size.

    Raises:
        DataError: unknown task, or questions that cannot be loaded.
    """
    digest = hashlib.sha256()
    for name in benchmark.tasks:
        task = registry.find(name)
        data = locate(task, benchmark, paths)
        digest.update(name.encode())
        if data is None:
            digest.update(str(open_hub(task)._fingerprint).encode())
            continue
        _folder_hash(digest, data.folder)
        if task.benchmark == "videomme":
            for path in sorted(data.videos.iterdir()):
                digest.update(f"{path.name} {path.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def question_ids(benchmark: BenchmarkConfig, paths: PathsConfig) -> set[str]:
    """Ids ``<set>/<id>`` of all questions that will be asked, ``limit`` honoured.

    Raises:
        DataError: unknown task, or questions that cannot be loaded.
    """
    found: set[str] = set()
    for name in benchmark.tasks:
        task = registry.find(name)
        data = locate(task, benchmark, paths)
        rows = open_hub(task) if data is None else open_local(task, data)
        if benchmark.limit is not None:
            rows = rows.select(range(min(benchmark.limit, len(rows))))
        column = SCHEMAS[task.benchmark].id
        if column in rows.column_names:
            names = rows.select_columns([column])[column]
        else:
            names = [None] * len(rows)
        found.update(
            f"{task.set}/{doc_name(task, rows[i]) if value is None else value}"
            for i, value in enumerate(names)
        )
    return found
