"""Which samples are drawn: repeatable, disjoint, and refused with a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.readers import Sample
from morphoquant.calibration.samples import (
    CalibrationError,
    batches,
    check_disjoint,
    load_samples,
)
from morphoquant.config.schema import CalibrationConfig, CalibrationSource
from morphoquant.errors import HarnessError

Make = Callable[..., CalibrationConfig]


def source(
    path: str = "mini:scienceqa", reader: str = "scienceqa", **more: str
) -> CalibrationSource:
    return CalibrationSource(path=path, reader=reader, **more)


def test_draw_is_seeded(mini_root: Path, calibration_config: Make) -> None:
    first = load_samples(calibration_config(), mini_root)
    again = load_samples(calibration_config(), mini_root)
    other = load_samples(calibration_config(seed=1), mini_root)
    assert first.ids == again.ids
    assert first.ids_hash == again.ids_hash
    assert set(first.ids) != set(other.ids)
    assert first.ids_hash != other.ids_hash


def test_counts_and_disjointness(mini_root: Path, calibration_config: Make) -> None:
    """M19: statistics and search samples share nothing."""
    found = load_samples(calibration_config(samples=30, search_samples=15), mini_root)
    assert (len(found.samples), len(found.search), len(found.ids)) == (30, 15, 45)
    assert len(set(found.ids)) == 45
    assert {s.id for s in found.samples}.isdisjoint(s.id for s in found.search)
    named = [name.split("/", 1)[1] for name in found.ids]
    assert named == [s.id for s in (*found.samples, *found.search)]


def test_round_robin_over_the_sources(mini_root: Path, calibration_config: Make) -> None:
    found = load_samples(calibration_config(samples=10, search_samples=5), mini_root)
    sets = Counter(name.split("/")[0] for name in found.ids)
    assert sets == dict.fromkeys(
        ["mmmu", "scienceqa", "videomme", "air_bench_sound", "air_bench_music"], 3
    )
    assert {s.modality for s in found.samples} == {"text", "image", "video", "audio"}


def test_more_samples_extend_the_draw(mini_root: Path, calibration_config: Make) -> None:
    """A larger calibration contains the smaller one, so that a size sweep compares sizes."""
    few = load_samples(calibration_config(samples=5, search_samples=0), mini_root)
    many = load_samples(calibration_config(samples=20, search_samples=0), mini_root)
    assert many.ids[:5] == few.ids


def test_exhausted_source_gives_way(mini_root: Path, calibration_config: Make) -> None:
    """Audio sets hold 12 rows each, the others 24: 96 rows in all, and not one more."""
    found = load_samples(calibration_config(samples=90, search_samples=6), mini_root)
    assert len(set(found.ids)) == 96
    with pytest.raises(CalibrationError, match="asks for 97 prompts, the sources hold 96"):
        load_samples(calibration_config(samples=90, search_samples=7), mini_root)


def test_same_source_twice(mini_root: Path, calibration_config: Make) -> None:
    config = calibration_config(sources=(source(), source()))
    with pytest.raises(CalibrationError, match="twice; are two sources the same"):
        load_samples(config, mini_root)


def test_wrong_split_lists_the_splits(mini_root: Path, calibration_config: Make) -> None:
    config = calibration_config(sources=(source(split="train"),))
    with pytest.raises(CalibrationError, match="no split 'train'; it has test, calibration"):
        load_samples(config, mini_root)


def test_missing_folder(calibration_config: Make, mini_root: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(CalibrationError, match=r"no folder .*gone"):
        load_samples(calibration_config(sources=(source(str(gone)),)))
    with pytest.raises(CalibrationError, match="no folder"):
        load_samples(calibration_config(sources=(source("mini:nothing"),)), mini_root)


def test_folder_that_is_no_data_set(calibration_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(CalibrationError, match=r"save_to_disk") as caught:
        load_samples(calibration_config(sources=(source(str(tmp_path)),)))
    assert isinstance(caught.value, HarnessError)
    assert str(tmp_path) in str(caught.value)


def test_local_clips_need_their_folder(mini_root: Path, calibration_config: Make) -> None:
    local = str(mini_root / "videomme")
    with pytest.raises(CalibrationError, match="set 'videos' to the folder"):
        load_samples(calibration_config(sources=(source(local, "videomme"),)))
    given = source(local, "videomme", videos=str(mini_root / "videos"))
    found = load_samples(calibration_config(sources=(given,), samples=2, search_samples=0))
    part = found.samples[0].messages[0]["content"][0]
    assert Path(part["video"]).is_file()
    assert found.ids[0].startswith("videomme/")


def test_wrong_reader_names_the_source(mini_root: Path, calibration_config: Make) -> None:
    config = calibration_config(sources=(source("mini:scienceqa", "mmmu"),))
    with pytest.raises(CalibrationError, match="'mmmu' needs a column 'question_type', its"):
        load_samples(config, mini_root)


def test_leak_is_refused() -> None:
    check_disjoint(["mmmu/1", "mmmu/2"], {"mmmu/3", "scienceqa/1"})
    with pytest.raises(CalibrationError) as caught:
        check_disjoint(["mmmu/3", "mmmu/1", "a/1", "b/2", "c/3"], {f"mmmu/{i}" for i in range(9)})
    message = str(caught.value)
    assert "leakage: 2 calibration samples" in message
    assert "mmmu/1, mmmu/3" in message
    assert "a/1" not in message
    assert "calibration.sources" in message


def test_calibrating_on_the_evaluated_split_is_refused(
    mini_root: Path, calibration_config: Make, tmp_path: Path
) -> None:
    """The ids that evaluation gives its questions are the ones that calibration uses."""
    from morphoquant.config.schema import BenchmarkConfig, PathsConfig
    from morphoquant.evaluation.data import question_ids

    tasks = {
        "mini_mmmu": ("mmmu", "mini:mmmu", "validation"),
        "mini_scienceqa": ("scienceqa", "mini:scienceqa", "test"),
        "mini_videomme": ("videomme", "mini:videomme", "test"),
        "mini_air_bench_sound": ("air_bench", "mini:air_bench_sound", "sound"),
        "mini_air_bench_music": ("air_bench", "mini:air_bench_music", "music"),
    }
    paths = PathsConfig(cache=str(tmp_path))
    for task, (reader, path, split) in tasks.items():
        benchmark = BenchmarkConfig(name="x", tasks=(task,), data_root=str(mini_root))
        asked = question_ids(benchmark, paths)
        assert asked

        def draw(split: str, reader: str = reader, path: str = path) -> tuple[str, ...]:
            sources = (source(path, reader, split=split),)
            config = calibration_config(sources=sources, samples=4, search_samples=0)
            return load_samples(config, mini_root).ids

        check_disjoint(draw("calibration"), asked)
        with pytest.raises(CalibrationError, match="leakage: 4 "):
            check_disjoint(draw(split), asked)


@given(
    kinds=st.lists(st.sampled_from(["text", "image", "video"]), max_size=30),
    size=st.integers(1, 7),
)
def test_batches_are_a_partition_by_modality(kinds: list[str], size: int) -> None:
    samples = [Sample(str(i), [], "A", kind) for i, kind in enumerate(kinds)]
    groups = batches(samples, size)
    assert sorted(int(s.id) for g in groups for s in g) == list(range(len(kinds)))
    assert all(1 <= len(g) <= size for g in groups)
    assert all(len({s.modality for s in g}) == 1 for g in groups)
    full = Counter(kinds)
    assert len(groups) == sum(-(-count // size) for count in full.values())


def test_a_row_that_a_set_holds_twice_is_drawn_once(
    calibration_config: Make, mini_root: Path, tmp_path: Path
) -> None:
    import datasets

    rows = datasets.load_from_disk(str(mini_root / "scienceqa"))["calibration"].select(range(4))
    doubled = datasets.concatenate_datasets([rows, rows])
    datasets.DatasetDict({"calibration": doubled}).save_to_disk(str(tmp_path / "sqa"))
    found = load_samples(
        calibration_config(sources=(source(str(tmp_path / "sqa")),), samples=4, search_samples=0)
    )
    assert sorted(found.ids) == sorted(f"scienceqa/{name}" for name in rows["id"])
