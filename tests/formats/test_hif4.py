"""HiF4 against its definition, evaluated block by block in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant.formats.hif4 import (
    E6M2_MAX,
    E6M2_MIN,
    SEVENTH,
    fake_quantize_hif4,
    hif4_storage_bits,
    quantize_hif4,
    round_e6m2,
)

E6M2_VALUES = [2.0**e * (1 + j / 4) for e in range(-48, 16) for j in range(4)][:-1]  # then NaN
SIGNED_QUARTERS = torch.arange(8.0).repeat(2) * torch.tensor([0.25] * 8 + [-0.25] * 8)  # by code


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bfloat16(value: Fraction | float) -> Fraction:
    """The nearest bfloat16, for values that float64 holds."""
    return Fraction(float(torch.tensor(float(value), dtype=torch.float64).bfloat16()))


def reference(block: list[float]) -> tuple[list[float], float]:
    """SPEC 1.5, steps 1 to 4, on at most 64 numbers: values and level-1 scale."""
    x = [abs(Fraction(value)) for value in block]
    wanted = bfloat16(max(x) * Fraction(SEVENTH))
    even = min(
        range(len(E6M2_VALUES)), key=lambda k: (abs(Fraction(E6M2_VALUES[k]) - wanted), k % 2)
    )
    scale = Fraction(E6M2_VALUES[even])
    inverse = bfloat16(1 / scale)
    values = []
    for k, value in enumerate(x):
        eight, four = x[k // 8 * 8 :][:8], x[k // 4 * 4 :][:4]
        e8 = int(max(eight) * inverse >= 4)
        e4 = int(max(four) * inverse / 2**e8 >= 2)
        unit = value * inverse / 2 ** (e8 + e4)
        quarters = min(math.floor(unit * 4 + Fraction(1, 2)), 7)
        level = Fraction(quarters, 4) * 2 ** (e8 + e4) * scale
        values.append(math.copysign(float(level), block[k]))
    return values, float(scale)


def test_e6m2_level_set() -> None:
    """Q3: 255 values from 2^-48 to 1.5 * 2^15; every one is a fixed point of the rounding."""
    values = torch.tensor(E6M2_VALUES)
    assert len(E6M2_VALUES) == 255
    assert E6M2_VALUES[0] == E6M2_MIN
    assert E6M2_VALUES[-1] == E6M2_MAX == 49152
    assert torch.equal(round_e6m2(values), values)
    outside = torch.tensor([0.0, 1e-30, 57344.0, 1e30])
    assert round_e6m2(outside).tolist() == [E6M2_MIN, E6M2_MIN, E6M2_MAX, E6M2_MAX]


def test_e6m2_rounding() -> None:
    """Midpoints to the even mantissa, the numbers beside them to their own side."""
    values = torch.tensor(E6M2_VALUES)
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    even = torch.where(torch.arange(254) % 2 == 0, low, high)
    assert torch.equal(round_e6m2(middle), even)
    assert torch.equal(round_e6m2(torch.nextafter(middle, torch.zeros(254))), low)
    assert torch.equal(round_e6m2(torch.nextafter(middle, high)), high)


def test_a_seventh_in_bfloat16() -> None:
    assert torch.tensor(1 / 7).bfloat16().item() == SEVENTH


@pytest.mark.parametrize("exponent", [-48, -20, 0, 13, 15])
def test_all_codes_on_all_micro_exponents(exponent: int) -> None:
    """Q3: every sign, magnitude and pair of exponents is reached and reproduced, up to 7 F."""
    # Seven or four quarters ask for the exponents of their group of four. The other group of the
    # same eight does without its own: exponents8 never is set unless one exponents4 is.
    groups = ((1, 2, 3, 7), (0, 5, 6, 4), (9, 10, 11, 15), (8, 13, 14, 12))
    layout = [(e8, e4, group) for e8 in (1, 0) for group in groups for e4 in (1, 0)]
    codes = [code for _, _, group in layout for code in group]
    quarters = SIGNED_QUARTERS.double()[codes].view(16, 4)
    factors = torch.tensor([2.0 ** (e8 + e4) for e8, e4, _ in layout]).double().unsqueeze(1)
    x = (quarters * factors * 2.0**exponent).flatten()
    found = quantize_hif4(x)
    assert found.scales.tolist() == [2.0**exponent]
    assert found.exponents8.squeeze(0).tolist() == [True] * 4 + [False] * 4
    assert found.exponents4.squeeze(0).tolist() == [True, False] * 8
    assert found.codes.tolist() == codes
    assert torch.equal(found.dequantized, x)


def test_all_codes_on_all_scales() -> None:
    """Q1, Q3: all 16 codes on all 255 values of E6M2.

    With a largest value of 7 F in every group of four all micro exponents are set, whatever the
    reciprocal in bfloat16 is off.
    """
    rest = [code for code in range(16) if code != 7]
    codes = [code for k in range(0, 15, 3) for code in (7, *rest[k : k + 3])] * 3
    codes += [7, 15, 0, 8]
    scales = torch.tensor(E6M2_VALUES, dtype=torch.float64)
    x = scales.unsqueeze(1) * (4 * SIGNED_QUARTERS.double()[codes])
    found = quantize_hif4(x)
    assert torch.equal(found.scales.squeeze(1).double(), scales)
    assert bool(found.exponents8.all())
    assert bool(found.exponents4.all())
    assert found.codes.tolist() == [codes] * 255
    assert torch.equal(found.dequantized, x)


def test_saturation() -> None:
    x = torch.tensor([1e9, -1e9, 1.0])
    assert fake_quantize_hif4(x).tolist() == [7 * E6M2_MAX, -7 * E6M2_MAX, 0.0]


@pytest.mark.parametrize("width", [64, 37, 5, 1])
def test_the_definition(width: int) -> None:
    """Values and scales on rows of many kinds, short blocks included (Q10)."""
    spread = gaussian(12, width, seed=width) * torch.logspace(-18, 8, 12).unsqueeze(1)
    tails = gaussian(8, width, seed=1) ** 5
    for x in (spread, tails, tails.bfloat16().float()):
        found = quantize_hif4(x.double())
        for row in range(len(x)):
            values, scale = reference(x[row].tolist())
            assert found.scales[row].tolist() == [scale]
            assert found.dequantized[row].tolist() == values


def test_thresholds_of_the_micro_exponents() -> None:
    """``>=``, at a level-1 scale of one: 4 and 2 are reached, the floats below are not."""
    x = torch.zeros(64)
    x[0] = 7.0
    x[8], x[16] = 4.0, math.nextafter(4, 0) - 1e-6
    x[24], x[32] = 2.0, 1.999
    found = quantize_hif4(x)
    assert found.scales.tolist() == [1.0]
    assert found.exponents8.squeeze(0).tolist() == [True, True, *[False] * 6]
    assert found.exponents4.squeeze(0)[::2].tolist() == [True, True, True, True, *[False] * 4]
    assert found.dequantized[[0, 8, 24, 32]].tolist() == [7.0, 4.0, 2.0, 1.75]


def test_halves_go_up_and_the_float_below_does_not() -> None:
    x = torch.zeros(64, dtype=torch.float64)
    x[0] = 7
    x[8:11] = torch.tensor([0.125, math.nextafter(0.125, 0), -0.125], dtype=torch.float64)
    assert fake_quantize_hif4(x)[8:11].tolist() == [0.25, 0.0, -0.25]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-64, 64, width=32), min_size=1, max_size=80),
    power=st.integers(-12, 9),
)
def test_properties(values: list[float], power: int) -> None:
    """Q2, Q4, Q5 and Q10 on arbitrary rows."""
    x = torch.tensor(values, dtype=torch.float64)
    once = fake_quantize_hif4(x)
    assert torch.equal(fake_quantize_hif4(-x), -once)
    for start in range(0, len(values), 64):
        assert torch.equal(fake_quantize_hif4(x[start : start + 64]), once[start:][:64])
    x = torch.where(x.abs() < 2.0**-10, 0, x)
    once = fake_quantize_hif4(x)
    if bool((quantize_hif4(x).scales > 2.0**-20).all()):
        assert torch.equal(fake_quantize_hif4(x * 2.0**power), once * 2.0**power)
    found = quantize_hif4(x)
    scale = found.scales.double().repeat_interleave(64)[: len(x)]
    shift = found.exponents8.repeat_interleave(8, dim=-1).flatten()[: len(x)].int()
    shift = shift + found.exponents4.repeat_interleave(4, dim=-1).flatten()[: len(x)].int()
    step = scale * torch.exp2(shift.double()) / 4
    # Half a step, and what the reciprocal in bfloat16 is off (2^-9 relative).
    bound = step / 2 + x.abs() * 2.0**-8
    assert ((x - once).abs() <= bound)[x.abs() <= 7 * step].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_scales_and_values_agree(dtype: torch.dtype) -> None:
    x = gaussian(3, 5, 100).to(dtype)
    found = quantize_hif4(x)
    assert found.codes.shape == x.shape
    assert found.scales.shape == (3, 5, 2)
    assert found.exponents8.shape == (3, 5, 2, 8)
    assert found.exponents4.shape == (3, 5, 2, 16)
    assert set(found.scales.flatten().tolist()) <= set(E6M2_VALUES)
    shift = found.exponents8.repeat_interleave(8, dim=-1).int()
    shift = shift + found.exponents4.repeat_interleave(4, dim=-1).int()
    steps = (found.scales.unsqueeze(-1) * torch.exp2(shift)).flatten(-2)[..., :100]
    values = SIGNED_QUARTERS[found.codes.int()] * steps
    assert torch.equal(found.dequantized, values.to(dtype))
    assert found.dequantized.dtype == dtype
    assert torch.equal(fake_quantize_hif4(x), found.dequantized)


def test_float32_and_float64_agree_on_bfloat16_values() -> None:
    """Products of two bfloat16 numbers are exact in either."""
    x = gaussian(64, 256, seed=4).bfloat16()
    assert torch.equal(fake_quantize_hif4(x.float()), fake_quantize_hif4(x.double()).float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_block(value: float) -> None:
    """Q7."""
    x = gaussian(2, 100)
    clean = fake_quantize_hif4(x)
    x[0, 70] = value
    found = quantize_hif4(x)
    assert found.dequantized[0, 64:].isnan().all()
    assert found.scales.isnan().tolist() == [[False, True], [False, False]]
    clean[0, 64:] = 0
    assert torch.equal(found.dequantized.nan_to_num(nan=0.0), clean)


def test_zeros_and_empty_rows() -> None:
    """Q6, Q7."""
    assert torch.equal(fake_quantize_hif4(torch.zeros(2, 70)), torch.zeros(2, 70))
    assert fake_quantize_hif4(torch.zeros(0, 70)).shape == (0, 70)


def test_storage_bits() -> None:
    assert hif4_storage_bits((3584, 18944)) == 4.5
    assert hif4_storage_bits((2, 65)) == 4 + 2 * 32 / 65


def test_sqnr_on_gaussian_values() -> None:
    """SPEC 1.5: 21.6 dB."""
    x = gaussian(512, 512).double()
    error = fake_quantize_hif4(x) - x
    sqnr = 10 * math.log10(float(x.square().sum() / error.square().sum()))
    assert sqnr == pytest.approx(21.6, abs=0.15)
