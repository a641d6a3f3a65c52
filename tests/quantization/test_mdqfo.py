"""The range search against a brute-force loop, and its invariants."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.statistics import ChannelStatistics
from morphoquant.config.schema import CompensationConfig, RangeConfig
from morphoquant.quantization import mdqfo
from morphoquant.quantization.mdqfo import RangeSearch, shrink_ratios
from morphoquant.quantization.ranges import StaticRange, initial_range

CHANNELS = 12


def activations(rows: int = 200, seed: int = 0) -> torch.Tensor:
    """Normal, heavy-tailed, sign-constant, silent and constant channels."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, CHANNELS, generator=draw)
    x[:, 1] = x[:, 1] ** 5
    x[0, 2] = 200.0
    x[:, 3] = x[:, 3].abs() + 4
    x[:, 4] = -x[:, 4].abs() - 0.1
    x[:, 5] = 0.0
    x[:, 6] = 0.3
    x[:, 7] *= 1e-6
    x[:, 8] *= 1e4
    return x


def config(**changes: Any) -> RangeConfig:
    return RangeConfig(**({"name": "mdqfo"} | changes))


def search(
    x: torch.Tensor,
    settings: RangeConfig,
    mask: torch.Tensor | None = None,
    compensation: CompensationConfig | None = None,
    affine: bool = True,
    bits: int = 4,
) -> RangeSearch:
    statistics = ChannelStatistics(x.shape[1])
    statistics.update(x)
    start = initial_range(statistics, mask, affine)
    return RangeSearch(start, bits, settings, mask, compensation or CompensationConfig())


def searched(x: torch.Tensor, settings: RangeConfig, **more: Any) -> RangeSearch:
    found = search(x, settings, **more)
    found.update(x)
    return found


def reference_losses(x: torch.Tensor, found: RangeSearch, gate: float | None) -> np.ndarray:
    """[candidates, channels], one channel and candidate at a time, in float64."""
    cfg, mask = found.config, found.mask
    out = np.zeros((len(found.ratios), x.shape[1]))
    for i, ratio in enumerate(found.ratios):
        candidate = found.initial.shrunk(ratio)
        rounded = candidate.grid(4)(x)
        for c in range(x.shape[1]):
            v, q = x[:, c].double().numpy(), rounded[:, c].double().numpy()
            if mask is not None and mask[c]:
                through = np.ones_like(v, bool)
                if gate is not None:
                    edge = max(abs(float(candidate.lo[c])), abs(float(candidate.hi[c])))
                    through = np.abs(v) > np.float32(gate * edge)
                q = np.where(through, v, q)
            size = np.sum(np.abs(v) ** cfg.p)
            if size == 0:
                continue
            out[i, c] = np.sum(np.abs(v - q) ** cfg.p) / size
            lengths = math.sqrt(np.sum(v * v) * np.sum(q * q))
            cosine = float(np.sum(v * q)) / lengths if lengths else 0.0
            out[i, c] += cfg.cosine_weight * (1 - cosine)
    return out


MASK = torch.zeros(CHANNELS, dtype=torch.bool)
MASK[[1, 2, 5, 9]] = True


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, 2.5])
@pytest.mark.parametrize("cosine", [0.0, 0.75])
@pytest.mark.parametrize("reading", [None, "channel", "element"])
def test_brute_force(p: float, cosine: float, reading: str | None) -> None:
    x = activations()
    settings = config(p=p, cosine_weight=cosine)
    compensation = CompensationConfig(name="dabc", reading=reading or "channel", gate=0.8)
    mask = None if reading is None else MASK
    found = searched(x, settings, mask=mask, compensation=compensation)
    expected = reference_losses(x, found, 0.8 if reading == "element" else None)
    losses = found.losses().numpy()
    # The kernel sums in float32: where v and its rounding agree (a constant channel) only the
    # float32 noise of the sums remains.
    np.testing.assert_allclose(losses, expected, rtol=2e-4, atol=1e-6 + 1e-6 * cosine)
    chosen = found.best_ratios().numpy()
    ratios = np.array(found.ratios)
    for c in range(CHANNELS):
        at = int(np.abs(ratios - chosen[c]).argmin())
        assert expected[at, c] <= expected[:, c].min() * (1 + 1e-3) + 2e-6


def test_ratios() -> None:
    found = shrink_ratios(config(candidates=15, min_ratio=0.6))
    expected = [0.6, 0.6223, 0.6454, 0.6694, 0.6943, 0.7201, 0.7468, 0.7746]
    expected += [0.8034, 0.8332, 0.8642, 0.8963, 0.9296, 0.9642, 1.0]
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[-1] == 1.0
    assert shrink_ratios(config(candidates=1)) == [1.0]
    assert shrink_ratios(config(search=False)) == [1.0]
    assert shrink_ratios(config(candidates=2, min_ratio=0.25)) == pytest.approx([0.25, 1.0])


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("cosine", [0.0, 0.75])
@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("affine", [False, True])
def test_never_worse_than_unshrunk(p: float, cosine: float, mask: Any, affine: bool) -> None:
    """M5, for every channel, on what was searched."""
    found = searched(activations(), config(p=p, cosine_weight=cosine), mask=mask, affine=affine)
    losses, chosen = found.losses(), found.best_ratios()
    table = torch.tensor(found.ratios, dtype=torch.float32)
    assert torch.isin(chosen, table).all(), "always one of the candidates"
    index = (table[:, None] == chosen).int().argmax(0)
    picked = losses.gather(0, index[None])[0]
    assert (picked <= losses[-1]).all()
    assert (losses >= 0).all()


def test_only_ratio_one_reproduces_the_start() -> None:
    """M5."""
    found = searched(activations(), config(candidates=1))
    assert torch.equal(found.result().lo, found.initial.shrunk(1.0).lo)
    torch.testing.assert_close(found.result().lo, found.initial.lo)
    torch.testing.assert_close(found.result().hi, found.initial.hi)
    assert (found.best_ratios() == 1).all()


@pytest.mark.parametrize("cosine", [0.0, 0.75, 10.0])
@pytest.mark.parametrize("value", [0.3, -0.1, 7.0, 1e-3, 1e4, 0.0])
def test_constant_channels_keep_a_range(cosine: float, value: float) -> None:
    """A channel that its grid reproduces to rounding noise must not end with ratio 0."""
    for rows in (1, 3, 50):
        x = torch.full((rows, 3), value)
        for affine in (False, True):
            found = searched(x, config(cosine_weight=cosine), affine=affine)
            assert (found.best_ratios() >= 0.6).all()
            assert (found.losses() >= 0).all()
            # at least as near as the far end of half a step of the unshrunk symmetric grid
            error = (found.result().grid(4)(x) - x).abs().max()
            assert error <= abs(value) / 14 + 1e-8


@pytest.mark.parametrize("p", [2.0, 3.0])
@pytest.mark.parametrize("rows", [1, 3, 50, 2000])
def test_rounding_noise_of_the_cosine_does_not_choose(rows: int, p: float) -> None:
    """Channels +-a lie on their grid: the loss is rounding noise, and must not turn negative."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2000, generator=draw).abs()
    x = x * torch.where(torch.rand(rows, 1, generator=draw) > 0.5, 1, -1)
    found = searched(x, config(p=p, cosine_weight=0.75), affine=False)
    assert (found.losses() >= 0).all()
    assert (found.best_ratios() == 1).all()


def test_silent_and_masked_channels_keep_their_whole_range() -> None:
    """Where nothing can be gained (loss 0 everywhere) the larger ratio wins."""
    found = searched(activations(), config(cosine_weight=0.5), mask=MASK)
    chosen = found.best_ratios()
    assert (chosen[MASK] == 1).all(), "channel reading: the range has no effect (SPEC 2.4)"
    assert chosen[5] == 1


def test_smaller_p_shrinks_more() -> None:
    """SPEC 2.7: on normals with rare spikes."""
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    x[:4] *= 20
    means = [
        float(searched(x, config(p=p, min_ratio=0.05, candidates=30)).best_ratios().mean())
        for p in (0.5, 1.0, 2.0, 3.0)
    ]
    assert means == sorted(means)
    assert means[0] < 0.5 * means[-1]


@given(
    cuts=st.lists(st.integers(0, 200), max_size=5),
    order=st.randoms(use_true_random=False),
    p=st.sampled_from([0.5, 2.0, 3.0]),
)
def test_order_and_split_do_not_matter(cuts: list[int], order: Any, p: float) -> None:
    """M7: tokens in any order, in any batches."""
    x = activations()
    settings = config(p=p, cosine_weight=0.5)
    whole = searched(x, settings)
    rows = list(range(200))
    order.shuffle(rows)
    edges = [0, *sorted(cuts), 200]
    parts = [x[rows[a:b]] for a, b in itertools.pairwise(edges)]
    found = search(x, settings)
    for part in parts:
        found.update(part)
    torch.testing.assert_close(found.losses(), whole.losses(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.best_ratios(), whole.best_ratios())


def test_batch_order_is_exact() -> None:
    """The same batches in another order: sums differ in the last bits of float64 only."""
    x = activations(400)
    found = []
    for parts in (x.split(37), x.split(37)[::-1]):
        one = search(x, config(cosine_weight=0.5))
        for part in parts:
            one.update(part)
        found.append(one)
    torch.testing.assert_close(found[0].losses(), found[1].losses(), rtol=1e-12, atol=1e-14)
    assert torch.equal(found[0].best_ratios(), found[1].best_ratios())


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(1000)
    whole = searched(x, config(cosine_weight=0.5))
    sizes: list[int] = []
    inner = RangeSearch._update_chunk

    def spy(self: RangeSearch, chunk: torch.Tensor) -> None:
        sizes.append(len(chunk))
        inner(self, chunk)

    monkeypatch.setattr(RangeSearch, "_update_chunk", spy)
    monkeypatch.setattr(mdqfo, "CACHE_BYTES", 4 * 4 * CHANNELS * 7 // 4)
    chunked = searched(x, config(cosine_weight=0.5))
    assert max(sizes) == 7
    assert sum(sizes) == 1000
    torch.testing.assert_close(chunked.losses(), whole.losses(), rtol=1e-5, atol=1e-6)
    assert torch.equal(chunked.best_ratios(), whole.best_ratios())


@given(power=st.integers(-6, 6))
def test_scaled_activations_scale_the_ranges(power: int) -> None:
    """M9."""
    x, factor = activations()[:, :5], 2.0**power
    small = searched(x, config(cosine_weight=0.5)).result()
    large = searched(x * factor, config(cosine_weight=0.5)).result()
    assert torch.equal(large.lo, small.lo * factor)
    assert torch.equal(large.hi, small.hi * factor)


def test_input_is_left_alone() -> None:
    x = activations()
    before = x.clone()
    for p in (0.5, 1.0, 2.0, 3.0):
        for mask in (None, MASK):
            searched(x, config(p=p, cosine_weight=0.5), mask=mask)
    assert torch.equal(x, before)


def test_bfloat16_activations() -> None:
    x = activations().bfloat16()
    low = search(x.float(), config())
    low.update(x)
    assert torch.equal(low.best_ratios(), searched(x.float(), config()).best_ratios())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_activations_are_refused(bad: float) -> None:
    x = activations()
    found = searched(x, config())
    x[3, 2] = bad
    found.update(x)
    with pytest.raises(ValueError, match="NaN or infinite"):
        found.best_ratios()


def test_asymmetric_ranges_around_zero_are_searched_sensibly() -> None:
    """Far more negative than positive: shrinking must not cut the positive side off."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=draw)
    x[0] = -12.0
    x[:, 1:] = x[:, 1:].clamp_min(-6)
    lo, hi = x.amin(0), x.amax(0)
    start = StaticRange(lo, hi, torch.ones(4, dtype=torch.bool))
    found = RangeSearch(start, 4, config(min_ratio=0.2), None, CompensationConfig())
    found.update(x)
    chosen = found.result()
    assert (found.best_ratios() < 1).any()
    assert (chosen.lo < 0).all()
    assert (chosen.hi >= 0.2 * hi).all()


def test_nothing_searched_keeps_the_start() -> None:
    """No token of the search set reached this group."""
    assert (search(activations(), config(cosine_weight=0.5)).best_ratios() == 1).all()


# ----------------------------------------------------------------------------- choices


def test_given_candidates_are_compared_channel_by_channel() -> None:
    """What the gradient search hands over: its ratios against 1, the better one wins (M5)."""
    x = activations()
    draw = torch.rand(CHANNELS, generator=torch.Generator().manual_seed(1)) * 0.9 + 0.1
    ones = torch.ones(CHANNELS)
    statistics = ChannelStatistics(CHANNELS)
    statistics.update(x)
    start = initial_range(statistics, None, True)
    found = RangeSearch(start, 4, config(), None, CompensationConfig(), torch.stack([draw, ones]))
    found.update(x)
    losses, chosen = found.losses(), found.best_ratios()
    assert torch.isin(chosen, torch.cat([draw, ones])).all()
    picked = torch.where(chosen == 1, losses[1], losses[0])
    assert (picked <= losses[1]).all()
    for c in range(CHANNELS):
        alone = start.shrunk(torch.where(torch.arange(CHANNELS) == c, draw, 1.0)).grid(4)(x)[:, c]
        error = float(((alone - x[:, c]).double() ** 2).sum())
        size = float((x[:, c].double() ** 2).sum())
        if size:
            assert float(losses[0, c]) == pytest.approx(error / size, rel=1e-3, abs=1e-6)


def test_unnormalised_loss_is_the_mean_error() -> None:
    x = activations()
    plain, scaled = searched(x, config(normalize=False)), searched(x, config())
    norm = (x.double() ** 2).sum(0)
    seen = norm > 0
    expected = scaled.losses()[:, seen] * norm[seen] / len(x)
    torch.testing.assert_close(plain.losses()[:, seen], expected, rtol=1e-5, atol=0.0)
    assert torch.equal(plain.best_ratios(), scaled.best_ratios()), "without a cosine: the same"


def test_moving_average_is_the_public_implementation_s() -> None:
    """0.5 * old + 0.5 * new, the first batch as it is: M7 does not hold."""
    x = activations()
    parts = [x[:80], x[80:120] * 2, x[120:]]
    expected = None
    for part in parts:
        fresh = search(x, config(normalize=False, cosine_weight=0.5))
        fresh.update(part)
        loss = fresh.losses()
        expected = loss if expected is None else 0.5 * expected + 0.5 * loss
    forward, backward = (
        search(x, config(normalize=False, cosine_weight=0.5, accumulate="ema")) for _ in range(2)
    )
    for part in parts:
        forward.update(part)
    for part in parts[::-1]:
        backward.update(part)
    assert expected is not None
    torch.testing.assert_close(forward.losses(), expected)
    assert not torch.allclose(forward.losses(), backward.losses(), rtol=1e-2)


@pytest.mark.parametrize("kind", ["restricted", "full", "sym15"])
@pytest.mark.parametrize("affine", [False, True])
def test_every_grid_is_searched_on_its_own_levels(kind: Any, affine: bool) -> None:
    x = activations()
    statistics = ChannelStatistics(CHANNELS)
    statistics.update(x)
    start = replace(initial_range(statistics, None, affine), kind=kind)
    found = RangeSearch(start, 4, config(cosine_weight=0.5), None, CompensationConfig())
    found.update(x)
    for i, ratio in enumerate(found.ratios):
        value = start.shrunk(ratio).grid(4)(x).double()
        exact = x.double()
        size = (exact**2).sum(0)
        seen = size > 0
        expected = ((value - exact) ** 2).sum(0) / size
        cosine = torch.cosine_similarity(value, exact, dim=0, eps=1e-300)
        expected = expected + 0.5 * (1 - cosine)
        torch.testing.assert_close(found.losses()[i, seen], expected[seen], rtol=2e-4, atol=2e-6)
