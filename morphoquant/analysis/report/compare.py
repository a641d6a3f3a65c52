"""Runs that answered the same questions, beside each other: accuracies, differences, verdicts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from statsmodels.stats import multitest

from morphoquant.analysis import table
from morphoquant.analysis.paired import Difference, PairedDifference, compare, join
from morphoquant.analysis.report.gather import Run

HIGHER, LOWER, UNCORRECTED = "higher", "lower", ", not after correction"
NOTHING, UNKNOWN = "no difference found", "interval unknown"
LEVEL = 0.05
MEAN = "mean"

MOST_PAIRED = 12
"""Runs of a group that are compared pair by pair: 66 comparisons."""

Measured = tuple[float, int, Difference | None]
"""Accuracy, questions, and the difference to the reference."""


@dataclass(frozen=True)
class Cell:
    """One accuracy (percent) and its difference to the unquantized model (points)."""

    value: float
    n: int
    difference: Difference | None
    p_adjusted: float
    """Holm, over all differences of its table; NaN without one."""

    @property
    def verdict(self) -> str:
        """What the difference says; empty without one."""
        return verdict(self.difference, self.p_adjusted) if self.difference else ""


@dataclass(frozen=True)
class Row:
    """One run in a table of its group."""

    run: Run
    label: str
    cells: dict[str, Cell]
    """By benchmark and ``mean``, or by modality."""


@dataclass(frozen=True)
class Pair:
    """Two runs of a group, the first compared with the second."""

    label: str
    base: str
    mean: Difference
    p_adjusted: float
    """Holm, over all pairs of the group."""

    @property
    def verdict(self) -> str:
        return verdict(self.mean, self.p_adjusted)


@dataclass(frozen=True)
class Group:
    """Runs of one model on one set of questions: the only ones that a number may compare."""

    runs: list[Run]

    @property
    def title(self) -> str:
        first = self.runs[0].result
        limit = "" if first.get("limit") is None else f", {first['limit']} questions of each task"
        return f"{first['model']} on {first['benchmark']}{limit}"

    @cached_property
    def labels(self) -> dict[str, str]:
        """Fingerprint -> the row's name, unique within the group."""
        results = [run.result for run in self.runs]
        named = table.row_labels(results)
        labels = {r["fingerprint"]: f"{named[r['fingerprint']]} {r['scheme']}" for r in results}
        taken = list(labels.values())
        return {
            fingerprint: label if taken.count(label) == 1 else f"{label} {fingerprint[:10]}"
            for fingerprint, label in labels.items()
        }

    def label(self, run: Run) -> str:
        return self.labels[run.result["fingerprint"]]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Benchmark -> questions; the same in all runs of a group."""
        return {n: a["n"] for run in self.runs for n, a in run.result["accuracy"].items()}

    @cached_property
    def modality_sizes(self) -> dict[str, int]:
        """Modality -> questions."""
        return {n: a["n"] for run in self.runs for n, a in run.result["modality"].items()}

    @property
    def benchmarks(self) -> list[str]:
        return list(self.sizes)

    @property
    def modalities(self) -> list[str]:
        known = ("text", "image", "video", "audio")
        return [m for m in known if m in self.modality_sizes] + sorted(
            set(self.modality_sizes) - set(known)
        )

    @cached_property
    def against(self) -> dict[str, PairedDifference]:
        """Fingerprint -> the run beside its own unquantized reference, where that is here."""
        here = {run.result["fingerprint"]: run for run in self.runs}
        references = {f: here.get(run.result.get("reference") or "") for f, run in here.items()}
        return {f: difference(here[f], base) for f, base in references.items() if base is not None}

    @cached_property
    def rows(self) -> list[Row]:
        """Accuracy by benchmark, and their mean."""
        told = {}
        for run in self.runs:
            found, result = self.against.get(run.result["fingerprint"]), run.result
            total = sum(row["n"] for row in result["accuracy"].values())
            told[run.key] = {
                name: (row["value"], row["n"], found.benchmarks.get(name) if found else None)
                for name, row in result["accuracy"].items()
            } | {MEAN: (result["mean"], total, found.mean if found else None)}
        return self._rows(told)

    @cached_property
    def modality_rows(self) -> list[Row]:
        """Accuracy by modality of the question."""
        told = {}
        for run in self.runs:
            found = self.against.get(run.result["fingerprint"])
            told[run.key] = {
                name: (row["value"], row["n"], found.modalities.get(name) if found else None)
                for name, row in run.result["modality"].items()
            }
        return self._rows(told)

    def _rows(self, told: Mapping[str, Mapping[str, Measured]]) -> list[Row]:
        places = [(key, name) for key, row in told.items() for name in row]
        p = [getattr(told[key][name][2], "p", math.nan) for key, name in places]
        adjusted = dict(zip(places, holm(p), strict=True))
        return [
            Row(
                run,
                self.label(run),
                {n: Cell(*m, adjusted[run.key, n]) for n, m in told[run.key].items()},
            )
            for run in self.runs
        ]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Every two runs, each pair once; none where there are too many."""
        if len(self.runs) > MOST_PAIRED:
            return []
        chosen = [(b, a) for a, b in itertools.combinations(self.runs, 2)]
        found = [difference(run, base).mean for run, base in chosen]
        adjusted = holm([d.p for d in found])
        return [
            Pair(self.label(run), self.label(base), d, p)
            for (run, base), d, p in zip(chosen, found, adjusted, strict=True)
        ]

    @cached_property
    def reach(self) -> float:
        """Points that the bars of the pairs reach to both sides."""
        ends = (abs(x) for p in self.pairs for x in (p.mean.low, p.mean.high, p.mean.delta))
        return max([1.0, *(math.ceil(x) for x in ends if not math.isnan(x))])

    @cached_property
    def notes(self) -> list[str]:
        """Footnotes: what differs between the rows besides their methods, and caveats."""
        notes = table.footnotes([run.result for run in self.runs])
        codes: dict[str, list[str]] = {}
        for run in self.runs:
            codes.setdefault(run.identity["code"][:10], []).append(self.label(run))
        if len(codes) > 1:
            told = "; ".join(f"{code}: {', '.join(names)}" for code, names in codes.items())
            notes.append(f"Not the same code in every row: {told}.")
        lonely = [
            self.label(run)
            for run in self.runs
            if run.quantizes and run.result["fingerprint"] not in self.against
        ]
        if lonely:
            notes.append(
                f"No unquantized reference of the same code and versions is here for "
                f"{', '.join(lonely)}: no differences are shown for such rows."
            )
        return notes


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by model, questions and the questions' content; the largest group first."""
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        identity = run.identity
        same = (identity["model"], identity["question_ids"], identity.get("question_data") or "")
        found.setdefault(same, []).append(run)
    # The sweep that matters, and not the trial before it.
    return [Group(g) for g in sorted(found.values(), key=lambda g: -len(g[0].samples) * len(g))]


def difference(run: Run, base: Run) -> PairedDifference:
    """Of two runs in one group, question by question (``paired``).

    Raises:
        HarnessError: they did not answer the same questions.
    """
    return compare(join(run.samples, base.samples))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction of p values (S. Holm, Scand. J. Statist. 1979); NaN stays NaN."""
    known = [i for i, value in enumerate(p) if not math.isnan(value)]
    adjusted = [math.nan] * len(p)
    if known:
        corrected = multitest.multipletests([p[i] for i in known], method="holm")[1]
        for i, value in zip(known, corrected, strict=True):
            adjusted[i] = float(value)
    return adjusted


def verdict(found: Difference, adjusted: float) -> str:
    """What is said of a difference, given the corrected p value of its test."""
    if math.isnan(found.low):
        return UNKNOWN
    if not found.found:
        return NOTHING
    said = HIGHER if found.delta > 0 else LOWER
    return said if adjusted < LEVEL else said + UNCORRECTED
