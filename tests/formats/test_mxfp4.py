"""MXFP4 against its definition, evaluated exactly, and against compressed-tensors."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant.compat import prepare_torchvision
from morphoquant.formats.minifloat import E2M1_LEVELS, e2m1_codes, round_e2m1
from morphoquant.formats.mxfp4 import fake_quantize_mxfp4, mxfp4_storage_bits, quantize_mxfp4

SIGNED_LEVELS = torch.tensor([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)])  # by code


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest_e2m1(value: Fraction) -> float:
    """The definition: nearest magnitude, of two the one with the even code."""
    magnitude = min(abs(value), Fraction(6))
    code = min(range(8), key=lambda c: (abs(magnitude - Fraction(E2M1_LEVELS[c])), c % 2))
    return math.copysign(E2M1_LEVELS[code], value)


def test_e2m1_levels() -> None:
    """Q3: two exponent bits with bias 1, one mantissa bit, subnormal at exponent 0."""
    for code, level in enumerate(E2M1_LEVELS):
        exponent, mantissa = code >> 1, code & 1
        expected = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
        assert level == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_e2m1_rounding(dtype: torch.dtype) -> None:
    """Every level, every midpoint and the numbers right beside them, both signs."""
    levels = torch.tensor(E2M1_LEVELS, dtype=dtype)
    middle = (levels[1:] + levels[:-1]) / 2
    far = torch.tensor([6.5, 7, 7.99, 1e30], dtype=dtype)
    points = torch.cat((levels, middle, far))
    beside = [torch.nextafter(points, torch.full_like(points, end)) for end in (0.0, 1e38)]
    values = torch.cat((points, *beside))
    values = torch.cat((values, -values))
    expected = [nearest_e2m1(Fraction(value)) for value in values.tolist()]
    assert torch.equal(round_e2m1(values), torch.tensor(expected, dtype=dtype))


def test_e2m1_codes_enumerate() -> None:
    """Q3: the sixteen codes and their values, minus zero included."""
    assert e2m1_codes(SIGNED_LEVELS).tolist() == list(range(16))


def test_all_codes_on_all_scales() -> None:
    """Q1, Q3: all 16 codes on all 255 values of E8M0; float64, for it holds 6 * 2^127 as well."""
    scales = torch.exp2(torch.arange(-127, 128).double())
    x = scales.unsqueeze(1) * SIGNED_LEVELS.double().repeat(2)
    found = quantize_mxfp4(x)
    assert torch.equal(found.scales.squeeze(1).double(), scales)
    assert torch.equal(found.dequantized, x)
    assert found.codes.tolist() == [2 * list(range(16))] * 255


@pytest.mark.parametrize("exponent", [-126, -30, 0, 17, 125])
def test_all_codes_in_float32(exponent: int) -> None:
    x = SIGNED_LEVELS.double().repeat(2) * 2.0**exponent
    found = quantize_mxfp4(x)
    assert found.scales.tolist() == [2.0**exponent]
    assert torch.equal(found.dequantized, x)
    assert found.codes.tolist() == 2 * list(range(16))
    assert torch.equal(fake_quantize_mxfp4(x.float()), x.float())


def test_scale_is_the_shared_exponent() -> None:
    """``2^(floor(log2 amax) - 2)`` at the edges of binades, within [2^-127, 2^127]."""
    amax = [1.0, math.nextafter(2, 0), 2.0, 6.0, 7.99, 8.0, 1e-30, 3e38]
    blocks = torch.zeros(len(amax), 32, dtype=torch.float64)
    blocks[:, 5] = -torch.tensor(amax, dtype=torch.float64)
    found = quantize_mxfp4(blocks).scales.squeeze(1).tolist()
    assert found == [2.0 ** (math.frexp(value)[1] - 1 - 2) for value in amax]
    extreme = torch.tensor([[1e-45], [2.0**-126], [1e300], [0.0]], dtype=torch.float64)
    limits = quantize_mxfp4(extreme)
    assert limits.scales.squeeze(1).tolist() == [2.0**-127, 2.0**-127, 2.0**127, 2.0**-127]
    assert limits.dequantized.squeeze(1).tolist() == [0.0, 2.0**-126, 6 * 2.0**127, 0.0]


def test_saturation_above_a_mantissa_of_one_and_a_half() -> None:
    x = torch.zeros(32)
    x[:4] = torch.tensor([7.9, 6.1, -7.0, 5.1])
    assert fake_quantize_mxfp4(x)[:4].tolist() == [6.0, 6.0, -6.0, 6.0]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=70),
    power=st.integers(-20, 20),
)
def test_properties(values: list[float], power: int) -> None:
    """Q1, Q2, Q4, Q5, Q10 on arbitrary rows."""
    x = torch.tensor(values, dtype=torch.float64)
    once = fake_quantize_mxfp4(x)
    assert torch.equal(fake_quantize_mxfp4(once), once)
    assert torch.equal(fake_quantize_mxfp4(-x), -once)
    x = torch.where(x.abs() < 2.0**-60, 0, x)  # off the scale's lower end
    once = fake_quantize_mxfp4(x)
    assert torch.equal(fake_quantize_mxfp4(x * 2.0**power), once * 2.0**power)
    for start in range(0, len(values), 32):
        block, done = x[start : start + 32], once[start : start + 32]
        assert torch.equal(fake_quantize_mxfp4(block), done)
        scale = float(quantize_mxfp4(block).scales)
        half_step = (block.abs() / 4).clamp_min(scale / 4)
        assert ((block - done).abs() <= half_step)[block.abs() <= 6 * scale].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_scales_and_values_agree(dtype: torch.dtype) -> None:
    x = gaussian(3, 5, 80).to(dtype)
    found = quantize_mxfp4(x)
    assert found.codes.shape == x.shape
    assert found.scales.shape == (3, 5, 3)
    scales = found.scales.repeat_interleave(32, dim=-1)[..., :80]
    assert torch.equal(found.dequantized, (SIGNED_LEVELS[found.codes.int()] * scales).to(dtype))
    assert found.dequantized.dtype == dtype
    assert torch.equal(fake_quantize_mxfp4(x), found.dequantized)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_block(value: float) -> None:
    """Q7."""
    x = gaussian(2, 80)
    clean = fake_quantize_mxfp4(x)
    x[0, 40] = value
    found = quantize_mxfp4(x)
    assert found.dequantized[0, 32:64].isnan().all()
    assert found.scales.isnan().tolist() == [[False, True, False], [False] * 3]
    clean[0, 32:64] = 0
    assert torch.equal(found.dequantized.nan_to_num(nan=0.0), clean)


def test_zeros_and_empty_rows() -> None:
    """Q6, Q7."""
    assert torch.equal(fake_quantize_mxfp4(torch.zeros(2, 40)), torch.zeros(2, 40))
    assert fake_quantize_mxfp4(torch.zeros(0, 40)).shape == (0, 40)


def test_against_compressed_tensors() -> None:
    """Its scale wherever it does not round a mantissa of 1.75 or more up, and its elements."""
    prepare_torchvision()  # transformers, which compressed-tensors imports, may need it
    from compressed_tensors.quantization import quant_args as arguments
    from compressed_tensors.quantization.utils import mxfp_utils as scales

    x = gaussian(64, 32 * 8, seed=1) * torch.logspace(-6, 6, 64).unsqueeze(1)
    found = quantize_mxfp4(x)
    largest = x.unflatten(1, (8, 32)).abs().amax(dim=-1)
    kept = torch.frexp(largest).mantissa * 2 < 1.75
    assert kept.double().mean() > 0.5
    exponents = scales.generate_mx_scales(largest) - 127
    assert torch.equal(found.scales[kept], torch.exp2(exponents)[kept])
    unit = x / found.scales.repeat_interleave(32, dim=1)
    with torch.compiler.set_stance("force_eager"):
        levels = arguments.FP4_E2M1_DATA.cast_to_fp4(unit.clone())
    assert torch.equal(SIGNED_LEVELS[found.codes.int()], levels)


def test_storage_bits() -> None:
    assert mxfp4_storage_bits((3584, 18944)) == 4.25
    assert mxfp4_storage_bits((2, 3, 33)) == 4 + 2 * 8 / 33


def test_sqnr_on_gaussian_values() -> None:
    """SPEC 1.5: 18.8 dB."""
    x = gaussian(512, 512).double()
    error = fake_quantize_mxfp4(x) - x
    sqnr = 10 * math.log10(float(x.square().sum() / error.square().sum()))
    assert sqnr == pytest.approx(18.8, abs=0.2)
