"""Every row of a table against every other: which of two methods is better, and is it resolved?

A table against fp16 does not answer that: two rows that both lose something resolved may be equal,
and two that both lose nothing resolved may differ. All pairs share one bootstrap (``resampling``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from morphoquant.analysis.cells import compared, questions
from morphoquant.analysis.paired import (
    CONFIDENCE,
    RESAMPLES,
    Difference,
    PairedDifference,
    align,
    differences,
    holm,
    read_samples,
    verdict,
)
from morphoquant.analysis.table import DETAILS, Found, Report, row_labels

TITLE = "Pairwise: mean accuracy of a minus b, in points"
LIMIT = 12
"""Rows of a table up to which all its pairs are printed."""
NUMBERS = ("Δ", "low", "high", "p")


def compare_runs(
    runs: Sequence[Mapping[str, Any]],
    bases: Collection[str] | None = None,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> dict[tuple[str, str], PairedDifference]:
    """All pairs of runs that answered the same questions.

    Args:
        runs: as ``table.load_runs`` returns them, each once; their ``path`` is read.
        bases: fingerprints of runs that others are compared with; default: the unquantized.
        resamples: bootstrap resamples.
        confidence: level of the intervals.

    Returns:
        (fingerprint, fingerprint) -> the first against the second, in the order of ``runs``; a
        base is the second, wherever it stands.

    Raises:
        HarnessError: the answers of a run cannot be read.
    """
    if len(runs) < 2:
        return {}
    if bases is None:
        bases = {run["fingerprint"] for run in runs if run["method"] == "fp16"}
    names = [run["fingerprint"] for run in runs]
    tables = align({run["fingerprint"]: read_samples(run) for run in runs})
    column = {name: table for table in tables for name in table.columns if name in set(names)}
    asked = [
        (b, a) if a in bases and b not in bases else (a, b)
        for a, b in itertools.combinations(names, 2)
        if column[a] is column[b]
    ]
    options: dict[str, Any] = {"resamples": resamples, "confidence": confidence}
    found: dict[tuple[str, str], PairedDifference] = {}
    for table in tables:
        own = [pair for pair in asked if column[pair[0]] is table]
        if own:
            made = differences(table, own, modalities=False, **options)
            found |= zip(own, made, strict=True)
    return {pair: found[pair] for pair in asked}


def row_names(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Fingerprint -> method and scheme, as the rows of a table are named in its pairs."""
    labels = row_labels(runs)
    return {run["fingerprint"]: f"{labels[run['fingerprint']]} {run['scheme']}" for run in runs}


def pairwise(runs: Sequence[dict[str, Any]], found: Found) -> pd.DataFrame:
    """One row per pair.

    Args:
        runs: of the table.
        found: as ``compare_runs`` returns it.

    Returns:
        Columns ``a``, ``b``; of the mean over benchmarks ``Δ mean`` (a minus b, points), its 95 %
        interval ``low``, ``high``, ``p`` (exact McNemar, all questions pooled), ``p adjusted``
        (Holm over all pairs), ``gained`` and ``lost`` (questions that a alone, and b alone,
        answered rightly), ``verdict``, ``questions`` asked and ``questions needed``
        (``resampling.questions_needed``; infinite without a gap); then for every benchmark its
        ``DETAILS``, whose ``p adjusted`` is over all pairs and benchmarks.
    """
    names = row_names(runs)
    benchmarks = list(dict.fromkeys(name for pair in found.values() for name in pair.benchmarks))
    rows = []
    for (a, b), pair in found.items():
        mean = pair.mean
        row: dict[str, Any] = {"a": names[a], "b": names[b], "Δ mean": mean.delta}
        row |= {"low": mean.low, "high": mean.high, "p": mean.p, "p adjusted": math.nan}
        row |= {"gained": mean.gained, "lost": mean.lost, "verdict": None}
        row |= {"questions": mean.n, "questions needed": rounded_up(mean.needed)}
        for name in benchmarks:
            part = pair.benchmarks.get(name)
            row |= {f"{key} {name}": _number(part, key) for key in NUMBERS}
            row |= {f"p adjusted {name}": math.nan, f"verdict {name}": None}
        rows.append(row)
    columns = ["a", "b", "Δ mean", "low", "high", "p", "p adjusted", "gained", "lost", "verdict"]
    frame = pd.DataFrame(rows, columns=None if rows else [*columns, "questions needed"])
    if not rows:
        return frame
    frame["p adjusted"] = holm(frame["p"])
    frame["verdict"] = [
        verdict(pair.mean, p) for pair, p in zip(found.values(), frame["p adjusted"], strict=True)
    ]
    if benchmarks:
        raw = frame[[f"p {name}" for name in benchmarks]]
        adjusted = holm(raw.stack(future_stack=True)).unstack()  # type: ignore[arg-type]
        for name in benchmarks:
            frame[f"p adjusted {name}"] = adjusted[f"p {name}"]
            frame[f"verdict {name}"] = [
                verdict(pair.benchmarks[name], p) if name in pair.benchmarks else None
                for pair, p in zip(found.values(), frame[f"p adjusted {name}"], strict=True)
            ]
    return frame


def _number(part: Difference | None, key: str) -> float:
    return float(getattr(part, "delta" if key == "Δ" else key)) if part else math.nan


def rounded_up(needed: float) -> float:
    """Whole questions; infinite stays infinite."""
    return math.ceil(needed) if math.isfinite(needed) else needed


def report(runs: Sequence[dict[str, Any]], found: Found) -> Report:
    """The pairwise table of some runs.

    With more than ``LIMIT`` rows the terminal shows the pairs that say which ranks are resolved:
    those of neighbours in the order of the mean, and those with the first of that order; the files
    hold all.
    """
    frame = pairwise(runs, found)
    cells = _cells(frame)
    notes = footnotes(frame)
    first = None
    if len(runs) > LIMIT:
        telling = _telling(runs, found)
        first = len(telling)
        order = [*telling, *(i for i in range(len(frame)) if i not in set(telling))]
        frame, cells = frame.iloc[order], cells.iloc[order]
        frame, cells = frame.reset_index(drop=True), cells.reset_index(drop=True)
        notes.append(
            f"First come the {first} pairs with the highest mean of the quantized rows, and of "
            f"neighbours in that order; a terminal shows no more. All {len(frame)} are in the "
            f"files."
        )
    return Report(TITLE, frame, cells, notes, printed=len(frame) > 1, first=first)


def _telling(runs: Sequence[dict[str, Any]], found: Found) -> list[int]:
    """Places of the pairs that say most of an order of many rows."""
    quantized = [run for run in runs if run["method"] != "fp16"]
    ranked = [r["fingerprint"] for r in sorted(quantized, key=lambda run: -run["mean"])]
    wanted = {frozenset(pair) for pair in itertools.pairwise(ranked)}
    wanted |= {frozenset((ranked[0], other)) for other in ranked[1:]}
    return [i for i, pair in enumerate(found) if frozenset(pair) in wanted]


def footnotes(frame: pd.DataFrame) -> list[str]:
    """How to read the columns."""
    if frame.empty:
        return ["No two rows answered the same questions: nothing can be compared."]
    return [
        f"Interval: {100 * CONFIDENCE:g} % of the difference of the means over benchmarks, "
        f"bootstrap percentile ({RESAMPLES} resamples within benchmarks, the same for all pairs; "
        f"the questions of one Video-MME clip are drawn together). p: exact McNemar test of the "
        f"questions that a alone (+) and b alone (-) answered rightly; adjusted: Holm, over "
        f"{len(frame)} pairs. A verdict says where a stands; 'no difference found' is not to say "
        f"that there is none.",
        "Questions needed: how many, of these benchmarks in these shares, a test at 5 % "
        "(two-sided, uncorrected) needs to find a gap of this size with 80 % probability, if "
        "answers change as often as here (Connor 1987; clusters count with their design effect). "
        "Of a gap that is not resolved it is a rough guess.",
    ]


def _cells(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame as it is shown: of the mean alone, an interval in one cell."""
    if frame.empty:
        return frame
    own = [c for c in frame.columns if not _of_a_benchmark(str(c))]
    shown = compared(frame[own])
    shown["Δ mean"] = [f"{delta:+.1f}" for delta in frame["Δ mean"]]
    shown["questions"] = [f"{n:,}" for n in frame["questions"]]
    shown["questions needed"] = [questions(n) for n in frame["questions needed"]]
    return shown.rename(columns={"Δ mean": "Δ"})


def _of_a_benchmark(column: str) -> bool:
    own = ("Δ mean", "p adjusted")
    return column not in own and column.startswith(tuple(f"{d} " for d in DETAILS))
