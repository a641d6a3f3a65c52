"""Uniform integer grids (SPEC 1.2 to 1.4): codes, dequantized values, ranges of slices.

Everything is a pure function on tensors. Conventions:

- ``x_hat = scale * (code - zero_point)``; zero points are whole numbers kept in floating point.
- Rounding is half to even. Half-precision inputs are computed in float32 and come back in their
  own dtype; float64 stays float64.
- A *slice* is what shares one scale: the whole tensor, a row, or a group of neighbours in a row.
  A row that a group size does not divide ends in a shorter group; nothing is padded.
- NaN stays in its slice: :func:`fake_quantize` returns NaN wherever the input or the scale is NaN,
  and a slice whose range was taken over a NaN (or an infinity) is NaN as a whole. Integer codes
  cannot say NaN and say 0.
- 16 bits are the caller's business: they mean that nothing here is called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

GridKind = Literal["restricted", "full", "sym15", "asymmetric", "affine"]
Granularity = Literal["per_tensor", "per_channel", "per_token", "per_group"]

SCALE_FLOOR = torch.finfo(torch.float32).tiny  # an all-zero slice divides by this and stays zero
OFFSET_LIMIT = 2.0**22  # largest |zero point| of an affine grid; float32 counts exactly to 2^24


@dataclass(frozen=True)
class Grid:
    """A uniform grid of at most ``2^bits`` levels.

    Attributes:
        bits: 2 to 8.
        kind: with ``Q = 2^(bits-1) - 1``,

            - ``restricted``: codes -Q..Q, step ``alpha / Q``; odd-symmetric (SPEC "sym-7").
            - ``full``: codes -Q-1..Q, the same step.
            - ``sym15``: codes -Q-1..Q, step ``2 alpha / (2^bits - 1)``. The grid that an affine
              routine yields when called with [-alpha, alpha]: alpha itself is out of reach.
            - ``asymmetric``: codes 0..2^bits-1 over [min(lo, 0), max(hi, 0)]; zero is a level.
            - ``affine``: codes -Q-1..Q over [lo, hi] as it is; zero need not be a level, so a
              range of one sign keeps all its levels.
    """

    bits: int
    kind: GridKind = "restricted"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"an integer grid has 2 to 8 bits, got {self.bits}")

    @property
    def symmetric(self) -> bool:
        """True where the zero point is always 0 and only the largest magnitude matters."""
        return self.kind in ("restricted", "full", "sym15")

    @property
    def low(self) -> int:
        """Smallest code."""
        if self.kind == "asymmetric":
            return 0
        return -(2 ** (self.bits - 1)) + (self.kind == "restricted")

    @property
    def high(self) -> int:
        """Largest code."""
        return 2**self.bits - 1 if self.kind == "asymmetric" else 2 ** (self.bits - 1) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8 if self.kind == "asymmetric" else torch.int8


def _working(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _rounded(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """Codes in floating point (NaN kept), a fresh tensor."""
    codes = torch.div(_working(x), scale)
    if zero_point is None:
        codes.round_()
    elif grid.kind == "affine":  # the offset first: decides which way exact halves go
        codes.add_(zero_point).round_()
    else:
        codes.round_().add_(zero_point)
    return codes.clamp_(grid.low, grid.high)


def quantize_codes(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """Integer codes of ``x``.

    Args:
        x: any shape.
        scale, zero_point: broadcastable to ``x``; ``zero_point`` may be None (all zero).

    Returns:
        ``grid.code_dtype``, shape of ``x``. NaN becomes code 0.
    """
    return torch.nan_to_num_(_rounded(x, scale, zero_point, grid), nan=0.0).to(grid.code_dtype)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None
) -> torch.Tensor:
    """``scale * (codes - zero_point)`` in the dtype of ``scale``, shape of ``codes``."""
    values = codes.to(scale.dtype)
    return (values if zero_point is None else values - zero_point) * scale


def fake_quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, grid: Grid
) -> torch.Tensor:
    """The nearest level of every element, in the dtype of ``x`` (arguments as above)."""
    codes = _rounded(x, scale, zero_point, grid)
    if zero_point is not None:
        codes.sub_(zero_point)
    return codes.mul_(scale).to(x.dtype)


def scale_from_range(
    lo: torch.Tensor, hi: torch.Tensor, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Step and offset of the grid that covers [lo, hi].

    Args:
        lo, hi: same shape, ``lo <= hi``. A symmetric grid uses ``max(|lo|, |hi|)`` only.

    Returns:
        scale and zero point in the shape of ``lo``; the zero point of a symmetric grid is None.
        Scales are at least :data:`SCALE_FLOOR`, and an affine grid's at least
        ``max(|lo|, |hi|) / OFFSET_LIMIT``, so that a constant slice far from zero has a finite
        offset (and is reproduced to seven digits).
    """
    lo, hi = _working(lo), _working(hi)
    edge = torch.maximum(lo.abs(), hi.abs())
    steps = 2**grid.bits - 1
    if grid.symmetric:
        scale = 2 * edge / steps if grid.kind == "sym15" else edge / grid.high
        return scale.clamp_min(SCALE_FLOOR), None
    if grid.kind == "asymmetric":
        lo, hi = lo.clamp_max(0), hi.clamp_min(0)
        scale = (hi / steps - lo / steps).clamp_min(SCALE_FLOOR)  # hi - lo could overflow
        return scale, torch.round(-lo / scale).clamp_(0, steps)
    scale = torch.maximum(hi / steps - lo / steps, edge / OFFSET_LIMIT).clamp_min(SCALE_FLOOR)
    return scale, grid.low - torch.round(lo / scale)


# ------------------------------------------------------------------------------- slices


def slices(
    x: torch.Tensor, granularity: Granularity, group_size: int = 128
) -> tuple[torch.Tensor, ...]:
    """Views of ``x`` whose last axis is one slice.

    Weights [out, in]: ``per_channel`` is a row. Activations [..., channels]: ``per_token`` is a
    row. ``per_group`` cuts rows into groups of neighbours:

        >>> [tuple(part.shape) for part in slices(torch.zeros(2, 10), "per_group", 4)]
        [(2, 2, 4), (2, 1, 2)]

    Returns:
        one tensor, or two where a shorter group is left over at the end of a row.
    """
    if granularity == "per_tensor":
        return (x.reshape(1, -1),)
    if granularity in ("per_channel", "per_token"):
        return (x.unsqueeze(-2),)
    if granularity != "per_group":
        raise ValueError(f"unknown granularity {granularity!r}")
    if group_size < 1:
        raise ValueError(f"group_size must be positive, got {group_size}")
    full = x.shape[-1] // group_size * group_size
    parts = []
    if full:
        parts.append(x[..., :full].unflatten(-1, (-1, group_size)))
    if full < x.shape[-1]:
        parts.append(x[..., full:].unsqueeze(-2))
    return tuple(parts)


def reduce_minmax(
    x: torch.Tensor, granularity: Granularity, group_size: int = 128
) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of every slice: [1], [..., 1] or [..., groups], dtype of x."""
    found = [torch.aminmax(part, dim=-1) for part in slices(x, granularity, group_size)]
    return (
        torch.cat([bounds.min for bounds in found], dim=-1),
        torch.cat([bounds.max for bounds in found], dim=-1),
    )


def reduce_absmax(x: torch.Tensor, granularity: Granularity, group_size: int = 128) -> torch.Tensor:
    """Largest magnitude of every slice: [1], [..., 1] or [..., groups], dtype of x."""
    lo, hi = reduce_minmax(x, granularity, group_size)
    return torch.maximum(lo.abs(), hi.abs())


def expand_slices(
    values: torch.Tensor, channels: int, granularity: Granularity, group_size: int = 128
) -> torch.Tensor:
    """Repeat one value per slice so that it broadcasts against rows of ``channels`` elements."""
    if granularity != "per_group":
        return values
    return values.repeat_interleave(group_size, dim=-1)[..., :channels]


def fake_quantize_activation(
    x: torch.Tensor,
    bits: int,
    granularity: Granularity = "per_token",
    group_size: int = 128,
    symmetric: bool = True,
    clip_ratio: float = 1.0,
    symmetric_grid: GridKind = "restricted",
) -> torch.Tensor:
    """Dynamic fake quantization: every slice spans its own values, times ``clip_ratio``.

    Args:
        x: [..., channels].
        symmetric: the ``symmetric_grid``, else the ``asymmetric`` one.

    Returns:
        [..., channels] in the dtype of ``x``.
    """
    grid = Grid(bits, symmetric_grid if symmetric else "asymmetric")
    parts = []
    for part in slices(x, granularity, group_size):
        bounds = torch.aminmax(part, dim=-1, keepdim=True)
        lo, hi = _working(bounds.min) * clip_ratio, _working(bounds.max) * clip_ratio
        scale, zero_point = scale_from_range(lo, hi, grid)
        done = fake_quantize(part, scale, zero_point, grid)
        parts.append(done.reshape(x.shape) if granularity == "per_tensor" else done.flatten(-2))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


# ------------------------------------------------------------------------------- packing


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Two codes per byte, the even one in the low nibble.

    Args:
        codes: integers [..., channels] in -8..7 (two's complement) or 0..15.

    Returns:
        uint8 [..., ceil(channels / 2)]; an odd last byte has an empty high nibble.
    """
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 15):
        raise ValueError("a nibble holds -8..7 or 0..15")
    nibbles = (codes.to(torch.int16) & 0xF).to(torch.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = torch.nn.functional.pad(nibbles, (0, 1))
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: torch.Tensor, channels: int, signed: bool = True) -> torch.Tensor:
    """Invert :func:`pack_int4`: int8 (signed) or uint8 [..., channels]."""
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)[..., :channels]
    if not signed:
        return nibbles
    values = nibbles.to(torch.int8)
    return torch.where(values > 7, values - 16, values)
