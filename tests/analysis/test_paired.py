"""Paired differences: their arithmetic, their symmetry, and intervals that cover what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from morphoquant.analysis import paired
from morphoquant.errors import HarnessError

FEW = 200  # resamples, where the interval itself is not the subject


def answers(verdicts: dict[str, list[int]], modality: str = "image") -> pd.DataFrame:
    """Answers of a run; Video-MME asks three questions about every clip."""
    rows: list[dict[str, Any]] = []
    for benchmark, correct in verdicts.items():
        for i, verdict in enumerate(correct):
            name = f"{i // 3:03d}-{i % 3 + 1}" if benchmark == "videomme" else f"q{i}"
            rows.append(
                {
                    "benchmark": benchmark,
                    "task": f"{benchmark}_val",
                    "doc_id": i,
                    "id": f"{benchmark}/{name}",
                    "modality": "video" if benchmark == "videomme" else modality,
                    "target": "A",
                    "correct": float(verdict),
                }
            )
    return pd.DataFrame(rows)


def compared(
    run: dict[str, list[int]], base: dict[str, list[int]], **options: Any
) -> paired.PairedDifference:
    pairs = paired.join(answers(run), answers(base))
    return paired.compare(pairs, **{"resamples": FEW, **options})


verdicts = st.lists(st.integers(0, 1), min_size=4, max_size=40)


@st.composite
def two_runs(draw: st.DrawFn) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    run, base = {}, {}
    for name in ("mmmu", "videomme"):
        run[name] = draw(verdicts)
        size = len(run[name])
        base[name] = draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    return run, base


@given(two_runs())
@settings(max_examples=40, deadline=None)
def test_accuracies_counts_and_differences_agree(
    both: tuple[dict[str, list[int]], dict[str, list[int]]],
) -> None:
    found = compared(*both)
    for name, part in found.benchmarks.items():
        run, base = (np.array(side[name]) for side in both)
        assert part.value == pytest.approx(100 * run.mean())
        assert part.base == pytest.approx(100 * base.mean())
        assert part.delta == pytest.approx(100 * (part.gained - part.lost) / part.n, abs=1e-9)
    mean = np.mean([part.delta for part in found.benchmarks.values()])
    assert found.mean.delta == pytest.approx(mean, abs=1e-9)
    assert found.mean.gained == sum(part.gained for part in found.benchmarks.values())
    assert found.mean.n == sum(part.n for part in found.modalities.values())


@given(two_runs())
@settings(max_examples=20, deadline=None)
def test_exchanging_the_runs_mirrors_everything(
    both: tuple[dict[str, list[int]], dict[str, list[int]]],
) -> None:
    there, back = compared(*both).mean, compared(*reversed(both)).mean
    assert (back.gained, back.lost, back.p) == (there.lost, there.gained, there.p)
    assert back.delta == pytest.approx(-there.delta)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), nan_ok=True)
    assert back.needed == there.needed


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=12))
def test_correction_only_raises_p_values(p: list[float]) -> None:
    raw = pd.Series(p, dtype=float)
    adjusted = paired.holm(raw)
    assert (adjusted.isna() == raw.isna()).all()
    assert (adjusted.dropna() >= raw.dropna()).all()
    assert (adjusted.dropna() <= 1).all()
    if raw.notna().any():  # the smallest is multiplied by the number of tests
        smallest = raw.idxmin()
        assert adjusted[smallest] == pytest.approx(min(1.0, raw[smallest] * raw.notna().sum()))


def test_a_verdict_needs_interval_and_corrected_test() -> None:
    part = compared({"mmmu": [1] * 30 + [0] * 10}, {"mmmu": [0] * 40}).mean
    assert paired.verdict(part, 0.01) == paired.HIGHER
    assert paired.verdict(part, 0.06) == paired.HIGHER + paired.UNCORRECTED
    back = compared({"mmmu": [0] * 40}, {"mmmu": [1] * 30 + [0] * 10}).mean
    assert paired.verdict(back, 0.01) == paired.LOWER
    same = compared({"mmmu": [1, 0]}, {"mmmu": [1, 0]}).mean
    assert paired.verdict(same, 0.01) == paired.NOTHING
    single = compared({"mmmu": [1]}, {"mmmu": [0]}).mean
    assert paired.verdict(single, 0.01) == paired.verdict(None, 0.01) == paired.UNKNOWN


def test_runs_are_grouped_by_what_they_answered() -> None:
    long, short = answers({"mmmu": [1, 0, 1]}), answers({"mmmu": [1, 0]})
    other = long.assign(target="B")
    tables = paired.align({"a": long, "b": short, "c": long[::-1], "d": other})
    assert [list(t.columns[3:]) for t in tables] == [["a", "c"], ["b"], ["d"]]
    assert (tables[0]["a"] == tables[0]["c"]).all()
    with pytest.raises(HarnessError, match="b answered 2 questions twice"):
        paired.align({"a": long, "b": pd.concat([short, short])})


def test_a_run_against_itself_finds_nothing() -> None:
    run = {"mmmu": [0, 1, 1, 0], "videomme": [1, 1, 0, 0, 1, 0]}
    found = compared(run, run).mean
    assert (found.delta, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert (found.gained, found.lost, found.found) == (0, 0, False)
    assert found.needed == np.inf


def test_every_benchmark_weighs_the_same_in_the_mean() -> None:
    found = compared(
        {"mmmu": [1] * 10, "scienceqa": [0] * 90}, {"mmmu": [0] * 10, "scienceqa": [0] * 90}
    )
    assert found.mean.delta == pytest.approx(50.0)
    assert found.modalities["image"].delta == pytest.approx(10.0)


def test_the_order_of_rows_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    run, base = (answers({"mmmu": list(rng.integers(0, 2, 60))}) for _ in range(2))
    straight = paired.compare(paired.join(run, base))
    shuffled = paired.compare(paired.join(run.sample(frac=1, random_state=1), base[::-1]))
    assert shuffled == straight


def test_the_seed_decides_the_interval() -> None:
    rng = np.random.default_rng(0)
    run, base = ({"mmmu": list(rng.integers(0, 2, 97))} for _ in range(2))
    assert compared(run, base, seed=3) == compared(run, base, seed=3)
    assert compared(run, base, seed=3).mean.low != compared(run, base, seed=4).mean.low


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(7)
    trials, truth = 300, 10.0
    verdicts: dict[str, Any] = {}
    for i in range(trials):
        # +1 with probability 0.25, -1 with 0.15, else no change: 10 points on average.
        change = rng.choice([1, -1, 0], size=150, p=[0.25, 0.15, 0.60])
        verdicts[f"base {i}"] = np.where(change == 1, 0, 1)
        verdicts[f"run {i}"] = verdicts[f"base {i}"] + change
    asked = {"benchmark": "mmmu", "cluster": [str(i) for i in range(150)]}
    found = paired.differences(
        pd.DataFrame(asked | verdicts),
        [(f"run {i}", f"base {i}") for i in range(trials)],
        modalities=False,
        resamples=FEW,
    )
    covered = sum(part.mean.low <= truth <= part.mean.high for part in found)
    # Two-sided 99.9 % range of a binomial with 300 trials, plus a point for percentile intervals.
    assert 0.90 <= covered / trials <= 0.99


def test_a_clip_is_resampled_with_all_its_questions() -> None:
    rng = np.random.default_rng(1)
    clips = rng.integers(0, 2, 60)
    alike = list(np.repeat(clips, 3))  # a clip's three questions stand or fall together
    zeros = [0] * len(alike)
    clustered = compared({"videomme": alike}, {"videomme": zeros}, resamples=2000).mean
    single = compared({"mmmu": list(clips)}, {"mmmu": [0] * 60}, resamples=2000).mean
    naive = compared({"mmmu": alike}, {"mmmu": zeros}, resamples=2000).mean
    assert (clustered.clusters, clustered.n, naive.clusters) == (60, 180, 180)
    # Three copies of a verdict tell no more than one: the interval of 60 questions, not of 180.
    width = clustered.high - clustered.low
    assert width == pytest.approx(single.high - single.low, rel=0.05)
    assert width == pytest.approx((naive.high - naive.low) * 3**0.5, rel=0.15)


def test_ids_of_another_form_are_their_own_cluster() -> None:
    frame = answers({"videomme": [1, 0, 1]})
    frame["id"] = ["videomme/a", "videomme/b", "videomme/c"]
    assert paired.join(frame, frame)["cluster"].nunique() == 3


def test_pairing_finds_what_the_accuracies_alone_hide() -> None:
    base = [1, 0] * 200
    run = [1, 0] * 190 + [1, 1] * 10  # ten gained, none lost: 2.5 points of 400 questions
    part = compared({"mmmu": run}, {"mmmu": base}).mean
    unpaired = 100 * (2 * 0.25 / 400) ** 0.5
    assert part.delta == pytest.approx(2.5)
    assert part.delta < 1.96 * unpaired
    assert part.found
    assert part.p == pytest.approx(2 * 0.5**10)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_a_binomial_test(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert paired.mcnemar(gained, lost) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 64), (6, 0, 2 / 64)]
)
def test_mcnemar_by_hand(gained: int, lost: int, p: float) -> None:
    assert paired.mcnemar(gained, lost) == pytest.approx(p)


def test_one_cluster_has_no_interval() -> None:
    part = compared({"mmmu": [1, 0], "videomme": [1]}, {"mmmu": [0, 0], "videomme": [0]})
    assert np.isnan(part.benchmarks["videomme"].low)
    assert np.isnan(part.mean.high)
    assert not part.mean.found
    assert not np.isnan(part.benchmarks["mmmu"].low)


def test_different_questions_are_refused_with_their_numbers() -> None:
    with pytest.raises(HarnessError, match="3 in both, 2 only in the run, 0 only in the base"):
        paired.join(answers({"mmmu": [1] * 5}), answers({"mmmu": [1] * 3}))
    with pytest.raises(HarnessError, match="3 in both, 0 only in the run, 4 only in the base"):
        paired.join(answers({"mmmu": [1] * 3}), answers({"mmmu": [1] * 3, "scienceqa": [1] * 4}))
    with pytest.raises(HarnessError, match="0 in both"):
        paired.join(answers({"mmmu": [1]}), answers({"scienceqa": [1]}))


def test_other_data_is_refused() -> None:
    run = answers({"mmmu": [1, 0, 1]})
    with pytest.raises(HarnessError, match="2 of 3 questions have another target"):
        paired.join(run, run.assign(target=["A", "B", "C"]))
    with pytest.raises(HarnessError, match="run answered 3 questions twice"):
        paired.join(pd.concat([run, run]), run)
    with pytest.raises(HarnessError, match="base has 1 verdicts"):
        paired.join(run, run.assign(correct=[1.0, 0.5, 0.0]))


def test_repeated_content_is_told_apart_by_its_place() -> None:
    frame = answers({"scienceqa": [1, 0, 1]}).assign(id="scienceqa/same")
    assert len(paired.join(frame, frame)) == 3


def test_runs_are_read_from_their_directories(tmp_path: Path) -> None:
    runs = []
    for name, correct in (("run", [1, 1, 1]), ("base", [1, 0, 0])):
        (tmp_path / name).mkdir()
        answers({"mmmu": correct}).to_parquet(tmp_path / name / paired.SAMPLES)
        runs.append({"path": str(tmp_path / name)})
    found = paired.paired_difference(*runs)
    assert found.mean.delta == pytest.approx(200 / 3)
    frame = found.frame()
    assert list(frame["kind"]) == ["mean", "benchmark", "modality"]
    assert list(frame["gained"]) == [2, 2, 2]
    with pytest.raises(HarnessError, match="no readable table of answers"):
        paired.paired_difference(runs[0], {"path": str(tmp_path)})
