"""The table of an ablation: every row changes one factor of a base run, and is compared with it.

A job names its change as ``ablation=<factor>_<what>`` (a file of ``conf/ablation``); the row with
``ablation=base`` is what the others are compared with, question by question (``paired``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from morphoquant.analysis import table
from morphoquant.analysis.paired import CONFIDENCE, RESAMPLES, PairedDifference, paired_difference
from morphoquant.errors import HarnessError

GROUP = "ablation="
BASE = "base"
LEVEL = 0.05  # of the corrected test
TITLE = "Ablation: accuracy in percent (difference to the base row in points)"

IS_BASE, SAME_RUN = "base row", "same run as the base"
NOTHING, UNKNOWN, UNCOMPARED = "no difference found", "interval unknown", "base failed"
HIGHER, LOWER, UNCORRECTED = "higher", "lower", ", not after correction"


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
        where there are several; per benchmark its accuracy (percent) and ``Δ <benchmark>`` to the
        base (points); ``mean``, ``Δ mean`` and its interval ``low``, ``high``; ``p`` (exact
        McNemar over all questions) and ``p adjusted`` (Benjamini-Hochberg over all rows);
        ``gained`` and ``lost`` questions; ``verdict``; effective ``A bits`` and ``W bits``.

    Raises:
        HarnessError: no base job; a directory without a finished run; rows that answered other
            questions than their base.
    """
    jobs = read_jobs(notes)
    settings = list(dict.fromkeys(job.setting for job in jobs))
    runs, references = load_jobs(jobs, root)
    benchmarks = list(dict.fromkeys(name for run in runs.values() for name in run["accuracy"]))
    rows = []
    for setting in settings:
        group = [job for job in jobs if job.setting == setting]
        first = next((job for job in group if job.choice == base), None)
        if first is None:
            where = f" with {setting}" if setting else ""
            raise HarnessError(f"no job {GROUP}{base}{where}: nothing to compare the others with")
        compared = runs[first.run] if first.run is not None else None
        for job in [first, *(job for job in group if job is not first)]:
            run = runs[job.run] if job.run is not None else None
            difference = None
            if run and compared and run["fingerprint"] != compared["fingerprint"]:
                difference = paired_difference(
                    run, compared, confidence=confidence, resamples=resamples
                )
            rows.append(_row(job, run, compared, difference, benchmarks, base))
    frame = pd.DataFrame(rows)
    if len(settings) == 1:
        frame = frame.drop(columns="setting")
    frame = _with_correction(frame)
    measured = list(runs.values())
    footnotes = [
        *_how(frame, measured, base, confidence, resamples),
        *table.unequal(measured),
        *table.caveats(measured),
        *_unquantized(references),
        *table.failure_notes([dict(note) for note in notes if "error" in note]),
    ]
    return table.Report(TITLE, frame, cells(frame, confidence), footnotes)


def _row(
    job: Job,
    run: dict[str, Any] | None,
    compared: dict[str, Any] | None,
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
    found = difference.mean if difference else None
    for name in benchmarks:
        row[name] = run["accuracy"].get(name, {}).get("value", math.nan) if run else math.nan
        part = difference.benchmarks.get(name) if difference else None
        row[f"Δ {name}"] = part.delta if part else math.nan
    row["mean"] = run["mean"] if run else math.nan
    row["Δ mean"] = found.delta if found else math.nan
    for key in ("low", "high", "p"):
        row[key] = getattr(found, key) if found else math.nan
    row["p adjusted"] = math.nan
    for key in ("gained", "lost"):
        row[key] = getattr(found, key) if found else math.nan
    row["verdict"] = _verdict(job, run, compared, difference, base)
    row["A bits"] = run["bits"]["activation"] if run else math.nan
    row["W bits"] = run["bits"]["weight"] if run else math.nan
    return row


def _verdict(
    job: Job,
    run: dict[str, Any] | None,
    compared: dict[str, Any] | None,
    difference: PairedDifference | None,
    base: str,
) -> str:
    if run is None:
        reason = job.error.strip().splitlines()
        return f"failed: {reason[0] if reason else 'no reason given'}"
    if job.choice == base:
        return IS_BASE
    if compared is None:
        return UNCOMPARED
    if difference is None:
        return SAME_RUN
    found = difference.mean
    if math.isnan(found.low):
        return UNKNOWN
    if not found.found:
        return NOTHING
    return HIGHER if found.delta > 0 else LOWER


def _with_correction(frame: pd.DataFrame) -> pd.DataFrame:
    """``p adjusted``; a difference that many comparisons explain loses its plain verdict.

    Benjamini and Hochberg (J. R. Stat. Soc. B 1995) bound the expected share of false differences
    among those found. Rows share their base, so their tests depend positively on each other, the
    case in which that procedure holds.
    """
    tested = frame["p"].notna()
    if tested.any():
        frame.loc[tested, "p adjusted"] = stats.false_discovery_control(frame.loc[tested, "p"])
    doubtful = frame["verdict"].isin([HIGHER, LOWER]) & ~(frame["p adjusted"] < LEVEL)
    frame.loc[doubtful, "verdict"] += UNCORRECTED
    return frame


def _how(
    frame: pd.DataFrame,
    runs: Sequence[dict[str, Any]],
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
    return notes


def _unquantized(references: Sequence[dict[str, Any]]) -> list[str]:
    """What the unquantized model reaches, which is no row of an ablation."""
    notes = []
    for run in references:
        parts = ", ".join(f"{name} {a['value']:.1f}" for name, a in run["accuracy"].items())
        notes.append(f"The unquantized model: {run['mean']:.1f} ({parts}).")
    return notes


def cells(frame: pd.DataFrame, confidence: float = CONFIDENCE) -> pd.DataFrame:
    """The frame as it is shown: an interval, and gained and lost questions, in one cell each."""
    shown = frame.drop(columns=["low", "high", "gained", "lost"])
    shown["p"] = [_p(p) for p in frame["p"]]
    shown["p adjusted"] = [_p(p) for p in frame["p adjusted"]]
    intervals = [interval(low, high) for low, high in zip(frame["low"], frame["high"], strict=True)]
    changed = [
        f"+{int(gained)} / -{int(lost)}" if not math.isnan(gained) else "–"
        for gained, lost in zip(frame["gained"], frame["lost"], strict=True)
    ]
    after = list(shown.columns).index("p")
    shown.insert(after, f"{100 * confidence:g} % interval", intervals)
    shown.insert(list(shown.columns).index("verdict"), "changed answers", changed)
    return shown


def interval(low: float, high: float) -> str:
    """An interval in points, as text."""
    return "–" if math.isnan(low) or math.isnan(high) else f"{low:+.1f} to {high:+.1f}"


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
