"""bitsandbytes FP4 against bitsandbytes on the CPU."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from morphoquant.formats.fp4 import (
    FP4_LEVELS,
    fake_quantize_fp4,
    fp4_storage_bits,
    quantize_fp4,
)

LEVELS = torch.tensor(FP4_LEVELS, dtype=torch.float64)


@pytest.fixture(scope="module")
def oracle() -> Any:
    """bitsandbytes' functional module."""
    return importlib.import_module("bitsandbytes.functional")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adversarial() -> dict[str, torch.Tensor]:
    zeros = gaussian(4, 256)
    zeros[1] = 0
    zeros[2, :70] = 0
    ascending = torch.tensor(FP4_LEVELS).sort().values
    ties = torch.cat((torch.ones(1), (ascending[1:] + ascending[:-1]) / 2, torch.zeros(48)))
    return {
        "gaussian": gaussian(96, 192) * 0.02,
        "many scale blocks": gaussian(300, 256) * 0.02,
        "zero blocks": zeros,
        "all zero": torch.zeros(2, 64),
        "one value": torch.full((2, 64), -0.3),
        "single element": torch.tensor([[0.7, -0.1]]),
        "ties of levels": ties.reshape(1, 64),
        "heavy tails": gaussian(64, 128) ** 5,
        "tiny": gaussian(8, 64) * 1e-30,
        "huge": gaussian(8, 64) * 1e30,
        "short last block": gaussian(5, 50),
        "row not a block": gaussian(7, 96),
    }


def unpacked(packed: torch.Tensor, count: int) -> torch.Tensor:
    """bitsandbytes keeps the first of two codes in the high nibble."""
    flat = packed.reshape(-1)
    return torch.stack((flat >> 4, flat & 0xF), dim=1).reshape(-1)[:count]


def decoded(oracle: Any, packed: torch.Tensor, state: Any) -> torch.Tensor:
    """bitsandbytes' dequantization, rows of partial blocks through its generic kernel.

    The vectorized CPU kernel counts blocks per row and is wrong there (0.50.2).
    """
    shape = state.shape
    if shape[-1] % 64:
        state.shape = torch.Size((math.prod(shape), 1))
    with torch.compiler.set_stance("force_eager"):
        return oracle.dequantize_4bit(packed, state).reshape(shape)


def test_levels(oracle: Any) -> None:
    """The eight magnitudes of SPEC 1.5, and bitsandbytes' own table in its order."""
    magnitudes = torch.tensor([0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]).double()
    torch.testing.assert_close(LEVELS[:8].sort().values, magnitudes, rtol=1e-7, atol=0)
    assert torch.equal(LEVELS[8:], -LEVELS[:8])
    assert torch.equal(torch.tensor(FP4_LEVELS), oracle.get_4bit_type("fp4", device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(adversarial()))
def test_codes_scales_and_values(oracle: Any, name: str, dtype: torch.dtype) -> None:
    w = adversarial()[name].clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    found = quantize_fp4(w)
    packed, state = oracle.quantize_4bit(w, quant_type="fp4", compress_statistics=False)
    assert torch.equal(found.codes.reshape(-1), unpacked(packed, w.numel()))
    # bitsandbytes writes 1e-38 for a zero block that is short
    torch.testing.assert_close(found.scales, state.absmax, rtol=0, atol=1e-37)
    assert torch.equal(found.dequantized, decoded(oracle, packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_double_quantization(oracle: Any, dtype: torch.dtype) -> None:
    """Scales to the one near tie in a hundred that the CPU kernel's lookup decides otherwise."""
    w = adversarial()["many scale blocks"].to(dtype)
    found = quantize_fp4(w, double_quantization=True)
    packed, state = oracle.quantize_4bit(w, quant_type="fp4", compress_statistics=True)
    assert torch.equal(found.codes.reshape(-1), unpacked(packed, w.numel()))
    assert found.scale_codes is not None
    apart = (found.scale_codes.int() - state.absmax.int()).abs()
    assert int(apart.max()) <= 1
    assert apart.double().mean() <= 0.01
    torch.testing.assert_close(found.scale_offset, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.scale_scales, state.state2.absmax, rtol=1e-6, atol=0)
    state.absmax, state.offset = found.scale_codes, found.scale_offset
    state.state2.absmax = found.scale_scales
    assert torch.equal(found.dequantized, decoded(oracle, packed, state))


def test_codes_name_the_nearest_level() -> None:
    """By the definition, without any oracle."""
    w = gaussian(16, 64, seed=3)
    found = quantize_fp4(w)
    unit = w.double() / w.double().abs().amax(dim=1, keepdim=True)
    nearest = (unit.unsqueeze(-1) - LEVELS).abs().amin(dim=-1)
    torch.testing.assert_close((unit - LEVELS[found.codes.int()]).abs(), nearest)
    assert torch.equal(found.scales, w.abs().amax(dim=1))


def test_fake_quantize_is_row_by_row() -> None:
    """Q10: equal to the weight routine where 64 divides K, and rows stay apart where not."""
    w = gaussian(3, 128)
    assert torch.equal(fake_quantize_fp4(w), quantize_fp4(w).dequantized)
    x = gaussian(2, 3, 100).bfloat16()
    found = fake_quantize_fp4(x)
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    for row in range(3):
        for part in (slice(0, 64), slice(64, 100)):
            alone = quantize_fp4(x[1, row, part]).dequantized
            assert torch.equal(found[1, row, part], alone)


def test_idempotent_power_of_two_scaling_and_zeros() -> None:
    """Q1, Q4, Q5, Q6, Q7."""
    w = gaussian(8, 128)
    w[0, :64] = 0
    once = fake_quantize_fp4(w)
    assert torch.equal(fake_quantize_fp4(once), once)
    assert torch.equal(fake_quantize_fp4(w * 8), once * 8)
    assert torch.equal(fake_quantize_fp4(-w), -once)
    assert torch.equal(once[0, :64], torch.zeros(64))
    assert torch.equal(fake_quantize_fp4(w.double()).float(), once)
    assert torch.equal(
        quantize_fp4(w, double_quantization=True).dequantized[0, :64], torch.zeros(64)
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values(value: float) -> None:
    """Q7: they stay in their block of an activation; a weight is refused."""
    x = gaussian(2, 128)
    clean = fake_quantize_fp4(x)
    x[0, 3] = value
    found = fake_quantize_fp4(x)
    assert found[0, :64].isnan().all()
    assert torch.equal(found[0, 64:], clean[0, 64:])
    assert torch.equal(found[1], clean[1])
    with pytest.raises(ValueError, match="non-finite"):
        quantize_fp4(x)


def test_storage_bits() -> None:
    assert fp4_storage_bits((3584, 3584)) == 4.5
    assert fp4_storage_bits((3584, 3584), double_quantization=True) == pytest.approx(
        4.127, abs=1e-3
    )


def test_sqnr_on_gaussian_weights() -> None:
    """Below NF4's 20.7 dB, which was made for this distribution, and below MXFP4's 18.8."""
    w = gaussian(512, 512).double()
    error = fake_quantize_fp4(w) - w
    sqnr = 10 * math.log10(float(w.square().sum() / error.square().sum()))
    assert sqnr == pytest.approx(18.3, abs=0.2)
