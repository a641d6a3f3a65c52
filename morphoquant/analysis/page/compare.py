"""Runs that answered the same questions, beside each other: accuracies, differences, verdicts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from morphoquant.analysis import table
from morphoquant.analysis.figures.style import MODALITIES, ordered
from morphoquant.analysis.page.gather import Run
from morphoquant.analysis.paired import (
    Difference,
    PairedDifference,
    align,
    differences,
    holm,
    verdict,
)
from morphoquant.analysis.pairs import LIMIT

MEAN = "mean"

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
    verdicts: pd.DataFrame
    """``paired.align`` of their answers; one column per fingerprint."""

    @property
    def title(self) -> str:
        first = self.runs[0].result
        if not self.benchmarks:
            return f"{first['model']}, nothing asked"
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
        return ordered(self.modality_sizes, MODALITIES)

    @cached_property
    def differences(self) -> dict[tuple[str, str], PairedDifference]:
        """(fingerprint, fingerprint of an earlier run) -> the first against the second.

        All of them come from one bootstrap.
        """
        names = [run.result["fingerprint"] for run in self.runs]
        pairs: list[tuple[Hashable, Hashable]] = [
            (run, base) for base, run in itertools.combinations(names, 2)
        ]
        if not pairs or self.verdicts.empty:
            return {}
        found = differences(self.verdicts, pairs)
        return {(str(a), str(b)): d for (a, b), d in zip(pairs, found, strict=True)}

    @cached_property
    def against(self) -> dict[str, PairedDifference]:
        """Fingerprint -> the run beside its own unquantized reference, where that is here."""
        references = {run.result["fingerprint"]: run.result.get("reference") for run in self.runs}
        return {run: d for (run, base), d in self.differences.items() if references[run] == base}

    @cached_property
    def rows(self) -> list[Row]:
        """Accuracy by benchmark, and their mean."""
        told: dict[str, dict[str, Measured]] = {}
        for run in self.runs:
            found, result = self.against.get(run.result["fingerprint"]), run.result
            total = sum(row["n"] for row in result["accuracy"].values())
            told[run.key] = {
                name: (row["value"], row["n"], found.benchmarks.get(name) if found else None)
                for name, row in result["accuracy"].items()
            }
            if result["accuracy"]:
                told[run.key][MEAN] = (result["mean"], total, found.mean if found else None)
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
        adjusted = dict(zip(places, holm(pd.Series(p, dtype=float)), strict=True))
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
        """Every two runs; of many runs, those that say which ranks are resolved.

        With more than ``LIMIT`` runs these are the pairs of neighbours in the order of the mean,
        and those with the first of that order. p values are corrected for all pairs.
        """
        found = self.differences
        if not found:
            return []
        adjusted = holm(pd.Series([pair.mean.p for pair in found.values()], dtype=float))
        ranked = sorted(self.runs, key=lambda run: -run.result["mean"])
        order = [run.result["fingerprint"] for run in ranked]
        telling = {frozenset(pair) for pair in itertools.pairwise(order)}
        telling |= {frozenset((order[0], other)) for other in order[1:]}
        return [
            Pair(self.labels[run], self.labels[base], pair.mean, float(p))
            for ((run, base), pair), p in zip(found.items(), adjusted, strict=True)
            if len(self.runs) <= LIMIT or frozenset((run, base)) in telling
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
        if lonely and self.benchmarks:
            notes.append(
                f"No unquantized reference of the same code and versions is here for "
                f"{', '.join(lonely)}: no differences are shown for such rows."
            )
        return notes


def groups(runs: Sequence[Run]) -> list[Group]:
    """The runs by model, questions and the questions' content; the largest group first.

    Raises:
        HarnessError: a run answered a question twice.
    """
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        identity = run.identity
        same = (identity["model"], identity["question_ids"], identity.get("question_data") or "")
        found.setdefault(same, []).append(run)
    made = [
        Group([run for run in alike if run.result["fingerprint"] in verdicts], verdicts)
        for alike in found.values()
        for verdicts in align({run.result["fingerprint"]: run.samples for run in alike})
    ]
    # The sweep that matters, and not the trial before it.
    return sorted(made, key=lambda group: -len(group.verdicts) * len(group.runs))
