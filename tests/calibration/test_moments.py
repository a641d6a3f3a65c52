"""Streaming moments against one-shot references, and what they must not depend on."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from morphoquant.calibration import moments
from morphoquant.calibration.moments import ChannelStatistics, Score
from morphoquant.errors import ActivationError

MOMENTS = ("mean", "m2", "m3", "m4", "abs_sum")


def activations(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed float32 with channels of very different scale and mean."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=draw) ** 3
    scale = torch.logspace(-3, 3, channels)
    return x * scale + torch.randn(channels, generator=draw) * scale


def seen(*parts: torch.Tensor) -> ChannelStatistics:
    found = ChannelStatistics(parts[0].shape[1])
    for part in parts:
        found.update(part)
    return found


def assert_same(a: ChannelStatistics, b: ChannelStatistics, tolerance: float = 1e-9) -> None:
    """Ranges bitwise; every central sum close relative to its natural size."""
    assert a.n == b.n
    assert torch.equal(a.lo, b.lo)
    assert torch.equal(a.hi, b.hi)
    size = b.rms.clamp_min(1e-300)
    for power, name in enumerate(MOMENTS[:4], start=1):
        bound = tolerance * size**power * (1 if name == "mean" else b.n) * (1 + b.crest**power)
        assert ((getattr(a, name) - getattr(b, name)).abs() <= bound).all(), name
    assert torch.allclose(a.abs_sum, b.abs_sum, rtol=tolerance, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 7, 500])
def test_one_shot_reference(rows: int) -> None:
    """M6 against numpy in float64."""
    x = activations(rows, 33)
    found, values = seen(x), x.double().numpy()
    assert found.n == rows
    assert torch.equal(found.lo, x.amin(0))
    assert torch.equal(found.hi, x.amax(0))
    np.testing.assert_allclose(found.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.abs_mean, np.abs(values).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.std, values.std(0), rtol=1e-10)
    np.testing.assert_allclose(found.rms, np.sqrt((values**2).mean(0)), rtol=1e-12)
    np.testing.assert_allclose(found.absmax, np.abs(values).max(0), rtol=0)
    centred = values - values.mean(0)
    np.testing.assert_allclose(found.m4, (centred**4).sum(0), rtol=1e-10)


@given(
    cuts=st.lists(st.integers(0, 300), max_size=6),
    order=st.randoms(use_true_random=False),
    seed=st.integers(0, 5),
)
def test_split_and_order_do_not_matter(cuts: list[int], order: Any, seed: int) -> None:
    """M6 and M7: any split of the rows into batches, in any order."""
    x = activations(300, 9, seed)
    edges = [0, *sorted(cuts), 300]
    parts = [x[a:b] for a, b in itertools.pairwise(edges)]
    order.shuffle(parts)
    assert_same(seen(*parts), seen(x))


def test_internal_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(300, 5)
    whole = seen(x)
    monkeypatch.setattr(moments, "piece_rows", lambda channels: 7)
    assert_same(seen(x), whole)


@given(sizes=st.tuples(*[st.integers(0, 60)] * 3))
def test_merge_is_associative_and_commutative(sizes: tuple[int, int, int]) -> None:
    assume(any(sizes))
    parts = [seen(activations(size, 6, seed)) for seed, size in enumerate(sizes)]
    left = ChannelStatistics.merged([ChannelStatistics.merged(parts[:2]), parts[2]])
    right = ChannelStatistics.merged([parts[0], ChannelStatistics.merged(parts[1:])])
    turned = ChannelStatistics.merged(reversed(parts))
    assert_same(left, right)
    assert_same(left, turned)


def test_merge_leaves_the_other_alone() -> None:
    a, b = seen(activations(10, 4)), seen(activations(20, 4, 1))
    before = b.m4.clone()
    a.merge(b)
    a.update(activations(5, 4))
    assert torch.equal(b.m4, before)
    assert b.n == 20


def test_kurtosis_is_scipys() -> None:
    x = activations(400, 12)
    expected = scipy.stats.kurtosis(x.double().numpy(), axis=0, fisher=True, bias=True)
    streamed = seen(*x.split(37)).excess_kurtosis
    np.testing.assert_allclose(streamed, expected, rtol=1e-8)
    assert (streamed > 3).any(), "cubed normals are heavy-tailed"


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-20])
def test_constant_channel(value: float) -> None:
    """Zero, not 0/0 and not the kurtosis of rounding noise."""
    found = seen(torch.full((7, 2), value), torch.full((6, 2), value))
    assert found.excess_kurtosis.tolist() == [0.0, 0.0]
    assert torch.isfinite(found.crest).all()
    assert found.crest.tolist() == pytest.approx([0.0 if value == 0 else 1.0] * 2)
    assert found.dispersion("log1p").tolist() == [0.0, 0.0]
    assert found.dispersion("mean").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_is_refused(bad: float) -> None:
    x = activations(10, 4)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        seen(x)


def test_bfloat16_is_counted_exactly() -> None:
    x = activations(2000, 6).bfloat16()
    found = seen(x)
    assert torch.equal(found.lo, x.float().amin(0))
    np.testing.assert_allclose(found.mean, x.double().mean(0), rtol=1e-10)
    np.testing.assert_allclose(found.abs_mean, x.double().abs().mean(0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 1e4, -1e4])
def test_mean_far_from_zero(mean: float, dtype: torch.dtype) -> None:
    """Nothing cancels where the mean is large against the standard deviation.

    Raw float32 products would lose everything here: mean^4 is 1e16 times std^4.
    """
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(3000, 6, generator=draw, dtype=torch.float64) + mean).to(dtype)
    centred = x.double() - x.double().mean(0)
    for found in (seen(x), seen(*x.split(37)), seen(*x.flip(0).split(1))):
        assert_same(found, seen(x))
        for power, sums in ((2, found.m2), (3, found.m3), (4, found.m4)):
            size = centred.abs().pow(power).sum(0)
            assert ((sums - centred.pow(power).sum(0)).abs() <= 1e-6 * size).all(), power
        np.testing.assert_allclose(found.mean, x.double().mean(0), rtol=1e-10, atol=1e-10)


def test_untypical_first_rows() -> None:
    """A pivot 100 standard deviations off, from 2 of 20000 rows, costs a few of 16 digits."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 3, generator=draw, dtype=torch.float64)
    x[:2] += 1e5
    found = seen(x[:2], *x[2:].split(500))
    centred = x - x.mean(0)
    for power, sums in ((2, found.m2), (3, found.m3), (4, found.m4)):
        np.testing.assert_allclose(sums, centred.pow(power).sum(0), rtol=1e-10)
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-10)


def test_range_keeps_the_values() -> None:
    """Float64 activations are not rounded to float32, where 1 + 1e-12 is 1."""
    x = torch.tensor([[1 + 1e-12], [-1 - 1e-12]], dtype=torch.float64)
    found = seen(x)
    assert (float(found.lo), float(found.hi)) == (-1 - 1e-12, 1 + 1e-12)
    assert seen(x.bfloat16()).lo.dtype == torch.float32


@given(value=st.floats(-1e6, 1e6), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_constant_float64_channel(value: float, cuts: list[int]) -> None:
    """The mean of equal numbers may be off by one bit; moments are zero all the same."""
    found = seen(*(torch.full((rows, 1), value, dtype=torch.float64) for rows in cuts))
    assert [found.m2.item(), found.m3.item(), found.m4.item()] == [0, 0, 0]
    assert found.excess_kurtosis.item() == found.std.item() == 0


def test_layer_kurtosis_is_that_of_all_elements() -> None:
    x = activations(300, 9)
    expected = scipy.stats.kurtosis(x.double().numpy(), axis=None)
    assert seen(*x.split(50)).layer_kurtosis == pytest.approx(expected, rel=1e-8)
    assert seen(torch.full((5, 3), 2.0)).layer_kurtosis == 0.0


def test_nothing_seen() -> None:
    found = ChannelStatistics(3)
    found.merge(ChannelStatistics(3))
    found.update(torch.zeros(0, 3))
    assert found.n == 0
    for value in (found.mean, found.std, found.absmax, found.excess_kurtosis, found.crest):
        assert value.tolist() == [0.0] * 3


def test_refused_rows_are_not_counted() -> None:
    found = seen(activations(10, 4))
    before = found.m2.clone()
    with pytest.raises(ActivationError):
        found.update(torch.full((2, 4), torch.nan))
    assert found.n == 10
    assert torch.equal(found.m2, before)


def test_input_is_left_alone() -> None:
    """Powers are formed in place, on a copy: also where no conversion makes one."""
    x = activations(30, 4).double()
    before = x.clone()
    seen(x)
    assert torch.equal(x, before)


# ----------------------------------------------------------------------------- dispersion


def test_dispersion_formulas() -> None:
    x = activations(50, 8)
    spread = (x.amax(0) - x.amin(0)).double()
    mean = x.double().abs().mean(0)
    torch.testing.assert_close(seen(x).dispersion("mean"), spread / (mean + 1e-5))
    torch.testing.assert_close(seen(x).dispersion("log1p"), spread / torch.log(1 + mean + 1e-5))
    torch.testing.assert_close(seen(x).dispersion("log_mean"), spread / torch.log(mean + 1e-5))
    torch.testing.assert_close(seen(x).dispersion("log_l1"), spread / torch.log(50 * mean + 1e-5))
    assert torch.equal(seen(x).dispersion("absmax"), x.abs().amax(0).double())


@given(times=st.integers(2, 6))
def test_dispersion_ignores_repeated_tokens(times: int) -> None:
    """M8, and that the paper's formula (sum instead of mean) does not have this property."""
    x = activations(40, 8)
    once, often = seen(x), seen(*[x] * times)
    for score in ("log1p", "mean", "log_mean", "absmax"):
        torch.testing.assert_close(once.dispersion(score), often.dispersion(score))
    assert not torch.allclose(once.dispersion("log_l1"), often.dispersion("log_l1"), rtol=1e-2)


def test_repeated_tokens_turn_the_papers_ranking_round() -> None:
    """A small channel's logarithm grows faster with n than a large one's."""
    x = torch.tensor([[2.0, 30.0], [1.0, -15.0]])
    few, many = seen(x), seen(*[x] * 10000)
    assert few.dispersion("log_l1").argmax() == many.dispersion("log_l1").argmax() == 1
    few, many = seen(x * 0.4), seen(*[x * 0.4] * 10000)
    ratio = few.dispersion("log_l1") / many.dispersion("log_l1")
    assert ratio[0] > 2 * ratio[1]


@pytest.mark.parametrize("score", get_args(Score))
def test_scores_are_numbers_whatever_the_activation(score: Score) -> None:
    """M17, and the poles of both logarithms: mean or sum of magnitudes plus eps equal to one."""
    pole = 1 - 1e-5
    x = torch.tensor(
        [
            [0.0, 3.0, pole, 2 * pole, pole / 2, 1e-30, 5.0],
            [0.0, 3.0, -pole, 0.0, -pole / 2, -1e-30, 4.0],
        ],
        dtype=torch.float64,
    )
    found = seen(x).dispersion(score)
    assert torch.isfinite(found).all()
    # An all-zero and a constant channel have no spread, whichever sign the logarithm has.
    if score != "absmax":
        assert found[:2].tolist() == [0.0, 0.0]
        assert not torch.signbit(found[:2]).any()
    assert torch.isfinite(ChannelStatistics(3).dispersion(score)).all()


def test_poles_of_the_logarithms() -> None:
    """Finite, huge, and of the sign of the logarithm; negative below the pole."""
    pole = 1 - 1e-5
    x = torch.tensor([[pole, 0.5, 2.0], [-pole, -0.5, -2.0]], dtype=torch.float64)
    at, below, above = seen(x).dispersion("log_mean").tolist()
    assert abs(at) > 1e11
    assert below == pytest.approx(1.0 / math.log(0.5 + 1e-5))
    assert below < 0 < above
    assert above == pytest.approx(4.0 / math.log(2.0 + 1e-5))


def test_scale_behaviour() -> None:
    """M9: the mean score is free of scale, log1p grows with magnitude."""
    x = activations(60, 8).abs() + 1.0
    for power in (-2, 3, 10):
        factor = 2.0**power
        a, b = seen(x), seen(x * factor)
        torch.testing.assert_close(a.dispersion("mean"), b.dispersion("mean"), rtol=1e-4, atol=0)
        torch.testing.assert_close(a.excess_kurtosis, b.excess_kurtosis)
        torch.testing.assert_close(a.crest, b.crest)
        grown = b.dispersion("log1p") > a.dispersion("log1p")
        assert bool(grown.all()) is (power > 0)
