"""Slot 3: fake quantizers of activations, one module per granularity and mode (SPEC 1.3)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from morphoquant.calibration.statistics import ChannelStatistics
from morphoquant.config.schema import ActivationConfig
from morphoquant.formats import fake_quantize_activation
from morphoquant.formats.integer import (
    Granularity,
    Grid,
    expand_slices,
    reduce_minmax,
    scale_from_range,
)
from morphoquant.quantization.ranges import (
    StaticGrid,
    StaticRange,
    SymmetricGrid,
    initial_range,
)


class DynamicQuantizer(nn.Module):
    """Range taken from the activation itself: per token, or per group of channels of a token.

    Every token is quantized by itself, so neither the batch nor its padding matters.

    Args:
        bits: grid width.
        symmetric: restricted symmetric grid (zero stays zero), or min-max with a zero point.
        clip_ratio: factor on the range.
        group_size: channels per group, or None for one range per token.
        grid: which symmetric grid.
    """

    def __init__(
        self,
        bits: int,
        symmetric: bool,
        clip_ratio: float,
        group_size: int | None,
        grid: SymmetricGrid = "restricted",
    ) -> None:
        super().__init__()
        self.grid = grid
        self.bits, self.symmetric, self.clip_ratio = bits, symmetric, clip_ratio
        self.group_size = group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., channels] -> the same shape and dtype, on the grid."""
        return fake_quantize_activation(
            x,
            self.bits,
            "per_token" if self.group_size is None else "per_group",
            self.group_size or x.shape[-1],
            self.symmetric,
            self.clip_ratio,
            self.grid,
        )

    def bounds(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest level at every element of ``x`` (broadcastable to it)."""
        grid = Grid(self.bits, self.grid if self.symmetric else "asymmetric")
        kind: Granularity = "per_token" if self.group_size is None else "per_group"
        size = self.group_size or x.shape[-1]
        lo, hi = reduce_minmax(x, kind, size)
        lo, hi = lo.float() * self.clip_ratio, hi.float() * self.clip_ratio
        scale, zero_point = scale_from_range(lo, hi, grid)
        shift = torch.zeros_like(scale) if zero_point is None else zero_point
        low, high = (grid.low - shift) * scale, (grid.high - shift) * scale
        return (
            expand_slices(low, x.shape[-1], kind, size),
            expand_slices(high, x.shape[-1], kind, size),
        )


class StaticQuantizer(nn.Module):
    """Range fixed in calibration: one per channel, or one for the tensor.

    Args:
        chosen: the clipping range, tensors of [channels] (or [1]).
        bits: grid width.
    """

    step: torch.Tensor
    offset: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __init__(self, chosen: StaticRange, bits: int) -> None:
        super().__init__()
        grid = chosen.grid(bits)
        for name in ("step", "offset", "low", "high"):
            self.register_buffer(name, getattr(grid, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., channels] -> the same shape and dtype, on the grid."""
        grid = StaticGrid(self.step, self.offset, self.low, self.high)
        return grid(x.float()).to(x.dtype)

    def bounds(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest level of every channel, float32 [channels] (or [1])."""
        return (self.low + self.offset) * self.step, (self.high + self.offset) * self.step


def dynamic_quantizer(config: ActivationConfig, bits: int) -> DynamicQuantizer:
    """The module for ``mode: dynamic``."""
    group = config.group_size if config.granularity == "per_group" else None
    return DynamicQuantizer(bits, config.symmetric, config.range.clip_ratio, group, config.grid)


def static_range(
    config: ActivationConfig, statistics: ChannelStatistics, mask: torch.Tensor | None
) -> StaticRange:
    """The range before any search, for ``mode: static``.

    Args:
        config: granularity, symmetry, grid.
        statistics: of all non-padding calibration tokens.
        mask: bool [channels] of *dynamically* compensated channels, or None.
    """
    if config.granularity == "per_tensor":
        edge = statistics.absmax.max().float().reshape(1)
        start = StaticRange(-edge, edge, torch.zeros_like(edge, dtype=torch.bool))
        if not config.symmetric:
            lo, hi = statistics.lo.min().float(), statistics.hi.max().float()
            affine = torch.ones_like(start.affine)
            start = StaticRange(lo.reshape(1), hi.reshape(1), affine)
    elif config.symmetric:
        near = mask if config.range.masked_edge == "near" else None
        start = initial_range(statistics, near, config.affine_when_sign_constant)
    else:
        lo, hi = statistics.lo.float(), statistics.hi.float()
        start = StaticRange(lo, hi, torch.ones_like(lo, dtype=torch.bool))
    start = replace(start, kind=config.grid, towards_zero=config.range.shrink == "towards_zero")
    ratio = config.range.clip_ratio
    return start if ratio == 1.0 else start.shrunk(ratio)


__all__ = ["DynamicQuantizer", "StaticQuantizer", "dynamic_quantizer", "static_range"]
