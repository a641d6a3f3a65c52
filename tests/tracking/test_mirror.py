"""wandb mirrors a run when it can, and never costs one."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterator
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


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a user was warned of (wandb itself logs its own progress too)."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


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


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that refuses connections: a port of this machine on which nobody listens."""
    import wandb

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    wandb.teardown()  # settings are read once per process
    yield
    monkeypatch.undo()
    wandb.teardown()


@pytest.mark.usefixtures("nowhere")
def test_a_server_out_of_reach_costs_one_warning_and_no_data(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(TrackerConfig(mode="online"), {"bits": 4}, "run", None, tmp_path)
    assert isinstance(tracker, WandbTracker)
    use(tracker)
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    (said,) = warnings(caplog)
    assert "kept offline" in said
    assert "wandb sync" in said


def test_a_server_that_refuses_is_one_warning_and_no_data_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    started = wandb.init

    def refuse(**options: Any) -> Any:
        if options["mode"] == "online":
            raise wandb.errors.UsageError("No API key configured. Use `wandb login`")
        return started(**options)

    monkeypatch.setattr(wandb_mirror, "_reach", lambda: None)
    monkeypatch.setattr(wandb, "init", refuse)
    use(open_tracker(TrackerConfig(mode="online"), {}, "run", None, tmp_path))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    (said,) = warnings(caplog)
    assert "No API key" in said
