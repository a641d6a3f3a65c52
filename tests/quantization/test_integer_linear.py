"""The integer path equals the simulation of the folded model (M13), exactly where it can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from morphoquant.formats.weights import fake_quantize_weight
from morphoquant.quantization.compensation import DynamicCompensation
from morphoquant.quantization.folding import FoldedWeight, fold_weight
from morphoquant.quantization.integer_linear import IntegerLinear
from morphoquant.quantization.integer_product import integer_product
from morphoquant.quantization.ranges import StaticGrid, StaticRange

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, StaticGrid, torch.Tensor]


def drawn(
    tokens: int, rows: int, channels: int, seed: int, share: float, affine: bool, bits: int = 4
) -> Case:
    """x, weight, bias (float64), grid and mask; sizes of channels over six decades."""
    draw = torch.Generator().manual_seed(seed)
    size = 10 ** (6 * torch.rand(channels, generator=draw) - 3)
    x = torch.randn(tokens, channels, generator=draw, dtype=torch.float64) * size
    weight = torch.randn(rows, channels, generator=draw, dtype=torch.float64)
    bias = torch.randn(rows, generator=draw, dtype=torch.float64)
    shift = torch.rand(channels, generator=draw)
    x[:, shift > 0.7] += 5 * size[shift > 0.7]  # of one sign
    silent = torch.rand(channels, generator=draw) < 0.1
    x[:, silent] = 0
    lo, hi = x.amin(0).float(), x.amax(0).float()
    constant = (lo * hi > 0) & affine
    edge = torch.maximum(lo.abs(), hi.abs()) * 0.8  # some elements are clipped
    chosen = StaticRange(
        torch.where(constant, lo, -edge), torch.where(constant, hi, edge), constant
    )
    mask = torch.rand(channels, generator=draw) < share
    return x, weight, bias, chosen.grid(bits), mask


def limits(grid: StaticGrid, gate: float) -> torch.Tensor:
    return gate * grid.step * (grid.offset.abs() + grid.high)


def simulated(
    x: torch.Tensor,
    folded: FoldedWeight,
    grid: StaticGrid,
    bias: torch.Tensor | None,
    compensation: DynamicCompensation | None,
) -> torch.Tensor:
    """Fake quantization: compensated levels times the dequantized weight."""
    rounded = grid(x)
    through = rounded if compensation is None else compensation(x, rounded)[0]
    return F.linear(through, folded.dequantized, bias)


def assert_variants_equal_the_simulation(
    case: Case, bits: int, group: int | None, limit: torch.Tensor | None
) -> None:
    """S left out; S in the codes, without residual, with all of it, and with it past a limit.

    To 1e-12 of the sum of the magnitudes of all terms of an output.
    """
    x, weight, bias, grid, mask = case
    apart = fold_weight(weight, grid, mask, bits, group)
    whole = fold_weight(weight, grid, mask, bits, group, exclude_masked=False)
    every, gated = DynamicCompensation(mask), DynamicCompensation(mask, limit)
    sizes = x.abs() + grid(x).abs() + (grid.offset * grid.step).abs()
    for folded, residual, reference in (
        (apart, None, every),
        (whole, None, None),
        (whole, every, every),
        (whole, gated, gated),
    ):
        found = IntegerLinear(folded, grid, bias, residual)(x)
        error = (found - simulated(x, folded, grid, bias, reference)).abs()
        terms = sizes @ folded.dequantized.abs().T + bias.abs()
        assert torch.isfinite(found).all()
        assert (error <= 1e-12 * terms + 1e-300).all()


@given(
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40)),
    seed=st.integers(0, 9999),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    affine=st.booleans(),
    group=st.sampled_from([None, 1, 3, 8, 64]),
    bits=st.tuples(st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8])),
    gate=st.sampled_from([None, 0.0, 0.8, 1.0, 1.5]),
)
@settings(max_examples=60)
def test_equals_the_simulation(
    sizes: tuple[int, int, int],
    seed: int,
    share: float,
    affine: bool,
    group: int | None,
    bits: tuple[int, int],
    gate: float | None,
) -> None:
    """M13."""
    case = drawn(*sizes, seed, share, affine, bits[0])
    limit = None if gate is None else limits(case[3], gate)
    assert_variants_equal_the_simulation(case, bits[1], group, limit)


@pytest.mark.parametrize("group", [None, 1, 3])
@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
def test_adversarial_channels(group: int | None, masked: str, scale: float) -> None:
    """One spike, one sign, constant, silent, silent in calibration only, huge and tiny (M17)."""
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 0] = 200.0
    x[:, 1] = x[:, 1].abs() + 100
    x[:, 2] = -x[:, 2].abs() - 1e4
    x[:, 3] = 7.0
    x[:, [4, 5]] = 0.0
    x[:, 6] *= 1e-9
    x *= scale
    lo, hi = x.amin(0).float(), x.amax(0).float()
    edge = torch.maximum(lo.abs(), hi.abs())
    constant = lo * hi > 0
    chosen = StaticRange(
        torch.where(constant, lo, -edge), torch.where(constant, hi, edge), constant
    )
    grid = chosen.grid(4)
    x[2, 5] = 3.0 * scale  # far off a grid that has seen nothing but zeros
    weight = torch.randn(4, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[1] = 0
    bias = torch.zeros(4, dtype=torch.float64)
    mask = torch.zeros(10, dtype=torch.bool)
    mask[{"none": [], "some": [0, 3, 5], "all": list(range(10))}[masked]] = True
    assert_variants_equal_the_simulation((x, weight, bias, grid, mask), 4, group, 0.8 * edge)


@given(
    seed=st.integers(0, 9999),
    channels=st.integers(1, 40),
    group=st.sampled_from([None, 1, 3, 8]),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    bits=st.sampled_from([4, 8]),
)
def test_bitwise_equal_where_arithmetic_is_exact(
    seed: int, channels: int, group: int | None, share: float, bits: int
) -> None:
    """M13: steps and scales are powers of two, all else has few binary digits: no sum rounds."""
    draw = torch.Generator().manual_seed(seed)

    def whole(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=draw)

    rows, width = 4, group or channels
    step = 2.0 ** whole(-3, 3, channels)
    one_sided = whole(0, 1, channels)
    edge = torch.full_like(step, 2.0 ** (bits - 1) - 1)
    grid = StaticGrid(step, (one_sided * whole(-900, 900, channels)).float(), -edge - 1, edge)
    mask = torch.rand(channels, generator=draw) < share
    codes = whole(-7, 7, rows, channels)
    for start in range(0, channels, width):  # With and without S, every group reaches 7 ...
        kept = (~mask[start : start + width]).nonzero().flatten()
        codes[:, start] = 7
        codes[:, start + kept[:1]] = 7
    scale = 2.0 ** whole(-3, 3, rows, -(-channels // width))
    scale = scale.double().repeat_interleave(width, dim=1)[:, :channels]
    weight = codes * scale / step.double()
    x = whole(-(1 << 16), 1 << 16, 5, channels).double() / 64
    bias = whole(-99, 99, rows).double() / 8

    folded = fold_weight(weight, grid, mask, 4, group)
    assert torch.equal(folded.codes, (codes * ~mask).to(torch.int8)), "... so it is found again"
    assert torch.equal(folded.dequantized, weight)
    found = IntegerLinear(folded, grid, bias)(x)
    assert torch.equal(found, simulated(x, folded, grid, bias, DynamicCompensation(mask)))

    # The same with the channels left in: weights on a grid, so every term stays exact.
    kept = fold_weight(weight, grid, torch.zeros_like(mask), 4, group)
    for limit in (None, limits(grid, 0.5)):
        residual = DynamicCompensation(mask, limit)
        found = IntegerLinear(kept, grid, bias, residual)(x)
        assert torch.equal(found, simulated(x, kept, grid, bias, residual))
    found = IntegerLinear(kept, grid, None)(x)
    assert torch.equal(found, simulated(x, kept, grid, None, None))


def test_integer_products_are_exact_at_the_limits() -> None:
    draw = torch.Generator().manual_seed(0)
    for q, p in (
        (torch.full((2, 100_000), -128), torch.full((3, 100_000), 127)),
        (torch.full((2, 131_071), -128), torch.full((3, 131_071), -128)),  # 2^31 - 16384
        tuple(torch.randint(-128, 128, (4, 777), generator=draw) for _ in range(2)),
    ):
        found = integer_product(q.to(torch.int8), p.to(torch.int8))
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), q @ p.T)


def test_sums_that_could_leave_int32_are_refused() -> None:
    channels = 140_000
    edges = torch.ones(channels)
    grid = StaticRange(-edges, edges, torch.zeros(channels, dtype=torch.bool)).grid(8)
    weight = torch.ones(1, channels)
    with pytest.raises(ValueError, match="could leave int32"):
        IntegerLinear(fold_weight(weight, grid, None, 8, None), grid)
    linear = IntegerLinear(fold_weight(weight, grid, None, 8, 100_000), grid)
    x = torch.ones(1, channels, dtype=torch.float64)
    assert float(linear(x)) == pytest.approx(channels, rel=1e-6)


# --------------------------------------------------------------- outlier channels


@given(seed=st.integers(0, 9999), affine=st.booleans())
def test_outlier_channels_are_not_counted_twice(seed: int, affine: bool) -> None:
    """What only S carries arrives once: the full value through the original column."""
    x, weight, _, grid, mask = drawn(4, 5, 24, seed, 0.4, affine)
    linear = IntegerLinear(fold_weight(weight, grid, mask, 4, 8), grid)
    assert (linear.quantize(x)[:, mask] == 0).all()
    other = x.clone()
    other[:, mask] += 1e3
    difference = linear(other) - linear(x)
    expected = (other - x)[:, mask] @ weight[:, mask].T
    torch.testing.assert_close(difference, expected, rtol=1e-10, atol=1e-7)


def test_a_panel_on_top_of_codes_that_hold_the_channels_is_another_function() -> None:
    """The defect itself (SPEC D-18): M13 can tell, and the module refuses to be built that way."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(r, 24, generator=draw, dtype=torch.float64) for r in (8, 5))
    mask = torch.arange(24) % 5 == 0
    x[:, mask] *= 10
    edge = x.abs().amax(0).float()
    grid = StaticRange(-edge, edge, torch.zeros_like(mask)).grid(4)
    apart = fold_weight(weight, grid, mask, 4, 8)
    whole = fold_weight(weight, grid, mask, 4, 8, exclude_masked=False)
    with pytest.raises(ValueError, match="left out of the codes already"):
        IntegerLinear(apart, grid, residual=DynamicCompensation(mask))
    expected = simulated(x, apart, grid, None, DynamicCompensation(mask))
    counted_twice = IntegerLinear(whole, grid)(x) + x[:, mask] @ apart.panel.T
    assert (counted_twice - expected).norm() > 0.5 * expected.norm()
    once = IntegerLinear(whole, grid, residual=DynamicCompensation(mask))(x)
    assert (once - expected).norm() < 0.3 * expected.norm()


def test_all_channels_masked_is_the_original_layer() -> None:
    """M1: the ranges do not matter."""
    x, weight, bias, grid, _ = drawn(4, 5, 24, 0, 0.0, True)
    everything = torch.ones(24, dtype=torch.bool)
    for factor in (1e-3, 1.0):
        other = replace(grid, step=grid.step * factor)
        linear = IntegerLinear(fold_weight(weight, other, everything, 4, 8), other, bias)
        torch.testing.assert_close(linear(x), F.linear(x, weight, bias), rtol=1e-12, atol=1e-9)


def test_the_limit_decides_which_residuals_return() -> None:
    x, weight, bias, grid, mask = drawn(16, 5, 24, 3, 0.5, False)
    folded = fold_weight(weight, grid, mask, 4, 8, exclude_masked=False)

    def output(limit: torch.Tensor | None) -> torch.Tensor:
        return IntegerLinear(folded, grid, bias, DynamicCompensation(mask, limit))(x)

    none = IntegerLinear(folded, grid, bias)(x)
    assert torch.equal(output(torch.full((24,), torch.inf)), none)
    torch.testing.assert_close(output(torch.zeros(24)), output(None), rtol=1e-10, atol=1e-8)
    part = output(limits(grid, 1.0))
    heard = mask & (folded.codes != 0).any(0)  # some column of W_Q may be all zero
    touched = (heard & (x.abs() > limits(grid, 1.0))).any(1)
    assert 0 < int(touched.sum()) < 16
    assert torch.equal(part[~touched], none[~touched])
    assert (part[touched] != none[touched]).any(1).all()


def test_zero_points_are_not_clipped_to_the_code_range() -> None:
    """A channel in [100, 101] has z in the thousands; its grid stays fine (SPEC D-18)."""
    lo = torch.tensor([100.0, -101.0])
    grid = StaticRange(lo, lo + 1, torch.ones(2, dtype=torch.bool)).grid(4)
    assert grid.offset.abs().min() > 1000
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    linear = IntegerLinear(fold_weight(weight, grid, None, 8, None), grid)
    x = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None] + lo
    assert (linear(x) - x).abs().max() <= 1 / 30 + 1e-4
    assert len(linear.quantize(x)[:, 0].unique()) == 16


# ------------------------------------------------------------------------- the module


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_and_leading_axes(dtype: torch.dtype) -> None:
    """float32 inside: as near to the float64 emulation as the dtype allows, and in that dtype."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 64, generator=draw).to(dtype)
    weight = torch.randn(5, 64, generator=draw).to(dtype)
    bias = torch.randn(5, generator=draw).to(dtype)
    edges = torch.rand(64, generator=draw) * 3 + 0.5
    grid = StaticRange(-edges, edges, torch.zeros(64, dtype=torch.bool)).grid(4)
    mask = torch.arange(64) % 7 == 0
    linear = IntegerLinear(fold_weight(weight, grid, mask, 4, 16), grid, bias)
    exact = IntegerLinear(fold_weight(weight.double(), grid, mask, 4, 16), grid, bias.double())
    # The rounding to codes happens in float32: give float64 the same codes.
    assert torch.equal(linear.quantize(x.float()), exact.quantize(x.double()))
    found = linear(x)
    assert found.dtype == dtype
    assert found.shape == (2, 3, 5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact(x.double()), rtol=tolerance, atol=1e-4)


def test_tokens_do_not_influence_each_other() -> None:
    x, weight, bias, grid, mask = drawn(9, 5, 40, 2, 0.2, True)
    linear = IntegerLinear(fold_weight(weight, grid, mask, 4, 8), grid, bias)
    together = linear(x)
    alone = torch.stack([linear(row) for row in x])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-9)
    assert linear(x[:0]).shape == (0, 5)


def test_values_that_codes_cannot_say() -> None:
    """Infinities saturate, NaN is code 0 (and stays NaN in the panel); a zero step says zero."""
    step = torch.tensor([1.0, 1.0, 0.0, 1.0])
    grid = StaticGrid(step, torch.zeros(4), torch.full((4,), -7.0), torch.full((4,), 7.0))
    weight = torch.ones(1, 4, dtype=torch.float64)
    mask = torch.tensor([False, False, False, True])
    linear = IntegerLinear(fold_weight(weight, grid, mask, 4, 4), grid)
    x = torch.tensor([[torch.inf, torch.nan, 5.0, 0.5]], dtype=torch.float64)
    assert linear.quantize(x).tolist() == [[7, 0, 0, 0]]
    assert float(linear(x)) == pytest.approx(7.5, rel=1e-12)
    assert torch.isnan(linear(torch.full((1, 4), torch.nan)))


def test_state_survives_saving() -> None:
    """M16."""
    x, weight, bias, grid, mask = drawn(4, 5, 24, 0, 0.3, True)
    linear = IntegerLinear(fold_weight(weight, grid, mask, 4, 8), grid, bias)
    other = IntegerLinear(fold_weight(torch.zeros_like(weight), grid, mask, 4, 8), grid)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other(x), linear(x))


def test_cost() -> None:
    _, weight, bias, grid, _ = drawn(1, 6, 50, 0, 0.0, False)
    mask = torch.arange(50) < 5
    expected = {"integer_macs": 7 * 6 * 50, "panel_macs": 7 * 6 * 5, "overhead": 0.1}
    assert IntegerLinear(fold_weight(weight, grid, mask, 4), grid, bias).cost(7) == expected
    whole = fold_weight(weight, grid, mask, 4, exclude_masked=False)
    residual = DynamicCompensation(mask, limits(grid, 0.8))
    assert IntegerLinear(whole, grid, bias, residual).cost(7) == expected
    assert IntegerLinear(whole, grid, bias).cost(7)["panel_macs"] == 0


def test_parts_that_do_not_belong_together_are_refused() -> None:
    _, weight, bias, grid, mask = drawn(1, 5, 24, 0, 0.3, False)
    folded = fold_weight(weight, grid, mask, 4, 8, exclude_masked=False)
    with pytest.raises(ValueError, match="no integer codes"):
        IntegerLinear(fold_weight(weight, grid, mask, 16), grid)
    with pytest.raises(ValueError, match="other activation steps"):
        IntegerLinear(folded, replace(grid, step=grid.step * 2))
    with pytest.raises(ValueError, match="fit int8"):
        IntegerLinear(folded, replace(grid, high=grid.high + 200))
    with pytest.raises(ValueError, match="expected a bias"):
        IntegerLinear(folded, grid, bias[:-1])
    with pytest.raises(ValueError, match="expected a mask"):
        IntegerLinear(folded, grid, bias, DynamicCompensation(mask[:-1]))


# ------------------------------------------------------------------- what it is good for


@pytest.mark.parametrize("group", [None, 128])
def test_leaving_outliers_out_beats_folding_them_in(group: int | None) -> None:
    """SPEC 2.11: 2048 channels, of which 20 are 30 times larger. Output SQNR in dB."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(256, 2048, generator=draw, dtype=torch.float64)
    weight = torch.randn(128, 2048, generator=draw, dtype=torch.float64)
    mask = torch.zeros(2048, dtype=torch.bool)
    mask[torch.randperm(2048, generator=draw)[:20]] = True
    x[:, mask] *= 30
    edge = x.abs().amax(0).float()
    grid = StaticRange(-edge, edge, torch.zeros_like(mask)).grid(4)
    exact = x @ weight.T

    def sqnr(found: torch.Tensor) -> float:
        return float(10 * torch.log10(exact.square().sum() / (found - exact).square().sum()))

    whole = fold_weight(weight, grid, mask, 4, group, exclude_masked=False)
    folded_in = sqnr(IntegerLinear(whole, grid)(x))
    residual = sqnr(IntegerLinear(whole, grid, residual=DynamicCompensation(mask))(x))
    left_out = sqnr(IntegerLinear(fold_weight(weight, grid, mask, 4, group), grid)(x))
    granularity = "per_channel" if group is None else "per_group"
    plain = fake_quantize_weight(weight, 4, granularity, group or 2048).dequantized
    unfolded = sqnr(F.linear(grid(x), plain))
    assert folded_in < residual < left_out
    assert left_out > folded_in + 8
    assert left_out > residual + 6
    assert folded_in + 2 < unfolded < left_out, "simulated without folding: neither bound holds"
