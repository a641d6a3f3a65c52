"""Progress with a rate and an ETA: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from morphoquant.ranks import Ranks

LINE_EVERY = 10.0  # seconds between two lines where there is no terminal
QUIET = 3.0  # seconds that go by before the first line: short work says nothing

_prefix: str | None = None


def as_lines(prefix: str) -> None:
    """From now on lines with a prefix, whatever stderr is: several processes share it."""
    global _prefix
    _prefix = prefix


def speed(rate: float) -> str:
    """``3.2/s``, or ``41.0 s each`` where that is the number above one."""
    return f"{rate:.1f}/s" if rate >= 1 or rate <= 0 else f"{1 / rate:.1f} s each"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s``, ``2 h 07 min``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


class _Lines:
    """Progress for logs: at most a line every few seconds."""

    def __init__(self, title: str, total: int, unit: str) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.start = self.said = time.monotonic()
        self.said += QUIET - LINE_EVERY

    def step(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= LINE_EVERY:
            self.said = now
            rate = self.done / max(now - self.start, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            share = 100 * self.done / max(self.total, 1)
            title = f"{_prefix or ''}{self.title}"
            print(
                f"{title}: {self.done}/{self.total} {self.unit} ({share:.0f} %), "
                f"{speed(rate)}, {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )


@contextmanager
def progress(title: str, total: int, unit: str = "steps") -> Iterator[Callable[[int], None]]:
    """``with progress("Quantizing", 28, unit="blocks") as step: ...; step(1)``."""
    if not Ranks.of_process().leads:  # one bar is enough for all
        yield lambda count: None
        return
    if _prefix is not None or not sys.stderr.isatty():
        yield _Lines(title, total, unit).step
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}, {task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, unit=unit, rate="")

        def step(count: int) -> None:
            bar.advance(task, count)
            rate = bar.tasks[0].speed
            bar.update(task, rate=speed(rate) if rate else "")

        yield step


@contextmanager
def progress_callback(
    title: str, unit: str = "questions"
) -> Iterator[Callable[[int, int, str], None]]:
    """For work that reports ``(done, total, part)``: one bar per part, made when it begins."""
    state: dict[str, object] = {}

    def report(done: int, total: int, part: str) -> None:
        if state.get("part") != part:
            close()
            context = progress(f"{title} {part}", total, unit)
            state.update(part=part, context=context, step=context.__enter__(), done=0)
        before = state["done"]
        assert isinstance(before, int)
        if done > before:
            state["step"](done - before)  # type: ignore[operator]
            state["done"] = done

    def close() -> None:
        context = state.pop("context", None)
        if context is not None:
            context.__exit__(None, None, None)  # type: ignore[attr-defined]
        state.clear()

    try:
        yield report
    finally:
        close()
