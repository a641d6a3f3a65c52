"""AWQ's clip search against a loop over groups, rows and ratios, and its invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant import formats
from morphoquant.errors import ActivationError
from morphoquant.quantization import awq_clip as module
from morphoquant.quantization.awq_clip import MAX_TOKENS, RATIOS, awq_clip, clip_ratios


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int = 5, channels: int = 20, seed: int = 0) -> torch.Tensor:
    """Heavy tails, float64, so that several ratios are chosen."""
    return torch.randn(rows, channels, generator=drawn(seed), dtype=torch.float64) ** 3


def tokens(count: int = 30, channels: int = 20, seed: int = 1) -> torch.Tensor:
    x = torch.randn(count, channels, generator=drawn(seed), dtype=torch.float64)
    return x * torch.rand(channels, generator=drawn(seed + 1), dtype=torch.float64) ** 2


def cut(w: torch.Tensor, ratio: torch.Tensor | float) -> torch.Tensor:
    edge = w.abs().amax(-1, keepdim=True) * ratio
    return torch.minimum(torch.maximum(w, -edge), edge)


def group_loss(
    w: torch.Tensor, x: torch.Tensor, ratio: float, bits: int, symmetric: bool
) -> torch.Tensor:
    """One group of one row: clip, round, and compare its part of the output."""
    rounded = formats.fake_quantize_weight(cut(w[None], ratio), bits, symmetric=symmetric)
    return (x @ (rounded.dequantized[0] - w)).square().mean()


def brute_force(
    w: torch.Tensor, x: torch.Tensor, bits: int, group_size: int, symmetric: bool
) -> torch.Tensor:
    found = []
    for row in w:
        for start in range(0, w.shape[1], group_size):
            part, seen = (t[..., start : start + group_size] for t in (row, x))
            losses = [float(group_loss(part, seen, r, bits, symmetric)) for r in RATIOS]
            found.append(RATIOS[losses.index(min(losses))])
    return torch.tensor(found, dtype=torch.float64).reshape(len(w), -1)


def test_candidates() -> None:
    """SPEC 4.3."""
    expected = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
    assert pytest.approx(expected) == RATIOS


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 10, 20, 128])
@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("bits", [3, 4])
def test_equals_the_loop(symmetric: bool, group_size: int, count: int, bits: int) -> None:
    """20 channels in groups of 8 end in a shorter one; 3 tokens are fewer than a group."""
    w, x = weight(), tokens(count)
    found = clip_ratios(w, x, bits, group_size, symmetric)
    expected = brute_force(w, x, bits, group_size, symmetric)
    assert torch.equal(found, expected)
    assert len(found.unique()) > 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [8, 10])
def test_is_plain_rounding_of_the_clipped_weight(symmetric: bool, group_size: int) -> None:
    """As AWQ's own code does it: clamp first, then round with the range that is left."""
    w, x = weight(), tokens()
    found = awq_clip(w, x, 4, group_size, symmetric)
    ratios = clip_ratios(w, x, 4, group_size, symmetric)
    parts = [cut(part, ratios[:, [i]]) for i, part in enumerate(w.split(group_size, dim=1))]
    expected = formats.fake_quantize_weight(
        torch.cat(parts, dim=1), 4, "per_group", group_size, symmetric
    )
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.dequantized, expected.dequantized)
    if symmetric:
        assert found.zero_point is None
    else:
        assert found.zero_point is not None
        assert expected.zero_point is not None
        assert torch.equal(found.zero_point, expected.zero_point)


@given(
    seed=st.integers(0, 1000),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    count=st.integers(1, 40),
)
def test_no_group_loses_more_than_unclipped(
    seed: int, bits: int, symmetric: bool, count: int
) -> None:
    w, x = weight(seed=seed), tokens(count, seed=seed + 1)
    found = awq_clip(w, x, bits, 10, symmetric).dequantized
    plain = formats.fake_quantize_weight(w, bits, "per_group", 10, symmetric).dequantized
    for group in (slice(0, 10), slice(10, 20)):
        ours, theirs = ((x[:, group] @ (q - w)[:, group].T).square().sum(0) for q in (found, plain))
        assert (ours <= theirs * (1 + 1e-9) + 1e-20).all()


def test_large_weights_on_silent_channels_are_cut() -> None:
    """Their rounding costs nothing, their range costs the others."""
    w, x = weight(40, 100, seed=3).clamp(-1, 1), tokens(100, channels=100)
    w[:, 4], x[:, 4] = 4.0, 3.0
    assert (clip_ratios(w, x, 6, 100) == 1).all()
    x[:, 4] = 0.0
    assert float(clip_ratios(w, x, 6, 100).mean()) < 0.75


def test_equal_losses_take_the_widest_range() -> None:
    """Zero weights, and inputs that are zero."""
    assert (clip_ratios(torch.zeros(3, 20), tokens().float(), 4, 10) == 1).all()
    assert (clip_ratios(weight(), torch.zeros(7, 20), 4, 10) == 1).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_pieces_do_not_matter(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = weight(), tokens()
    whole = clip_ratios(w, x, 4, 8, symmetric)
    monkeypatch.setattr(module, "PIECE", 2 * 16)
    assert torch.equal(clip_ratios(w, x, 4, 8, symmetric), whole)


@given(order=st.randoms(use_true_random=False))
def test_order_of_tokens_does_not_matter(order: Any) -> None:
    rows = list(range(30))
    order.shuffle(rows)
    w, x = weight(), tokens()
    assert torch.equal(clip_ratios(w, x[rows], 4, 10), clip_ratios(w, x, 4, 10))


@given(power=st.integers(-10, 10))
def test_sizes_do_not_matter(power: int) -> None:
    w, x, factor = weight(), tokens(), 2.0**power
    found = clip_ratios(w, x, 4, 10)
    assert torch.equal(clip_ratios(w * factor, x, 4, 10), found)
    assert torch.equal(clip_ratios(w, x * factor, 4, 10), found)


def test_more_tokens_than_needed_are_thinned_evenly() -> None:
    x = tokens(2 * MAX_TOKENS)
    found = clip_ratios(weight(), x, 3, 10)
    assert torch.equal(found, clip_ratios(weight(), x[::2], 3, 10))
    assert torch.equal(
        clip_ratios(weight(), x[: MAX_TOKENS + 1], 3, 10),
        clip_ratios(weight(), x[: MAX_TOKENS + 1 : 2], 3, 10),
    )


def test_bfloat16_is_computed_in_float32() -> None:
    w, x = weight().bfloat16(), tokens().bfloat16()
    found = awq_clip(w, x, 4, 10)
    assert found.dequantized.dtype == torch.bfloat16
    assert torch.equal(clip_ratios(w, x, 4, 10), clip_ratios(w.float(), x.float(), 4, 10))
    assert found.scale.dtype == torch.float32


def test_inputs_are_left_alone() -> None:
    w, x = weight(), tokens()
    before = w.clone(), x.clone()
    awq_clip(w, x, 4, 8)
    assert torch.equal(w, before[0])
    assert torch.equal(x, before[1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_unusable_tokens_are_refused(bad: float) -> None:
    x = tokens()
    x[3, 2] = bad
    with pytest.raises(ActivationError, match="without NaN"):
        clip_ratios(weight(), x, 4)
    with pytest.raises(ActivationError, match="needs calibration tokens"):
        clip_ratios(weight(), tokens()[:0], 4)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a weight"):
        clip_ratios(weight(), tokens(channels=3), 4)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        clip_ratios(weight(), tokens(), 16)
