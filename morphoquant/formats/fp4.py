"""FP4 as bitsandbytes defines it: eight magnitudes and a sign, blocks of 64 (SPEC 1.5).

Not E2M1: the magnitudes are {0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1} times the block's ``absmax``.
It is what a model gets that is loaded with ``load_in_4bit=True`` and nothing else, then without
double quantization. Blocks, scales and double quantization are those of NF4, whose module says
how they are computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from morphoquant.formats.minifloat import in_blocks, out_of_blocks
from morphoquant.formats.nf4 import (
    BLOCK,
    SCALE_BLOCK,
    _dequantize_blocks,
    _quantize_blocks,
    dynamic_codebook,
    nf4_storage_bits,
)

_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
FP4_LEVELS = tuple(sign * level / 12 for sign in (1, -1) for level in _TWELFTHS)  # by code


@dataclass(frozen=True)
class FP4Tensor:
    """A weight in bitsandbytes FP4.

    Attributes:
        dequantized: shape and dtype of the original.
        codes: uint8 0..15, shape of the original; indices into ``FP4_LEVELS``. There are two
            zeros: like bitsandbytes, code 0 rounds what is at most 0 and code 8 what is above.
        scales: float32 [blocks], the ``absmax`` values in use (after their own round trip).
        scale_codes: uint8 [blocks], or None without double quantization.
        scale_scales: float32 [ceil(blocks / 256)], or None.
        scale_offset: float32 scalar, the mean of the scales, or None.
    """

    dequantized: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    scale_codes: torch.Tensor | None = None
    scale_scales: torch.Tensor | None = None
    scale_offset: torch.Tensor | None = None


@cache
def _ascending() -> tuple[torch.Tensor, torch.Tensor]:
    """Levels in ascending order, float32 [16], and the code of each, uint8 [16]."""
    levels, codes = torch.tensor(FP4_LEVELS, dtype=torch.float32).sort(stable=True)
    return levels, codes.to(torch.uint8)


def quantize_fp4(weight: torch.Tensor, double_quantization: bool = False) -> FP4Tensor:
    """Quantize a weight to bitsandbytes FP4 in blocks of 64 consecutive values.

    Args:
        weight: any shape, floating point; flattened row-major. Computed in float32.
        double_quantization: keep the block scales in 8 bits, as for NF4.

    Raises:
        ValueError: the weight has a NaN or an infinity, which double quantization would spread.
    """
    levels, order = (table.to(weight.device) for table in _ascending())
    ranks, scales = _quantize_blocks(weight.detach().reshape(-1), levels, BLOCK)
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("FP4 cannot hold NaN or infinity: the weight has non-finite values")
    scale_codes = scale_scales = offset = None
    if double_quantization:
        dynamic = dynamic_codebook().to(weight.device)
        offset = scales.mean()
        scale_codes, scale_scales = _quantize_blocks(scales - offset, dynamic, SCALE_BLOCK)
        scales = _dequantize_blocks(scale_codes, scale_scales, dynamic, SCALE_BLOCK, torch.float32)
        scales += offset
    values = _dequantize_blocks(ranks, scales, levels, BLOCK, weight.dtype)
    return FP4Tensor(
        dequantized=values.view(weight.shape),
        codes=order[ranks.int()].view(weight.shape),
        scales=scales,
        scale_codes=scale_codes,
        scale_scales=scale_scales,
        scale_offset=offset,
    )


def fake_quantize_fp4(x: torch.Tensor) -> torch.Tensor:
    """The FP4 value of every element, blocks of 64 along the last axis, no double quantization.

    Blocks do not run on from one row to the next, so that a token's values are its own; where 64
    divides K this is :func:`quantize_fp4`.

    Args:
        x: [..., K]. Computed in float32.

    Returns:
        [..., K] in the dtype of ``x``. A block with a NaN or an infinity is NaN as a whole.
    """
    levels = _ascending()[0].to(x.device)
    blocks = in_blocks(x.float(), BLOCK)
    ranks, scales = _quantize_blocks(blocks.reshape(-1), levels, BLOCK)
    scales.masked_fill_(~scales.isfinite(), torch.nan)
    values = _dequantize_blocks(ranks, scales, levels, BLOCK, x.dtype)
    return out_of_blocks(values.view(blocks.shape), x.shape[-1])


def fp4_storage_bits(shape: tuple[int, ...], double_quantization: bool = False) -> float:
    """Bits per weight: those of NF4, 4 plus the block scales (8 bits if doubly quantized)."""
    return nf4_storage_bits(math.prod(shape), double_quantization)
