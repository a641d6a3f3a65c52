"""Which table a sweep ends in: the values of ``report`` and what makes each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from morphoquant.analysis import pairs, table
from morphoquant.analysis.cost import cost
from morphoquant.analysis.table import Report

Notes = Sequence[Mapping[str, Any]]
"""What the jobs of a sweep left: ``overrides`` with either ``run`` or ``error``."""


def comparison(notes: Notes, root: Path | None = None) -> Report:
    """Every run of a sweep beside the unquantized model, and beside every other.

    Args:
        notes: of the jobs.
        root: folder of the run directories, where the unquantized references are.

    Raises:
        HarnessError: a run is not finished.
    """
    found = list(dict.fromkeys(note["run"] for note in notes if "run" in note))
    failed = [dict(note) for note in notes if "error" in note]
    runs = table.load_runs([Path(d) for d in found], root)
    asked = [run for run in runs if run["accuracy"]]
    compared = pairs.compare_runs(asked)
    frame = table.comparison(runs, compared)
    footnotes = table.footnotes(runs, frame) + table.failure_notes(failed)
    frame = table.with_failures(frame, failed)
    parts = {"pairs": pairs.report(asked, compared)} if asked else {}
    parts["cost"] = cost(runs)
    return Report(table.TITLE, frame, frame, footnotes, parts)


def _ablation(notes: Notes, root: Path | None) -> Report:
    from morphoquant.analysis.ablation import ablation

    return ablation(notes, root)


def _table1(notes: Notes, root: Path | None) -> Report:
    from morphoquant.analysis.table1 import table1

    return table1(notes, root)


def _table3(notes: Notes, root: Path | None) -> Report:
    from morphoquant.analysis.published import table3

    return table3(notes, root)


def _trials(notes: Notes, root: Path | None) -> Report:
    from morphoquant.analysis.trials import trials

    return trials(notes, root)


def _sensitivity(notes: Notes, root: Path | None) -> Report:
    from morphoquant.analysis.sensitivity import sensitivity

    return sensitivity(notes, root)


REPORTS: dict[str, Callable[[Notes, Path | None], Report]] = {
    "comparison": comparison,
    "ablation": _ablation,
    "table1": _table1,
    "table3": _table3,
    "trials": _trials,
    "sensitivity": _sensitivity,
}
"""One maker for every value of ``report`` in the config."""


def make_report(name: str, notes: Notes, root: Path | None = None) -> Report:
    """The table called ``name`` of a sweep.

    Raises:
        HarnessError: its runs cannot be compared like that; the message says why.
    """
    return REPORTS[name](notes, root)
