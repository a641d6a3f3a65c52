"""Progress without a terminal: a line now and then, with share, rate and time left."""

from __future__ import annotations

import pytest

from morphoquant.tracking import progress as module
from morphoquant.tracking.progress import duration, progress, progress_callback, speed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Evaluating", 200, unit="questions") as step:
        for _ in range(20):
            clock[0] += 1.0
            step(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Evaluating: 30/200 questions (15 %), 10.0/s, 17 s left"
    assert len(lines) == 2  # after 3 s, then every 10


def test_short_work_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with progress("Quick", 2) as step:
        step(1)
        step(1)
    assert capsys.readouterr().err == ""


def test_callback_counts_differences_per_part(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_callback("Evaluating rtn") as report:
        for part in ("mmmu", "videomme"):
            for done in (4, 8, 8):
                clock[0] += 3.0
                report(done, 8, part)
    text = capsys.readouterr().err
    assert "Evaluating rtn mmmu: 8/8" in text
    assert "Evaluating rtn videomme: 8/8" in text


def test_words() -> None:
    assert [speed(r) for r in (3.21, 0.1, 0.0)] == ["3.2/s", "10.0 s each", "0.0/s"]
    assert [duration(s) for s in (5.4, 65, 7620)] == ["5 s", "1 min 05 s", "2 h 07 min"]
