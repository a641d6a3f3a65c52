"""Calibration samples: which, from where, and that none of them is evaluated."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from morphoquant.calibration import readers
from morphoquant.calibration.readers import Sample
from morphoquant.config.schema import CalibrationConfig, CalibrationSource
from morphoquant.errors import HarnessError

MINI = "mini:"


class CalibrationError(HarnessError, ValueError):
    """Calibration data that is missing, too small, unreadable or also evaluated."""


@dataclass(frozen=True)
class Calibration:
    """Samples for statistics, for the range search and for measuring; ids are ``<set>/<id>``."""

    samples: tuple[Sample, ...]
    search: tuple[Sample, ...]
    ids: tuple[str, ...]
    held_out: tuple[Sample, ...] = ()

    @property
    def ids_hash(self) -> str:
        return hashlib.sha256("\n".join(self.ids).encode()).hexdigest()[:16]

    @property
    def content_hash(self) -> str:
        """Identity of what the prompts hold: text, pictures, sound; clips by name and size."""
        return content_hash((*self.samples, *self.search, *self.held_out))[:16]


def content_hash(samples: Iterable[Sample], exact: bool = False) -> str:
    """sha256 over what prompts hold: text, pictures, sound; clips by name and size.

    Args:
        samples: in the order that counts.
        exact: also roles, answers (which a transform may read) and the times at which clips were
            written: two clips may have one name and size, and a cache must not confuse them.
    """
    digest = hashlib.sha256()
    for sample in samples:
        if exact:
            turns = [(turn["role"], len(turn["content"])) for turn in sample.messages]
            digest.update(f"\0sample\0{turns}\0{sample.answer}\0{sample.modality}".encode())
        for part in (part for turn in sample.messages for part in turn["content"]):
            value = part[part["type"]]
            if part["type"] == "image":
                value = (value.mode, value.size, value.tobytes())
            elif part["type"] == "audio":
                value = value.tobytes()
            elif part["type"] == "video":
                path = Path(value)
                state = path.stat() if path.is_file() else None
                value = (path.name, state.st_size if state else None)
                if exact and state:
                    value += (state.st_mtime_ns,)
            digest.update(f"\0{part['type']}\0".encode())
            for piece in value if isinstance(value, tuple) else (value,):
                digest.update(piece if isinstance(piece, bytes) else repr(piece).encode())
    return digest.hexdigest()


def _set_name(source: CalibrationSource) -> str:
    return source.path.removeprefix(MINI) if source.path.startswith(MINI) else source.reader


def _open(source: CalibrationSource, mini_root: Path | None) -> Any:
    """The split of one source.

    Raises:
        CalibrationError: no such folder, split or hub data set.
    """
    import datasets

    if source.path.startswith(MINI):
        assert mini_root is not None, "mini sources need the built embedded sets"
        folder = mini_root / source.path.removeprefix(MINI)
    else:
        folder = Path(source.path).expanduser()
    try:
        if folder.is_dir():
            data = datasets.load_from_disk(str(folder))
            if isinstance(data, datasets.DatasetDict):
                if source.split not in data:
                    raise CalibrationError(
                        f"calibration source {source.path}: no split {source.split!r}; "
                        f"it has {', '.join(data)}"
                    )
                data = data[source.split]
            return data
        if source.path.startswith((MINI, "/", ".", "~")):
            raise CalibrationError(f"calibration source {source.path}: no folder {folder}")
        return datasets.load_dataset(source.path, source.config, split=source.split)
    except CalibrationError:
        raise
    except Exception as error:  # the hub's client raises a dozen kinds
        raise CalibrationError(
            f"calibration source {source.path!r} (split {source.split!r}) could not be loaded: "
            f"{error}. Without the hub, save it elsewhere with datasets.save_to_disk and set "
            f"calibration.sources to the folder"
        ) from error


def _reader(source: CalibrationSource, mini_root: Path | None) -> Callable[[Any], Sample]:
    if source.reader == "videomme":
        if source.videos is not None:
            videos = Path(source.videos).expanduser()
        elif source.path.startswith(MINI) and mini_root is not None:
            videos = mini_root / "videos"
        else:
            raise CalibrationError(
                f"calibration source {source.path}: set 'videos' to the folder of its mp4 files"
            )
        return lambda row: readers.videomme(row, videos)
    read: Callable[[Any], Sample] = getattr(readers, source.reader)
    return read


def _read(source: CalibrationSource, read: Callable[[Any], Sample], row: Any) -> Sample:
    try:
        return read(row)
    except KeyError as error:
        raise CalibrationError(
            f"calibration source {source.path}: reader {source.reader!r} needs a column {error}, "
            f"its columns are {', '.join(row)}; is it the right reader?"
        ) from error


def load_samples(config: CalibrationConfig, mini_root: Path | None = None) -> Calibration:
    """Draw the samples: seeded, round-robin over the sources, without repetition.

    Args:
        config: how many and from where.
        mini_root: folder of the embedded sets, for sources whose path is ``mini:<set>``.

    Raises:
        CalibrationError: data missing, or fewer rows than asked for.
    """
    seen = config.samples + config.search_samples
    wanted = seen + config.held_out_samples  # drawn last: the others do not depend on them
    pools = []
    for source in config.sources:
        data = _open(source, mini_root)
        order = list(range(len(data)))
        random.Random(f"{config.seed}/{source.path}/{source.split}").shuffle(order)
        pools.append((source, data, _reader(source, mini_root), order))
    drawn: list[tuple[str, Sample]] = []
    drawn_from: dict[str, int] = {}
    while len(drawn) < wanted and any(order for *_, order in pools):
        for number, (source, data, read, order) in enumerate(pools):
            if order and len(drawn) < wanted:
                sample = _read(source, read, data[order.pop()])
                name = f"{_set_name(source)}/{sample.id}"
                # Rows without an id are named by their content, so a row that a data set holds
                # twice comes back under one name: once is enough.
                if name not in drawn_from:
                    drawn_from[name] = number
                    drawn.append((name, sample))
                elif drawn_from[name] != number:
                    raise CalibrationError(
                        f"calibration draws {name!r} twice; are two sources the same?"
                    )
    if len(drawn) < wanted:
        raise CalibrationError(
            f"calibration.samples + search_samples + held_out_samples asks for {wanted} prompts, "
            f"the sources hold {len(drawn)}; lower one or add a source"
        )
    ids = tuple(name for name, _ in drawn)
    samples = tuple(sample for _, sample in drawn)
    return Calibration(
        samples[: config.samples], samples[config.samples : seen], ids, samples[seen:]
    )


def check_disjoint(calibration_ids: Iterable[str], question_ids: Iterable[str]) -> None:
    """Refuse to calibrate on what is evaluated.

    Raises:
        CalibrationError: naming the first shared ids.
    """
    shared = sorted(set(calibration_ids) & set(question_ids))
    if shared:
        raise CalibrationError(
            f"leakage: {len(shared)} calibration samples are also evaluated, e.g. "
            f"{', '.join(shared[:3])}; take calibration.sources from another split"
        )


def batches(samples: Iterable[Sample], size: int) -> list[list[Sample]]:
    """Groups of at most ``size`` with the same modality, so that padding stays small."""
    by_kind: dict[str, list[Sample]] = {}
    for sample in samples:
        by_kind.setdefault(sample.modality, []).append(sample)
    return [
        group[i : i + size]
        for _, group in sorted(by_kind.items())
        for i in range(0, len(group), size)
    ]
