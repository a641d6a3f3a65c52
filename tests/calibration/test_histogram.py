"""Histograms of a layer's input against sorting, and what they must not depend on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.histogram import LayerDistribution, MagnitudeHistogram, TokenEnergies

SHARES = (0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)


def activations(rows: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Heavy-tailed, over many octaves, some exact zeros; a few tokens are massive."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=draw, dtype=torch.float64) ** 3
    x *= torch.logspace(-4, 3, channels, dtype=torch.float64)
    x[torch.rand(x.shape, generator=draw) < 0.05] = 0.0
    x[::97] *= 30.0
    return x


def seen(*parts: torch.Tensor) -> LayerDistribution:
    found = LayerDistribution()
    for part in parts:
        found.update(part)
    return found


def order_statistic(x: torch.Tensor, share: float) -> float:
    """Smallest |x| that at least ``share`` of the elements do not exceed."""
    return float(np.quantile(x.abs().double().numpy(), share, method="inverted_cdf"))


@given(
    rows=st.integers(1, 60),
    seed=st.integers(0, 20),
    share=st.sampled_from(SHARES),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_quantile_is_the_rounded_order_statistic(
    rows: int, seed: int, share: float, dtype: torch.dtype
) -> None:
    """Bitwise: rounding to bfloat16 is monotone, so it commutes with taking quantiles."""
    x = activations(rows, 13, seed).to(dtype)
    expected = order_statistic(x, share)
    found = seen(x).magnitudes.quantile(share)
    assert found == float(torch.tensor(expected, dtype=torch.float64).bfloat16())
    assert found == pytest.approx(expected, rel=2**-8)


def test_width_of_the_buckets() -> None:
    """Magnitudes 0.8 % apart are told apart, wherever they lie; a millionth apart they are not."""
    value = torch.logspace(-12, 7, 50, dtype=torch.float64)

    def together(factor: float) -> int:
        pairs = [seen(torch.stack([v, v * factor]).reshape(1, 2)) for v in value]
        return sum(int(pair.magnitudes.counts.max() == 2) for pair in pairs)

    assert together(1 + 2**-7) == 0
    assert together(1 + 2**-20) > 40


def test_range_of_the_octaves() -> None:
    """Zero and what lies below count as zero, what lies above at the upper end."""
    low = MagnitudeHistogram()
    low.update(torch.tensor([0.0, -0.0, 1e-20, -1e-300], dtype=torch.float64))
    assert low.quantile(1.0) == 0.0
    assert int(low.counts[0]) == 4
    high = MagnitudeHistogram()
    high.update(torch.tensor([-1e30, 1e300], dtype=torch.float64))
    assert high.quantile(0.5) == pytest.approx(2**24, rel=0.01)
    edges = MagnitudeHistogram()
    edges.update(torch.tensor([2.0**-40, 2.0**23]))
    assert edges.quantile(0.5) == 2.0**-40
    assert edges.quantile(1.0) == 2.0**23


def test_rank_is_not_pushed_up_by_rounding() -> None:
    """0.07 * 100 is 7.000000000000001 in floating point; 7 % of 100 values are seven."""
    found = seen(torch.arange(1.0, 101.0).reshape(10, 10))
    assert found.magnitudes.quantile(0.07) == 7.0


def test_sign_does_not_matter() -> None:
    x = activations(20, 7)
    assert torch.equal(seen(x).magnitudes.counts, seen(-x).magnitudes.counts)


def state(found: LayerDistribution) -> list[torch.Tensor]:
    tokens = found.tokens
    return [found.magnitudes.counts, tokens.counts, tokens.energy, tokens.first]


@given(
    cuts=st.lists(st.integers(0, 200), max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_split_order_and_merge_do_not_matter(cuts: list[int], order: Any) -> None:
    """M6 and M7: the counts are the same integers, energies but for rounding."""
    x = activations(200, 5)
    parts = [x[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), 200])]
    order.shuffle(parts)
    merged = LayerDistribution()
    for part in parts:
        merged.merge(seen(part))
    for other in (seen(*parts), merged):
        for a, b in zip(state(other), state(seen(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_merge_leaves_the_other_alone() -> None:
    a, b = seen(activations(10, 4)), seen(activations(20, 4, 1))
    before = [part.clone() for part in state(b)]
    a.merge(b)
    a.update(activations(5, 4))
    a.tokens.update_first(torch.tensor(1.0, dtype=torch.float64))
    assert all(map(torch.equal, before, state(b)))


@pytest.mark.parametrize("rows", [1, 50, 999, 1000, 1001, 3000])
def test_massive_share_against_sorting(rows: int) -> None:
    """One token in a thousand, but at least one; the border bucket is at most 13 % wide."""
    x = activations(rows, 6)
    energy = x.square().sum(1).sort(descending=True).values
    count = max(1, math.ceil(rows / 1000))
    exact = float(energy[:count].sum() / energy.sum())
    assert seen(x).tokens.massive_share() == pytest.approx(exact, rel=0.07)


def test_massive_share_finds_one_token_in_thousands() -> None:
    x = torch.ones(2000, 8)
    even = seen(x).tokens.massive_share()
    assert even == pytest.approx(0.001)
    x[1234] = 100.0
    assert seen(x).tokens.massive_share() == pytest.approx((80000 + 8) / (80000 + 8 * 1999))


def test_all_energy_is_kept() -> None:
    x = activations(300, 4)
    tokens = seen(x).tokens
    assert float(tokens.energy.sum()) == pytest.approx(float(x.square().sum()), rel=1e-12)
    assert tokens.massive_share(1.0) == pytest.approx(1.0)
    assert int(tokens.counts.sum()) == 300


def test_buckets_of_tokens_are_sixteen_to_an_octave() -> None:
    tokens = TokenEnergies()
    tokens.update(1 + torch.arange(128, dtype=torch.float64) / 128)
    assert tokens.counts[tokens.counts > 0].tolist() == [8] * 16
    ends = TokenEnergies()
    ends.update(torch.tensor([0.0, 2.0**-40, 2.0**23.99, 1e30], dtype=torch.float64))
    assert ends.counts[[0, 1, -1]].tolist() == [1, 1, 2]


def test_first_share() -> None:
    tokens = seen(torch.tensor([[3.0, 4.0], [1.0, 0.0]])).tokens
    assert math.isnan(tokens.first_share), "no prompts yet"
    tokens.update_first(torch.tensor(13.0, dtype=torch.float64))
    assert tokens.first_share == 0.5
    other = seen(torch.tensor([[5.0, 1.0]])).tokens
    tokens.merge(other)
    assert tokens.first_share == 0.25
    other.merge(TokenEnergies())
    assert math.isnan(other.first_share)


@pytest.mark.parametrize(
    "question",
    [
        lambda d: d.magnitudes.quantile(0.5),
        lambda d: d.tokens.massive_share(),
        lambda d: d.tokens.first_share,
    ],
)
def test_nothing_seen(question: Callable[[LayerDistribution], float]) -> None:
    assert math.isnan(question(LayerDistribution()))


def test_input_is_left_alone() -> None:
    """Counting works in place on a copy of the bit pattern, never on the activation's own."""
    x = activations(5, 4).bfloat16()
    before = x.clone()
    seen(x)
    assert torch.equal(x, before)
