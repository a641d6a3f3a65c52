"""What the block formats share: blocks along the last axis, small floats, their rounding.

Powers of two are taken from the bits of a number, never from ``log2`` or ``pow``: those are off by
a unit in the last place on some devices, and one binade is a factor of two. Every product and
quotient by such a power is exact, so each function below rounds once.
"""

from __future__ import annotations

import math

import torch

E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; code + 8 is the negative
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN_EXPONENT = -6
E4M3_MIN = 2.0**-9  # the smallest positive value, a subnormal

_EXPONENT_BITS = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def working(x: torch.Tensor) -> torch.Tensor:
    """``x`` in the precision it is computed in: float64 as it is, anything else in float32."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def in_blocks(x: torch.Tensor, block: int) -> torch.Tensor:
    """Cut the last axis into blocks: [..., K] -> [..., ceil(K / block), block].

    The result is in :func:`working` precision. Zeros fill a last block that is short: they never
    are the largest magnitude, so no scale depends on them. May share memory with ``x``.
    """
    values = working(x)
    count = math.ceil(x.shape[-1] / block)
    missing = count * block - x.shape[-1]
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.unflatten(-1, (count, block))


def out_of_blocks(blocks: torch.Tensor, channels: int) -> torch.Tensor:
    """Undo :func:`in_blocks`: [..., blocks, block] -> [..., channels]."""
    return blocks.flatten(-2)[..., :channels]


def block_absmax(blocks: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of every block, [..., block] -> [..., 1]; NaN where one is not finite.

    A scale made of it is NaN too, and with it the block: codes cannot say NaN or infinity.
    """
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    return largest.masked_fill(largest == torch.inf, torch.nan)


def storage_bits(
    shape: tuple[int, ...], element_bits: int, block: int, scale_bits: int, tensor_bits: int = 0
) -> float:
    """Bits per value of a tensor whose last axis is cut into blocks; short blocks count whole."""
    elements = math.prod(shape)
    blocks = elements // shape[-1] * math.ceil(shape[-1] / block)
    return element_bits + (scale_bits * blocks + tensor_bits) / elements


def binade(x: torch.Tensor) -> torch.Tensor:
    """``2^floor(log2 |x|)`` exactly; float32 or float64, the shape of ``x``.

    Zero and subnormal numbers give 0, infinity and NaN give infinity.
    """
    return (x.view(_INTEGERS[x.dtype]) & _EXPONENT_BITS[x.dtype]).view(x.dtype)


def round_half_even(x: torch.Tensor, mantissa_bits: int, min_exponent: int) -> torch.Tensor:
    """The nearest float with ``mantissa_bits`` behind the point, halves to the even mantissa.

    Below ``2^min_exponent`` the spacing stays what it is there (subnormal numbers). No upper
    bound: clamp before, at a level. Infinity and NaN give NaN.
    """
    step = binade(x).clamp_(min=2.0**min_exponent).mul_(2.0**-mantissa_bits)
    return torch.div(x, step).round_().mul_(step)


def round_half_away(magnitude: torch.Tensor) -> torch.Tensor:
    """The nearest whole number of values >= 0, halves up.

    Not ``floor(x + 0.5)``: the sum rounds the float just below one half up to one.
    """
    whole = magnitude.floor()
    return whole.add_(magnitude - whole >= 0.5)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest of the E2M1 levels, halves to the even mantissa, saturating at 6."""
    magnitude = x.abs()
    step = torch.where(magnitude < 4, 1.0, 2.0).to(x.dtype).masked_fill_(magnitude < 2, 0.5)
    return torch.div(x, step).round_().mul_(step).clamp_(-E2M1_MAX, E2M1_MAX)


def e2m1_codes(levels: torch.Tensor) -> torch.Tensor:
    """The 4-bit codes of values that are E2M1 levels: uint8, sign in bit 3. NaN becomes 0."""
    magnitude = levels.abs()
    codes = torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4)
    codes = torch.where(magnitude < 2, magnitude * 2, codes)
    codes = torch.where(levels.isnan(), 0, codes + 8 * levels.signbit())
    return codes.to(torch.uint8)


def round_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 value (the variant without infinity), saturating at 448; ``x >= 0``."""
    return round_half_even(x.clamp(max=E4M3_MAX), 3, E4M3_MIN_EXPONENT)
