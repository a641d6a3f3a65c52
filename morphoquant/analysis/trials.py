"""The table of a sweep that optimises: every trial with what was tried, the best first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from morphoquant.analysis.table import Report, failure_notes
from morphoquant.errors import HarnessError
from morphoquant.objective import DIRECTION
from morphoquant.tracking.rundir import read_result

TITLES = {"kl": "held-out KL", "held_out_accuracy": "held-out accuracy"}
"""Objective -> its column."""


def trials(notes: Sequence[Mapping[str, Any]], root: Path | None = None) -> Report:
    """One row per trial that came through, sorted by its objective.

    Columns: ``trial`` (number of the job), a column for every override that differs between the
    trials, the objective, ``top-1 %`` (agreement with the original's most likely token) where the
    divergence was measured, effective ``W bits`` and ``A bits``.

    Raises:
        HarnessError: no trial has an objective, or a run is not finished.
    """
    tried = [(i, note) for i, note in enumerate(notes) if note.get("objective") is not None]
    if not tried:
        raise HarnessError("no trial of this sweep has an objective: nothing to sort")
    name = tried[0][1]["objective_name"]
    given = [dict(a.split("=", 1) for a in note["arguments"]) for _, note in tried]
    keys = list(dict.fromkeys(key for one in given for key in one))
    tuned = [key for key in keys if len({one.get(key) for one in given}) > 1]
    rows = []
    for (number, note), one in zip(tried, given, strict=True):
        result = read_result(Path(note["run"]))
        if result is None:
            raise HarnessError(f"{note['run']}: no finished run here (result.json is missing)")
        measured = result.get("held_out") or {}
        row: dict[str, Any] = {"trial": number}
        row |= {_short(key): one.get(key, "") for key in tuned}
        row[TITLES[name]] = note["objective"]
        row["top-1 %"] = 100 * measured.get("top1_agreement", math.nan)
        row["W bits"], row["A bits"] = result["bits"]["weight"], result["bits"]["activation"]
        rows.append(row)
    frame = pd.DataFrame(rows).dropna(axis="columns", how="all")
    ascending = DIRECTION[name] == "minimize"
    frame = frame.sort_values([TITLES[name], "trial"], ascending=[ascending, True])
    frame = frame.reset_index(drop=True)
    remarks = [
        f"Sorted by {name}, {'less' if ascending else 'more'} is better. No question of a "
        "benchmark was asked to choose; the winner is still to be evaluated.",
        "A bits count what a compensation keeps in 16 bits: a better objective that was bought "
        "with bits is no better method.",
    ]
    failed = [dict(note) for note in notes if "error" in note]
    cells = frame.assign(
        trial=frame["trial"].map(str),
        **{_short(key): frame[_short(key)].map(_rounded) for key in tuned},
    )
    return Report("Trials", frame, cells, remarks + failure_notes(failed))


def _short(key: str) -> str:
    return key.removeprefix("method.").removeprefix("activation.").removeprefix("compensation.")


def _rounded(text: str) -> str:
    """A sampled number in four digits; everything else as it was given."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text
