"""HiF8: an 8-bit float whose mantissa shortens with the exponent (arXiv 2409.16626, SPEC 1.5).

Element-wise, without any scale. With ``E = floor(log2 |x|)`` the mantissa has 3 bits for
``|E| <= 3``, 2 for ``|E| <= 7``, 1 for ``|E| <= 15``; below 2^-15 only the powers of two down to
2^-22 remain ("denormal" codes). That is 38 binades; the largest value is 2^15, because the code
that would be 1.5 * 2^15 says infinity. Halves are rounded away from zero.

A code is the sign, a prefix that tells how many bits the exponent has, the exponent (its sign,
then its magnitude without the leading one), and the mantissa in what is left of the byte:

    prefix  0000  0001  001  01       10       11         (of the bits after the sign)
    E       -     0     +-1  +-(2-3)  +-(4-7)  +-(8-15)
    mantissa      3     3    3        2        1
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from morphoquant.formats.minifloat import binade, round_half_away, storage_bits, working

SMALLEST = 2.0**-22
LARGEST = 2.0**15
CODE_NAN = 0x80
CODE_INFINITY = 0x6F
CODE_SIGN = 0x80


@dataclass(frozen=True)
class HiF8Tensor:
    """A tensor in HiF8; there are no scales.

    Attributes:
        dequantized: the shape and dtype of the original.
        codes: uint8, the shape of the original; see :func:`hif8_values`.
    """

    dequantized: torch.Tensor
    codes: torch.Tensor


def _decode(code: int) -> float:
    """The value of a code 0..127, without its sign."""
    if code == CODE_INFINITY:
        return float("inf")
    if code < 8:  # prefix 0000
        return 2.0 ** (code - 23) if code else 0.0
    if code < 16:  # prefix 0001
        prefix_bits, exponent_bits = 4, 0
    elif code < 32:  # prefix 001
        prefix_bits, exponent_bits = 3, 1
    else:  # prefixes 01, 10 and 11
        prefix_bits, exponent_bits = 2, 1 + (code >> 5)
    mantissa_bits = 7 - prefix_bits - exponent_bits
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = 0
    if exponent_bits:
        leading = 1 << (exponent_bits - 1)
        field = (code >> mantissa_bits) & (2 * leading - 1)
        exponent = -field if field & leading else field | leading
    return 2.0**exponent * (1 + mantissa / (1 << mantissa_bits))


@cache
def hif8_values() -> torch.Tensor:
    """The values of all codes: float32 [256]; code 128 is NaN, 0x6F and 0xEF are infinite.

    Do not modify: it is cached.
    """
    half = torch.tensor([_decode(code) for code in range(128)])
    values = torch.cat((half, -half))
    values[CODE_NAN] = torch.nan
    return values


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest HiF8 values of float32 or float64 numbers; infinities and NaN stay."""
    magnitude = x.abs().clamp_(max=LARGEST)
    power = binade(magnitude).clamp_(min=SMALLEST)
    # Steps per binade: 8, 4, 2 or 1. The bounds compare powers of two, so < is exact.
    steps = torch.ones_like(power)
    for limit in (15, 7, 3):
        inside = (power >= 2.0**-limit) & (power <= 2.0**limit)
        steps = torch.where(inside, 2 * steps, steps)
    rounded = round_half_away(magnitude / power * steps).div_(steps).mul_(power)
    return torch.where(x.isinf(), x, rounded.copysign_(x))


def fake_quantize_hif8(x: torch.Tensor) -> torch.Tensor:
    """The HiF8 value of every element.

    Args:
        x: any shape.

    Returns:
        the shape and dtype of ``x``. Finite magnitudes above 2^15 saturate there; infinity and
        NaN are values of the format and stay.
    """
    return _rounded(working(x)).to(x.dtype)


def quantize_hif8(x: torch.Tensor) -> HiF8Tensor:
    """Codes and values of ``x``, any shape; the values are :func:`fake_quantize_hif8`'s."""
    values = _rounded(working(x))
    half = hif8_values()[:128].to(values.device, values.dtype)
    ascending, order = half.sort()
    codes = order[torch.bucketize(values.abs(), ascending).clamp_(max=127)]
    # The format has one zero, and NaN has the code of the other.
    codes = torch.where(values < 0, codes + CODE_SIGN, codes)
    codes = codes.masked_fill_(values.isnan(), CODE_NAN).to(torch.uint8)
    return HiF8Tensor(dequantized=values.to(x.dtype), codes=codes)


def hif8_storage_bits(shape: tuple[int, ...]) -> float:
    """Bits per value: 8 for any shape, there is nothing beside the codes."""
    return storage_bits(shape, element_bits=8, block=1, scale_bits=0)
