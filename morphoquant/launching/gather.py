"""Common to all launchers: launch, watch, and make of every job a note and a return value."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig

from morphoquant.launching import notes
from morphoquant.tracking.progress import duration

log = logging.getLogger("morphoquant.launching")

Jobs = Mapping[int, Sequence[str]]
"""Number -> overrides."""
Start = Callable[[Jobs], Mapping[int, str]]
"""Runs all of the jobs; returns number -> reason for those that did not come to their own end."""

WATCH_S = 1.0


def launch(
    config: DictConfig, overrides: Sequence[Sequence[str]], first: int, how: str, start: Start
) -> list[JobReturn]:
    """Run jobs to their end, each of them: a death is a note, never an exception.

    Args:
        config: of the sweep.
        overrides: of every job.
        first: number of the first job.
        how: the launcher in words.
        start: what runs the jobs.

    Returns:
        One entry a job, in order. Its value is the job's objective, None where it has none or
        failed (the note says why).
    """
    sweep = Path(str(config.hydra.sweep.dir))
    jobs = dict(enumerate(overrides, first))
    log.info("Starting %d jobs: %s", len(jobs), how)
    told = _labels(jobs)
    for number in jobs:
        log.info("#%d %s", number, told[number])
    (sweep / notes.JOBS).mkdir(parents=True, exist_ok=True)
    with _watched(sweep, told):
        reasons = dict(start(jobs))
    notes.wait_for(sweep, (number for number in jobs if number not in reasons))
    for number, given in jobs.items():
        unseen = f"its launcher says it ended well, but {sweep} shows no note of it; is paths.runs "
        unseen += "on a file system that all hosts share?"
        notes.bury(sweep, number, words(given), reasons.get(number, unseen))
    return [_returned(notes.read(sweep, number)) for number in jobs]


def words(overrides: Sequence[str]) -> str:
    return " ".join(filter_overrides(overrides))


def _labels(jobs: Jobs) -> dict[int, str]:
    """Each job by what it does not share with all others."""
    shared = set.intersection(*(set(given) for given in jobs.values()))
    own = {n: [o for o in given if o not in shared] for n, given in jobs.items()}
    return {n: words(own[n] or jobs[n]) for n in jobs}


def _returned(note: notes.Note | None) -> JobReturn:
    found = JobReturn()
    # Completed even where it failed: Hydra would raise, and the other jobs' table be lost.
    found.status = JobStatus.COMPLETED
    found.return_value = None if note is None else note.get("objective")
    return found


@contextmanager
def _watched(sweep: Path, labels: Mapping[int, str]) -> Iterator[None]:
    """A line for every job that ends, with how many are left and for about how long."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(sweep, labels, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(sweep: Path, labels: Mapping[int, str], over: threading.Event) -> None:
    started, waiting = time.monotonic(), dict(labels)
    last = False
    while waiting and not last:
        last = over.wait(WATCH_S)  # after the end, look once more
        for number in list(waiting):
            note = notes.read(sweep, number)
            if note is None or not notes.is_settled(note):
                continue
            label = waiting.pop(number)
            done, spent = len(labels) - len(waiting), time.monotonic() - started
            end = "failed" if "error" in note else "done"
            more = f", about {duration(spent / done * len(waiting))} left" if waiting else ""
            shown = (number, label, end, done, len(labels), duration(spent), more)
            log.info("#%d %s: %s (%d/%d jobs, %s%s)", *shown)
