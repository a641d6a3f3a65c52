"""Readers against lmms-eval's stock task code: the same parts, the same words, the same order."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import load_from_disk
from PIL import Image

from morphoquant.calibration import readers
from morphoquant.compat import prepare_torchvision
from morphoquant.embedded import benchmarks, sounds


@pytest.fixture(scope="module")
def stock() -> dict[str, Any]:
    """Stock utils modules and prompt settings."""
    prepare_torchvision()
    import importlib

    import lmms_eval

    folder = Path(lmms_eval.__file__).parent / "tasks"
    files = {
        "mmmu": "mmmu/mmmu_val.yaml",
        "scienceqa": "scienceqa/scienceqa.yaml",
        "videomme": "videomme/videomme.yaml",
        "air_bench": "air_bench/air_bench_foundation_sound.yaml",
    }
    found: dict[str, Any] = {}
    for name, file in files.items():
        text = re.sub(r"!function ", "", (folder / file).read_text())
        settings = yaml.safe_load(text)["lmms_eval_specific_kwargs"]["default"]
        module = importlib.import_module(f"lmms_eval.tasks.{name}.utils")
        found[name] = (module, settings)
    return found


def _rows(root: Path, name: str) -> list[dict[str, Any]]:
    data = load_from_disk(str(root / name))
    return [row for split in data for row in data[split]]


def _simplified(parts: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """Parts as comparable values; both spellings of a media part."""
    simple: list[tuple[str, Any]] = []
    for part in parts:
        value = part["text"] if part["type"] == "text" else part.get("url", part.get(part["type"]))
        if isinstance(value, Image.Image):
            value = (value.mode, value.size, value.tobytes())
        simple.append((part["type"], value))
    return simple


def test_mmmu(small_root: Path, stock: dict[str, Any]) -> None:
    module, settings = stock["mmmu"]
    for row in _rows(small_root, "mmmu"):
        sample = readers.mmmu(row)
        expected = module.mmmu_doc_to_messages(row, settings)
        assert _simplified(sample.messages[0]["content"]) == _simplified(expected[0]["content"])
        assert (sample.id, sample.answer, sample.modality) == (row["id"], row["answer"], "image")


@pytest.mark.parametrize(
    "question",
    [
        "Compare <image 1> with <image 2>.",
        "<image 1> before <image 2> after",
        "See <image 2> and <image 1> now.",
        "Twice <image 1> then <image 1> end",
        "No reference at all?",
    ],
)
@pytest.mark.parametrize("kind", ["multiple-choice", "open"])
def test_mmmu_with_other_layouts(stock: dict[str, Any], question: str, kind: str) -> None:
    module, settings = stock["mmmu"]
    row = {
        "id": "validation_Art_7",
        "question": question,
        "options": "['one', \"two's\", '3']",
        "question_type": kind,
        "answer": "A",
        "image_1": Image.new("L", (4, 4), 7),
        "image_2": Image.new("RGB", (5, 4), (1, 2, 3)),
    }
    expected = module.mmmu_doc_to_messages(row, settings)
    parts = readers.mmmu(row).messages[0]["content"]
    assert _simplified(parts) == _simplified(expected[0]["content"])


def test_scienceqa(small_root: Path, stock: dict[str, Any]) -> None:
    module, settings = stock["scienceqa"]
    for row in _rows(small_root, "scienceqa"):
        sample = readers.scienceqa(row)
        expected = [("image", v) for v in module.sqa_doc_to_visual(row)]
        parts = [{"type": kind, "url": value} for kind, value in expected]
        parts.append({"type": "text", "text": module.sqa_doc_to_text(row, settings)})
        assert _simplified(sample.messages[0]["content"]) == _simplified(parts)
        assert sample.answer == module.sqa_doc_to_target(row)
        assert sample.modality == ("text" if row["image"] is None else "image")


def test_scienceqa_without_ids_gets_stable_ones(small_root: Path) -> None:
    rows = [dict(row) for row in _rows(small_root, "scienceqa")]
    for row in rows:
        del row["id"]
    ids = [readers.scienceqa(row).id for row in rows]
    assert len(set(ids)) == len(ids)
    assert ids == [readers.scienceqa(row).id for row in rows]


def test_videomme(small_root: Path, stock: dict[str, Any]) -> None:
    module, settings = stock["videomme"]
    videos = small_root / "videos"
    legal = set(module.matrices)
    for row in _rows(small_root, "videomme"):
        sample = readers.videomme(row, videos)
        media, text = sample.messages[0]["content"]
        assert media == {"type": "video", "video": str(videos / f"{row['videoID']}.mp4")}
        assert Path(media["video"]).is_file()
        assert text["text"] == module.videomme_doc_to_text(row, settings)
        labels = (row["duration"], row["domain"], row["sub_category"], row["task_type"])
        assert "_".join(labels) in legal
        assert sample.answer == row["answer"]


@pytest.mark.parametrize("name", ["air_bench_sound", "air_bench_music"])
def test_air_bench(small_root: Path, stock: dict[str, Any], name: str) -> None:
    module, settings = stock["air_bench"]
    for row in _rows(small_root, name):
        sample = readers.air_bench(row)
        media, text = sample.messages[0]["content"]
        assert media["type"] == "audio"
        assert media["audio"].shape == (sounds.LENGTH,)
        assert text["text"] == module.air_bench_doc_to_text_foundation(row, settings)
        assert sample.answer == module.air_bench_doc_to_target_foundation(row)


def test_stock_parsers_understand_the_answers_the_model_is_trained_to_give(
    small_root: Path, stock: dict[str, Any]
) -> None:
    mmmu, sqa = stock["mmmu"][0], stock["scienceqa"][0]
    videomme, air = stock["videomme"][0], stock["air_bench"][0]
    for row in _rows(small_root, "mmmu"):
        options = row["options"].strip("[]").replace("'", "").split(", ")
        said = f"{row['answer']}. {options['ABCD'.index(row['answer'])]}"
        assert mmmu.mmmu_process_results(row, [said])["mmmu_acc"]["parsed_pred"] == [row["answer"]]
    for row in _rows(small_root, "scienceqa"):
        said = f"{sqa.sqa_doc_to_target(row)}. {row['choices'][row['answer']]}"
        assert sqa.sqa_process_results(row, [said]) == {"exact_match": 1.0}
    for row in _rows(small_root, "videomme"):
        said = row["options"]["ABCD".index(row["answer"])]
        result = videomme.videomme_process_results(row, [said])
        assert result["videomme_perception_score"]["score"] == 1.0
    for row in _rows(small_root, "air_bench_sound"):
        said = f"{air.get_gt(row)}. {row['answer_gt']}"
        assert air.air_bench_process_results_foundation(row, [said])["accuracy"]["score"] == 1.0


def test_mmmu_ids_name_official_subjects(stock: dict[str, Any]) -> None:
    module = stock["mmmu"][0]
    official = {s for subjects in module.DOMAIN_CAT2SUB_CAT.values() for s in subjects}
    assert set(benchmarks.MMMU_SUBJECTS.values()) <= official
    assert module.extract_subset_name("calibration_Art_3") == "Art"


def test_read_audio_takes_every_form_a_data_set_may_hold(tmp_path: Path) -> None:
    pcm = (np.sin(np.arange(16000) / 5) * 8000).astype(np.int16)
    wav = sounds.to_wav(pcm)
    (tmp_path / "a.wav").write_bytes(wav)
    expected = sounds.to_float(pcm)
    forms: list[dict[str, Any]] = [
        {"bytes": wav, "path": None},
        {"bytes": None, "path": str(tmp_path / "a.wav")},
        {"array": expected, "sampling_rate": 16000},
        {"array": np.stack([expected, expected]), "sampling_rate": 16000},
    ]
    for form in forms:
        assert np.allclose(readers.read_audio(form), expected)
    halved = readers.read_audio({"array": expected, "sampling_rate": 32000})
    assert abs(len(halved) - 8000) < 50


def test_other_audio_files_go_through_the_decoder() -> None:
    import av

    tone = np.sin(np.arange(44100) * 2 * np.pi * 440 / 44100).astype(np.float32)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="flac") as container:
        stream = container.add_stream("flac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            (tone * 30000).astype(np.int16)[None], format="s16", layout="mono"
        )
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    heard = readers.read_audio({"bytes": buffer.getvalue(), "path": None})
    assert abs(len(heard) - 16000) < 50
    assert 0.8 < np.abs(heard[1000:-1000]).max() < 1.0
