"""NF4 with double quantization against bitsandbytes on the CPU."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

from morphoquant import formats
from morphoquant.formats.nf4 import NF4_LEVELS, quantize_nf4


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
    middle = (torch.tensor(NF4_LEVELS)[1:] + torch.tensor(NF4_LEVELS)[:-1]) / 2
    ties = torch.cat([torch.tensor([1.0]), middle, torch.zeros(64 - 16)])
    return {
        "gaussian": gaussian(96, 192) * 0.02,
        "many scale blocks": gaussian(300, 256) * 0.02,
        "zero blocks": zeros,
        "all zero": torch.zeros(2, 64),
        "one value": torch.full((2, 64), -0.3),
        "single element": torch.tensor([[0.7, -0.1]]),
        "ties of levels": ties.reshape(1, 64),
        "negative ties": -ties.reshape(1, 64),
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
    """bitsandbytes' dequantization.

    Its vectorized CPU kernel counts blocks per row and is wrong where a row is no whole number of
    blocks (0.50.2); an odd last axis sends the same codes through its generic kernel.
    """
    shape = state.shape
    if shape[-1] % 64:
        state.shape = torch.Size((math.prod(shape), 1))
    with torch.compiler.set_stance("force_eager"):
        return oracle.dequantize_4bit(packed, state).reshape(shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(adversarial()))
def test_codes_and_values_without_double_quantization(
    oracle: Any, name: str, dtype: torch.dtype
) -> None:
    w = adversarial()[name].clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    found = quantize_nf4(w, double_quantization=False)
    packed, state = oracle.quantize_4bit(w, quant_type="nf4", compress_statistics=False)
    assert torch.equal(found.codes.reshape(-1), unpacked(packed, w.numel()))
    # bitsandbytes writes 1e-38 for a zero block that is short
    torch.testing.assert_close(found.absmax, state.absmax, rtol=0, atol=1e-37)
    assert torch.equal(found.dequantized, decoded(oracle, packed, state))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(adversarial()))
def test_double_quantization(oracle: Any, name: str, dtype: torch.dtype) -> None:
    """Bit for bit, but for scales that the CPU kernel looks up in a table of 2^16 cells.

    Those may fall to the neighbouring level if, and only if, they lie within a cell of the
    midpoint. Everything downstream of the scale codes is compared bit for bit.
    """
    w = adversarial()[name].to(dtype)
    found = quantize_nf4(w)
    packed, state = oracle.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(found.codes.reshape(-1), unpacked(packed, w.numel()))
    assert found.absmax_codes is not None
    assert found.absmax_scale is not None
    assert found.absmax_offset is not None
    torch.testing.assert_close(found.absmax_offset, state.offset, rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(found.absmax_scale, state.state2.absmax, rtol=1e-6, atol=1e-37)

    book = formats.dynamic_codebook()
    ours, theirs = found.absmax_codes.int(), state.absmax.int()
    span = found.absmax_scale.repeat_interleave(256)[: ours.numel()]
    counts = span > 0  # with no spread the code is multiplied by zero
    differ = counts & (ours != theirs)
    raw = w.float().reshape(-1)
    blocks = torch.stack([block.abs().max() for block in raw.split(64)])
    unit = (blocks - found.absmax_offset) / span
    midpoint = (book[ours] + book[theirs]) / 2
    assert ((unit - midpoint).abs()[differ] <= 2 / 65536).all()
    if name in ("gaussian", "many scale blocks", "heavy tails"):
        assert differ.double().mean() <= 0.01
    if not differ.any():
        assert torch.equal(found.dequantized, decoded(oracle, packed, state))


def test_scales_and_values_follow_from_the_codes(oracle: Any) -> None:
    """Decoding is bitsandbytes' own: hand it our codes and get our values."""
    w = (gaussian(300, 256) * 0.02).bfloat16()
    found = quantize_nf4(w)
    packed, state = oracle.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    state.absmax = found.absmax_codes
    assert torch.equal(found.dequantized, decoded(oracle, packed, state))


def test_dynamic_codebook_is_bitsandbytes(oracle: Any) -> None:
    assert torch.equal(formats.dynamic_codebook(), oracle.create_dynamic_map())


def test_levels_are_bitsandbytes(oracle: Any) -> None:
    assert torch.equal(torch.tensor(NF4_LEVELS), oracle.get_4bit_type("nf4", device="cpu"))


def test_codes_name_the_nearest_level() -> None:
    """By the definition, without any oracle."""
    w = gaussian(16, 64, seed=3)
    found = quantize_nf4(w, double_quantization=False)
    unit = w.double() / w.double().abs().amax(dim=1, keepdim=True)
    distance = (unit.unsqueeze(-1) - torch.tensor(NF4_LEVELS, dtype=torch.float64)).abs()
    assert torch.equal(found.codes.long(), distance.argmin(dim=-1))
    assert int(found.codes.max()) <= 15


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = gaussian(50, 333)
    whole = quantize_nf4(w)
    monkeypatch.setattr("morphoquant.formats.nf4.CHUNK", 256)
    pieces = quantize_nf4(w)
    for name in ("codes", "absmax", "dequantized"):
        assert torch.equal(getattr(whole, name), getattr(pieces, name))


def test_idempotent_power_of_two_scaling_and_zeros() -> None:
    """Q1, Q5, Q6, Q7 without double quantization; zeros stay zeros with it, too."""
    w = gaussian(8, 128)
    w[0, :64] = 0
    once = quantize_nf4(w, double_quantization=False).dequantized
    assert torch.equal(quantize_nf4(once, double_quantization=False).dequantized, once)
    assert torch.equal(quantize_nf4(w * 8, double_quantization=False).dequantized, once * 8)
    assert torch.equal(once[0, :64], torch.zeros(64))
    assert torch.equal(quantize_nf4(w).dequantized[0, :64], torch.zeros(64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(value: float) -> None:
    """Q7: the mean of the scales would carry one NaN into every block."""
    w = gaussian(4, 64)
    w[1, 1] = value
    with pytest.raises(ValueError, match="non-finite"):
        quantize_nf4(w)


def test_storage_bits() -> None:
    n = 3584 * 3584
    assert formats.nf4_storage_bits(n) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert formats.nf4_storage_bits(n, double_quantization=False) == 4.5
    assert formats.nf4_storage_bits(65) == pytest.approx(4 + (8 * 2 + 32 + 32) / 65)


def test_sqnr_on_gaussian_weights() -> None:
    """SPEC 1.5: 20.7 dB."""
    w = gaussian(512, 512).double()
    error = quantize_nf4(w, double_quantization=False).dequantized - w
    sqnr = 10 * math.log10(float(w.square().sum() / error.square().sum()))
    assert sqnr == pytest.approx(20.7, abs=0.2)
