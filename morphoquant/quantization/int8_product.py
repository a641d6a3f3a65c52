"""Integer matrix products that really run on 8-bit integers, where a device has them.

Codes of 2 to 8 bits lie in int8 containers. On a CPU the product is oneDNN's, through the operator
that torch's own compiler uses for quantized linears; on CUDA it is ``torch._int_mm`` (the integer
tensor cores; recent data-centre GPUs have no 4-bit ones, so 4-bit codes gain nothing over 8-bit
ones there). Both give the exact int32 sums: :func:`pack` refuses operands for which one could not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

Product = Callable[[torch.Tensor], torch.Tensor]
"""int8 [tokens, channels] -> exact sums [tokens, outputs]: int32, or float32 that hold integers."""

INT16_MAX = 2**15 - 1
FLOAT32_EXACT = 2**24  # every integer up to here has a float32
CUDA_MULTIPLE, CUDA_ROWS = 8, 32  # shapes that the CUDA product takes


def pack(codes: torch.Tensor, low: int, high: int) -> Product | None:
    """A product with the weight ``codes``, in low precision; None where this device has none.

    Args:
        codes: int8 [outputs, channels] on the device that will compute.
        low, high: smallest and largest code that activations will have.

    Returns:
        A function of activation codes (int8 [tokens, channels], within low and high).
    """
    if codes.device.type == "cuda":
        return _cuda(codes)
    if codes.device.type == "cpu" and hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return _onednn(codes, low, high)
    return None


def _onednn(codes: torch.Tensor, low: int, high: int) -> Product | None:
    """oneDNN takes activations as uint8 around a zero point.

    Without AVX512-VNNI it adds two neighbouring products in int16, which saturates; and it hands
    its sums over as float32. Operands that could pass either bound are not taken.
    """
    largest = int(codes.to(torch.int16).abs().max()) if codes.numel() else 0
    span = high - low
    if span > 255 or 2 * span * largest > INT16_MAX:
        return None
    if codes.shape[1] * span * largest > FLOAT32_EXACT:
        return None
    packed = torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)
    scale = torch.ones(codes.shape[0])
    zero = torch.zeros(codes.shape[0], dtype=torch.long)

    def product(q: torch.Tensor) -> torch.Tensor:
        shifted = (q.to(torch.int16) - low).to(torch.uint8)
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            shifted, 1.0, -low, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found

    return product


def _cuda(codes: torch.Tensor) -> Product:
    """``torch._int_mm`` wants multiples of 8 channels and outputs and more than 16 rows."""
    outputs, channels = codes.shape
    wide, deep = -channels % CUDA_MULTIPLE, -outputs % CUDA_MULTIPLE
    columns = F.pad(codes, (0, wide, 0, deep)).contiguous().t()

    def product(q: torch.Tensor) -> torch.Tensor:
        rows = q.shape[0]
        padded = F.pad(q, (0, wide, 0, max(0, CUDA_ROWS - rows)))
        found: torch.Tensor = torch._int_mm(padded, columns)
        return found[:rows, :outputs]

    return product
