"""Two runs on the same questions: the difference, its interval, and who won which question.

Two accuracies measured on the same questions share most of their noise: how hard the questions
are. The difference question by question does not, so effects can be told apart that the runs' own
standard errors would hide (SPEC 3.4). A question counts as *gained* where only the run answered
it rightly, as *lost* where only the base did; the others say nothing about the difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

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
BATCH_ELEMENTS = 1 << 22  # of a resampled array held at a time


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
    """The answers of a run as ``table.load_runs`` returns it, one row per question.

    Raises:
        HarnessError: its directory holds no readable ``samples.parquet``.
    """
    path = Path(run["path"]) / SAMPLES
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise HarnessError(f"{path}: no readable table of answers ({error})") from error


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
    columns = [*KEY, "benchmark", "modality", "target", "correct"]
    for name, frame in (("run", run), ("base", base)):
        repeated = int(frame.duplicated(KEY).sum())
        if repeated:
            raise HarnessError(f"the {name} answered {repeated} questions twice")
        odd = int((~frame["correct"].isin([0, 1])).sum())
        if odd:
            raise HarnessError(f"the {name} has {odd} verdicts that are neither 0 nor 1")
    pairs = run[columns].merge(
        base[[*KEY, "target", "correct"]],
        on=KEY,
        how="outer",
        suffixes=("", "_base"),
        indicator="side",
        sort=True,
    )
    sides = pairs["side"].value_counts()
    shared, ours, theirs = (int(sides[side]) for side in ("both", "left_only", "right_only"))
    if ours or theirs or not shared:
        raise HarnessError(
            f"these runs answered different questions: {shared} in both, {ours} only in the run, "
            f"{theirs} only in the base; a paired difference needs the same benchmark and limit"
        )
    changed = int((pairs["target"] != pairs["target_base"]).sum())
    if changed:
        raise HarnessError(
            f"{changed} of {shared} questions have another target in the base: the data changed "
            f"between these runs"
        )
    return pd.DataFrame(
        {
            "benchmark": pairs["benchmark"],
            "modality": pairs["modality"],
            "cluster": pairs["task"] + "/" + _clusters(pairs),
            "run": pairs["correct"].astype(float),
            "base": pairs["correct_base"].astype(float),
        }
    )


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
    """``paired_difference`` of verdicts that ``join`` brought together.

    The interval is a bootstrap percentile interval of paired differences: clusters are drawn with
    replacement (B. Efron, R. Tibshirani, *An Introduction to the Bootstrap*, 1993, ch. 13), for
    the mean over benchmarks within every benchmark. The test (Q. McNemar, Psychometrika 1947, in
    its exact binomial form) takes questions as independent, those of one clip as well. Where few
    answers changed the interval is too short (four gained and none lost leave out zero, at
    p = 1/8): read both.
    """

    def difference(strata: Sequence[pd.DataFrame]) -> Difference:
        return _difference(strata, resamples, confidence, seed)

    parts: dict[str, dict[str, pd.DataFrame]] = {
        column: {str(name): rows for name, rows in pairs.groupby(column, sort=False)}
        for column in ("benchmark", "modality")
    }
    return PairedDifference(
        mean=difference(list(parts["benchmark"].values())),
        benchmarks={name: difference([rows]) for name, rows in parts["benchmark"].items()},
        modalities={name: difference([rows]) for name, rows in parts["modality"].items()},
    )


def _difference(
    strata: Sequence[pd.DataFrame], resamples: int, confidence: float, seed: int
) -> Difference:
    """Of the unweighted mean over ``strata``."""
    value, base = (
        100.0 * float(np.mean([rows[side].mean() for rows in strata])) for side in ("run", "base")
    )
    gained = sum(int((rows["run"] > rows["base"]).sum()) for rows in strata)
    lost = sum(int((rows["run"] < rows["base"]).sum()) for rows in strata)
    totals = [_cluster_totals(rows) for rows in strata]
    low, high = _interval(totals, resamples, confidence, seed)
    return Difference(
        n=sum(len(rows) for rows in strata),
        clusters=sum(len(counts) for _, counts in totals),
        value=value,
        base=base,
        delta=value - base,
        low=low,
        high=high,
        p=mcnemar(gained, lost),
        gained=gained,
        lost=lost,
    )


def _cluster_totals(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Per cluster the sum of its questions' differences and their number, float64 [clusters]."""
    grouped = (rows["run"] - rows["base"]).groupby(rows["cluster"], sort=False)
    return grouped.sum().to_numpy(dtype=float), grouped.size().to_numpy(dtype=float)


def _interval(
    totals: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int, confidence: float, seed: int
) -> tuple[float, float]:
    """Bootstrap percentile interval, in points, of the mean over strata."""
    sizes = [len(counts) for _, counts in totals]
    if min(sizes) < 2:  # nothing to resample
        return float("nan"), float("nan")

    def mean(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        # Clusters differ in size: what is averaged is questions, not clusters.
        shares = [
            sums[indices].sum(axis) / counts[indices].sum(axis)
            for (sums, counts), indices in zip(totals, drawn, strict=True)
        ]
        return np.mean(shares, axis=0)

    found = stats.bootstrap(
        [np.arange(size) for size in sizes],
        mean,
        n_resamples=resamples,
        batch=max(1, BATCH_ELEMENTS // max(sizes)),
        vectorized=True,
        axis=-1,
        confidence_level=confidence,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    # Benchmarks that cancel must give zero, and not 1e-17 on one side of it.
    return round(100.0 * float(found.low), 9), round(100.0 * float(found.high), 9)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided McNemar test: could a fair coin have split the changed answers so?"""
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost, 0.5).pvalue)
