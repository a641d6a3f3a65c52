"""Slot 3: fake quantizers of activations, one module per granularity and mode (SPEC 1.3)."""

from __future__ import annotations

import torch
from torch import nn

from morphoquant.calibration.statistics import ChannelStatistics
from morphoquant.config.schema import ActivationConfig
from morphoquant.quantization.ranges import SPAN_FLOOR, StaticGrid, StaticRange, initial_range


class DynamicQuantizer(nn.Module):
    """Range taken from the activation itself: per token, or per group of channels of a token.

    Every token is quantized by itself, so neither the batch nor its padding matters.

    Args:
        bits: grid width.
        symmetric: restricted symmetric grid (zero stays zero), or min-max with a zero point.
        clip_ratio: factor on the range.
        group_size: channels per group, or None for one range per token.
    """

    def __init__(
        self, bits: int, symmetric: bool, clip_ratio: float, group_size: int | None
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.clip_ratio = bits, symmetric, clip_ratio
        self.group_size = group_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., channels] -> the same shape and dtype, on the grid."""
        if self.group_size is None:
            return self._rows(x.float()).to(x.dtype)
        channels = x.shape[-1]
        missing = -channels % self.group_size
        # Repeating the last channel fills the last group without changing its range.
        values = x.float()
        if missing:
            values = torch.cat([values, values[..., -1:].expand(*x.shape[:-1], missing)], -1)
        grouped = values.unflatten(-1, (-1, self.group_size))
        return self._rows(grouped).flatten(-2)[..., :channels].to(x.dtype)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        top = 2 ** (self.bits - 1) - 1
        if self.symmetric:
            step = (x.abs().amax(-1, keepdim=True) * self.clip_ratio).clamp_min(SPAN_FLOOR) / top
            return (x / step).round_().clamp_(-top, top).mul_(step)
        lo = x.amin(-1, keepdim=True).clamp_max(0) * self.clip_ratio
        hi = x.amax(-1, keepdim=True).clamp_min(0) * self.clip_ratio
        levels = 2**self.bits - 1
        step = (hi - lo).clamp_min(SPAN_FLOOR) / levels
        zero = (-lo / step).round()
        return (x / step).round_().add_(zero).clamp_(0, levels).sub_(zero).mul_(step)


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


def dynamic_quantizer(config: ActivationConfig, bits: int) -> DynamicQuantizer:
    """The module for ``mode: dynamic``."""
    group = config.group_size if config.granularity == "per_group" else None
    return DynamicQuantizer(bits, config.symmetric, config.range.clip_ratio, group)


def static_range(
    config: ActivationConfig, statistics: ChannelStatistics, mask: torch.Tensor | None
) -> StaticRange:
    """The range before any search, for ``mode: static``."""
    if config.granularity == "per_tensor":
        edge = statistics.absmax.max().float().reshape(1)
        start = StaticRange(-edge, edge, torch.zeros_like(edge, dtype=torch.bool))
        if not config.symmetric:
            lo, hi = statistics.lo.min().float(), statistics.hi.max().float()
            affine = torch.ones_like(start.affine)
            start = StaticRange(lo.reshape(1), hi.reshape(1), affine)
    elif config.symmetric:
        start = initial_range(statistics, mask, config.affine_when_sign_constant)
    else:
        lo, hi = statistics.lo.float(), statistics.hi.float()
        start = StaticRange(lo, hi, torch.ones_like(lo, dtype=torch.bool))
    ratio = config.range.clip_ratio
    if ratio == 1.0:
        return start
    return StaticRange(start.lo * ratio, start.hi * ratio, start.affine)


__all__ = ["DynamicQuantizer", "StaticQuantizer", "dynamic_quantizer", "static_range"]
