"""What a run's data and checkpoint hold, looked up where no file has changed since it was seen.

The identity of a run needs hashes of its checkpoint, its calibration prompts and its questions.
Computing them means reading everything. The result is kept beside the state of every file that was
read (size, times of its last change), so that a finished run is recognised without opening a data
set or importing torch. What comes from the hub is always asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant.config.schema import ModelConfig, RunConfig
from morphoquant.sharing.artifacts import ArtifactStore
from morphoquant.tracking.fingerprint import code_hash, fingerprint, package_versions

if TYPE_CHECKING:
    from morphoquant.calibration.samples import Calibration

CHECKPOINT, CONTENT = "checkpoint", "content"


@dataclass(frozen=True)
class Content:
    """Identity of what a run reads.

    Attributes:
        calibration_ids, calibration_data: of the prompts: which, and what they hold.
        question_ids, question_data: of the questions.
        leaked: calibration samples that are evaluated too; 0 unless that was allowed.
    """

    calibration_ids: str
    calibration_data: str
    question_ids: str
    question_data: str
    leaked: int


def checkpoint_hash(config: ModelConfig, store: ArtifactStore) -> str:
    """:func:`morphoquant.models.loading.model_hash`; of files that did not change, looked up."""
    from morphoquant.models.loading import model_hash, read_files, resolve

    folder = resolve(config)
    if folder is None:
        return model_hash(config)
    with store.claim(CHECKPOINT, {"files": file_states(read_files(folder))}) as claim:
        if claim.found is not None:
            return str(claim.found.values["hash"])
        found = model_hash(config)
        claim.put({"hash": found})
    return found


def content_of(config: RunConfig, store: ArtifactStore) -> tuple[Content, Calibration | None]:
    """Identity of calibration prompts and questions; they are checked when they are first seen.

    Returns:
        the identity, and the calibration where it had to be loaded.

    Raises:
        HarnessError: data that is missing or bad, or calibration samples that are evaluated.
    """
    state = _state(config)
    if state is None:
        return _inspect(config)
    with store.claim(CONTENT, state) as claim:
        if claim.found is not None:
            return Content(**claim.found.values), None
        content, calibration = _inspect(config)
        if _state(config) == state:  # else the embedded sets were only built now
            claim.put(asdict(content))
    return content, calibration


def file_states(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and times of last change of some files; what rewriting one cannot leave alike."""
    found = []
    for path in paths:
        state = path.stat()
        where = str(path.resolve())
        found.append([where, state.st_size, state.st_mtime_ns, state.st_ctime_ns])
    return found


def load_calibration(config: RunConfig) -> Calibration:
    """The run's calibration prompts.

    Raises:
        HarnessError: missing or too few.
    """
    from morphoquant.calibration.samples import load_samples

    return load_samples(config.calibration, _mini_root(config))


def _inspect(config: RunConfig) -> tuple[Content, Calibration]:
    """Check and hash everything."""
    from morphoquant import evaluation
    from morphoquant.calibration.samples import check_disjoint

    evaluation.check(config.benchmark, config.paths)
    calibration = load_calibration(config)
    questions = evaluation.question_ids(config.benchmark, config.paths)
    if not config.calibration.allow_leakage:
        check_disjoint(calibration.ids, questions)
    content = Content(
        calibration_ids=calibration.ids_hash,
        calibration_data=calibration.content_hash,
        question_ids=fingerprint({"ids": sorted(questions)})[:16],
        question_data=evaluation.data_hash(config.benchmark, config.paths),
        leaked=len(set(calibration.ids) & questions),
    )
    return content, calibration


def _mini_root(config: RunConfig) -> Path | None:
    """The built embedded sets, where a calibration source asks for them."""
    from morphoquant.calibration.samples import MINI

    if not any(source.path.startswith(MINI) for source in config.calibration.sources):
        return None
    from morphoquant.embedded.benchmarks import build

    return build(Path(config.paths.cache) / "mini")


def _state(config: RunConfig) -> dict[str, Any] | None:
    """What :func:`_inspect` depends on, with the state of all files; None where the hub is asked.

    A folder that is missing (or a task that is not known) has no files: what is wrong with it is
    said by the inspection.
    """
    folders = _folders(config)
    if folders is None:
        return None
    files = (path for folder in sorted(folders) for path in sorted(folder.rglob("*")))
    try:
        states = file_states(path for path in files if path.is_file())
    except OSError:  # changes under our hands
        return None
    return {
        "calibration": config.calibration.model_dump(mode="json"),
        "benchmark": config.benchmark.model_dump(mode="json"),
        "files": fingerprint({"files": states}),
        "code": code_hash(),
        "versions": package_versions(),
    }


def _folders(config: RunConfig) -> set[Path] | None:
    """All folders that are read; None where the hub is asked."""
    from morphoquant.evaluation import tasks as registry

    cache = Path(config.paths.cache).expanduser()
    mini = cache / "mini"
    folders: set[Path] = set()
    for source in config.calibration.sources:
        if source.path.startswith("mini:"):
            folders |= {mini / source.path.removeprefix("mini:"), mini / "videos"}
            continue
        folder = Path(source.path).expanduser()
        if not folder.is_dir():
            return None
        folders.add(folder)
        if source.videos is not None:
            folders.add(Path(source.videos).expanduser())
    root = config.benchmark.data_root
    for name in config.benchmark.tasks:
        task = registry.find(name)
        if root is None and not task.embedded:
            return None
        built = cache / "mini_held_out" if task.held_out else mini
        where = built if root is None else Path(root).expanduser()
        folders |= {where / task.folder, where / "videos"}
    return folders
