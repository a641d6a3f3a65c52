"""HiF8: its level set from the definition, rounding between all levels, and a second decoder."""

from __future__ import annotations

import math
import platform
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant import formats
from morphoquant.formats.hif8 import (
    fake_quantize_hif8,
    hif8_storage_bits,
    hif8_values,
    quantize_hif8,
)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def defined_levels() -> list[float]:
    """All finite values >= 0, ascending, from SPEC 1.5: mantissa bits by the size of E."""
    levels = [0.0] + [2.0**e for e in range(-22, -15)]
    for exponent in range(-15, 16):
        bits = 3 if abs(exponent) <= 3 else 2 if abs(exponent) <= 7 else 1
        levels += [2.0**exponent * (1 + j / 2**bits) for j in range(2**bits)]
    return levels[:-1]  # the place of 1.5 * 2^15 is infinity's


LEVELS = torch.tensor(defined_levels(), dtype=torch.float64)


def test_level_set() -> None:
    """Q3: all 256 codes; 38 binades; one zero, one NaN, two infinities."""
    values = hif8_values()
    finite = values[values.isfinite()].double()
    assert torch.equal(finite[finite >= 0].sort().values, LEVELS)
    assert torch.equal((-finite[finite <= 0]).sort().values, LEVELS)
    assert len(finite) == 256 - 3
    assert values[0] == 0
    assert values[0x80].isnan()
    assert [values[0x6F], values[0xEF]] == [torch.inf, -torch.inf]
    assert len(set(torch.frexp(LEVELS[1:]).exponent.tolist())) == 38
    assert (float(LEVELS[1]), float(LEVELS[-1])) == (2.0**-22, 2.0**15)


def test_known_codes() -> None:
    """One code per kind of prefix, by hand."""
    x = [2.0**-22, 2.0**-16, 1.0, 1.875, 2.0, 0.5, 4.0, -0.25, 16.0, 2.0**-7, 256.0, -(2.0**15)]
    codes = [0x01, 0x07, 0x08, 0x0F, 0x10, 0x18, 0x20, 0xB0, 0x40, 0x5C, 0x60, 0xEE]
    assert quantize_hif8(torch.tensor(x)).codes.tolist() == codes
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf])
    assert quantize_hif8(special).codes.tolist() == [0, 0, 0x80, 0x6F, 0xEF]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_between_all_levels(dtype: torch.dtype) -> None:
    """Levels stay, midpoints go away from zero, the numbers beside them to their own side."""
    levels = LEVELS.to(dtype)
    low, high = levels[:-1], levels[1:]
    middle = (low + high) / 2
    below = torch.nextafter(middle, torch.zeros_like(middle))
    for sign in (1, -1):
        assert torch.equal(fake_quantize_hif8(sign * levels), sign * levels)
        assert torch.equal(fake_quantize_hif8(sign * middle), sign * high)
        assert torch.equal(fake_quantize_hif8(sign * below), sign * low)


def test_range() -> None:
    """Finite magnitudes saturate at 2^15; one mantissa bit up to there; below 2^-23 is zero."""
    x = torch.tensor([40000.0, -1e9, 3e38, 1.5 * 2.0**14, 1.2 * 2.0**14, 300.0, 2.0**-24])
    expected = [2.0**15, -(2.0**15), 2.0**15, 1.5 * 2.0**14, 2.0**14, 256.0, 0.0]
    assert fake_quantize_hif8(x).tolist() == expected
    assert fake_quantize_hif8(torch.tensor([1e300], dtype=torch.float64)).tolist() == [2.0**15]


def test_non_finite_values_stay_where_they_are() -> None:
    """Q7: the format has codes for them."""
    found = fake_quantize_hif8(torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]))
    assert found[0].isnan()
    assert found[1:].tolist() == [torch.inf, -torch.inf, 1.0]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-40000, 40000, width=32), min_size=1, max_size=40))
def test_properties(values: list[float]) -> None:
    """Q1, Q3, Q4 and the distance to the nearest level."""
    x = torch.tensor(values, dtype=torch.float64)
    once = fake_quantize_hif8(x)
    assert torch.equal(fake_quantize_hif8(once), once)
    assert torch.equal(fake_quantize_hif8(-x), -once)
    nearest = (x.abs().unsqueeze(-1) - LEVELS).abs().amin(dim=-1)
    assert torch.equal((x - once).abs(), nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_and_values_agree(dtype: torch.dtype) -> None:
    """Every HiF8 value from 2^-22 has at most four significant bits: exact in all dtypes."""
    x = (gaussian(3, 5, 70) * torch.logspace(-3, 3, 70)).to(dtype)
    found = quantize_hif8(x)
    assert found.codes.dtype == torch.uint8
    assert torch.equal(found.dequantized, hif8_values()[found.codes.int()].to(dtype))
    assert found.dequantized.dtype == dtype
    assert torch.equal(fake_quantize_hif8(x), found.dequantized)


def test_no_scale_and_no_shape() -> None:
    """Element-wise: any shape, one value at a time; 8 bits."""
    assert float(fake_quantize_hif8(torch.tensor(17.0))) == 16.0
    assert fake_quantize_hif8(torch.zeros(0, 7)).shape == (0, 7)
    assert hif8_storage_bits((3, 7)) == 8


@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="en-dtypes has no such wheel"
)
def test_against_en_dtypes() -> None:
    """The numpy type of the Ascend ecosystem: all codes, and its rounding up to 2^15."""
    import en_dtypes
    import numpy

    codes = numpy.arange(256, dtype=numpy.uint8).view(en_dtypes.hifloat8).astype(numpy.float32)
    assert torch.equal(hif8_values().nan_to_num(), torch.from_numpy(codes).nan_to_num())
    spread = torch.exp2(torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 40 - 25)
    x = torch.cat((spread, -spread))
    theirs = x.numpy().astype(en_dtypes.hifloat8).astype(numpy.float32)
    assert torch.equal(fake_quantize_hif8(x), torch.from_numpy(theirs))


def test_sqnr_on_gaussian_values() -> None:
    """Eight bits tell: at least nine dB above the best of the 4-bit formats here."""
    x = gaussian(512, 512).double()
    error = fake_quantize_hif8(x) - x
    sqnr = 10 * math.log10(float(x.square().sum() / error.square().sum()))
    assert sqnr == pytest.approx(31.5, abs=0.2)


def test_order_of_the_formats_on_gaussian_values() -> None:
    """SPEC 1.5: HiF4 > NF4-g64 > NVFP4 > INT4-g64 > MXFP4, to a third of a dB."""
    x = gaussian(512, 512, seed=5)
    grouped = formats.fake_quantize_weight(x, 4, "per_group", group_size=64)
    found = {
        "hif4": (formats.fake_quantize_hif4(x), 21.6),
        "nf4": (formats.quantize_nf4(x, double_quantization=False).dequantized, 20.7),
        "nvfp4": (formats.fake_quantize_nvfp4(x), 20.5),
        "int4": (grouped.dequantized, 19.4),
        "mxfp4": (formats.fake_quantize_mxfp4(x), 18.8),
    }
    measured = []
    for values, expected in found.values():
        noise = (values.double() - x.double()).square().sum()
        measured.append(10 * math.log10(float(x.double().square().sum() / noise)))
        assert measured[-1] == pytest.approx(expected, abs=0.3)
    assert measured == sorted(measured, reverse=True)
