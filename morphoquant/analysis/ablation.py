"""The table of an ablation: every row changes one factor of a base run, and is compared with it.

A job names its change as ``ablation=<factor>_<what>`` (a file of ``conf/ablation``); the row with
``ablation=base`` is what the others are compared with, question by question (``paired``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from morphoquant.analysis import pairs, table
from morphoquant.analysis.cells import compared, interval
from morphoquant.analysis.cost import cost
from morphoquant.analysis.paired import (
    CONFIDENCE,
    HIGHER,
    LOWER,
    NOTHING,
    RESAMPLES,
    UNCORRECTED,
    UNKNOWN,
    Difference,
    PairedDifference,
    paired_difference,
    verdict,
)
from morphoquant.analysis.resampling import LEVEL
from morphoquant.errors import HarnessError

__all__ = ["HIGHER", "LOWER", "NOTHING", "UNCORRECTED", "UNKNOWN", "ablation", "interval"]

GROUP = "ablation="
BASE = "base"
TITLE = "Ablation: accuracy in percent (difference to the base row in points)"

IS_BASE, SAME_RUN = "base row", "same run as the base"
UNCOMPARED = "base failed"


@dataclass(frozen=True)
class Job:
    """One job of a sweep, from the note it left."""

    choice: str
    """Name of the ``ablation`` choice."""
    setting: str
    """The overrides in which jobs differ besides the choice (two methods, say); else empty."""
    run: Path | None
    """Its run directory; None where it failed."""
    error: str = ""

    @property
    def factor(self) -> str:
        return self.choice.split("_", 1)[0]


def read_jobs(notes: Sequence[Mapping[str, str]]) -> list[Job]:
    """The jobs of a sweep, from its notes: ``overrides`` with either ``run`` or ``error``.

    Raises:
        HarnessError: a job chose no ablation, or two jobs are the same.
    """
    parsed = []
    for note in notes:
        overrides = note["overrides"].split()
        chosen = [o.lstrip("+").removeprefix(GROUP) for o in overrides if _chooses(o)]
        if len(chosen) != 1:
            raise HarnessError(f"no {GROUP}<choice> in the job {note['overrides']!r}")
        parsed.append((chosen[0], [o for o in overrides if not _chooses(o)], note))
    jobs = []
    for choice, others, note in parsed:
        differing = [o for o in others if any(o not in theirs for _, theirs, _ in parsed)]
        run = Path(note["run"]) if "run" in note else None
        jobs.append(Job(choice, " ".join(differing), run, note.get("error", "")))
    seen: set[tuple[str, str]] = set()
    for job in jobs:
        if (job.choice, job.setting) in seen:
            raise HarnessError(f"two jobs of {GROUP}{job.choice} {job.setting}".rstrip())
        seen.add((job.choice, job.setting))
    return jobs


def _chooses(override: str) -> bool:
    return override.lstrip("+").startswith(GROUP)


def load_jobs(
    jobs: Sequence[Job], root: Path | None = None
) -> tuple[dict[Path, dict[str, Any]], list[dict[str, Any]]]:
    """Directory -> result of every job that came through, and the unquantized references.

    Raises:
        HarnessError: a directory holds no finished run.
    """
    directories = list(dict.fromkeys(job.run for job in jobs if job.run is not None))
    wanted = set(directories)
    loaded = table.load_runs(directories, root) if directories else []
    runs = {Path(run["path"]): run for run in loaded if Path(run["path"]) in wanted}
    return runs, [run for run in loaded if Path(run["path"]) not in wanted]


def ablation(
    notes: Sequence[Mapping[str, str]],
    root: Path | None = None,
    *,
    base: str = BASE,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> table.Report:
    """Compare every job of a sweep with its base job.

    Args:
        notes: what the jobs left: ``{"overrides", "run"}`` or ``{"overrides", "error"}``.
        root: folder of the run directories, where the unquantized references are; default:
            beside each run.
        base: the choice that the others are compared with. Where jobs differ in more than the
            choice, every group of equal settings has its own.
        confidence: level of the intervals.
        resamples: of the bootstrap.

    Returns:
        The report. Its frame has one row per job, base first: ``factor``, ``choice``, ``setting``
        where there are several; per benchmark its accuracy (percent) and its ``table.DETAILS``,
        to the base, corrected over all rows and benchmarks; ``mean``, ``Δ mean`` and its interval
        ``low``, ``high``; ``p`` (exact McNemar over all questions) and ``p adjusted``
        (Benjamini-Hochberg over all rows); ``gained`` and ``lost`` questions; ``verdict``;
        effective ``A bits`` and ``W bits``. Its parts are ``pairs`` and ``cost``.

    Raises:
        HarnessError: no base job; a directory without a finished run; rows that answered other
            questions than their base.
    """
    jobs = read_jobs(notes)
    settings = list(dict.fromkeys(job.setting for job in jobs))
    runs, references = load_jobs(jobs, root)
    benchmarks = list(dict.fromkeys(name for run in runs.values() for name in run["accuracy"]))
    bases = {runs[job.run]["fingerprint"] for job in jobs if job.choice == base and job.run}
    once = {run["fingerprint"]: run for run in runs.values()}
    found = pairs.compare_runs(
        list(once.values()), bases, confidence=confidence, resamples=resamples
    )
    rows: list[dict[str, Any]] = []
    tested: dict[int, PairedDifference] = {}
    for setting in settings:
        group = [job for job in jobs if job.setting == setting]
        first = next((job for job in group if job.choice == base), None)
        if first is None:
            where = f" with {setting}" if setting else ""
            raise HarnessError(f"no job {GROUP}{base}{where}: nothing to compare the others with")
        against = runs[first.run] if first.run is not None else None
        for job in [first, *(job for job in group if job is not first)]:
            run = runs[job.run] if job.run is not None else None
            difference = None
            if run and against and run["fingerprint"] != against["fingerprint"]:
                pair = run["fingerprint"], against["fingerprint"]
                # Not found: other questions. This says which.
                difference = found.get(pair) or paired_difference(run, against)
                tested[len(rows)] = difference
            rows.append(_row(job, run, against, difference, benchmarks, base))
    frame = pd.DataFrame(rows)
    correct(frame, {(i, ""): difference.mean for i, difference in tested.items()})
    single = {
        (i, f" {name}"): difference.benchmarks[name]
        for i, difference in tested.items()
        for name in benchmarks
        if name in difference.benchmarks
    }
    correct(frame, single)
    if len(settings) == 1:
        frame = frame.drop(columns="setting")
    measured = list(runs.values())
    footnotes = [
        *_how(frame, measured, benchmarks, base, confidence, resamples),
        *table.unequal(measured),
        *table.caveats(measured),
        *unquantized(references),
        *table.failure_notes([dict(note) for note in notes if "error" in note]),
    ]
    shown = compared(frame, confidence)
    shown["verdict mean"] = shown["verdict"].where(frame["p"].notna())
    parts = {"pairs": pairs.report(measured, found), "cost": cost([*references, *measured])}
    parts = {name: replace(part, printed=False) for name, part in parts.items()}
    return table.Report(TITLE, frame, shown, footnotes, parts)


def _row(
    job: Job,
    run: dict[str, Any] | None,
    against: dict[str, Any] | None,
    difference: PairedDifference | None,
    benchmarks: Sequence[str],
    base: str,
) -> dict[str, Any]:
    """One row of the frame; whatever is unknown is NaN."""
    row: dict[str, Any] = {
        "factor": job.factor,
        "choice": job.choice.removeprefix(f"{job.factor}_") if job.choice != base else "–",
        "setting": job.setting,
    }
    row |= compared_columns(run, difference, benchmarks, details=True)
    row["verdict"] = _without_test(job, run, against, difference, base)
    row["A bits"] = run["bits"]["activation"] if run else math.nan
    row["W bits"] = run["bits"]["weight"] if run else math.nan
    return row


def compared_columns(
    run: Mapping[str, Any] | None,
    difference: PairedDifference | None,
    benchmarks: Sequence[str],
    details: bool = False,
) -> dict[str, Any]:
    """What a row says of a run and of its difference to another; NaN where that is unknown.

    Args:
        run: its result, or None where it failed.
        difference: to what it is compared with.
        benchmarks: in the order of the columns.
        details: interval and test of every benchmark too, with room for what follows from all rows
            (:func:`correct`).
    """
    found = difference.mean if difference else None
    row: dict[str, Any] = {}
    for name in benchmarks:
        row[name] = run["accuracy"].get(name, {}).get("value", math.nan) if run else math.nan
        part = difference.benchmarks.get(name) if difference else None
        row[f"Δ {name}"] = part.delta if part else math.nan
        if details:
            row |= {f"{key} {name}": getattr(part, key, math.nan) for key in ("low", "high", "p")}
            row |= {f"p adjusted {name}": math.nan, f"verdict {name}": None}
    row["mean"] = run["mean"] if run and benchmarks else math.nan
    row["Δ mean"] = found.delta if found else math.nan
    row |= {key: getattr(found, key, math.nan) for key in ("low", "high", "p")}
    row["p adjusted"] = math.nan
    return row | {key: getattr(found, key, math.nan) for key in ("gained", "lost")}


def _without_test(
    job: Job,
    run: dict[str, Any] | None,
    against: dict[str, Any] | None,
    difference: PairedDifference | None,
    base: str,
) -> str | None:
    """Why a row has no verdict on its difference; None where it gets one."""
    if run is None:
        return failed(job.error)
    if job.choice == base:
        return IS_BASE
    if against is None:
        return UNCOMPARED
    return SAME_RUN if difference is None else None


def failed(error: str) -> str:
    """The verdict on a job without a run: the first line of its reason."""
    reason = error.strip().splitlines()
    return f"failed: {reason[0] if reason else 'no reason given'}"


def correct(frame: pd.DataFrame, parts: Mapping[tuple[int, str], Difference]) -> None:
    """Fill in ``p adjusted`` and the verdicts of differences that are corrected together.

    Benjamini and Hochberg (J. R. Stat. Soc. B 1995) bound the expected share of false differences
    among those found. Rows share their base, so their tests depend positively on each other, the
    case in which that procedure holds.

    Args:
        frame: the rows, changed in place.
        parts: place of a row and what its columns' names end in -> the difference.
    """
    adjusted = stats.false_discovery_control([p.p for p in parts.values()]) if parts else []
    for ((row, suffix), part), p in zip(parts.items(), adjusted, strict=True):
        frame.loc[row, f"p adjusted{suffix}"] = p
        frame.loc[row, f"verdict{suffix}"] = verdict(part, p)


def _how(
    frame: pd.DataFrame,
    runs: Sequence[dict[str, Any]],
    benchmarks: Sequence[str],
    base: str,
    confidence: float,
    resamples: int,
) -> list[str]:
    """How to read the columns."""
    sizes = {name: found["n"] for run in runs for name, found in run["accuracy"].items()}
    counted = ", ".join(f"{name} {n}" for name, n in sizes.items())
    notes = [f"Questions: {counted}."] if sizes else []
    notes.append(
        f"The base row is {GROUP}{base}; every other row changes one factor of it. Differences "
        f"are paired: the same questions, answered by both."
    )
    notes.append(
        f"Interval: {100 * confidence:g} % of the difference of the means over benchmarks, "
        f"bootstrap percentile ({resamples} resamples within benchmarks; the questions of "
        f"one Video-MME clip are drawn together). '{NOTHING}' means that it covers zero: "
        f"not that there is none."
    )
    tested = int(frame["p"].notna().sum())
    notes.append(
        f"p: exact McNemar test of the questions gained and lost, all benchmarks pooled; adjusted: "
        f"after Benjamini-Hochberg over {tested} comparisons (false discovery rate), needed below "
        f"{LEVEL}."
    )
    cells = int(frame[[f"p {name}" for name in benchmarks]].notna().sum().sum())
    if cells:
        notes.append(
            f"{table.UNRESOLVED} marks a difference that is not resolved, by interval or corrected "
            f"test; of single benchmarks after the same correction over their {cells} differences."
        )
    return notes


def unquantized(references: Sequence[dict[str, Any]]) -> list[str]:
    """What the unquantized model reaches, which is no row of an ablation."""
    notes = []
    for run in references:
        parts = ", ".join(f"{name} {a['value']:.1f}" for name, a in run["accuracy"].items())
        notes.append(f"The unquantized model: {run['mean']:.1f} ({parts}).")
    return notes
