"""The held-out questions: the stock tasks read them, and nobody else has seen them."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from morphoquant.config.schema import BenchmarkConfig, PathsConfig
from morphoquant.embedded.benchmarks import BENCHMARKS, build_held_out
from morphoquant.evaluation import check, question_ids

TASKS = tuple(f"mini_held_out_{n}" for n in ("mmmu", "scienceqa", "videomme", "sound", "music"))


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_held_out(tmp_path_factory.mktemp("cache") / "mini_held_out", count=16)


def content(row: dict[str, object]) -> str:
    """What a question shows and says, without its names."""
    kept = ("question", "choices", "hint", "options", "audio", "image", "image_1")
    return repr([row.get(name) for name in kept])


@pytest.mark.parametrize("name", list(BENCHMARKS))
def test_shares_no_question_with_the_other_splits(
    held_out: Path, mini_root: Path, name: str
) -> None:
    split = BENCHMARKS[name][0]

    def rows(folder: Path, part: str) -> list[dict[str, object]]:
        found = datasets.load_from_disk(str(folder / name))[part]
        for column in ("image", "image_1"):
            if column in found.column_names:
                found = found.cast_column(column, datasets.Image(decode=False))
        return list(found)

    fresh = rows(held_out, split)
    others = rows(mini_root, split) + rows(mini_root, "calibration")
    assert list(datasets.load_from_disk(str(held_out / name))) == [split]
    if name == "videomme":  # its content is in the clips
        seen = {(mini_root / "videos" / f"{row['videoID']}.mp4").read_bytes() for row in others}
        new = {(held_out / "videos" / f"{row['videoID']}.mp4").read_bytes() for row in fresh}
    else:
        seen, new = {content(row) for row in others}, {content(row) for row in fresh}  # type: ignore[assignment]
    assert new
    assert not new & seen


def test_the_stock_tasks_can_ask_them(held_out: Path, mini_root: Path) -> None:
    config = BenchmarkConfig(name="mini_held_out", tasks=TASKS, data_root=str(held_out))
    paths = PathsConfig(cache=str(held_out.parent))
    check(config, paths)
    asked = question_ids(config, paths)
    assert len(asked) == 16 * 4
    plain = tuple(f"mini_{n}" for n in ("mmmu", "scienceqa", "videomme"))
    evaluated = question_ids(
        BenchmarkConfig(name="mini", tasks=plain, data_root=str(mini_root)), paths
    )
    assert not asked & evaluated
