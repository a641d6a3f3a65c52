"""Sweeps by their commands, and the tables that ablations and Table 3 end in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from morphoquant.analysis.notebook import command
from morphoquant.analysis.report import formatted
from morphoquant.analysis.reports import make_report
from morphoquant.analysis.sweeps import ABOUT, Sweep
from morphoquant.errors import HarnessError


@dataclass(frozen=True)
class SweepTable:
    """One sweep: what was asked, how it ended, and its own table where that is not a comparison."""

    name: str
    command: str
    finished: bool
    done: int
    failed: int
    begun: int
    """Jobs that left neither a run nor a reason: they run, or were killed."""
    title: str
    headers: list[str]
    rows: list[list[str]]
    notes: list[str]


def sweep_tables(sweeps: Sequence[Sweep]) -> list[SweepTable]:
    """Of every sweep, by name. A table that cannot be made any more leaves the reason as a note."""
    return [_table(sweep) for sweep in sorted(sweeps, key=lambda s: s.path.name)]


def _table(sweep: Sweep) -> SweepTable:
    done = sum("run" in note for note in sweep.notes)
    title = ""
    headers: list[str] = []
    rows: list[list[str]] = []
    notes: list[str] = []
    if sweep.report != "comparison":
        try:
            report = make_report(sweep.report, sweep.notes)
            title, notes = report.title, report.notes
            headers, rows = formatted(report.cells)
        except HarnessError as error:
            notes = [f"The table {sweep.report!r} of this sweep cannot be made: {error}"]
    finished = (sweep.path / ABOUT).is_file()
    told = command(sweep) if finished else ""
    failed = sum("error" in note for note in sweep.notes)
    return SweepTable(
        name=sweep.path.resolve().name,
        command=told,
        finished=finished,
        done=done,
        failed=failed,
        begun=len(sweep.notes) - done - failed,
        title=title,
        headers=headers,
        rows=rows,
        notes=notes,
    )
