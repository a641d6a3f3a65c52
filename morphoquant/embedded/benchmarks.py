"""The embedded benchmarks: synthetic questions in the schemas that lmms-eval's stock tasks read.

``build(root)`` writes, once::

    root/mmmu/             DatasetDict: validation, calibration
    root/scienceqa/        DatasetDict: test, calibration (three quarters text only)
    root/videomme/         DatasetDict: test, calibration
    root/air_bench_sound/  DatasetDict: sound, calibration
    root/air_bench_music/  DatasetDict: music, calibration
    root/videos/           <videoID>.mp4, H.264
    root/manifest.json     version, hash of the content, hash of every file

Content of the two splits comes from different seed streams (and, for text, different hash
buckets); identifiers never repeat. Nothing is downloaded. ``build_held_out`` writes a third split
in the same layout, for choosing hyper-parameters.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from morphoquant.embedded import clips, pictures, sentences, sounds
from morphoquant.embedded.questions import (
    IMAGE_KINDS,
    LETTERS,
    MUSIC_KINDS,
    SOUND_KINDS,
    TEXT_POOLS,
    VIDEO_KINDS,
    Question,
    generator,
)

VERSION = 1
EVALUATION = 256  # questions of a benchmark
CALIBRATION = 128
HELD_OUT = 128
MANIFEST = "manifest.json"

MMMU_SUBJECTS = {
    "color": "Art",
    "shape": "Architecture_and_Engineering",
    "size": "Physics",
    "count": "Math",
    "where": "Geography",
    "pattern": "Design",
}
SCIENCEQA_TOPICS = {
    "category": ("biology", "Classification"),
    "season": ("geography", "Seasons"),
    "state": ("chemistry", "Temperature"),
    "trend": ("science-and-engineering-practices", "Series"),
    "order": ("writing-strategies", "Sequences"),
}
VIDEO_LABELS = {  # domain, sub_category, task_type: values that the stock task accepts
    "starts": ("Knowledge", "Technology", "Attribute Perception"),
    "becomes": ("Knowledge", "Astronomy", "Temporal Perception"),
    "change": ("Life Record", "Daily Life", "Object Recognition"),
    "direction": ("Sports Competition", "Other Sports", "Action Recognition"),
    "light": ("Artistic Performance", "Magic Show", "Spatial Perception"),
}
AIR_TASKS = {
    "kind": "Acoustic_Scene_Classification",
    "loudness": "Sound_AQA",
    "when": "Audio_Grounding",
    "pitch": "Music_Midi_Pitch_Analysis",
    "contour": "Music_AQA",
    "notes": "Music_Midi_Velocity_Analysis",
}

Row = dict[str, Any]


def _png(pixels: Any) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def mmmu_row(question: Question, image: Any, split: str, index: int) -> Row:
    """An MMMU row; ``image`` is what the image column holds."""
    prefix = "validation" if split == "evaluation" else split
    subject = MMMU_SUBJECTS[question.kind]
    return {
        "id": f"{prefix}_{subject}_{index + 1}",
        "question": f"<image 1>\n{question.text}",
        "options": str(list(question.options)),
        "explanation": "",
        "image_1": image,
        **{f"image_{i}": None for i in range(2, 8)},
        "img_type": "['Synthetic']",
        "answer": question.letter,
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": question.kind,
    }


def scienceqa_row(question: Question, image: Any, split: str, index: int) -> Row:
    """A ScienceQA row, with or without an image."""
    topic, category = SCIENCEQA_TOPICS.get(question.kind, ("physics", "Pictures"))
    return {
        "id": f"scienceqa_{split}_{index + 1}",
        "image": image,
        "question": question.text,
        "choices": list(question.options),
        "answer": question.correct,
        "hint": question.hint,
        "task": "closed choice",
        "grade": "grade1",
        "subject": "natural science",
        "topic": topic,
        "category": category,
        "skill": question.kind,
        "lecture": "",
        "solution": "",
    }


def videomme_row(question: Question, split: str, index: int) -> Row:
    """A Video-MME row; its file is ``<videoID>.mp4``."""
    domain, sub_category, task_type = VIDEO_LABELS[question.kind]
    prefix = "e" if split == "evaluation" else split[0]
    number = f"{prefix}{index + 1:04d}"
    return {
        "video_id": number,
        "duration": "short",
        "domain": domain,
        "sub_category": sub_category,
        "url": "",
        "videoID": f"clip_{split}_{index + 1:04d}",
        "question_id": f"{number}-1",
        "task_type": task_type,
        "question": question.text,
        "options": [f"{a}. {b}" for a, b in zip(LETTERS, question.options, strict=True)],
        "answer": question.letter,
    }


def air_bench_row(question: Question, audio: Any, subset: str, split: str, index: int) -> Row:
    """An AIR-Bench foundation row; ``audio`` is what the audio column holds."""
    a, b, c, d = question.options
    return {
        "audio": audio,
        "path": f"{subset}_{split}_{index + 1}.wav",
        "uniq_id": f"{subset}_{split}_{index + 1}",
        "task_name": AIR_TASKS[question.kind],
        "dataset_name": "embedded",
        "question": question.text,
        "choice_a": a,
        "choice_b": b,
        "choice_c": c,
        "choice_d": d,
        "answer_gt": question.answer,
    }


def _mmmu(split: str, count: int, videos: Path) -> Iterator[Row]:
    kinds = tuple(IMAGE_KINDS)
    for i in range(count):
        pixels, questions = pictures.draw(generator(split, "mmmu", i), kinds[i % len(kinds)])
        yield mmmu_row(questions[0], _png(pixels), split, i)


def _scienceqa(split: str, count: int, videos: Path) -> Iterator[Row]:
    text_kinds, image_kinds = tuple(TEXT_POOLS), tuple(IMAGE_KINDS)
    seen: set[tuple[str, str]] = set()
    for i in range(count):
        rng = generator(split, "scienceqa", i)
        if i % 4 == 3:
            pixels, questions = pictures.draw(rng, image_kinds[i // 4 % len(image_kinds)])
            yield scienceqa_row(questions[0], _png(pixels), split, i)
            continue
        kind = text_kinds[(i - i // 4) % len(text_kinds)]
        question = sentences.draw(rng, kind, split)
        while (question.hint, question.text) in seen:
            question = sentences.draw(rng, kind, split)
        seen.add((question.hint, question.text))
        yield scienceqa_row(question, None, split, i)


def _videomme(split: str, count: int, videos: Path) -> Iterator[Row]:
    kinds = tuple(VIDEO_KINDS)
    for i in range(count):
        frames, questions = clips.draw(generator(split, "videomme", i), kinds[i % len(kinds)])
        row = videomme_row(questions[0], split, i)
        (videos / f"{row['videoID']}.mp4").write_bytes(clips.to_mp4(frames))
        yield row


def _air_bench(subset: str, kinds: tuple[str, ...]) -> Callable[[str, int, Path], Iterator[Row]]:
    def rows(split: str, count: int, videos: Path) -> Iterator[Row]:
        for i in range(count):
            rng = generator(split, f"air_bench_{subset}", i)
            pcm, questions = sounds.draw(rng, kinds[i % len(kinds)])
            audio = {"bytes": sounds.to_wav(pcm), "path": None}
            yield air_bench_row(questions[0], audio, subset, split, i)

    return rows


#: name -> (evaluation split's name, share of the question count, generator of rows)
BENCHMARKS: dict[str, tuple[str, float, Callable[[str, int, Path], Iterator[Row]]]] = {
    "mmmu": ("validation", 1.0, _mmmu),
    "scienceqa": ("test", 1.0, _scienceqa),
    "videomme": ("test", 1.0, _videomme),
    "air_bench_sound": ("sound", 0.5, _air_bench("sound", tuple(SOUND_KINDS))),
    "air_bench_music": ("music", 0.5, _air_bench("music", tuple(MUSIC_KINDS))),
}


def _features(name: str, example: Row) -> Any:
    from datasets import Features, List, Value
    from datasets import Image as ImageFeature

    def feature(column: str, value: Any) -> Any:
        if column == "image" or (column.startswith("image_") and name == "mmmu"):
            return ImageFeature()
        if column == "audio":
            # A plain struct: the Audio feature needs torchcodec, even to store a finished file.
            return {"bytes": Value("binary"), "path": Value("string")}
        if isinstance(value, list):
            return List(Value("string"))
        return Value("int64" if isinstance(value, int) else "string")

    return Features({column: feature(column, value) for column, value in example.items()})


def _update(digest: Any, row: Row) -> None:
    """Add one row's content to a hash; bytes count as bytes, everything else as JSON."""
    for column, value in row.items():
        if isinstance(value, dict):
            value = hashlib.sha256(value["bytes"]).hexdigest()
        digest.update(json.dumps([column, value]).encode())


def _write(folder: Path, counts: dict[str, int]) -> str:
    """Write all sets into ``folder``; returns the hash of their content.

    Args:
        folder: an empty one.
        counts: content split -> questions of a benchmark.
    """
    from datasets import (
        Dataset,
        DatasetDict,
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    quiet = are_progress_bars_disabled()
    disable_progress_bars()
    videos = folder / "videos"
    videos.mkdir()
    digest = hashlib.sha256()
    for name, (split, share, rows) in BENCHMARKS.items():
        parts = {  # what is asked stands under the name that the stock task reads
            "calibration" if content == "calibration" else split: list(
                rows(content, round(count * share), videos)
            )
            for content, count in counts.items()
        }
        for part in parts.values():
            for row in part:
                _update(digest, row)
                if "videoID" in row:
                    digest.update((videos / f"{row['videoID']}.mp4").read_bytes())
        features = _features(name, parts[split][0])
        DatasetDict(
            {key: Dataset.from_list(part, features=features) for key, part in parts.items()}
        ).save_to_disk(folder / name)
    if not quiet:
        enable_progress_bars()
    return digest.hexdigest()


@lru_cache(maxsize=8192)
def _file_hash(path: Path, size: int, modified: int, changed: int) -> str:
    """sha256 of a file, once per process: every task of every job asks for all of them."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _hash(path: Path) -> str:
    state = path.stat()
    return _file_hash(path.absolute(), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): _hash(path) for path in files}


def is_intact(root: Path, evaluation: int = EVALUATION, calibration: int = CALIBRATION) -> bool:
    """Whether ``root`` holds this version's sets of these sizes, with every file unharmed."""
    return _is_intact(root, {"evaluation": evaluation, "calibration": calibration})


def _is_intact(root: Path, counts: dict[str, int]) -> bool:
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    wanted = {"version": VERSION, **counts}
    if any(manifest.get(key) != value for key, value in wanted.items()):
        return False
    return manifest.get("files") == _hashes(root)


def build(root: Path, evaluation: int = EVALUATION, calibration: int = CALIBRATION) -> Path:
    """Make sure the embedded benchmarks lie under ``root``; returns ``root``.

    Nothing is written when they are there and intact. Otherwise they are written into a temporary
    folder beside ``root`` and renamed into place, so that a reader never sees half of them and of
    two processes that build at once the later one takes the earlier one's result.
    """
    return _build(Path(root), {"evaluation": evaluation, "calibration": calibration})


def build_held_out(root: Path, count: int = HELD_OUT) -> Path:
    """The same sets once more with other questions (the split ``dev`` of the content).

    They are neither evaluated nor calibrated on, and the embedded model was not trained on them.
    """
    return _build(Path(root), {"dev": count})


def _build(root: Path, counts: dict[str, int]) -> Path:
    if _is_intact(root, counts):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        content = _write(folder, counts)
        manifest = {
            "version": VERSION,
            **counts,
            "content_sha256": content,
            "files": _hashes(folder),
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        folder.chmod(0o755)
        if _is_intact(root, counts):  # another process was faster
            return root
        if root.exists():  # damaged or of another version
            stale = Path(tempfile.mkdtemp(prefix=f".{root.name}-old-", dir=root.parent))
            os.replace(root, stale / root.name)
            shutil.rmtree(stale)
        try:
            os.rename(folder, root)
        except OSError:  # the other process won the last moment
            if not _is_intact(root, counts):
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return root
