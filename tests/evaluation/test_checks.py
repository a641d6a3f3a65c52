from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morphoquant.config.schema import BenchmarkConfig, PathsConfig
from morphoquant.evaluation import DataError, check, question_ids

from .conftest import MINI, SPLITS, config

Edited = Callable[..., Path]


def put(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda row: row.update(values)


def test_good_sets_pass(root: Path, paths: PathsConfig) -> None:
    check(config(root), paths)


def test_mini_sets_are_built_where_no_data_is_named(
    root: Path, paths: PathsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from morphoquant.embedded import benchmarks

    whole = benchmarks.build
    monkeypatch.setattr(benchmarks, "build", lambda folder: whole(folder, 4, 4))
    chosen = BenchmarkConfig(name="mini", tasks=MINI)
    check(chosen, paths)
    assert (Path(paths.cache) / "mini" / "mmmu").is_dir()
    assert len(question_ids(chosen, paths)) == 4 + 4 + 4 + 2 + 2


def test_unknown_and_repeated_tasks(root: Path, paths: PathsConfig) -> None:
    with pytest.raises(DataError, match=r"benchmark\.tasks.*'mmnu'.*mini_mmmu.*videomme"):
        check(config(root, "mmnu"), paths)
    with pytest.raises(DataError, match="mini_mmmu named more than once"):
        check(config(root, "mini_mmmu", "mini_mmmu"), paths)


def test_hub_tasks_are_checked_by_name_only(paths: PathsConfig) -> None:
    check(BenchmarkConfig(name="paper", tasks=("mmmu_val", "videomme")), paths)


def test_missing_folder_says_where_and_how(tmp_path: Path, paths: PathsConfig) -> None:
    with pytest.raises(DataError) as caught:
        check(config(tmp_path, "mmmu_val"), paths)
    message = str(caught.value)
    assert str(tmp_path / "mmmu") in message
    assert "lmms-lab-encoder/MMMU" in message
    assert "save_to_disk" in message
    assert "benchmark.data_root=" in message


def test_a_folder_of_something_else(tmp_path: Path, paths: PathsConfig) -> None:
    (tmp_path / "mmmu").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        check(config(tmp_path, "mmmu_val"), paths)


def test_a_single_dataset_or_a_wrong_split(root: Path, tmp_path: Path, paths: PathsConfig) -> None:
    from datasets import DatasetDict, load_from_disk

    sets = load_from_disk(str(root / "scienceqa"))
    sets["test"].save_to_disk(str(tmp_path / "one" / "scienceqa"))
    with pytest.raises(DataError, match=r"single Dataset.*'test'"):
        check(config(tmp_path / "one", "scienceqa"), paths)
    DatasetDict({"train": sets["test"]}).save_to_disk(str(tmp_path / "two" / "scienceqa"))
    with pytest.raises(DataError, match=r"no split 'test'.*has train"):
        check(config(tmp_path / "two", "scienceqa"), paths)


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("mmmu", "options"),
        ("mmmu", "image_7"),
        ("scienceqa", "hint"),
        ("videomme", "task_type"),
        ("air_bench_sound", "audio"),
        ("air_bench_sound", "uniq_id"),
    ],
)
def test_missing_columns_are_named(
    edited: Edited, paths: PathsConfig, name: str, column: str
) -> None:
    where = edited(name, drop=column)
    with pytest.raises(DataError, match=f"no column '{column}'"):
        check(config(where, f"mini_{name}"), paths)


def test_a_column_of_another_kind(root: Path, tmp_path: Path, paths: PathsConfig) -> None:
    from datasets import DatasetDict, Value, load_from_disk

    data = load_from_disk(str(root / "scienceqa"))["test"].cast_column("answer", Value("string"))
    DatasetDict({"test": data}).save_to_disk(str(tmp_path / "scienceqa"))
    with pytest.raises(DataError, match=r"'answer': found .*string.*expected integers"):
        check(config(tmp_path, "mini_scienceqa"), paths)


def test_images_that_would_stay_bytes(root: Path, tmp_path: Path, paths: PathsConfig) -> None:
    from datasets import DatasetDict, Image, load_from_disk

    data = load_from_disk(str(root / "scienceqa"))["test"]
    data = data.cast_column("image", Image(decode=False))
    DatasetDict({"test": data}).save_to_disk(str(tmp_path / "scienceqa"))
    with pytest.raises(DataError, match=r"'image': found .*decode=False.*decode=True"):
        check(config(tmp_path, "mini_scienceqa"), paths)


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("mmmu", {"options": "['a', 'b'"}, ["options", "['a', 'b'", "list of strings"]),
        ("mmmu", {"options": "__import__('os')"}, ["options", "list of strings"]),
        ("mmmu", {"options": "['a', 3]"}, ["options"]),
        ("mmmu", {"options": "['a', 'b']", "answer": "C"}, ["answer", "'C'", "one of A, B"]),
        ("mmmu", {"id": "Art3"}, ["id", "Art3", "<Subject>"]),
        ("mmmu", {"question_type": "essay"}, ["question_type", "multiple-choice, open"]),
        ("mmmu", {"image_1": None}, ["image_1", "<image 1>"]),
        ("mmmu", {"question": "<image 9> what?"}, ["image_9"]),
        ("scienceqa", {"answer": 26}, ["answer", "26", "index"]),
        ("scienceqa", {"answer": -1}, ["answer", "-1"]),
        ("scienceqa", {"choices": []}, ["choices", "[]"]),
        ("videomme", {"duration": "tiny"}, ["duration", "'tiny'", "short, medium, long"]),
        ("videomme", {"domain": "Cooking"}, ["domain", "Life Record"]),
        ("videomme", {"sub_category": "Chess"}, ["sub_category", "Esports"]),
        ("videomme", {"task_type": "Guess"}, ["task_type", "Object Reasoning"]),
        ("videomme", {"answer": "a"}, ["answer", "one of A, B"]),
        ("videomme", {"options": ["yes", "no"]}, ["options", "A. ..."]),
        ("videomme", {"videoID": "gone"}, ["videoID", "gone", "videos", ".mp4"]),
        ("air_bench_music", {"answer_gt": "none of it"}, ["answer_gt", "one of the choices"]),
        ("air_bench_music", {"choice_a": None}, ["choice_a"]),
        ("air_bench_music", {"audio": None}, ["audio", "no sound"]),
    ],
)
def test_values_the_stock_code_cannot_take(
    edited: Edited, paths: PathsConfig, name: str, values: dict[str, Any], words: list[str]
) -> None:
    where = edited(name, put(**values), row=2)
    with pytest.raises(DataError) as caught:
        check(config(where, f"mini_{name}"), paths)
    message = str(caught.value)
    for word in [str(where / name), SPLITS[name], "row 2", *words]:
        assert word in message


def test_questions_beyond_the_limit_are_not_looked_at(edited: Edited, paths: PathsConfig) -> None:
    where = edited("videomme", put(videoID="gone"), row=5)
    check(config(where, "mini_videomme", limit=5), paths)
    with pytest.raises(DataError, match="gone"):
        check(config(where, "mini_videomme", limit=6), paths)


def test_other_endings_of_clips_are_found(
    root: Path, edited: Edited, paths: PathsConfig, tmp_path: Path
) -> None:
    where = edited("videomme", put(videoID="other"))
    (where / "videos").unlink()
    shutil.copytree(root / "videos", where / "videos")
    clip = next((where / "videos").glob("*.mp4"))
    shutil.copy(clip, where / "videos" / "other.mkv")
    check(config(where, "mini_videomme"), paths)


@pytest.mark.parametrize(("kept", "words"), [(0, "Invalid data"), (200, "Invalid data")])
def test_clips_that_cannot_be_opened_are_named(
    root: Path, edited: Edited, paths: PathsConfig, kept: int, words: str
) -> None:
    """An mp4 that was cut off has lost its index, which stands at its end."""
    where = edited("videomme", put(videoID="torn"), row=3)
    (where / "videos").unlink()
    shutil.copytree(root / "videos", where / "videos")
    whole = next((where / "videos").glob("*.mp4")).read_bytes()
    torn = where / "videos" / "torn.mp4"
    torn.write_bytes(whole[:kept])
    with pytest.raises(DataError, match=r"row 3, column 'videoID'") as caught:
        check(config(where, "mini_videomme"), paths)
    assert str(torn) in str(caught.value)
    assert words in str(caught.value)


def test_a_clip_whose_pictures_are_damaged_is_named(
    root: Path, edited: Edited, paths: PathsConfig
) -> None:
    """Its index is whole, so that it opens: only decoding tells."""
    where = edited("videomme", put(videoID="damaged"), row=3)
    (where / "videos").unlink()
    shutil.copytree(root / "videos", where / "videos")
    content = bytearray(next((where / "videos").glob("*.mp4")).read_bytes())
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    content[start:end] = b"\xff" * (end - start)
    damaged = where / "videos" / "damaged.mp4"
    damaged.write_bytes(content)
    with pytest.raises(DataError, match=r"row 3, column 'videoID'.*damaged\.mp4"):
        check(config(where, "mini_videomme"), paths)


def test_question_ids_honour_the_limit(root: Path, paths: PathsConfig) -> None:
    everything = question_ids(config(root), paths)
    assert len(everything) == 12 + 12 + 12 + 6 + 6
    assert "mmmu/validation_Art_1" in everything
    assert {name.split("/")[0] for name in everything} == set(SPLITS)
    few = question_ids(config(root, limit=3), paths)
    assert len(few) == 15
    assert few < everything


def test_rows_without_an_id_are_named_as_calibration_names_them(
    edited: Edited, paths: PathsConfig
) -> None:
    from datasets import load_from_disk

    from morphoquant.calibration import readers

    where = edited("scienceqa", drop="id")
    check(config(where, "scienceqa"), paths)
    rows = load_from_disk(str(where / "scienceqa"))["test"]
    expected = {f"scienceqa/{readers.scienceqa(row).id}" for row in rows}
    assert question_ids(config(where, "scienceqa"), paths) == expected
    assert len(expected) == len(rows)


def test_hub_data_out_of_reach_is_a_data_error(
    paths: PathsConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DataError, match=r"lmms-lab-encoder/MMMU.*hub.*data_root"):
        question_ids(BenchmarkConfig(name="mmmu", tasks=("mmmu_val",)), paths)
