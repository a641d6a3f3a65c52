"""wandb mirrors a run when it can, and never costs one."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from morphoquant.config.schema import TrackerConfig
from morphoquant.tracking import wandb_mirror
from morphoquant.tracking.wandb_mirror import NoTracker, WandbTracker, open_tracker


class Broken:
    """Stands for a wandb run whose connection is gone."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError("no route to host")


def use(tracker: wandb_mirror.Tracker) -> None:
    tracker.log({"accuracy": 1.0})
    tracker.table("samples", pd.DataFrame({"a": [1]}))
    tracker.summary({"mean": 2.0})
    tracker.finish()


def test_none_is_silent(tmp_path: Path) -> None:
    tracker = open_tracker(TrackerConfig(name="none"), {}, "run", None, tmp_path)
    assert isinstance(tracker, NoTracker)
    use(tracker)
    assert not list(tmp_path.iterdir())


def test_a_failing_init_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def fail(**_: Any) -> None:
        raise RuntimeError("quota")

    monkeypatch.setattr(wandb, "init", fail)
    use(open_tracker(TrackerConfig(), {}, "run", None, tmp_path))
    assert [r.getMessage() for r in caplog.records] == [
        "wandb could not start, the run goes on without it: quota"
    ]


def test_a_missing_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(open_tracker(TrackerConfig(), {}, "run", None, tmp_path))
    assert len(caplog.records) == 1


def test_failing_calls_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        use(WandbTracker(Broken()))
    assert [r.getMessage() for r in caplog.records] == [
        "wandb failed, the run goes on without it: no route to host"
    ]


def test_offline_leaves_files_and_says_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = open_tracker(TrackerConfig(), {"bits": 4}, "tiny-rtn-0123456789", "sweep", tmp_path)
    assert isinstance(tracker, WandbTracker)
    use(tracker)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert "wandb" not in capfd.readouterr().err.lower()
