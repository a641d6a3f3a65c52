"""Many differences at once give what others' implementations give for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import NormalIndPower

from morphoquant.analysis import resampling
from morphoquant.analysis.paired import mcnemar
from morphoquant.analysis.resampling import Stratum, intervals, questions_needed

OPTIONS: dict[str, Any] = {"resamples": 200, "confidence": 0.95, "seed": 3}
FIRST, SECOND = np.array([0]), np.array([1])


def drawn(seed: int, questions: int, clusters: int, runs: int = 2) -> Stratum:
    generator = np.random.default_rng(seed)
    right = generator.integers(0, 2, (questions, runs)).astype(float)
    numbered = np.concatenate([np.arange(clusters), generator.integers(0, clusters, questions)])
    return Stratum.of(right, numbered[:questions])


def by_scipy(strata: list[Stratum], a: int, b: int) -> tuple[float, float]:
    def mean(*chosen: np.ndarray, axis: int = -1) -> np.ndarray:
        shares = [
            (s.sums[:, a] - s.sums[:, b])[i].sum(axis) / s.counts[i].sum(axis)
            for s, i in zip(strata, chosen, strict=True)
        ]
        return np.mean(shares, axis=0)

    found = stats.bootstrap(
        [np.arange(len(s.counts)) for s in strata],
        mean,
        n_resamples=OPTIONS["resamples"],
        vectorized=True,
        confidence_level=OPTIONS["confidence"],
        method="percentile",
        random_state=np.random.default_rng(OPTIONS["seed"]),
    ).confidence_interval
    return 100 * found.low, 100 * found.high


@given(st.integers(0, 1000), st.integers(2, 30), st.integers(2, 30))
@settings(max_examples=25, deadline=None)
def test_intervals_are_scipy_s(seed: int, questions: int, clusters: int) -> None:
    strata = [drawn(seed, questions + 30, clusters, 3), drawn(seed + 1, 17, 17, 3)]
    low, high = intervals(strata, np.array([0, 2, 1]), np.array([1, 0, 2]), **OPTIONS)
    for i, (a, b) in enumerate([(0, 1), (2, 0), (1, 2)]):
        assert (low[i], high[i]) == pytest.approx(by_scipy(strata, a, b), abs=1e-8)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    strata = [drawn(0, 90, 31, 4)]
    a, b = np.array([0, 1, 2, 3, 0]), np.array([1, 2, 3, 0, 2])
    whole = intervals(strata, a, b, **OPTIONS)
    monkeypatch.setattr(resampling, "BATCH_ELEMENTS", 401)  # 12 resamples, two pairs at a time
    assert np.array_equal(whole, intervals(strata, a, b, **OPTIONS))


def test_benchmarks_that_cancel_leave_nothing() -> None:
    # Differences of 1/10, 2/10 and -3/10 in every resample; in floating point they do not add to 0.
    strata = []
    for gained in (1, 2, -3):
        right = np.zeros((50, 2))
        for start in range(0, 50, 10):
            right[start : start + abs(gained), int(gained < 0)] = 1
        strata.append(Stratum.of(right, np.arange(50) // 10))
    low, high = intervals(strata, FIRST, SECOND, **OPTIONS)
    assert (low[0], high[0]) == (0.0, 0.0)
    assert questions_needed(strata, FIRST, SECOND)[0] == np.inf


# ------------------------------------------------------------------------- questions needed


def changed(gained: int, lost: int, n: int, copies: int = 1) -> Stratum:
    """Verdicts of which so many changed; with copies, in clusters that change together."""
    right = np.zeros((n, 2))
    right[:gained, 0] = 1
    right[gained : gained + lost, 1] = 1
    return Stratum.of(np.repeat(right, copies, axis=0), np.repeat(np.arange(n), copies))


def needed(*strata: Stratum, **options: float) -> float:
    return float(questions_needed(strata, FIRST, SECOND, **options)[0])


@pytest.mark.parametrize(("gained", "lost"), [(12, 6), (30, 14), (5, 25)])
def test_so_many_questions_resolve_the_gap(gained: int, lost: int) -> None:
    """The exact McNemar test finds such a gap in about four of five sets of that size."""
    n = int(np.ceil(needed(changed(gained, lost, 100))))
    generator = np.random.default_rng(0)
    rates = np.array([gained, lost, 100 - gained - lost]) / 100
    sets = generator.multinomial(n, rates, size=4000)
    found = np.mean([mcnemar(int(g), int(lo)) < 0.05 for g, lo, _ in sets])
    assert 0.74 <= found <= 0.84  # exact tests are a little cautious, and n is an approximation
    fewer = generator.multinomial(n // 2, rates, size=4000)
    assert np.mean([mcnemar(int(g), int(lo)) < 0.05 for g, lo, _ in fewer]) < found - 0.2


def test_connor_by_hand() -> None:
    rate, gap = 0.18, 0.06
    z = stats.norm.isf([0.025, 0.2])
    by_hand = (z[0] * rate**0.5 + z[1] * (rate - gap**2) ** 0.5) ** 2 / gap**2
    assert needed(changed(12, 6, 100)) == pytest.approx(by_hand)
    assert needed(changed(6, 12, 100)) == pytest.approx(by_hand)


def test_small_gaps_need_what_a_paired_z_test_needs() -> None:
    gap, variance = 0.01, 0.41 - 0.01**2
    found = NormalIndPower().solve_power(
        gap / variance**0.5, power=0.8, alpha=0.05, ratio=0, alternative="two-sided"
    )
    assert needed(changed(210, 200, 1000)) == pytest.approx(found, rel=1e-3)


def test_more_power_and_smaller_gaps_need_more() -> None:
    assert needed(changed(12, 6, 100), power=0.9) > needed(changed(12, 6, 100))
    assert needed(changed(12, 6, 100), level=0.01) > needed(changed(12, 6, 100))
    assert needed(changed(12, 8, 100)) > needed(changed(12, 6, 100))
    assert needed(changed(9, 9, 100)) == np.inf


def test_questions_that_change_together_count_once() -> None:
    assert needed(changed(12, 6, 100, copies=3)) == pytest.approx(3 * needed(changed(12, 6, 100)))


def test_splitting_into_equal_benchmarks_changes_nothing() -> None:
    one = changed(12, 6, 100)
    assert needed(one, one, one) == pytest.approx(needed(one))


def test_a_noisier_benchmark_takes_more() -> None:
    assert needed(changed(12, 6, 100), changed(12, 6, 30)) != needed(changed(12, 6, 100))
    quiet, noisy = changed(6, 0, 100), changed(46, 40, 100)
    assert needed(quiet) < needed(quiet, noisy) < needed(noisy)


def test_the_variance_is_that_of_cluster_robust_errors() -> None:
    generator = np.random.default_rng(8)
    clusters = np.concatenate([np.arange(80), generator.integers(0, 80, 160)])
    right = generator.integers(0, 2, (240, 2)).astype(float)
    right[:, 0] = np.maximum(right[:, 0], clusters % 2)  # a gap, and correlated within clusters
    stratum = Stratum.of(right, clusters)
    d = right[:, 0] - right[:, 1]
    fitted = sm.OLS(d, np.ones(240)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": False}
    )
    around_zero = (np.bincount(clusters, d) ** 2).sum() / 240
    z = stats.norm.isf([0.025, 0.2])
    expected = z[0] * around_zero**0.5 + z[1] * (fitted.cov_params()[0, 0] * 240) ** 0.5
    assert needed(stratum) == pytest.approx((expected / d.mean()) ** 2)
