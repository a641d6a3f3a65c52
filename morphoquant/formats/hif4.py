"""HiF4: blocks of 64 with scales on three levels (arXiv 2602.11287, SPEC 1.5).

A block carries 32 bits beside its 64 codes: one unsigned E6M2 scale, eight 1-bit exponents (one
per 8 values) and sixteen more (one per 4). A code is a sign and a magnitude of 0 to 7 quarters:

    x_hat = sign * code / 4 * 2^(exponent8 + exponent4) * scale,    at most 7 * scale

The scale is found in bfloat16, as the format's own conversion does; the rest is computed in
float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from morphoquant.formats.minifloat import (
    block_absmax,
    in_blocks,
    out_of_blocks,
    round_half_away,
    round_half_even,
    storage_bits,
)

BLOCK = 64
METADATA_BITS = 32
SEVENTH = 0.142578125  # 1/7 in bfloat16
E6M2_MIN = 2.0**-48
E6M2_MAX = 1.5 * 2.0**15


@dataclass(frozen=True)
class HiF4Tensor:
    """A tensor in HiF4, in ``blocks = ceil(K / 64)`` blocks per row.

    Attributes:
        dequantized: [..., K], the dtype of the original.
        codes: uint8 0..15 [..., K]; bits 0 to 2 count quarters, bit 3 is the sign.
        scales: float32 [..., blocks], E6M2 values; NaN for a block with NaN or infinity.
        exponents8: bool [..., blocks, 8], of 8 neighbours each.
        exponents4: bool [..., blocks, 16], of 4 neighbours each.
    """

    dequantized: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    exponents8: torch.Tensor
    exponents4: torch.Tensor


@dataclass(frozen=True)
class _Rounded:
    """Blocks of 64 as 16 groups of 4.

    Attributes:
        quarters: whole numbers -7..7 in floating point, [..., blocks, 16, 4].
        scale: [..., blocks, 1].
        exponents8, exponents4: bool [..., blocks, 8] and [..., blocks, 16].
        step: what one quarter is worth, [..., blocks, 16, 1].
    """

    quarters: torch.Tensor
    scale: torch.Tensor
    exponents8: torch.Tensor
    exponents4: torch.Tensor
    step: torch.Tensor

    def values(self, channels: int) -> torch.Tensor:
        """Dequantized, [..., channels]."""
        return out_of_blocks((self.quarters * self.step).flatten(-2), channels)


def round_e6m2(x: torch.Tensor) -> torch.Tensor:
    """The nearest E6M2 value, halves to the even mantissa, within [2^-48, 1.5 * 2^15].

    ``2^e * (1 + j/4)``, without zero and subnormal numbers; NaN stays NaN.
    """
    return round_half_even(x.clamp(E6M2_MIN, E6M2_MAX), 2, -48)


def _rounded(x: torch.Tensor) -> _Rounded:
    groups = in_blocks(x, BLOCK).unflatten(-1, (16, 4))
    largest4 = groups.abs().amax(dim=-1)
    largest8 = largest4.unflatten(-1, (8, 2)).amax(dim=-1)
    largest = block_absmax(largest8)
    scale = round_e6m2((largest * SEVENTH).bfloat16().to(groups.dtype))
    inverse = (1 / scale).bfloat16().to(groups.dtype)
    exponents8 = largest8 * inverse >= 4
    factor8 = torch.where(exponents8, 2.0, 1.0).to(groups.dtype).repeat_interleave(2, dim=-1)
    exponents4 = largest4 * inverse / factor8 >= 2
    factor = torch.where(exponents4, 2 * factor8, factor8).unsqueeze(-1)
    # A power of two does not round: the order of the factors changes nothing.
    scaled = groups * (inverse.unsqueeze(-1) * 4 / factor)
    quarters = round_half_away(scaled.abs()).clamp_(max=7).copysign_(scaled)
    return _Rounded(quarters, scale, exponents8, exponents4, factor * scale.unsqueeze(-1) / 4)


def fake_quantize_hif4(x: torch.Tensor) -> torch.Tensor:
    """The HiF4 value of every element, blocks along the last axis.

    Args:
        x: [..., K], activations or a weight [out, in].

    Returns:
        [..., K] in the dtype of ``x``; magnitudes above 344,064 saturate. A block with a NaN or
        an infinity is NaN as a whole.
    """
    return _rounded(x).values(x.shape[-1]).to(x.dtype)


def quantize_hif4(x: torch.Tensor) -> HiF4Tensor:
    """Codes, scales and values of ``x`` [..., K]; the values are :func:`fake_quantize_hif4`'s."""
    found = _rounded(x)
    channels = x.shape[-1]
    codes = found.quarters.abs() + 8 * found.quarters.signbit()
    codes = codes.masked_fill_(found.quarters.isnan(), 0).to(torch.uint8)
    return HiF4Tensor(
        dequantized=found.values(channels).to(x.dtype),
        codes=out_of_blocks(codes.flatten(-2), channels),
        scales=found.scale.squeeze(-1).float(),
        exponents8=found.exponents8,
        exponents4=found.exponents4,
    )


def hif4_storage_bits(shape: tuple[int, ...]) -> float:
    """Bits per value of a tensor [..., K]: 4, and 32 per block of 64 (4.5 if 64 divides K)."""
    return storage_bits(shape, element_bits=4, block=BLOCK, scale_bits=METADATA_BITS)
