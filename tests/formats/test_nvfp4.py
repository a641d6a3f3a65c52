"""NVFP4 against its definition, torch's E4M3 and compressed-tensors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant.compat import prepare_torchvision
from morphoquant.formats.minifloat import E2M1_LEVELS, E4M3_MIN, round_e4m3
from morphoquant.formats.nvfp4 import (
    fake_quantize_nvfp4,
    nvfp4_storage_bits,
    nvfp4_tensor_scale,
    quantize_nvfp4,
)

SIGNED_LEVELS = torch.tensor([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)])  # by code
E4M3_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 127 is NaN


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sqnr(x: torch.Tensor, found: torch.Tensor) -> float:
    """Signal to quantization noise in dB."""
    error = found.double() - x.double()
    return 10 * math.log10(float(x.double().square().sum() / error.square().sum()))


def test_e4m3_level_set() -> None:
    """Q3: four exponent bits with bias 7, subnormals, 448 at the top."""
    normal = [(1 + j / 8) * 2.0**e for e in range(-6, 9) for j in range(8)][:-1]
    expected = [j / 8 * 2.0**-6 for j in range(8)] + normal
    assert E4M3_VALUES.tolist() == expected
    assert torch.equal(round_e4m3(E4M3_VALUES), E4M3_VALUES)
    assert E4M3_VALUES[1] == E4M3_MIN


def test_e4m3_rounding_is_torchs_cast() -> None:
    """All midpoints, the numbers right beside them, and the whole range at random."""
    middle = (E4M3_VALUES[1:] + E4M3_VALUES[:-1]) / 2
    beside = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (0.0, 1e9)]
    spread = torch.exp2(torch.rand(20_000, generator=torch.Generator().manual_seed(0)) * 22 - 13)
    x = torch.cat((middle, *beside, spread)).clamp(max=448)
    assert torch.equal(round_e4m3(x), x.to(torch.float8_e4m3fn).float())
    assert torch.equal(round_e4m3(x.double()), x.to(torch.float8_e4m3fn).double())
    assert round_e4m3(torch.tensor([449.0, 1e30])).tolist() == [448.0, 448.0]


def test_every_block_scale_and_every_code() -> None:
    """Q1, Q3: blocks of all levels on all 126 scales are reproduced, code by code."""
    scales = E4M3_VALUES[1:]
    x = scales.unsqueeze(1) * SIGNED_LEVELS * 0.25
    found = quantize_nvfp4(x, tensor_scale=0.25)
    assert torch.equal(found.scales.squeeze(1), scales)
    assert torch.equal(found.dequantized, x)
    assert found.codes.tolist() == [list(range(16))] * 126
    assert quantize_nvfp4(x).tensor_scale == 0.25


def test_definition_step_by_step() -> None:
    """Tensor scale first, block scale from what is left, elements last; in float64."""
    x = gaussian(8, 64, seed=2).double() * torch.logspace(-3, 3, 8).double().unsqueeze(1)
    found = quantize_nvfp4(x)
    assert torch.equal(found.tensor_scale, (x.abs().max().float() / (6 * 448)))
    unit = x / found.tensor_scale.double()
    largest = unit.unflatten(1, (4, 16)).abs().amax(dim=-1)
    scales = (largest / 6).clamp(E4M3_MIN, 448).float().to(torch.float8_e4m3fn).double()
    assert torch.equal(found.scales.double(), scales)
    inner = unit / scales.repeat_interleave(16, dim=1)
    distance = (inner.clamp(-6, 6).unsqueeze(-1) - SIGNED_LEVELS).abs()
    chosen = (inner.clamp(-6, 6) - SIGNED_LEVELS[found.codes.int()]).abs()
    torch.testing.assert_close(chosen, distance.amin(dim=-1))
    levels = SIGNED_LEVELS[found.codes.int()] * scales.repeat_interleave(16, dim=1)
    assert torch.equal(found.dequantized, levels * found.tensor_scale.double())


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e-3, 1.0, 1e30])
def test_tiny_and_huge_tensors_lose_nothing(magnitude: float) -> None:
    """The tensor scale is applied: the SQNR is that of a unit Gaussian (SPEC 1.5: 20.5 dB)."""
    x = gaussian(256, 256)
    assert sqnr(x * magnitude, fake_quantize_nvfp4(x * magnitude)) == pytest.approx(20.5, abs=0.2)


def test_without_a_tensor_scale_small_tensors_underflow() -> None:
    """The defect that the tensor scale is there for."""
    x = gaussian(64, 64) * 1e-4
    assert sqnr(x, fake_quantize_nvfp4(x, tensor_scale=1.0)) < 3


def test_a_fixed_tensor_scale() -> None:
    """Calibrated: values do not depend on the batch, and saturate beyond its range."""
    x = gaussian(4, 64)
    scale = nvfp4_tensor_scale(x.abs().max())
    whole = fake_quantize_nvfp4(x, scale)
    assert torch.equal(whole, fake_quantize_nvfp4(x))
    for row in range(4):
        assert torch.equal(fake_quantize_nvfp4(x[row], float(scale)), whole[row])
    far = fake_quantize_nvfp4(torch.tensor([1e9, -1e9, 1.0]), 2.0)
    assert far.tolist() == [2 * 2688, -2 * 2688, 0.0]
    with pytest.raises(ValueError, match="one scale per tensor"):
        fake_quantize_nvfp4(x, torch.ones(4))


def test_a_block_far_below_the_rest_keeps_the_smallest_scale() -> None:
    """Rounded to nearest its scale would be 0 and all its values lost."""
    x = torch.zeros(32)
    x[0] = 2688.0  # tensor scale 1
    x[16:19] = torch.tensor([2.0**-9, -(2.0**-8), 2.0**-12])
    found = quantize_nvfp4(x)
    assert found.scales.tolist() == [448.0, E4M3_MIN]
    assert found.dequantized[16:19].tolist() == [2.0**-9, -(2.0**-8), 0.0]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    power=st.integers(-40, 40),
)
def test_properties(values: list[float], power: int) -> None:
    """Q2, Q4, Q5, Q10; Q5 holds because the tensor scale moves along."""
    x = torch.tensor([*values, 100.0])
    scale = nvfp4_tensor_scale(x.abs().max())
    once = fake_quantize_nvfp4(x)
    assert torch.equal(fake_quantize_nvfp4(-x), -once)
    assert torch.equal(fake_quantize_nvfp4(x * 2.0**power), once * 2.0**power)
    found = quantize_nvfp4(x)
    step = found.scales.repeat_interleave(16)[: len(x)] * scale
    half_step = (x.abs() / 4).clamp_min(step / 4) * (1 + 1e-6)
    inside = x.abs() <= 6 * step
    assert ((x - once).abs() <= half_step)[inside].all()
    for start in range(0, len(x), 16):
        assert torch.equal(fake_quantize_nvfp4(x[start : start + 16], scale), once[start:][:16])


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.floats(0.125, 64, width=32), min_size=1, max_size=40))
def test_idempotent_with_a_fixed_tensor_scale(values: list[float]) -> None:
    """Q1, where block scales are normal E4M3 numbers."""
    once = fake_quantize_nvfp4(torch.tensor(values), 0.125)
    assert torch.equal(fake_quantize_nvfp4(once, 0.125), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codes_scales_and_values_agree(dtype: torch.dtype) -> None:
    x = gaussian(3, 5, 40).to(dtype)
    found = quantize_nvfp4(x)
    assert found.codes.shape == x.shape
    assert found.scales.shape == (3, 5, 3)
    assert set(found.scales.flatten().tolist()) <= set(E4M3_VALUES.tolist())
    scales = found.scales.repeat_interleave(16, dim=-1)[..., :40]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    values = (SIGNED_LEVELS[found.codes.int()] * scales).to(work) * found.tensor_scale.to(work)
    assert torch.equal(found.dequantized, values.to(dtype))
    assert found.dequantized.dtype == dtype
    assert torch.equal(fake_quantize_nvfp4(x), found.dequantized)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_stay_in_their_block(value: float) -> None:
    """Q7: the tensor scale is taken from the others."""
    x = gaussian(2, 40)
    x[1, 0] = 9
    clean = fake_quantize_nvfp4(x)
    x[0, 20] = value
    found = quantize_nvfp4(x)
    assert found.dequantized[0, 16:32].isnan().all()
    clean[0, 16:32] = 0
    assert torch.equal(found.dequantized.nan_to_num(nan=0.0), clean)


def test_zeros_and_empty_tensors() -> None:
    """Q6, Q7."""
    assert torch.equal(fake_quantize_nvfp4(torch.zeros(2, 40)), torch.zeros(2, 40))
    assert fake_quantize_nvfp4(torch.zeros(0, 40)).shape == (0, 40)


def test_against_compressed_tensors() -> None:
    """Bit for bit where its inverse tensor scale is exact, at a largest value of 2688 * 2^-7."""
    prepare_torchvision()  # transformers, which compressed-tensors imports, may need it
    from compressed_tensors.quantization import quant_args as arguments
    from compressed_tensors.quantization.utils import helpers

    x = gaussian(64, 64, seed=1)
    x[3, 7] = 21
    shared = helpers.generate_gparam(x.min(), x.max())
    settings_ = arguments.QuantizationArgs(
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    blocks = x.unflatten(1, (4, 16))
    scales, _ = helpers.calculate_qparams(
        blocks.amin(dim=-1), blocks.amax(dim=-1), settings_, global_scale=shared
    )
    found = quantize_nvfp4(x)
    assert found.tensor_scale == 1 / shared == 2.0**-7
    assert torch.equal(found.scales, scales.float())
    unit = blocks / (scales.float() / shared).unsqueeze(-1)
    with torch.compiler.set_stance("force_eager"):
        levels = arguments.FP4_E2M1_DATA.cast_to_fp4(unit.clone()).flatten(1)
    assert torch.equal(SIGNED_LEVELS[found.codes.int()], levels)


def test_storage_bits() -> None:
    assert nvfp4_storage_bits((3584, 18944)) == pytest.approx(4.5, abs=1e-6)
    assert nvfp4_storage_bits((2, 17)) == 4 + (2 * 2 * 8 + 32) / 34
