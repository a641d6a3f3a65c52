"""A run's data is read once, and again as soon as any of its files could have changed."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from morphoquant.calibration.samples import CalibrationError
from morphoquant.config import RunConfig, load
from morphoquant.config.store import register
from morphoquant.models.loading import embedded_folder, model_hash
from morphoquant.sharing import content
from morphoquant.sharing.artifacts import ArtifactStore

CONF = Path(__file__).parents[2] / "conf"


@pytest.fixture(scope="module")
def data(mini_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the small embedded sets, to be changed."""
    folder = tmp_path_factory.mktemp("data") / "sets"
    shutil.copytree(mini_root, folder)
    return folder


@pytest.fixture(scope="module")
def configure(data: Path) -> Callable[..., RunConfig]:
    register()
    sources = (
        f"[{{reader:scienceqa,path:'{data}/scienceqa'}},"
        f"{{reader:videomme,path:'{data}/videomme',videos:'{data}/videos'}}]"
    )

    @functools.cache
    def make(*overrides: str) -> RunConfig:
        fixed = [
            "method=rtn",
            "benchmark=mini_scienceqa",
            f"benchmark.data_root={data}",
            f"calibration.sources={sources}",
            "calibration.samples=6",
            "calibration.search_samples=2",
        ]
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            return load(compose("config", overrides=[*fixed, *overrides]))

    return make


@pytest.fixture
def inspections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the data is read."""
    counted: list[int] = []
    inspect = content._inspect

    def count(config: RunConfig) -> Any:
        counted.append(1)
        return inspect(config)

    monkeypatch.setattr(content, "_inspect", count)
    return counted


def touch(path: Path) -> None:
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # moves the time of change alone


def test_unchanged_data_is_looked_up(
    configure: Callable[..., RunConfig], data: Path, tmp_path: Path, inspections: list[int]
) -> None:
    store = ArtifactStore(tmp_path)
    first, loaded = content.content_of(configure(), store)
    assert loaded is not None
    assert (first.calibration_ids, first.calibration_data) == (
        loaded.ids_hash,
        loaded.content_hash,
    )
    again, nothing = content.content_of(configure("bits=w8a8", "method=morphoquant"), store)
    assert (again, nothing, len(inspections)) == (first, None, 1)
    other, _ = content.content_of(configure("calibration.samples=5"), store)
    assert other.calibration_ids != first.calibration_ids
    assert other.question_ids == first.question_ids
    fewer, _ = content.content_of(configure("limit=2"), store)
    assert fewer.question_ids != first.question_ids
    assert len(inspections) == 3
    for name in ("videos", "scienceqa"):
        touch(next(p for p in sorted((data / name).rglob("*")) if p.is_file()))
        assert content.content_of(configure(), store)[0] == first
        assert content.content_of(configure(), store)[0] == first
    assert len(inspections) == 5, "once for every touched file"


def test_a_rewritten_clip_is_seen(
    configure: Callable[..., RunConfig], data: Path, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path)
    first, _ = content.content_of(configure(), store)
    for clip in (data / "videos").glob("clip_calibration_*"):
        clip.write_bytes(clip.read_bytes() + b"\0")
    second, _ = content.content_of(configure(), store)
    assert second.calibration_data != first.calibration_data


def test_bad_data_is_refused_every_time(
    configure: Callable[..., RunConfig], data: Path, tmp_path: Path
) -> None:
    config = configure(
        f"calibration.sources=[{{reader:scienceqa,path:'{data}/scienceqa',split:test}}]",
        "calibration.samples=3",
    )
    for _ in range(2):
        with pytest.raises(CalibrationError, match="leakage"):
            content.content_of(config, ArtifactStore(tmp_path))


def test_the_hub_is_always_asked(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(content, "_inspect", lambda config: asked.append(1))
    for overrides in (
        ("benchmark=scienceqa", "benchmark.data_root=null"),
        ("calibration.sources=[{reader:mmmu,path:owner/set}]",),
    ):
        for _ in range(2):
            content.content_of(configure(*overrides), ArtifactStore(tmp_path))
    assert len(asked) == 4


def test_every_embedded_set_is_watched(configure: Callable[..., RunConfig]) -> None:
    mini = "calibration.sources=[{reader:mmmu,path:'mini:mmmu'}]"
    config = configure(mini, "benchmark=mini_held_out", "benchmark.data_root=null")
    cache = Path(config.paths.cache)
    folders = content._folders(config)
    assert folders is not None
    assert {cache / "mini" / "mmmu", cache / "mini_held_out" / "mmmu"} <= folders


def test_a_checkpoint_is_hashed_once(
    configure: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(embedded_folder("tiny_omni"), folder)
    model = configure(f"model.path={folder}").model
    store = ArtifactStore(tmp_path / "cache")
    expected = model_hash(model)
    assert content.checkpoint_hash(model, store) == expected
    monkeypatch.setattr("morphoquant.models.loading.model_hash", lambda config: "asked again")
    assert content.checkpoint_hash(model, store) == expected
    (folder / "README.md").write_text("not read by loading")
    assert content.checkpoint_hash(model, store) == expected
    touch(folder / "config.json")
    assert content.checkpoint_hash(model, store) == "asked again"
