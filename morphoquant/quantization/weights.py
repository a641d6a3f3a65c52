"""Slot 2: weights onto their grid (SPEC 1.4, 1.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from morphoquant import formats
from morphoquant.config.schema import WeightConfig


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight after its round trip, and what the manifest says about it.

    Attributes:
        dequantized: [out, in], the dtype of the original.
        description: format, bits, effective bits (scales included), granularity.
    """

    dequantized: torch.Tensor
    description: dict[str, Any]


def _none(weight: torch.Tensor, config: WeightConfig, bits: int) -> QuantizedWeight:
    return QuantizedWeight(weight.detach(), {"format": "none", "bits": 16, "effective_bits": 16.0})


def _int(weight: torch.Tensor, config: WeightConfig, bits: int) -> QuantizedWeight:
    found = formats.fake_quantize_weight(
        weight.detach(), bits, config.granularity, config.group_size, config.symmetric, config.clip
    )
    description = {
        "format": "int",
        "bits": bits,
        "effective_bits": formats.int_storage_bits(
            (weight.shape[0], weight.shape[1]),
            bits,
            config.granularity,
            config.group_size,
            config.symmetric,
        ),
        "granularity": config.granularity,
        "symmetric": config.symmetric,
        "clip": config.clip,
    }
    if config.granularity == "per_group":
        description["group_size"] = config.group_size
    return QuantizedWeight(found.dequantized.to(weight.dtype), description)


def _nf4(weight: torch.Tensor, config: WeightConfig, bits: int) -> QuantizedWeight:
    found = formats.quantize_nf4(weight.detach(), config.double_quantization)
    description = {
        "format": "nf4",
        "bits": 4,
        "effective_bits": formats.nf4_storage_bits(weight.numel(), config.double_quantization),
        "granularity": "per_group",
        "group_size": 64,
        "double_quantization": config.double_quantization,
    }
    return QuantizedWeight(found.dequantized.to(weight.dtype), description)


FORMATS: dict[str, Callable[[torch.Tensor, WeightConfig, int], QuantizedWeight]] = {
    "none": _none,
    "int": _int,
    "nf4": _nf4,
}


def quantize_weight(weight: torch.Tensor, config: WeightConfig, bits: int) -> QuantizedWeight:
    """Round-trip a weight [out, in] through the configured grid; 16 bits is the identity."""
    name = config.format
    if bits >= 16:
        name = "none"
    elif name == "nf4" and bits != 4 and config.fallback_format is not None:
        name = config.fallback_format
    return FORMATS[name](weight, config, bits)
