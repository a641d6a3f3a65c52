"""Slot 2: weights onto their grid (SPEC 1.4, 1.5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from morphoquant import formats
from morphoquant.config.method import FIXED_WIDTH
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


def describe_int(weight: torch.Tensor, config: WeightConfig, bits: int) -> dict[str, Any]:
    """What the manifest says of an integer weight [out, in]."""
    described = {
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
        described["group_size"] = config.group_size
    return described


def _int(weight: torch.Tensor, config: WeightConfig, bits: int) -> QuantizedWeight:
    found = formats.fake_quantize_weight(
        weight.detach(),
        bits,
        config.granularity,
        config.group_size,
        config.symmetric,
        "mse" if config.clip == "mse" else "minmax",
    )
    return QuantizedWeight(found.dequantized.to(weight.dtype), describe_int(weight, config, bits))


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


def _fp4(weight: torch.Tensor, config: WeightConfig, bits: int) -> QuantizedWeight:
    found = formats.quantize_fp4(weight.detach(), config.double_quantization)
    shape = (weight.shape[0], weight.shape[1])
    description = {
        "format": "fp4",
        "bits": 4,
        "effective_bits": formats.fp4_storage_bits(shape, config.double_quantization),
        "granularity": "per_group",
        "group_size": 64,
        "double_quantization": config.double_quantization,
    }
    return QuantizedWeight(found.dequantized.to(weight.dtype), description)


def _block(
    rounded: Callable[[torch.Tensor], torch.Tensor],
    storage_bits: Callable[[tuple[int, ...]], float],
    block: int | None,
) -> Callable[[torch.Tensor, WeightConfig, int], QuantizedWeight]:
    """A format that needs nothing but the weight: blocks along the reduction axis."""

    def quantize(weight: torch.Tensor, config: WeightConfig, bits: int) -> QuantizedWeight:
        description: dict[str, Any] = {
            "format": config.format,
            "bits": bits,
            "effective_bits": storage_bits(tuple(weight.shape)),
            "granularity": "per_group" if block else "per_element",
        }
        if block:
            description["group_size"] = block
        return QuantizedWeight(rounded(weight.detach()), description)

    return quantize


FORMATS: dict[str, Callable[[torch.Tensor, WeightConfig, int], QuantizedWeight]] = {
    "none": _none,
    "int": _int,
    "nf4": _nf4,
    "fp4": _fp4,
    "mxfp4": _block(formats.fake_quantize_mxfp4, formats.mxfp4_storage_bits, 32),
    "nvfp4": _block(formats.fake_quantize_nvfp4, formats.nvfp4_storage_bits, 16),
    "hif4": _block(formats.fake_quantize_hif4, formats.hif4_storage_bits, 64),
    "hif8": _block(formats.fake_quantize_hif8, formats.hif8_storage_bits, None),
}


def quantize_weight(weight: torch.Tensor, config: WeightConfig, bits: int) -> QuantizedWeight:
    """Round-trip a weight [out, in] through the configured grid; 16 bits is the identity."""
    return FORMATS[format_at(config, bits)](weight, config, bits)


def format_at(config: WeightConfig, bits: int) -> str:
    """The format of weights at a width: ``none`` at 16 bits, the fallback where there is one."""
    if bits >= 16:
        return "none"
    width = FIXED_WIDTH.get(config.format)
    if width is not None and bits != width and config.fallback_format is not None:
        return config.fallback_format
    return config.format


def storage_bits(shape: tuple[int, int], config: WeightConfig, bits: int) -> float:
    """Bits per weight, scales included, that :func:`quantize_weight` spends on [out, in]."""
    name = format_at(config, bits)
    if name == "none":
        return 16.0
    if name == "int":
        described = (config.granularity, config.group_size, config.symmetric)
        return formats.int_storage_bits(shape, bits, *described)
    if name == "nf4":
        return formats.nf4_storage_bits(shape[0] * shape[1], config.double_quantization)
    if name == "fp4":
        return formats.fp4_storage_bits(shape, config.double_quantization)
    return BLOCK_STORAGE[name](shape)


BLOCK_STORAGE: dict[str, Callable[[tuple[int, ...]], float]] = {
    "mxfp4": formats.mxfp4_storage_bits,
    "nvfp4": formats.nvfp4_storage_bits,
    "hif4": formats.hif4_storage_bits,
    "hif8": formats.hif8_storage_bits,
}
