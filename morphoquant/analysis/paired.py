"""Two runs on the same questions: the difference, its interval, and who won which question.

Two accuracies measured on the same questions share most of their noise: how hard the questions
are. The difference question by question does not, so effects can be told apart that the runs' own
standard errors would hide (SPEC 3.4). A question counts as *gained* where only the run answered
it rightly, as *lost* where only the base did; the others say nothing about the difference.

What a table says of a difference is decided here too, in one place for all tables: ``verdict``.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from morphoquant.analysis.resampling import LEVEL, Stratum, intervals, questions_needed
from morphoquant.errors import HarnessError

SAMPLES = "samples.parquet"
RESAMPLES, CONFIDENCE, SEED = 2000, 0.95, 0
KEY = ["task", "doc_id", "id"]
"""What makes a question this question. The place in the task too: published ScienceQA rows carry
no id and are named by their content, and content may repeat."""
CLUSTERS = {"videomme": r"^(.+)-\d+$"}
"""Benchmark -> the part of a question's id that its correlated neighbours share. Video-MME asks
three questions about every clip, ``<video>-<number>``. The other benchmarks' ids do not tell
which questions share their material: those questions are taken as independent."""
COLUMNS = [*KEY, "benchmark", "modality", "target", "correct"]
"""What a comparison reads of an answer."""

HIGHER, LOWER, UNCORRECTED = "higher", "lower", ", not after correction"
NOTHING, UNKNOWN = "no difference found", "interval unknown"


@dataclass(frozen=True)
class Difference:
    """One paired comparison. Accuracies in percent; ``delta``, ``low`` and ``high`` in points."""

    n: int
    """Questions."""
    clusters: int
    """What was resampled: questions, for Video-MME clips."""
    value: float
    base: float
    delta: float
    """``value - base``."""
    low: float
    """Bootstrap percentile interval of ``delta``; NaN where a benchmark has one cluster only."""
    high: float
    p: float
    """Exact two-sided McNemar test on the pooled questions that changed; 1 where none did."""
    gained: int
    lost: int
    needed: float
    """Questions, of the same benchmarks in the same shares, that would resolve such a gap (80 %
    power, 5 % two-sided; ``resampling.questions_needed``). Infinite without a gap."""

    @property
    def found(self) -> bool:
        """Whether the interval is known and leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class PairedDifference:
    """A run against a base, as a whole and in parts."""

    mean: Difference
    """Of the mean over benchmarks, as ``result["mean"]``. Its test pools all questions, so with
    benchmarks of unequal size it weighs them differently from ``delta``."""
    benchmarks: dict[str, Difference]
    modalities: dict[str, Difference]
    """By the question's modality (text, image, video, audio), pooled over benchmarks."""

    def frame(self) -> pd.DataFrame:
        """Rows ``mean``, then benchmarks, then modalities; columns ``kind``, ``name``, fields."""
        parts = [("mean", "mean", self.mean)]
        parts += [("benchmark", name, found) for name, found in self.benchmarks.items()]
        parts += [("modality", name, found) for name, found in self.modalities.items()]
        rows = [{"kind": kind, "name": name, **asdict(found)} for kind, name, found in parts]
        return pd.DataFrame(rows)


def read_samples(run: Mapping[str, Any]) -> pd.DataFrame:
    """The answers of a run as ``table.load_runs`` returns it: ``COLUMNS``, one row per question.

    Raises:
        HarnessError: its directory holds no readable ``samples.parquet``.
    """
    path = Path(run["path"]) / SAMPLES
    try:
        return pd.read_parquet(path, columns=COLUMNS)
    except (OSError, ValueError) as error:
        raise HarnessError(f"{path}: no readable table of answers ({error})") from error


def _checked(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """The answers in the order of ``KEY``, whatever order they were given in."""
    repeated = int(frame.duplicated(KEY).sum())
    if repeated:
        raise HarnessError(f"{name} answered {repeated} questions twice")
    odd = int((~frame["correct"].isin([0, 1])).sum())
    if odd:
        raise HarnessError(f"{name} has {odd} verdicts that are neither 0 nor 1")
    return frame[COLUMNS].sort_values(KEY, ignore_index=True)


def _same_questions(run: pd.DataFrame, base: pd.DataFrame) -> bool:
    asked = [*KEY, "benchmark", "target"]
    return run[asked].equals(base[asked])


def _beside(runs: Mapping[Hashable, pd.DataFrame]) -> pd.DataFrame:
    """Verdicts of runs on the same questions, checked and sorted."""
    first = next(iter(runs.values()))
    described: dict[Hashable, pd.Series] = {
        "benchmark": first["benchmark"],
        "modality": first["modality"],
        "cluster": first["task"] + "/" + _clusters(first),
    }
    return pd.DataFrame({**described, **{k: v["correct"].astype(float) for k, v in runs.items()}})


def join(run: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Both runs' verdicts beside each other.

    Args:
        run: answers, one row per question (``evaluation.results.SAMPLE_COLUMNS``).
        base: the same of the run compared with.

    Returns:
        One row per question: ``benchmark``, ``modality``, ``cluster`` (text, unique over tasks),
        ``run`` and ``base`` (float64, 1 where the answer was right).

    Raises:
        HarnessError: a question stands twice, is missing on one side or has another target
            there, or a verdict is neither 0 nor 1.
    """
    run, base = _checked(run, "the run"), _checked(base, "the base")
    ours, theirs = pd.MultiIndex.from_frame(run[KEY]), pd.MultiIndex.from_frame(base[KEY])
    shared = len(ours.intersection(theirs))
    if not shared or len(ours) != shared or len(theirs) != shared:
        raise HarnessError(
            f"these runs answered different questions: {shared} in both, {len(ours) - shared} only "
            f"in the run, {len(theirs) - shared} only in the base; a paired difference needs the "
            f"same benchmark and limit"
        )
    changed = int((run["target"] != base["target"]).sum())
    if changed:
        raise HarnessError(
            f"{changed} of {shared} questions have another target in the base: the data changed "
            f"between these runs"
        )
    return _beside({"run": run, "base": base})


def align(runs: Mapping[Hashable, pd.DataFrame]) -> list[pd.DataFrame]:
    """Verdicts of many runs beside each other, one table for all that answered the same questions.

    Args:
        runs: name -> answers, as for ``join``.

    Returns:
        Tables as ``join`` returns them, with one column per run in place of ``run`` and ``base``;
        every run is in one of them. Runs in different tables cannot be compared.

    Raises:
        HarnessError: a question stands twice, or a verdict is neither 0 nor 1.
    """
    groups: list[dict[Hashable, pd.DataFrame]] = []
    for name, frame in runs.items():
        own = _checked(frame, str(name))
        for group in groups:
            if _same_questions(own, next(iter(group.values()))):
                group[name] = own
                break
        else:
            groups.append({name: own})
    return [_beside(group) for group in groups]


def _clusters(pairs: pd.DataFrame) -> pd.Series[str]:
    """What a question shares with its correlated neighbours; itself, where that is unknown."""
    clusters = pairs["doc_id"].astype(str) + "/" + pairs["id"]
    for benchmark, pattern in CLUSTERS.items():
        shared = pairs["id"].str.extract(pattern, expand=False)
        rows = (pairs["benchmark"] == benchmark) & shared.notna()
        clusters = clusters.mask(rows, shared)
    return clusters


def paired_difference(
    run: Mapping[str, Any],
    base: Mapping[str, Any],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> PairedDifference:
    """How much better a run is than a base, on the same questions.

    Args:
        run: a finished run, as ``table.load_runs`` returns it (its ``path`` is read).
        base: what it is compared with.
        resamples: bootstrap resamples.
        confidence: level of the intervals.
        seed: of the resampling; the same seed gives the same interval.

    Raises:
        HarnessError: the two did not answer the same questions; answers that cannot be read.
    """
    pairs = join(read_samples(run), read_samples(base))
    return compare(pairs, resamples=resamples, confidence=confidence, seed=seed)


def compare(
    pairs: pd.DataFrame,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> PairedDifference:
    """``paired_difference`` of verdicts that ``join`` brought together."""
    options: dict[str, Any] = {"resamples": resamples, "confidence": confidence, "seed": seed}
    return differences(pairs, [("run", "base")], **options)[0]


def differences(
    answers: pd.DataFrame,
    pairs: Sequence[tuple[Hashable, Hashable]],
    *,
    modalities: bool = True,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = SEED,
) -> list[PairedDifference]:
    """Many pairs of runs at once, all on the same resamples.

    The interval is a bootstrap percentile interval of paired differences: clusters are drawn with
    replacement, for the mean over benchmarks within every benchmark (``resampling.intervals``).
    The test (Q. McNemar, Psychometrika 1947, in its exact binomial form) takes questions as
    independent, those of one clip as well. Where few answers changed the interval is too short
    (four gained and none lost leave out zero, at p = 1/8): read both.

    Args:
        answers: as ``align`` returns them.
        pairs: columns of ``answers``: a run and what it is compared with.
        modalities: whether to compare within modalities too.
        resamples: bootstrap resamples.
        confidence: level of the intervals.
        seed: of the resampling; the same seed gives the same intervals, whatever else is compared.

    Returns:
        One per pair, in their order. Exchanging the two of a pair mirrors its result exactly.
    """
    columns = list(dict.fromkeys(name for pair in pairs for name in pair))
    right = answers[columns].to_numpy(dtype=float)
    place = {name: i for i, name in enumerate(columns)}
    first, second = (np.array([place[pair[side]] for pair in pairs], int) for side in (0, 1))

    def strata(column: str) -> dict[str, Stratum]:
        found = {}
        for name, rows in answers.groupby(column, sort=False).indices.items():
            clusters, _ = pd.factorize(answers["cluster"].to_numpy()[rows])
            found[str(name)] = Stratum.of(right[rows], clusters)
        return found

    def of(parts: Sequence[Stratum]) -> list[Difference]:
        ends = intervals(
            parts, first, second, resamples=resamples, confidence=confidence, seed=seed
        )
        return _differences(parts, first, second, *ends)

    benchmarks = strata("benchmark")
    modal = strata("modality") if modalities else {}
    mean = of(list(benchmarks.values()))
    by_benchmark = {name: of([part]) for name, part in benchmarks.items()}
    by_modality = {name: of([part]) for name, part in modal.items()}
    return [
        PairedDifference(
            mean[i],
            {name: found[i] for name, found in by_benchmark.items()},
            {name: found[i] for name, found in by_modality.items()},
        )
        for i in range(len(pairs))
    ]


def _differences(
    strata: Sequence[Stratum],
    first: np.ndarray,
    second: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> list[Difference]:
    """Of the unweighted mean over ``strata``."""
    scores = 100.0 * np.mean([part.right.mean(axis=0) for part in strata], axis=0)
    # Whole numbers in a matrix product: exact. [runs, runs]
    won = np.sum([part.right.T @ (1 - part.right) for part in strata], axis=0).astype(int)
    needed = questions_needed(strata, first, second)
    found = []
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        gained, lost = int(won[a, b]), int(won[b, a])
        found.append(
            Difference(
                n=sum(len(part.right) for part in strata),
                clusters=sum(len(part.counts) for part in strata),
                value=float(scores[a]),
                base=float(scores[b]),
                delta=float(scores[a] - scores[b]),
                low=float(low[i]),
                high=float(high[i]),
                p=mcnemar(gained, lost),
                gained=gained,
                lost=lost,
                needed=float(needed[i]),
            )
        )
    return found


@lru_cache(maxsize=4096)
def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: could a fair coin have split the changed answers so?"""
    from statsmodels.stats import contingency_tables  # seconds, and a single run compares nothing

    changed = np.array([[0, gained], [lost, 0]])  # those that both answered alike do not matter
    return float(contingency_tables.mcnemar(changed, exact=True).pvalue)


def holm(p: pd.Series[float]) -> pd.Series[float]:
    """p values corrected for their number; NaN, which no test gave, counts for nothing.

    Holm (Scand. J. Stat. 1979) bounds the chance that a table claims any difference that is none,
    however its tests depend on each other (those of a table share rows and questions).
    """
    tested = p.notna()
    adjusted = p.astype(float)
    if tested.any():
        from statsmodels.stats import multitest

        adjusted[tested] = multitest.multipletests(p[tested], method="holm")[1]
    return adjusted


def verdict(found: Difference | None, adjusted: float) -> str:
    """What a table says of a difference, given the corrected p value of its test.

    A difference is resolved (plain ``higher`` or ``lower``) when its interval leaves out zero and
    its test stands after the correction for the number of comparisons.
    """
    if found is None or np.isnan(found.low):
        return UNKNOWN
    if not found.found:
        return NOTHING
    said = HIGHER if found.delta > 0 else LOWER
    return said if adjusted < LEVEL else said + UNCORRECTED
