"""A run directory survives what happens to disks and processes."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import (
    RunDirectory,
    StorageError,
    as_storage_error,
    read_result,
    write_atomic,
)

IDENTITY = {"config": {"bits": {"weight": 4}}, "code": "abc"}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.open(tmp_path, "tiny-rtn-w4a4", IDENTITY)


def test_the_directory_says_what_it_is(run: RunDirectory) -> None:
    assert run.path.name == f"tiny-rtn-w4a4-{run.fingerprint[:10]}"
    assert json.loads((run.path / "identity.json").read_text()) == IDENTITY
    assert "weight: 4" in (run.path / "config.yaml").read_text()


def test_the_same_identity_is_the_same_directory(run: RunDirectory, tmp_path: Path) -> None:
    (run.path / "answers").mkdir()
    again = RunDirectory.open(tmp_path, "tiny-rtn-w4a4", dict(reversed(IDENTITY.items())))
    assert again.path == run.path
    assert again.answers.is_dir()
    other = RunDirectory.open(tmp_path, "tiny-rtn-w4a4", {**IDENTITY, "code": "abd"})
    assert other.path != run.path


def test_finished_means_a_valid_result(run: RunDirectory) -> None:
    assert not run.finished
    with pytest.raises(FileNotFoundError):
        run.result()
    (run.path / "result.json").write_text('{"finger')
    assert not run.finished
    run.finish({"fingerprint": run.fingerprint, "mean": 1.5})
    assert run.finished
    assert run.result()["mean"] == 1.5
    assert read_result(run.path) == run.result()


def test_tables_come_back(run: RunDirectory) -> None:
    frame = pd.DataFrame({"id": ["a", "b"], "correct": [True, None]})
    run.write_table("samples", frame)
    found = pd.read_parquet(run.path / "samples.parquet")
    assert list(found["id"]) == ["a", "b"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(run: RunDirectory) -> None:
    run.write_text("note.txt", "old")
    before = sorted(run.path.iterdir())

    def half(path: Path) -> None:
        path.write_text("ne")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError):
        write_atomic(run.path / "note.txt", half)
    assert (run.path / "note.txt").read_text() == "old"
    assert sorted(run.path.iterdir()) == before


def test_a_full_disk_is_said_plainly(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_text("note.txt", "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"(?s)note\.txt.*No space left.*same command") as error:
        run.write_text("note.txt", "new")
    assert isinstance(error.value, HarnessError)
    assert (run.path / "note.txt").read_text() == "old"
    assert not [p for p in run.path.iterdir() if p.name.startswith(".note")]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"paths\.runs"):
        RunDirectory.open(tmp_path / "runs", "x", IDENTITY)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            RunDirectory.open(tmp_path, "x", IDENTITY)
    finally:
        tmp_path.chmod(0o700)


def test_what_a_killed_process_left_half_written_goes(run: RunDirectory) -> None:
    (run.path / "figures").mkdir()
    left = [run.path / ".result.json-17-0123abcd", run.path / "figures" / ".a.png-9-ffffffff"]
    left.append(run.path / ".config.yaml-17-0123abcd")
    # Written before the lock is taken: another process may be about to rename it.
    under_way = run.path / ".identity.json-18-0123abcd"
    kept = [run.path / ".note-1", run.path / "x-17-0123abcd", under_way]
    for path in left + kept:
        path.touch()
    os.utime(left[-1], (0, 0))
    with run.lock():
        assert not any(path.exists() for path in left)
        assert all(path.exists() for path in kept)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EROFS])
def test_a_full_disk_is_one_whoever_meets_it(number: int) -> None:
    found = as_storage_error(OSError(number, os.strerror(number), "/tmp/elsewhere"))
    assert isinstance(found, StorageError)
    assert "/tmp/elsewhere" in str(found)
    assert os.strerror(number) in str(found)
    assert as_storage_error(found) is found
    other = ConnectionRefusedError(errno.ECONNREFUSED, "no")
    assert as_storage_error(other) is other


def test_a_second_holder_waits_and_says_so(
    run: RunDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    order: list[str] = []
    second = RunDirectory(run.path, IDENTITY)

    def other() -> None:
        with second.lock():
            order.append("second")

    with caplog.at_level(logging.INFO), run.lock():
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert "waiting" in caplog.text


def _hold_and_die(path: str) -> None:
    with RunDirectory(Path(path), IDENTITY).lock():
        os._exit(1)


def test_a_killed_process_leaves_no_lock(run: RunDirectory) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_hold_and_die, args=(str(run.path),)
    )
    process.start()
    process.join(60)
    assert process.exitcode == 1
    with run.lock():
        pass
