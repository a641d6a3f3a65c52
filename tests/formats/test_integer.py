"""Q1 to Q10 for the uniform grids, and the slices that scales belong to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant import formats
from morphoquant.formats import Grid, GridKind

KINDS: tuple[GridKind, ...] = ("restricted", "full", "sym15", "asymmetric", "affine")
SYMMETRIC: tuple[GridKind, ...] = ("restricted", "full", "sym15")
bits = st.integers(2, 8)
kinds = st.sampled_from(KINDS)
floats = st.floats(-1e4, 1e4, width=32)
rows = st.lists(floats, min_size=1, max_size=40).map(torch.tensor)


def fitted(x: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    return formats.scale_from_range(x.min(), x.max(), grid)


def levels(grid: Grid, scale: Any, zero_point: Any) -> torch.Tensor:
    codes = torch.arange(grid.low, grid.high + 1).to(grid.code_dtype)
    return formats.dequantize(codes, scale, zero_point)


@given(rows, bits, kinds)
@settings(max_examples=150, deadline=None)
def test_idempotent_and_on_the_grid(x: torch.Tensor, width: int, kind: GridKind) -> None:
    """Q1 and Q3: a second pass changes nothing; every value is one of the levels."""
    grid = Grid(width, kind)
    scale, zero = fitted(x, grid)
    once = formats.fake_quantize(x, scale, zero, grid)
    assert torch.equal(formats.fake_quantize(once, scale, zero, grid), once)
    assert torch.isin(once, levels(grid, scale, zero)).all()
    codes = formats.quantize_codes(x, scale, zero, grid)
    assert codes.dtype == grid.code_dtype
    assert grid.low <= int(codes.min()) <= int(codes.max()) <= grid.high
    assert torch.equal(formats.dequantize(codes, scale, zero), once)


@given(rows, bits, st.sampled_from(("restricted", "full", "asymmetric", "affine")))
@settings(max_examples=150, deadline=None)
def test_error_is_at_most_half_a_step(x: torch.Tensor, width: int, kind: GridKind) -> None:
    """Q2, on the slice whose own range set the grid; an affine offset may cost another half."""
    grid = Grid(width, kind)
    scale, zero = fitted(x.double(), grid)
    error = (formats.fake_quantize(x.double(), scale, zero, grid) - x.double()).abs().max()
    allowed = 0.5 if kind in SYMMETRIC else 1.0
    assert error <= allowed * scale * (1 + 1e-6) + 1e-30


@given(rows, bits, kinds, st.integers(-12, 12))
@settings(max_examples=100, deadline=None)
def test_powers_of_two_scale_through(
    x: torch.Tensor, width: int, kind: GridKind, exponent: int
) -> None:
    """Q5: Q(2^e x) = 2^e Q(x), bit for bit, away from the floor of the scale."""
    x = x.double()
    if x.abs().max() < 1e-20:
        return
    grid = Grid(width, kind)
    factor = 2.0**exponent
    small = formats.fake_quantize(x, *fitted(x, grid), grid)
    large = formats.fake_quantize(x * factor, *fitted(x * factor, grid), grid)
    assert torch.equal(small * factor, large)


@given(rows, bits)
@settings(max_examples=50, deadline=None)
def test_restricted_grid_is_odd_and_keeps_zero(x: torch.Tensor, width: int) -> None:
    """Q4 and Q6."""
    grid = Grid(width)
    scale, _ = fitted(x, grid)
    assert torch.equal(
        formats.fake_quantize(-x, scale, None, grid), -formats.fake_quantize(x, scale, None, grid)
    )
    assert formats.fake_quantize(torch.zeros(1), scale, None, grid).item() == 0.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("restricted", [i / 7 for i in range(-7, 8)]),
        ("full", [i / 7 for i in range(-8, 8)]),
        ("sym15", [i * 2 / 15 for i in range(-8, 8)]),
    ],
)
def test_four_bit_level_sets(kind: GridKind, expected: list[float]) -> None:
    """Q3: SPEC 1.2, alpha = 1."""
    grid = Grid(4, kind)
    one = torch.tensor(1.0, dtype=torch.float64)
    scale, zero = formats.scale_from_range(-one, one, grid)
    assert zero is None
    torch.testing.assert_close(
        levels(grid, scale, zero), torch.tensor(expected, dtype=torch.float64)
    )


def test_sym15_is_not_odd_and_saturates_the_positive_edge() -> None:
    """Q4's other half: +alpha comes back as 14/15 alpha, -alpha as 16/15 alpha."""
    grid = Grid(4, "sym15")
    x = torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = formats.fake_quantize(x, *fitted(x, grid), grid)
    torch.testing.assert_close(found, torch.tensor([14 / 15, -16 / 15], dtype=torch.float64))


@pytest.mark.parametrize("width", range(2, 9))
def test_sym15_is_the_affine_grid_of_a_symmetric_range(width: int) -> None:
    x = torch.linspace(-1.3, 1.3, 201, dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    found = []
    for kind in ("sym15", "affine"):
        grid = Grid(width, kind)  # type: ignore[arg-type]
        found.append(formats.fake_quantize(x, *formats.scale_from_range(-one, one, grid), grid))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_rounding_is_half_to_even() -> None:
    halves = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    codes = formats.quantize_codes(halves, torch.tensor(1.0), None, Grid(4))
    assert codes.tolist() == [0, 2, 2, 0, -2, -2]


def test_zero_is_a_level_of_the_asymmetric_grid_but_not_of_the_affine_one() -> None:
    """Q6. A range of one sign: the affine grid spends all levels on it, the other does not."""
    x = torch.tensor([2.0, 3.1, 5.0], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    for kind, keeps, worst in (("asymmetric", True, 5 / 30), ("affine", False, 3 / 15)):
        grid = Grid(4, kind)  # type: ignore[arg-type]
        scale, offset = fitted(x, grid)
        found = formats.fake_quantize(x, scale, offset, grid)
        assert (found - x).abs().max() <= worst + 1e-12
        back = formats.fake_quantize(zero, scale, offset, grid)
        assert bool(back == 0) == keeps


@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 100.001, 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_constant_slices_are_finite(kind: GridKind, value: float) -> None:
    """Q7: no division by zero, no infinite offset; the constant survives where it can."""
    x = torch.full((5,), value)
    grid = Grid(4, kind)
    scale, zero = fitted(x, grid)
    assert scale > 0
    found = formats.fake_quantize(x, scale, zero, grid)
    assert torch.isfinite(found).all()
    tolerance = 0.07 if kind == "sym15" else 1e-6
    torch.testing.assert_close(found, x, rtol=tolerance, atol=1e-37)


def test_values_outside_a_zero_range_stay_finite() -> None:
    """A channel that was always zero in calibration and is not at run time."""
    zero = torch.tensor(0.0)
    for kind in KINDS:
        grid = Grid(4, kind)
        found = formats.fake_quantize(
            torch.tensor([3e3, -3e3]), *formats.scale_from_range(zero, zero, grid), grid
        )
        assert torch.isfinite(found).all()


def test_nan_stays_in_its_slice() -> None:
    """Q7."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    x[1, 2] = float("nan")
    found = formats.fake_quantize_activation(x, 4)
    assert torch.isfinite(found[[0, 2]]).all()
    assert found[1].isnan().all()
    weight = formats.fake_quantize_weight(x, 4, "per_group", 4)
    assert weight.dequantized[1, :4].isnan().all()
    assert torch.isfinite(weight.dequantized[1, 4:]).all()
    # With a scale from elsewhere only the element itself is NaN, and its code is 0.
    scale = torch.tensor(0.1)
    assert formats.fake_quantize(x, scale, None, Grid(4)).isnan().sum() == 1
    assert formats.quantize_codes(x, scale, None, Grid(4))[1, 2] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = formats.fake_quantize_activation(x, 4)
    assert found.dtype == dtype
    assert torch.equal(found, formats.fake_quantize_activation(x.float(), 4).to(dtype))


@pytest.mark.parametrize("width", [1, 9, 16])
def test_other_widths_are_refused(width: int) -> None:
    """Q9: 16 bits never reach a grid."""
    with pytest.raises(ValueError, match="2 to 8 bits"):
        Grid(width)


# ------------------------------------------------------------------------------- slices


@given(st.integers(1, 20), st.integers(1, 25), st.sampled_from(("per_group", "per_token")))
@settings(max_examples=80, deadline=None)
def test_ranges_of_groups_ignore_what_is_not_there(
    channels: int, group: int, granularity: Any
) -> None:
    """Q10: a leftover group has the range of its own elements and nothing else."""
    x = 5 + torch.rand(3, channels, generator=torch.Generator().manual_seed(channels))
    lo, hi = formats.reduce_minmax(x, granularity, group)
    size = group if granularity == "per_group" else channels
    chunks = x.split(size, dim=-1)
    assert torch.equal(lo, torch.stack([c.amin(-1) for c in chunks], -1))
    assert torch.equal(hi, torch.stack([c.amax(-1) for c in chunks], -1))
    assert torch.equal(formats.reduce_absmax(-x, granularity, group), hi)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_token", "per_group"])
def test_activation_equals_slice_by_slice(granularity: Any, symmetric: bool) -> None:
    x = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(1))
    found = formats.fake_quantize_activation(x, 4, granularity, 4, symmetric, clip_ratio=0.9)
    pieces = {
        "per_tensor": [x.reshape(1, -1)],
        "per_token": [x.reshape(-1, 11)],
        "per_group": [c.reshape(-1, c.shape[-1]) for c in x.split(4, dim=-1)],
    }[granularity]
    grid = Grid(4, "restricted" if symmetric else "asymmetric")
    expected = []
    for piece in pieces:
        done = [
            formats.fake_quantize(
                row, *formats.scale_from_range(0.9 * row.min(), 0.9 * row.max(), grid), grid
            )
            for row in piece
        ]
        expected.append(torch.stack(done))
    if granularity == "per_group":
        whole = torch.cat([e.reshape(2, 3, -1) for e in expected], dim=-1)
    else:
        whole = expected[0].reshape(x.shape)
    assert torch.equal(found, whole)


def test_unknown_granularity_is_refused() -> None:
    with pytest.raises(ValueError, match="per_block"):
        formats.slices(torch.zeros(2, 2), "per_block")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size"):
        formats.slices(torch.zeros(2, 2), "per_group", 0)


# ------------------------------------------------------------------------------- packing


@given(st.integers(0, 9), st.integers(1, 4), st.booleans())
def test_packing_round_trip(channels: int, count: int, signed: bool) -> None:
    """Q8, odd widths included."""
    generator = torch.Generator().manual_seed(channels)
    low, high = (-8, 8) if signed else (0, 16)
    codes = torch.randint(low, high, (count, channels), generator=generator).to(
        torch.int8 if signed else torch.uint8
    )
    packed = formats.pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (count, math.ceil(channels / 2))
    assert torch.equal(formats.unpack_int4(packed, channels, signed), codes)


def test_packing_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="nibble"):
        formats.pack_int4(torch.tensor([[16]]))
