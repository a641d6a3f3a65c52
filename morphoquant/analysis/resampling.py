"""Intervals and sample sizes of many paired differences at once.

All pairs of a table share their resamples: a resample says how often every cluster of questions
was drawn, one matrix product with the runs' right answers gives every run's score on it, and the
difference of two scores is the difference of that pair. A hundred pairs cost little more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BATCH_ELEMENTS = 1 << 22  # of a resampled array held at a time
POWER, LEVEL = 0.8, 0.05


@dataclass(frozen=True)
class Stratum:
    """The questions of one benchmark (or modality), as all runs answered them.

    Clusters of questions are resampled within a stratum; of several strata the unweighted mean is
    taken.
    """

    right: np.ndarray
    """1 where an answer was right, float64 [questions, runs]."""
    sums: np.ndarray
    """Right answers per cluster, float64 [clusters, runs]."""
    counts: np.ndarray
    """Questions per cluster, float64 [clusters]."""

    @classmethod
    def of(cls, right: np.ndarray, clusters: np.ndarray) -> Stratum:
        """From verdicts [questions, runs] and the number of every question's cluster [questions].

        Clusters are numbered from zero without a gap.
        """
        counts = np.bincount(clusters).astype(float)
        sums = np.zeros((len(counts), right.shape[1]))
        np.add.at(sums, clusters, right)
        return cls(right, sums, counts)


def intervals(
    strata: Sequence[Stratum],
    first: np.ndarray,
    second: np.ndarray,
    *,
    resamples: int,
    confidence: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap percentile intervals of the mean over strata, of ``first`` minus ``second``.

    Clusters are drawn with replacement within every stratum (B. Efron, R. Tibshirani, *An
    Introduction to the Bootstrap*, 1993, ch. 13); the draws are those of ``scipy.stats.bootstrap``
    at the same seed.

    Args:
        strata: of the same runs.
        first: column of a run per pair, int [pairs].
        second: of the run it is compared with, int [pairs].
        resamples: bootstrap resamples.
        confidence: level of the intervals.
        seed: of the draws.

    Returns:
        Lower and upper ends in points, float64 [pairs]; NaN where a stratum has one cluster only:
        there is nothing to resample.
    """
    unknown = np.full(len(first), np.nan)
    if not len(first) or min(len(stratum.counts) for stratum in strata) < 2:
        return unknown, unknown.copy()
    drawn = _drawn(strata, resamples, seed)
    ends = np.empty((2, len(first)))
    tail = (1 - confidence) / 2
    step = max(1, BATCH_ELEMENTS // resamples)
    for start in range(0, len(first), step):
        a, b = first[start : start + step], second[start : start + step]
        # Sums of right answers are whole numbers: their differences are exact, in any order.
        shares = [(sums[:, a] - sums[:, b]) / counts[:, None] for sums, counts in drawn]
        found = np.quantile(np.mean(shares, axis=0), [tail, 1 - tail], axis=0)
        # Benchmarks that cancel must give zero, and not 1e-17 on one side of it.
        ends[:, start : start + step] = np.round(100.0 * found, 9) + 0.0  # no negative zero
    return ends[0], ends[1]


def _drawn(
    strata: Sequence[Stratum], resamples: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per stratum, of every resample: right answers [resamples, runs] and questions [resamples]."""
    generator = np.random.default_rng(seed)
    found = []
    for stratum in strata:
        size = len(stratum.counts)
        sums, counts = [], []
        rows = max(1, BATCH_ELEMENTS // size)
        for start in range(0, resamples, rows):
            number = min(rows, resamples - start)
            chosen = generator.integers(0, size, (number, size))
            chosen += size * np.arange(number)[:, None]
            times = np.bincount(chosen.ravel(), minlength=number * size)
            times = times.reshape(number, size).astype(float)
            sums.append(times @ stratum.sums)
            counts.append(times @ stratum.counts)
        found.append((np.concatenate(sums), np.concatenate(counts)))
    return found


def questions_needed(
    strata: Sequence[Stratum],
    first: np.ndarray,
    second: np.ndarray,
    *,
    power: float = POWER,
    level: float = LEVEL,
) -> np.ndarray:
    """Questions that it takes to resolve gaps like the measured ones, float64 [pairs].

    The size at which a two-sided McNemar test at ``level`` finds, with probability ``power``, a
    gap as large as the measured one when answers change as often as measured (R. J. Connor,
    Biometrics 1987; normal approximation). With d = +1 for a question gained, -1 for one lost, 0
    for the others: ``n = ((z_level/2 sqrt(E d²) + z_power sqrt(Var d)) / E d)²``.

    Questions of one cluster are correlated: both variances are sums over clusters of squared sums
    of d (as in cluster-robust standard errors), which is the variance of independent questions
    times the design effect. Over several strata they are those of the unweighted mean, and ``n``
    counts the questions of all strata together, in the same shares as now.

    Args:
        strata: of the same runs.
        first: column of a run per pair, int [pairs].
        second: of the run it is compared with, int [pairs].
        power: probability of finding the gap.
        level: of the test, two-sided, uncorrected.

    Returns:
        Not rounded; infinite where there is no gap.
    """
    from statsmodels.stats import power as sizes  # slow to import

    total = sum(len(stratum.right) for stratum in strata)
    gap, null, alternative = (np.zeros(len(first)) for _ in range(3))
    for stratum in strata:
        n = len(stratum.right)
        sums = stratum.sums[:, first] - stratum.sums[:, second]
        own = sums.sum(axis=0) / n
        gap += own / len(strata)
        scale = total / (n * len(strata)) ** 2
        # Of whole numbers: the same to the last bit in any order of runs.
        squares, crossed = (sums**2).sum(axis=0), (sums * stratum.counts[:, None]).sum(axis=0)
        null += scale * squares
        alternative += scale * (squares - 2 * own * crossed + own**2 * (stratum.counts**2).sum())
    needed = np.full(len(first), np.inf)
    some = np.abs(gap) > 1e-12  # benchmarks that cancel leave 1e-17
    needed[some] = sizes.normal_sample_size_one_tail(
        np.abs(gap[some]),
        power,
        level / 2,
        std_null=np.sqrt(null[some]),
        std_alternative=np.sqrt(np.maximum(alternative[some], 0.0)),
    )
    return needed
