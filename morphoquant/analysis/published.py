"""Published numbers, and measured ones beside them.

The numbers are data files with their sources (``published/README.md``). They come from another
protocol, and in part from sources that contradict each other (SPEC 3.4): they are shown beside
measurements, in columns of their own, with what differs said below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from morphoquant.analysis import pairs, table
from morphoquant.analysis.ablation import Job, load_jobs, read_jobs
from morphoquant.analysis.cells import interval
from morphoquant.analysis.cost import cost
from morphoquant.analysis.paired import Difference, PairedDifference, holm, verdict
from morphoquant.analysis.report import DETAILS, Report, mark
from morphoquant.errors import HarnessError

FOLDER = Path(__file__).parent / "published"
SOURCE = "source"


@dataclass(frozen=True)
class _File:
    name: str
    words: tuple[str, ...]
    flags: tuple[str, ...] = ()


FILES = {
    "table1": _File("table1_main.csv", ("model", "bits", "method")),
    "table2": _File("table2_latency.csv", ("gpu", "execution")),
    "table3": _File(
        "table3_ablation.csv", ("model", "bits", "variant"), ("dabc", "composite_loss")
    ),
    "masquant": _File("masquant_tables.csv", ("model", "bits", "method")),
}

VARIANTS = ("baseline", "plus_dabc", "full")
CHOICE = "table3_"  # what the variants' names have before them in conf/ablation
MEASURED, BITS = "measured", "A bits"
MODEL, SCHEME = "qwen2_5_omni_3b", "w4a4"  # what the published Table 3 is of
TITLE = (
    "Table 3: accuracy in percent, measured beside published (difference to the baseline in points)"
)
PROTOCOL = (
    "Published runs calibrate anew for every benchmark, so every published column is another "
    "quantized model, and norm, gate and sample counts change with it; the measured columns of a "
    "method are one quantized model with one setting.",
    "Published MMMU, Video-MME and AIR-Bench runs calibrate on prompts of the evaluated set "
    "(without their answers); ScienceQA calibrates on another split.",
    "Published scopes differ: the method leaves the audio tower in 16 bits, the simulated "
    "baselines quantize it and the speech generator too. Measured rows share one scope, unless a "
    "note says otherwise.",
    "One binomial standard error of the published numbers is 0.7 points on ScienceQA (4,241 "
    "questions) and 1.7 on MMMU (900): MMMU steps below 3 points are not significant there. Nobody "
    "can pair published answers, so published differences come without a test.",
)
"""What differs from the published protocol, whatever the table (SPEC 2.9, 3.4)."""
TABLE3 = (
    "Published baseline rows: the draft prints none; the arXiv version's equals the row that its "
    "main table calls Q-VLM (73.85 / 40.33), not its naive W4A4 row (73.17 / 40.00). The measured "
    "baseline has static ranges per channel, nothing searched, nothing compensated.",
    "The step to plus_dabc adds two things at once, compensation and the search of the ranges.",
    "The published sources disagree: W4A4 on ScienceQA is 72.93 in the draft, below the arXiv "
    "version's naive W4A4 (73.17), and 76.63 on arXiv; MMMU is 42.44 and 45.11. The arXiv numbers "
    "are second-hand; its abstract confirms 76.63 alone.",
    "The public implementation's main settings leave the composite loss off, though the full row "
    "is named after it.",
)
"""What is doubtful in the published Table 3, and how it was made (SPEC 2.7, 3)."""


def sources() -> pd.DataFrame:
    """What every source is: index ``source``; ``label``, ``title``, ``standing`` (how reliable)."""
    return pd.read_csv(FOLDER / "sources.csv", dtype=str).set_index(SOURCE)


def published_table(name: str) -> pd.DataFrame:
    """A published table, one row per method and source.

    Args:
        name: ``table1``, ``table2``, ``table3`` (MorphoQuant) or ``masquant``.

    Returns:
        Text columns that name the row, ``source`` (a row of ``sources``) and float64 columns;
        NaN where the source gives no number. Accuracies and word error rates in percent,
        ``memory_gb`` in GB, ``layer_latency_ms`` in ms.

    Raises:
        HarnessError: no such table.
    """
    if name not in FILES:
        raise HarnessError(f"no published table {name!r}; there are {', '.join(FILES)}")
    file = FILES[name]
    words = [*file.words, SOURCE]
    frame = pd.read_csv(FOLDER / file.name, dtype=dict.fromkeys(words, str))
    numbers = [column for column in frame if column not in {*words, *file.flags}]
    return frame.astype(dict.fromkeys(numbers, float) | dict.fromkeys(file.flags, bool))


def beside(measured: pd.DataFrame, published: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Measured and published numbers side by side, never in one column.

    Args:
        measured: columns ``keys``, ``source`` (what measured them) and numbers; text columns
            besides are left out.
        published: the same; numbers of the same name are of the same quantity.
        keys: columns that name a row.

    Returns:
        One row per key, in the order of ``published``, then of ``measured``: the keys, then for
        every quantity ``<quantity> (<source>)``, measured sources first. NaN where a source gives
        no number; no column where it never does.

    Raises:
        HarnessError: a source is both measured and published, or has a key twice.
    """
    both = set(measured[SOURCE]) & set(published[SOURCE])
    if both:
        raise HarnessError(f"measured and published at once: {', '.join(sorted(both))}")
    rows = pd.concat([published, measured], ignore_index=True)
    index = [*keys, SOURCE]
    if rows.duplicated(index).any():
        twice = rows.loc[rows.duplicated(index), index].iloc[0].tolist()
        raise HarnessError(f"two rows of {', '.join(map(str, twice))}")
    origins = list(dict.fromkeys([*measured[SOURCE], *published[SOURCE]]))
    quantities = [c for c in rows.select_dtypes("number") if c not in keys]
    found = rows[list(keys)].drop_duplicates(ignore_index=True)
    for quantity, origin in itertools.product(quantities, origins):
        values = rows.loc[rows[SOURCE] == origin, [*keys, quantity]].dropna(subset=[quantity])
        if len(values):
            named = values.rename(columns={quantity: f"{quantity} ({origin})"})
            found = found.merge(named, on=list(keys), how="left")
    return found


def table3(notes: Sequence[Mapping[str, str]], root: Path | None = None) -> Report:
    """The paper's Table 3, measured beside published.

    Args:
        notes: what the jobs of the sweep left, with ``ablation=table3_<variant>``.
        root: folder of the run directories, where the unquantized references are.

    Returns:
        The report. Its frame has one row per variant (``baseline``, ``plus_dabc``, ``full``) and
        for every quantity one column per source: each method that was measured, the draft, arXiv
        v2; ``Δ <column>`` is the difference to the baseline of the same column, in points, and
        measured ones have all ``DETAILS``. The notes hold the measured steps with their
        intervals, and what differs in protocol. Its parts are ``pairs`` and ``cost``.

    Raises:
        HarnessError: a job of another kind; a run that is not finished.
    """
    jobs = read_jobs(notes)
    for job in jobs:
        if job.choice not in {f"{CHOICE}{variant}" for variant in VARIANTS}:
            raise HarnessError(f"ablation={job.choice} is no row of Table 3")
    runs, _ = load_jobs(jobs, root)
    # Last what others are compared with: a pair is a run and one that stands behind it.
    ordered = sorted(
        (job for job in jobs if job.run is not None),
        key=lambda job: -VARIANTS.index(job.choice.removeprefix(CHOICE)),
    )
    once = {runs[job.run]["fingerprint"]: runs[job.run] for job in ordered if job.run}
    compared = pairs.compare_runs(list(once.values()))
    measured = _measured(jobs, runs)
    printed = published_table("table3")
    printed[SOURCE] = printed[SOURCE].map(sources()["label"])
    frame = beside(measured, printed, ["variant"])
    first = frame["variant"] == VARIANTS[0]
    for column in map(str, frame.columns.drop("variant")):
        if not column.startswith(BITS):
            baseline = frame.loc[first, column].iloc[0]
            frame[f"Δ {column}"] = (frame[column] - baseline).mask(first)
    frame = _tested(frame, jobs, runs, compared)
    found = list(runs.values())
    footnotes = [
        *what_was_measured(found, SCHEME),
        *_steps(jobs, runs, compared),
        *table.resolution(frame, "a measured one, to the baseline of its column"),
        *TABLE3,
        *PROTOCOL,
        *table.unequal(found),
        *table.caveats(found),
        *table.failure_notes([dict(note) for note in notes if "error" in note]),
    ]
    parts = {"pairs": pairs.report(list(once.values()), compared), "cost": cost(found)}
    return Report(TITLE, frame, shown(frame, ["variant"]), footnotes, parts)


def _tested(
    frame: pd.DataFrame,
    jobs: Sequence[Job],
    runs: Mapping[Path, dict[str, Any]],
    compared: Mapping[tuple[str, str], PairedDifference],
) -> pd.DataFrame:
    """Intervals, tests and verdicts of the measured differences to the baseline."""
    found: dict[tuple[int, str], Difference] = {}
    for job in jobs:
        first = [j for j in jobs if (j.choice, j.setting) == (CHOICE + VARIANTS[0], job.setting)]
        if job.run is None or not first or first[0].run is None:
            continue
        pair = compared.get((runs[job.run]["fingerprint"], runs[first[0].run]["fingerprint"]))
        row = frame.index[frame["variant"] == job.choice.removeprefix(CHOICE)][0]
        for name, part in ({**pair.benchmarks, "mean": pair.mean} if pair else {}).items():
            found[row, f"{name} ({_label(job, runs[job.run])})"] = part
    adjusted = holm(pd.Series([part.p for part in found.values()], dtype=float))
    for ((row, column), part), p in zip(found.items(), adjusted, strict=True):
        details = {"low": part.low, "high": part.high, "p": part.p, "p adjusted": p}
        for detail, value in (details | {"verdict": verdict(part, p)}).items():
            name = f"{detail} {column}"
            if name not in frame:
                frame[name] = None if detail == "verdict" else math.nan
            frame.loc[row, name] = value
    return frame


def _label(job: Job, run: Mapping[str, Any]) -> str:
    """Who measured: the method, or what the jobs differ in."""
    return f"{MEASURED}, {job.setting.replace('method=', '') or run['method']}"


def _measured(jobs: Sequence[Job], runs: Mapping[Path, dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for job in jobs:
        if job.run is None:
            continue
        run = runs[job.run]
        row: dict[str, Any] = {"variant": job.choice.removeprefix(CHOICE)}
        row[SOURCE] = _label(job, run)
        row |= {name: found["value"] for name, found in run["accuracy"].items()}
        rows.append(row | {"mean": run["mean"], BITS: run["bits"]["activation"]})
    return pd.DataFrame(rows, columns=None if rows else ["variant", SOURCE])


def what_was_measured(
    runs: Sequence[Mapping[str, Any]], scheme: str = "", model: str = MODEL
) -> list[str]:
    """The largest difference first: another model, other questions, other calibration.

    Args:
        runs: that were measured.
        scheme: of all published numbers; empty where rows differ in it.
        model: that was published.
    """
    notes = []
    for described in dict.fromkeys(_description(run, bool(scheme)) for run in runs):
        notes.append(f"Measured: {described}. Published: {f'{model} {scheme}'.strip()}.")
    others = sorted({str(run["model"]) for run in runs} - {model})
    if others:
        notes.append(
            f"{', '.join(others)} is not the published model: compare the directions of the steps, "
            f"not the numbers."
        )
    return notes


def _description(run: Mapping[str, Any], with_scheme: bool) -> str:
    calibration = run["calibration"]
    sizes = ", ".join(f"{name} {found['n']}" for name, found in run["accuracy"].items())
    leaked = calibration["leaked"]
    overlap = f"{leaked} of them evaluated too" if leaked else "none of them evaluated"
    name = f"{run['model']} {run['scheme']}" if with_scheme else run["model"]
    return (
        f"{name}, {' and '.join(run['scope']['towers'])} quantized, "
        f"questions {sizes}, {calibration['samples']} calibration samples ({overlap})"
    )


def _steps(
    jobs: Sequence[Job],
    runs: Mapping[Path, dict[str, Any]],
    compared: Mapping[tuple[str, str], PairedDifference],
) -> list[str]:
    """What every step of the measured table changed, question by question."""
    notes = []
    for setting in dict.fromkeys(job.setting for job in jobs):
        done = {
            job.choice.removeprefix(CHOICE): runs[job.run]
            for job in jobs
            if job.setting == setting and job.run is not None
        }
        steps = []
        for base, then in itertools.combinations([v for v in VARIANTS if v in done], 2):
            pair = compared.get((done[then]["fingerprint"], done[base]["fingerprint"]))
            if pair is None:  # one run serves both, or they answered other questions
                continue
            found = pair.mean
            steps.append(
                f"{base} to {then} {found.delta:+.1f} ({interval(found.low, found.high)}; "
                f"p = {found.p:.2g}; +{found.gained} / -{found.lost} answers)"
            )
        if steps:
            who = setting or next(iter(done.values()))["method"]
            notes.append(
                f"Measured steps of {who}, points of the mean over benchmarks with 95 % bootstrap "
                f"intervals and exact McNemar tests, uncorrected: {'; '.join(steps)}."
            )
    return notes


def shown(frame: pd.DataFrame, words: Sequence[str]) -> pd.DataFrame:
    """The frame as it is shown; published numbers with their two printed digits.

    Args:
        frame: columns ``words``, numbers, and ``DETAILS`` of numbers.
        words: columns of text.
    """
    found = frame[list(words)].copy()
    details = {f"{detail} {column}" for column in frame for detail in DETAILS}
    nothing = pd.Series(math.nan, frame.index)
    for column in map(str, frame.columns.drop(list(words))):
        if column in details:
            continue
        digits = 1 if f"({MEASURED}" in column and "bits" not in column else 2
        changes = frame.get(f"Δ {column}", nothing)
        verdicts = frame.get(f"verdict {column}", nothing)
        found[column] = [
            _cell(*cell, digits) for cell in zip(frame[column], changes, verdicts, strict=True)
        ]
    return found


def _cell(value: float, change: float, said: Any, digits: int) -> str:
    if math.isnan(value):
        return "–"
    told = "" if math.isnan(change) else f" ({change:+.{digits}f}{mark(said)})"
    return f"{value:.{digits}f}{told}"
