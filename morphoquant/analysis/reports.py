"""Which table a sweep ends in: the values of ``report`` and what makes each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphoquant.analysis import table
from morphoquant.analysis.table import Report

Notes = Sequence[Mapping[str, Any]]
"""What the jobs of a sweep left: ``overrides`` with either ``run`` or ``error``."""


def comparison(notes: Notes, root: Path | None = None) -> Report:
    """Every run of a sweep beside the unquantized model.

    Args:
        notes: of the jobs.
        root: folder of the run directories, where the unquantized references are.

    Raises:
        HarnessError: a run is not finished.
    """
    found = list(dict.fromkeys(note["run"] for note in notes if "run" in note))
    failed = [dict(note) for note in notes if "error" in note]
    runs = table.load_runs([Path(d) for d in found], root)
    frame = table.with_failures(table.comparison(runs), failed)
    footnotes = table.footnotes(runs) + table.failure_notes(failed)
    return Report(table.TITLE, frame, frame, footnotes)


def _ablation(notes: Notes, root: Path | None) -> Report:
    from morphoquant.analysis.ablation import ablation

    return ablation(notes, root)


def _table3(notes: Notes, root: Path | None) -> Report:
    from morphoquant.analysis.published import table3

    return table3(notes, root)


def _trials(notes: Notes, root: Path | None) -> Report:
    from morphoquant.analysis.trials import trials

    return trials(notes, root)


REPORTS: dict[str, Callable[[Notes, Path | None], Report]] = {
    "comparison": comparison,
    "ablation": _ablation,
    "table3": _table3,
    "trials": _trials,
}
"""One maker for every value of ``report`` in the config."""


def make_report(name: str, notes: Notes, root: Path | None = None) -> Report:
    """The table called ``name`` of a sweep.

    Raises:
        HarnessError: its runs cannot be compared like that; the message says why.
    """
    return REPORTS[name](notes, root)
