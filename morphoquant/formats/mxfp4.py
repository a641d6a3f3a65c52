"""MXFP4: E2M1 elements in blocks of 32 that share a power of two (SPEC 1.5).

The OCP Microscaling Formats specification 1.0: the scale is ``2^(floor(log2 amax) - 2)``, 2 being
the exponent of the largest element, 6. A block whose largest magnitude has a mantissa above 1.5
therefore saturates: 7.9 becomes 6. Some implementations round such a scale up instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from morphoquant.formats.minifloat import (
    binade,
    block_absmax,
    e2m1_codes,
    in_blocks,
    out_of_blocks,
    round_e2m1,
    storage_bits,
)

BLOCK = 32
ELEMENT_EXPONENT = 2  # of 6, the largest element
SCALE_LIMIT = 127  # E8M0 holds 2^-127 .. 2^127 and NaN


@dataclass(frozen=True)
class MXFP4Tensor:
    """A tensor in MXFP4.

    Attributes:
        dequantized: [..., K], the dtype of the original.
        codes: uint8 0..15 [..., K]; bits 0 to 2 index ``E2M1_LEVELS``, bit 3 is the sign.
        scales: float32 [..., ceil(K / 32)], powers of two; NaN for a block with NaN or infinity.
    """

    dequantized: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels [..., blocks, 32] and scales [..., blocks, 1] of ``x`` [..., K]."""
    blocks = in_blocks(x, BLOCK)
    largest = block_absmax(blocks)
    scale = (binade(largest) * 2.0**-ELEMENT_EXPONENT).clamp_(2.0**-SCALE_LIMIT, 2.0**SCALE_LIMIT)
    scale.masked_fill_(largest.isnan(), torch.nan)
    return round_e2m1(blocks / scale), scale


def fake_quantize_mxfp4(x: torch.Tensor) -> torch.Tensor:
    """The MXFP4 value of every element, blocks along the last axis.

    Args:
        x: [..., K], activations or a weight [out, in].

    Returns:
        [..., K] in the dtype of ``x``. A block with a NaN or an infinity is NaN as a whole.
    """
    levels, scale = _rounded(x)
    return out_of_blocks(levels.mul_(scale), x.shape[-1]).to(x.dtype)


def quantize_mxfp4(x: torch.Tensor) -> MXFP4Tensor:
    """Codes, scales and values of ``x`` [..., K]; the values are :func:`fake_quantize_mxfp4`'s."""
    levels, scale = _rounded(x)
    channels = x.shape[-1]
    return MXFP4Tensor(
        dequantized=out_of_blocks(levels * scale, channels).to(x.dtype),
        codes=out_of_blocks(e2m1_codes(levels), channels),
        scales=scale.squeeze(-1).float(),
    )


def mxfp4_storage_bits(shape: tuple[int, ...]) -> float:
    """Bits per value of a tensor [..., K]: 4, and 8 per block of 32 (4.25 if 32 divides K)."""
    return storage_bits(shape, element_bits=4, block=BLOCK, scale_bits=8)
