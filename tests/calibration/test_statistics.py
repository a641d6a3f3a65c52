"""Streaming statistics against one-shot references, and what they must not depend on."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from morphoquant.calibration import statistics
from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.models.structure import MODALITIES, Modality

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
    monkeypatch.setattr(statistics, "ROWS", 7)
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


# ----------------------------------------------------------------------------- dispersion


def test_dispersion_formulas() -> None:
    x = activations(50, 8)
    spread = (x.amax(0) - x.amin(0)).double()
    mean = x.double().abs().mean(0)
    torch.testing.assert_close(seen(x).dispersion("mean"), spread / (mean + 1e-5))
    torch.testing.assert_close(seen(x).dispersion("log1p"), spread / torch.log(1 + mean + 1e-5))


@given(times=st.integers(2, 6))
def test_dispersion_ignores_repeated_tokens(times: int) -> None:
    """M8, and that the paper's formula (sum instead of mean) does not have this property."""
    x = activations(40, 8)
    once, often = seen(x), seen(*[x] * times)
    for score in ("log1p", "mean"):
        torch.testing.assert_close(once.dispersion(score), often.dispersion(score))

    def literal(s: ChannelStatistics) -> torch.Tensor:
        return (s.hi - s.lo).double() / s.abs_sum.log()

    assert not torch.allclose(literal(once), literal(often), rtol=1e-2)


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


# ----------------------------------------------------------------------------- modalities


@given(
    seed=st.integers(0, 100),
    padding=st.integers(0, 30),
    batches=st.integers(1, 4),
)
def test_modalities_partition_and_padding_is_skipped(seed: int, padding: int, batches: int) -> None:
    """M7 and M11: per modality as if it were alone; pooled is the sum; padding, whatever it
    holds, is not there."""
    draw = torch.Generator().manual_seed(seed)
    x = activations(80, 5, seed)
    labels = torch.randint(0, 4, (80,), generator=draw, dtype=torch.int8)
    padded = torch.cat([x, torch.full((padding, 5), 1e30)])
    padded_labels = torch.cat([labels, torch.full((padding,), -1, dtype=torch.int8)])
    shuffle = torch.randperm(80 + padding, generator=draw)
    found = ModalityStatistics(5)
    for rows in shuffle.chunk(batches):
        found.update(padded[rows], padded_labels[rows])
    assert sum(part.n for part in found.parts.values()) == 80
    for modality in MODALITIES:
        chosen = x[labels == int(modality)]
        if len(chosen):
            assert_same(found.present[modality], seen(chosen))
        else:
            assert modality not in found.present
    assert_same(found.pooled(), seen(x))


def test_non_finite_padding_is_no_error() -> None:
    """Fully masked rows of an attention may well be NaN."""
    x = activations(4, 3)
    x[0] = torch.nan
    found = ModalityStatistics(3)
    found.update(x, torch.tensor([-1, 0, 0, 1]))
    assert_same(found.pooled(), seen(x[1:]))


def test_batched_activations_are_flattened() -> None:
    x = activations(12, 3)
    labels = torch.tensor([0, 1, 2, 3, -1, 0, 1, 1, 1, 2, 2, -1])
    flat, shaped = ModalityStatistics(3), ModalityStatistics(3)
    flat.update(x, labels)
    shaped.update(x.reshape(3, 4, 3), labels.reshape(3, 4))
    assert_same(flat.pooled(), shaped.pooled())


def test_merge_of_modalities() -> None:
    x, labels = activations(40, 3), torch.arange(40) % 5 - 1
    whole, first, second = (ModalityStatistics(3) for _ in range(3))
    whole.update(x, labels)
    first.update(x[:17], labels[:17])
    second.update(x[17:], labels[17:])
    first.merge(second)
    for modality in MODALITIES:
        assert_same(first.parts[modality], whole.parts[modality])
    assert list(first.present) == list(Modality)[1:]
