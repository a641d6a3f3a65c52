"""Folded weights: one rounding, outlier channels apart, and channels that hardly exist (M14)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from morphoquant.formats.integer import expand_slices
from morphoquant.formats.weights import fake_quantize_weight
from morphoquant.quantization.folding import FoldedWeight, fold_weight
from morphoquant.quantization.ranges import StaticGrid, StaticRange

ROWS, CHANNELS = 6, 10


def a_grid(edges: torch.Tensor, bits: int = 4) -> StaticGrid:
    return StaticRange(-edges, edges, torch.zeros_like(edges, dtype=torch.bool)).grid(bits)


def drawn(
    rows: int = ROWS,
    channels: int = CHANNELS,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    share: float = 0.3,
) -> tuple[torch.Tensor, StaticGrid, torch.Tensor]:
    """Weight, activation grid with steps over four decades, and mask."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, channels, generator=draw, dtype=torch.float64)
    edges = 10 ** (4 * torch.rand(channels, generator=draw) - 2)
    mask = torch.rand(channels, generator=draw) < share
    return weight.to(dtype), a_grid(edges), mask


def steps_of(folded: FoldedWeight) -> torch.Tensor:
    """``u_ng`` of every weight, [N, K]."""
    k = folded.codes.shape[1]
    return expand_slices(folded.scale.double(), k, "per_group", folded.group_width)


shapes = {
    "rows": st.integers(1, 5),
    "channels": st.integers(1, 40),
    "seed": st.integers(0, 999),
    "share": st.sampled_from([0.0, 0.2, 0.9, 1.0]),
    "bits": st.integers(2, 8),
    "group": st.sampled_from([None, 1, 3, 8, 64]),
}


@given(**shapes, exclude=st.booleans())
def test_rounded_once(
    rows: int, channels: int, seed: int, share: float, bits: int, group: int | None, exclude: bool
) -> None:
    """In the folded domain no weight is further than half a step from the original."""
    weight, grid, mask = drawn(rows, channels, seed, share=share)
    folded = fold_weight(weight, grid, mask, bits, group, exclude_masked=exclude)
    assert folded.codes.shape == weight.shape
    assert folded.codes.dtype == torch.int8
    assert int(folded.codes.abs().max()) <= 2 ** (bits - 1) - 1
    kept = ~mask if exclude else torch.ones_like(mask)
    error = ((folded.dequantized - weight) * grid.step.double()).abs()
    assert (error <= steps_of(folded) / 2 * (1 + 1e-12))[:, kept].all()
    assert torch.equal(folded.dequantized[:, ~kept], weight[:, ~kept])
    assert (folded.codes[:, ~kept] == 0).all()
    assert folded.channels.tolist() == (~kept).nonzero().flatten().tolist()
    assert torch.equal(folded.panel, weight[:, ~kept])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_product_is_not_rounded_to_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight, grid, _ = drawn(16, 96, dtype=dtype)
    folded = fold_weight(weight, grid, None, 8, 32)
    exact = fold_weight(weight.double(), grid, None, 8, 32)
    assert folded.scale.dtype == torch.float32
    assert folded.dequantized.dtype == dtype
    assert torch.equal(folded.codes, exact.codes)
    unit = a_grid(torch.full((96,), 7.0))  # step 1
    twice = fold_weight((weight * grid.step.to(dtype)).double(), unit, None, 8, 32)
    if dtype != torch.float32:
        assert not torch.equal(twice.codes, exact.codes), "the data can tell the difference"


@pytest.mark.parametrize("clip", ["minmax", "mse"])
@pytest.mark.parametrize("group", [None, 4])
def test_codes_are_those_of_the_scaled_weight(clip: Any, group: int | None) -> None:
    weight, grid, mask = drawn(share=0.3)
    folded = fold_weight(weight, grid, mask, 4, group, clip)
    scaled = weight * grid.step.double() * ~mask
    granularity = "per_channel" if group is None else "per_group"
    expected = fake_quantize_weight(scaled, 4, granularity, group or CHANNELS, clip=clip)
    assert torch.equal(folded.codes, expected.codes)
    assert torch.equal(folded.scale, expected.scale)


def test_clip_search_loses_less_in_the_folded_domain() -> None:
    weight, grid, mask = drawn(16, 256)
    errors = {}
    for clip in ("minmax", "mse"):
        folded = fold_weight(weight, grid, mask, 3, 64, clip)  # type: ignore[arg-type]
        error = (folded.dequantized - weight) * grid.step.double()
        errors[clip] = float(error.abs().pow(2.4).sum())
    assert errors["mse"] < 0.9 * errors["minmax"]


@given(seed=st.integers(0, 999), group=st.sampled_from([None, 1, 4]))
def test_masked_channels_have_no_influence_on_the_others(seed: int, group: int | None) -> None:
    weight, grid, mask = drawn(seed=seed)
    wild, steps = weight.clone(), grid.step.clone()
    wild[:, mask] *= -1e6
    steps[mask] *= 1e3
    one = fold_weight(weight, grid, mask, 4, group)
    two = fold_weight(wild, StaticGrid(steps, grid.offset, grid.low, grid.high), mask, 4, group)
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scale, two.scale)
    assert torch.equal(two.dequantized[:, mask], wild[:, mask])


def test_outlier_channels_left_in_would_cost_the_others_their_levels() -> None:
    weight, grid, _ = drawn(8, 64, share=0.0)
    steps = torch.full_like(grid.step, 0.1)
    steps[5] = 30.0
    grid = StaticGrid(steps, grid.offset, grid.low, grid.high)
    mask = torch.arange(64) == 5
    left_in = fold_weight(weight, grid, mask, 4, None, exclude_masked=False)
    assert left_in.channels.numel() == 0
    assert left_in.panel.shape == (8, 0)
    assert (left_in.codes[:, ~mask] == 0).double().mean() > 0.8
    left_out = fold_weight(weight, grid, mask, 4, None)
    assert (left_out.codes[:, ~mask] == 0).double().mean() < 0.4


@pytest.mark.parametrize("group", [None, 4])
def test_equal_steps_change_nothing(group: int | None) -> None:
    weight, _, _ = drawn(dtype=torch.float32)
    grid = StaticGrid(*(torch.full((1,), v) for v in (0.25, 0.0, -7.0, 7.0)))
    folded = fold_weight(weight, grid, None, 4, group)
    plain = fake_quantize_weight(
        weight, 4, "per_channel" if group is None else "per_group", group or CHANNELS
    )
    assert torch.equal(folded.codes, plain.codes)
    assert torch.equal(folded.dequantized, plain.dequantized)
    assert folded.step.shape == (CHANNELS,)


@given(power=st.integers(-8, 8), clip=st.sampled_from(["minmax", "mse"]))
def test_the_unit_of_the_activation_does_not_matter(power: int, clip: Any) -> None:
    weight, grid, mask = drawn()
    other = StaticGrid(grid.step * 2.0**power, grid.offset, grid.low, grid.high)
    one, two = (fold_weight(weight, g, mask, 4, 4, clip) for g in (grid, other))
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.dequantized, two.dequantized)


# --------------------------------------------------------------------- 16 bits (M14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exclude", [False, True])
def test_unquantized_folding_returns_the_weight(dtype: torch.dtype, exclude: bool) -> None:
    """Bit for bit: the product of two float32 numbers is exact in float64, and so divides back."""
    weight, grid, mask = drawn(16, 96, dtype=dtype)
    folded = fold_weight(weight, grid, mask, 16, 32, exclude_masked=exclude)
    assert torch.equal(folded.dequantized, weight)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    rounded = grid(x.float()).to(dtype)
    expected = F.linear(rounded, weight)
    assert torch.equal(F.linear(rounded, folded.dequantized), expected)
    assert folded.storage_bits() == 16


@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8]))
def test_unquantized_folding_is_per_channel_fake_quantization(seed: int, bits: int) -> None:
    """Codes times folded weights, with the zero points of sign-constant channels."""
    weight, _, _ = drawn(seed=seed)
    draw = torch.Generator().manual_seed(seed)
    lo = torch.randn(CHANNELS, generator=draw) * 3
    grid = StaticRange(lo, lo + torch.rand(CHANNELS, generator=draw), lo.abs() > 1).grid(bits)
    x = 4 * torch.randn(7, CHANNELS, generator=draw, dtype=torch.float64)
    levels = grid(x) / grid.step  # q + z
    folded = fold_weight(weight, grid, None, 16)
    torch.testing.assert_close(
        levels.round() @ folded.codes.T, F.linear(grid(x), weight), rtol=1e-11, atol=1e-11
    )


# --------------------------------------------------------------------- awkward channels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("group", [None, 1, 4])
@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_awkward_channels_stay_finite(
    dtype: torch.dtype, bits: int, group: int | None, clip: Any
) -> None:
    """Silent channels, all-zero rows, groups that are masked or silent as a whole (M17)."""
    weight, _, _ = drawn(ROWS, 15, dtype=dtype)
    weight[2] = 0
    weight[3] *= 1e-20
    edges = torch.ones(15)
    edges[[0, 5]] = 0.0  # the step of an all-zero channel: SPAN_FLOOR / 7
    edges[[8, 9, 10, 11]] = 0.0
    edges[12:] = torch.tensor([1e-20, 1e20, 1e30])
    mask = torch.zeros(15, dtype=torch.bool)
    mask[4:8] = True
    for grid in (a_grid(edges), StaticGrid(edges, *(torch.zeros(15),) * 3)):
        for exclude in (True, False):
            folded = fold_weight(weight, grid, mask, bits, group, clip, exclude)
            found = folded.dequantized
            assert torch.isfinite(found).all()
            assert (found[2] == 0).all()
            # A code is 0 below half a step, so rounding at most doubles a weight.
            assert (found.abs() <= 2.02 * weight.abs()).all()
            silent = (grid.step == 0) & ~(mask & exclude)
            assert (found[:, silent] == 0).all()
            if exclude:
                assert torch.equal(found[:, mask], weight[:, mask])


@pytest.mark.parametrize(
    ("masked", "group", "exclude", "expected"),
    [
        (0, None, True, 4 + 16 / 64),
        (0, 16, True, 4 + 16 * 4 / 64),
        (0, 48, True, 4 + 16 * 2 / 64),  # 48 and 16
        (8, 16, True, 4 + 16 * (4 + 8) / 64),
        (8, 16, False, 4 + 16 * 4 / 64),
        (64, 16, True, 4 + 16 * (4 + 64) / 64),
    ],
)
def test_storage_bits(masked: int, group: int | None, exclude: bool, expected: float) -> None:
    weight, grid, _ = drawn(3, 64)
    mask = torch.arange(64) < masked
    folded = fold_weight(weight, grid, mask, 4, group, exclude_masked=exclude)
    assert folded.storage_bits() == expected


def test_the_original_is_left_alone() -> None:
    weight, grid, mask = drawn()
    before, steps = weight.clone(), grid.step.clone()
    folded = fold_weight(weight, grid, mask, 4)
    folded.dequantized.zero_()
    folded.panel.zero_()
    folded.step.zero_()
    assert torch.equal(weight, before)
    assert torch.equal(grid.step, steps)


def test_what_does_not_fit_is_refused() -> None:
    weight, grid, mask = drawn()
    with pytest.raises(ValueError, match="expected a weight"):
        fold_weight(weight[0], grid, mask, 4)
    with pytest.raises(ValueError, match="10 input channels, but steps of shape"):
        fold_weight(weight, a_grid(torch.ones(9)), None, 4)
    with pytest.raises(ValueError, match="bool mask"):
        fold_weight(weight, grid, mask[:-1], 4)
    with pytest.raises(ValueError, match="bool mask"):
        fold_weight(weight, grid, mask.float(), 4)
    with pytest.raises(ValueError, match="2 to 8 bits"):
        fold_weight(weight, grid, mask, 9)
    with pytest.raises(ValueError, match="group_size must be positive"):
        fold_weight(weight, grid, mask, 4, 0)
    for bad in (-1.0, torch.nan, torch.inf):
        steps = grid.step.clone()
        steps[3] = bad
        with pytest.raises(ValueError, match="finite and not negative"):
            fold_weight(weight, StaticGrid(steps, grid.offset, grid.low, grid.high), mask, 4)
