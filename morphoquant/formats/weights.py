"""Round-to-nearest of a weight matrix on an integer grid, with optional clip search (SPEC 1.4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from morphoquant.formats.integer import (
    Granularity,
    Grid,
    dequantize,
    fake_quantize,
    quantize_codes,
    scale_from_range,
    slices,
)

Clip = Literal["minmax", "mse"]

SEARCH_STEPS = 80  # ranges 1.00, 0.99, ..., 0.21 of the full one
SEARCH_POWER = 2.4
SEARCH_CHUNK = 1 << 18  # elements worked on at a time: bounds the memory, and stays in the cache


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight on its grid.

    Attributes:
        dequantized: [out, in], the dtype of the original.
        codes: int8 (uint8 if asymmetric) [out, in].
        scale: float32 (float64 for float64 weights), one per slice: [1], [out, 1] or
            [out, groups].
        zero_point: like ``scale``, or None where symmetric.
    """

    dequantized: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None


def _search_ratio(
    part: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, grid: Grid
) -> torch.Tensor:
    """Shrink of every slice's range that loses least: part [slices, width] -> [slices, 1]."""
    best_loss = torch.full_like(lo, torch.inf)
    best = torch.ones_like(lo)
    for step in range(SEARCH_STEPS):
        ratio = 1 - step / 100
        scale, zero_point = scale_from_range(lo * ratio, hi * ratio, grid)
        error = fake_quantize(part, scale, zero_point, grid).sub_(part).abs_()
        loss = error.pow_(SEARCH_POWER).sum(dim=-1, keepdim=True)
        better = loss < best_loss  # strict: of equals, the widest range
        best_loss = torch.where(better, loss, best_loss)
        best = torch.where(better, ratio, best)
    return best


def _searched(
    part: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranges after the clip search; part [..., width], lo and hi [..., 1]."""
    flat, low, high = part.reshape(-1, part.shape[-1]), lo.reshape(-1, 1), hi.reshape(-1, 1)
    rows = max(1, SEARCH_CHUNK // flat.shape[-1])
    pieces = zip(flat.split(rows), low.split(rows), high.split(rows), strict=True)
    # Compute in float32 or better: errors of half-precision values would be rounded away.
    ratio = torch.cat([_search_ratio(w.to(a.dtype), a, b, grid) for w, a, b in pieces])
    ratio = ratio.reshape(lo.shape)
    return lo * ratio, hi * ratio


def fake_quantize_weight(
    weight: torch.Tensor,
    bits: int,
    granularity: Granularity = "per_channel",
    group_size: int = 128,
    symmetric: bool = True,
    clip: Clip = "minmax",
) -> QuantizedWeight:
    """Round a weight matrix to the nearest level of an integer grid.

    Args:
        weight: [out, in].
        bits: 2 to 8.
        granularity: ``per_tensor``, ``per_channel`` (one scale per output row) or ``per_group``
            (groups of ``group_size`` along ``in``, the reduction axis).
        symmetric: the ``restricted`` grid (codes -Q..Q), else the ``asymmetric`` one.
        clip: ``mse`` shrinks every slice's range by the ``p = 1 - i/100``, i < 80, that minimises
            the sum of ``|w - w_hat|^2.4`` (GPTQ's and QuaRot's setting).

    Raises:
        ValueError: the weight is not a matrix, or bits are out of range.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a weight [out, in], got shape {tuple(weight.shape)}")
    grid = Grid(bits, "restricted" if symmetric else "asymmetric")
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    codes = torch.empty(weight.shape, dtype=grid.code_dtype, device=weight.device)
    values = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    scales, zeros = [], []
    views = (slices(each, granularity, group_size) for each in (weight, codes, values))
    for parts in zip(*views, strict=True):
        found = [
            _round_rows(part, code, value, grid, work, clip)
            for part, code, value in zip(
                *(each.split(_rows(parts[0])) for each in parts), strict=True
            )
        ]
        scales.append(torch.cat([scale for scale, _ in found]))
        zeros += [torch.cat([z for _, z in found if z is not None])] if not grid.symmetric else []
    return QuantizedWeight(
        dequantized=values,
        codes=codes,
        scale=torch.cat(scales, dim=-1),
        zero_point=torch.cat(zeros, dim=-1) if zeros else None,
    )


def _rows(part: torch.Tensor) -> int:
    """Rows of [rows, ..., width] worked on at a time: on a CPU as many as the cache holds."""
    if part.device.type != "cpu":
        return len(part)
    return max(1, SEARCH_CHUNK * len(part) // max(part.numel(), 1))


def _round_rows(
    part: torch.Tensor,
    codes: torch.Tensor,
    values: torch.Tensor,
    grid: Grid,
    work: torch.dtype,
    clip: Clip,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Round slices [..., width] into ``codes`` and ``values``; their scales and zero points."""
    bounds = torch.aminmax(part, dim=-1, keepdim=True)
    lo, hi = bounds.min.to(work), bounds.max.to(work)
    if clip == "mse":
        lo, hi = _searched(part, lo, hi, grid)
    scale, zero_point = scale_from_range(lo, hi, grid)
    found = quantize_codes(part, scale, zero_point, grid)
    codes.copy_(found)
    values.copy_(dequantize(found, scale, zero_point))
    return scale.squeeze(-1), None if zero_point is None else zero_point.squeeze(-1)


def int_storage_bits(
    shape: tuple[int, int],
    bits: int,
    granularity: Granularity = "per_channel",
    group_size: int = 128,
    symmetric: bool = True,
) -> float:
    """Bits per weight including a 16-bit scale (and ``bits`` for a zero point) per slice."""
    rows, columns = shape
    count = {
        "per_tensor": 1,
        "per_channel": rows,
        "per_group": rows * math.ceil(columns / group_size),
    }[granularity]
    return bits + count * (16 + (0 if symmetric else bits)) / (rows * columns)
