"""NF4 with double quantization, as QLoRA defines it and bitsandbytes computes it (SPEC 1.5).

Blocks of 64 consecutive weights (row-major, across rows) share one ``absmax``; a code names the
nearest of 16 levels placed at quantiles of the normal distribution. Double quantization keeps the
``absmax`` values, less their mean, in 8 bits: blocks of 256, on a *dynamic* codebook whose levels
are dense near zero.

Nearest means nearest. On a CPU, bitsandbytes (0.50) looks 8-bit codes up in a table of 2^16 cells
and so decides a few near ties the other way; its GPU and generic kernels do not. Level decisions
at exact midpoints take the lower level, as bitsandbytes does for NF4.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache

import torch

NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
BLOCK = 64
SCALE_BLOCK = 256
CHUNK = 1 << 22  # weights converted at a time; a multiple of BLOCK, bounds working memory
TINY = 1e-38  # keeps the reciprocal of an all-zero block finite


@dataclass(frozen=True)
class NF4Weight:
    """A weight in NF4.

    Attributes:
        dequantized: shape and dtype of the original.
        codes: uint8 0..15, shape of the original.
        absmax: float32 [blocks], the scales in use (after their own round trip).
        absmax_codes: uint8 [blocks], or None without double quantization.
        absmax_scale: float32 [ceil(blocks / 256)], or None.
        absmax_offset: float32 scalar, the mean of the scales, or None.
    """

    dequantized: torch.Tensor
    codes: torch.Tensor
    absmax: torch.Tensor
    absmax_codes: torch.Tensor | None = None
    absmax_scale: torch.Tensor | None = None
    absmax_offset: torch.Tensor | None = None


@cache
def dynamic_codebook() -> torch.Tensor:
    """The 256 levels of the signed 8-bit dynamic data type (Dettmers, arXiv 1511.04561).

    The magnitudes fall into seven decades, 1e-6 to 1; decade ``e`` holds ``2^e`` values at the
    centres of equal cells of [0.1, 1]. Zero and one complete the 2 * 127 signed values.

    Returns:
        float32 [256], ascending. Do not modify: it is cached.
    """
    magnitudes = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        centres = (edges[:-1] + edges[1:]) / 2
        magnitudes.append(centres * 10 ** (decade - 6))
    half = torch.cat(magnitudes)
    return torch.cat((-half, half, torch.tensor([0.0, 1.0]))).sort().values


def _nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the nearest of the ascending ``levels``; exact midpoints go down. uint8."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


def _quantize_blocks(
    flat: torch.Tensor, levels: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of ``flat`` [n] on ``levels`` scaled to each block: (uint8 [n], float32 [blocks])."""
    count = flat.numel()
    codes = torch.empty(count, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(math.ceil(count / block), dtype=torch.float32, device=flat.device)
    full = count // block * block
    cuts = [*range(0, full, CHUNK), full]
    spans = [(a, b, block) for a, b in itertools.pairwise(cuts)]
    if full < count:
        spans.append((full, count, count - full))
    for start, stop, width in spans:
        values = flat[start:stop].float().view(-1, width)
        largest = values.abs().amax(dim=1)
        # A product with the reciprocal, not a quotient: they differ in the last bit.
        unit = (values * (1.0 / largest.clamp_min(TINY)).unsqueeze(1)).clamp_(-1, 1)
        codes[start:stop] = _nearest(unit.flatten(), levels)
        absmax[start // block : math.ceil(stop / block)] = largest
    return codes, absmax


def _dequantize_blocks(
    codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """``levels[code] * absmax`` of flat codes [n], computed in float32 -> ``dtype`` [n]."""
    out = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    for start in range(0, codes.numel(), CHUNK):
        part = codes[start : start + CHUNK]
        full = part.numel() // block * block
        values = levels[part.int()]
        scale = absmax[start // block : math.ceil((start + part.numel()) / block)]
        values[:full].view(-1, block).mul_(scale[: full // block].unsqueeze(1))
        if full < part.numel():
            values[full:].mul_(scale[-1])
        out[start : start + CHUNK] = values
    return out


def quantize_nf4(weight: torch.Tensor, double_quantization: bool = True) -> NF4Weight:
    """Quantize a weight to NF4 in blocks of 64.

    Args:
        weight: any shape, floating point; flattened row-major. Computed in float32.
        double_quantization: keep the block scales in 8 bits.

    Raises:
        ValueError: the weight has a NaN or an infinity. Double quantization takes the mean of all
            scales, so one of them would spread over the whole tensor.
    """
    flat = weight.detach().reshape(-1)
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32, device=weight.device)
    codes, absmax = _quantize_blocks(flat, levels, BLOCK)
    if not bool(torch.isfinite(absmax).all()):
        raise ValueError("NF4 cannot hold NaN or infinity: the weight has non-finite values")
    absmax_codes = absmax_scale = offset = None
    if double_quantization:
        dynamic = dynamic_codebook().to(weight.device)
        offset = absmax.mean()
        absmax_codes, absmax_scale = _quantize_blocks(absmax - offset, dynamic, SCALE_BLOCK)
        absmax = _dequantize_blocks(absmax_codes, absmax_scale, dynamic, SCALE_BLOCK, torch.float32)
        absmax += offset
    values = _dequantize_blocks(codes, absmax, levels, BLOCK, weight.dtype)
    return NF4Weight(
        dequantized=values.view(weight.shape),
        codes=codes.view(weight.shape),
        absmax=absmax,
        absmax_codes=absmax_codes,
        absmax_scale=absmax_scale,
        absmax_offset=offset,
    )


def nf4_storage_bits(elements: int, double_quantization: bool = True) -> float:
    """Bits per weight: 4, plus the block scales (8 bits each if doubly quantized, else 32)."""
    blocks = math.ceil(elements / BLOCK)
    if not double_quantization:
        return 4 + 32 * blocks / elements
    # per 256 scales one float32, and one float32 mean for the tensor
    return 4 + (8 * blocks + 32 * math.ceil(blocks / SCALE_BLOCK) + 32) / elements
