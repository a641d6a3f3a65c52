"""The builder: the same content every time, legal values, disjoint splits, real videos."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import load_from_disk

from morphoquant.embedded import benchmarks, clips, pictures, sentences, sounds
from morphoquant.embedded.questions import KINDS, VIDEO_KINDS, content_split, generator

EVALUATION, CALIBRATION = 24, 12


def _rows(root: Path, name: str, split: str) -> list[dict[str, Any]]:
    return list(load_from_disk(str(root / name))[split])


def _manifest(root: Path) -> dict[str, Any]:
    return json.loads((root / benchmarks.MANIFEST).read_text())


def test_two_builds_have_the_same_content(small_root: Path, tmp_path: Path) -> None:
    again = benchmarks.build(tmp_path / "again", EVALUATION, CALIBRATION)
    assert _manifest(again)["content_sha256"] == _manifest(small_root)["content_sha256"]


def test_an_intact_build_is_left_alone_and_a_damaged_one_is_mended(tmp_path: Path) -> None:
    root = benchmarks.build(tmp_path / "b", 4, 2)
    before = (root / benchmarks.MANIFEST).stat().st_mtime_ns
    benchmarks.build(root, 4, 2)
    assert (root / benchmarks.MANIFEST).stat().st_mtime_ns == before
    video = next((root / "videos").iterdir())
    video.write_bytes(b"broken")
    assert not benchmarks.is_intact(root, 4, 2)
    benchmarks.build(root, 4, 2)
    assert benchmarks.is_intact(root, 4, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]  # no leftovers


def test_two_builds_at_once_leave_one_intact_result(tmp_path: Path) -> None:
    root = tmp_path / "b"
    with ThreadPoolExecutor(2) as workers:
        done = list(workers.map(lambda _: benchmarks.build(root, 4, 2), range(2)))
    assert done == [root, root]
    assert benchmarks.is_intact(root, 4, 2)


@pytest.mark.parametrize("name", list(benchmarks.BENCHMARKS))
def test_sizes_and_split_names(small_root: Path, name: str) -> None:
    split, share, _ = benchmarks.BENCHMARKS[name]
    data = load_from_disk(str(small_root / name))
    assert {key: len(part) for key, part in data.items()} == {
        split: EVALUATION * share,
        "calibration": CALIBRATION * share,
    }


@pytest.mark.parametrize("name", list(benchmarks.BENCHMARKS))
def test_ids_are_unique_and_splits_disjoint(small_root: Path, name: str) -> None:
    column = {"mmmu": "id", "scienceqa": "id", "videomme": "question_id"}.get(name, "uniq_id")
    split = benchmarks.BENCHMARKS[name][0]
    evaluation = [row[column] for row in _rows(small_root, name, split)]
    calibration = [row[column] for row in _rows(small_root, name, "calibration")]
    assert len({*evaluation, *calibration}) == len(evaluation) + len(calibration)


def test_media_of_the_splits_differ(small_root: Path) -> None:
    for name in ("mmmu", "scienceqa"):
        column = "image_1" if name == "mmmu" else "image"
        split = benchmarks.BENCHMARKS[name][0]
        seen = [
            row[column].tobytes()
            for part in (split, "calibration")
            for row in _rows(small_root, name, part)
            if row[column] is not None
        ]
        assert len(set(seen)) == len(seen)
    videos = [path.read_bytes() for path in (small_root / "videos").iterdir()]
    assert len(set(videos)) == len(videos) == EVALUATION + CALIBRATION


def test_text_questions_of_the_splits_differ(small_root: Path) -> None:
    texts = {
        part: {
            (row["hint"], row["question"])
            for row in _rows(small_root, "scienceqa", part)
            if row["image"] is None
        }
        for part in ("test", "calibration")
    }
    assert len(texts["test"]) == EVALUATION * 3 // 4
    assert not texts["test"] & texts["calibration"]


def test_a_quarter_of_scienceqa_has_an_image(small_root: Path) -> None:
    rows = _rows(small_root, "scienceqa", "test")
    assert sum(row["image"] is not None for row in rows) == EVALUATION // 4


@pytest.mark.parametrize("split", ["train", "dev", "calibration", "evaluation"])
def test_text_content_stays_in_its_split(split: str) -> None:
    others = {"train", "dev", "calibration", "evaluation"} - {split}
    for kind in KINDS["text"]:
        rng = generator(split, "text", 0)
        mine = {sentences.draw(rng, kind, split) for _ in range(20)}
        for other in others:
            rng = generator(other, "text", 0)
            assert not mine & {sentences.draw(rng, kind, other) for _ in range(20)}
    assert content_split("x") == content_split("x")


@pytest.mark.parametrize("modality", ["image", "audio", "video"])
def test_drawing_is_deterministic_and_asks_the_wanted_kind_first(modality: str) -> None:
    draw = {"image": pictures.draw, "audio": sounds.draw, "video": clips.draw}[modality]
    for kind in KINDS[modality]:
        media, questions = draw(generator("dev", modality, 3), kind)
        again, same = draw(generator("dev", modality, 3), kind)
        other, _ = draw(generator("train", modality, 3), kind)
        assert np.array_equal(media, again)
        assert questions == same
        assert not np.array_equal(media, other)
        assert questions[0].kind == kind
        assert questions[0].options[questions[0].correct] == questions[0].answer


def test_mp4_files_decode_to_the_drawn_frames(small_root: Path) -> None:
    kinds = tuple(VIDEO_KINDS)
    for index, row in enumerate(_rows(small_root, "videomme", "test")[:6]):
        drawn, questions = clips.draw(
            generator("evaluation", "videomme", index), kinds[index % len(kinds)]
        )
        decoded = clips.from_mp4(str(small_root / "videos" / f"{row['videoID']}.mp4"))
        assert decoded.shape == (clips.FRAMES, clips.SIZE, clips.SIZE, 3)
        # Chroma is stored at half resolution: edges of shapes blur, areas do not.
        assert np.abs(decoded.astype(int) - drawn).mean() < 8
        assert row["question"] == questions[0].text


def test_audio_bytes_are_the_drawn_sound(small_root: Path) -> None:
    from morphoquant.calibration.readers import read_audio

    row = _rows(small_root, "air_bench_sound", "sound")[0]
    drawn, _ = sounds.draw(generator("evaluation", "air_bench_sound", 0), "kind")
    heard = read_audio(row["audio"])
    assert heard.dtype == np.float32
    assert np.array_equal(heard, sounds.to_float(drawn))
