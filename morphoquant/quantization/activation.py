"""Slot 3: fake quantizers of activations, one module per granularity and mode (SPEC 1.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from morphoquant.calibration.histogram import LayerDistribution
from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.config.schema import ActivationConfig
from morphoquant.formats import (
    fake_quantize_activation,
    fake_quantize_hif4,
    fake_quantize_hif8,
    fake_quantize_mxfp4,
    fake_quantize_nvfp4,
    hif4_storage_bits,
    hif8_storage_bits,
    mxfp4_storage_bits,
    nvfp4_storage_bits,
    nvfp4_tensor_scale,
)
from morphoquant.formats.integer import (
    Granularity,
    Grid,
    expand_slices,
    reduce_minmax,
    scale_from_range,
)
from morphoquant.models.structure import MODALITIES
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

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
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

    def bounds(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
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


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mxfp4": fake_quantize_mxfp4,
    "hif4": fake_quantize_hif4,
    "hif8": fake_quantize_hif8,
}
STORAGE_BITS: dict[str, Callable[[tuple[int, ...]], float]] = {
    "mxfp4": mxfp4_storage_bits,
    "nvfp4": nvfp4_storage_bits,
    "hif4": hif4_storage_bits,
    "hif8": hif8_storage_bits,
}


class FormatQuantizer(nn.Module):
    """Floating formats: blocks along the channels of every token, scales of their own (SPEC 1.5).

    Args:
        name: ``mxfp4``, ``nvfp4``, ``hif4`` or ``hif8``.
        largest: NVFP4 only: the largest magnitude of calibration, which fixes its per-tensor scale
            (taken from the tensor itself, it would depend on what else is in the batch).
    """

    tensor_scale: torch.Tensor | None

    def __init__(self, name: str, largest: torch.Tensor | None = None) -> None:
        super().__init__()
        self.name = name
        scale = None
        if name == "nvfp4":
            assert largest is not None, "NVFP4 needs a per-tensor scale from calibration"
            scale = nvfp4_tensor_scale(largest.float())
        self.register_buffer("tensor_scale", scale)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """[..., channels] -> the same shape and dtype, on the grid."""
        if self.tensor_scale is not None:
            return fake_quantize_nvfp4(x, self.tensor_scale)
        return FORMATS[self.name](x)

    def bounds(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """None: levels follow the block, and what a format saturates counts as rounding."""
        edge = torch.full((1,), torch.inf, device=x.device)
        return -edge, edge


class StaticQuantizer(nn.Module):
    """Range fixed in calibration: one per channel, one for the tensor, or one per modality.

    Args:
        chosen: the clipping range, tensors of [channels], [1], or [1 + modalities, 1]: the row of
            all tokens first, then one for every modality in the order of ``MODALITIES``.
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

    @property
    def needs_labels(self) -> bool:
        """Whether the scale depends on a token's modality."""
        return self.step.ndim == 2

    def _grid(self, labels: torch.Tensor | None) -> StaticGrid:
        values = (self.step, self.offset, self.low, self.high)
        if self.needs_labels:
            # Padding is labelled -1 and takes the row of all tokens, as unlabelled tokens do.
            row = torch.tensor(0) if labels is None else labels.long().clamp_min(-1) + 1
            values = tuple(value[row.to(value.device)] for value in values)  # type: ignore[assignment]
        return StaticGrid(*values)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """[..., channels], labels [...] -> the same shape and dtype, on the grid."""
        return self._grid(labels)(x.float()).to(x.dtype)

    def bounds(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest level at every element of ``x`` (broadcastable to it)."""
        grid = self._grid(labels)
        return (grid.low + grid.offset) * grid.step, (grid.high + grid.offset) * grid.step


def dynamic_quantizer(
    config: ActivationConfig, bits: int, largest: torch.Tensor | None = None
) -> DynamicQuantizer | FormatQuantizer:
    """The module for ``mode: dynamic``; ``largest`` is the magnitude that calibration saw."""
    if config.format != "int":
        return FormatQuantizer(config.format, largest)
    group = config.group_size if config.granularity == "per_group" else None
    return DynamicQuantizer(bits, config.symmetric, config.range.clip_ratio, group, config.grid)


def static_range(
    config: ActivationConfig, statistics: ChannelStatistics, mask: torch.Tensor | None
) -> StaticRange:
    """The range of every channel before any search, for ``mode: static``.

    Args:
        config: symmetry, grid.
        statistics: of all non-padding calibration tokens.
        mask: bool [channels] of *dynamically* compensated channels, or None.
    """
    if config.symmetric:
        near = mask if config.range.masked_edge == "near" else None
        start = initial_range(statistics, near, config.affine_when_sign_constant)
    else:
        lo, hi = statistics.lo.float(), statistics.hi.float()
        start = StaticRange(lo, hi, torch.ones_like(lo, dtype=torch.bool))
    return _as_configured(start, config)


def tensor_range(
    config: ActivationConfig, statistics: ModalityStatistics, apart: torch.Tensor | None = None
) -> StaticRange:
    """The range of all channels together before any search: [1], or one per modality [1 + M, 1].

    Per modality (MQuant's modality-specific static quantization, SPEC 4.8) the first row is of all
    tokens; a modality that calibration never showed takes it too.

    Args:
        config: granularity, range, symmetry, grid.
        statistics: of the group's input.
        apart: bool [channels] that stay in high precision and widen no range, or None.
    """
    pooled = statistics.pooled()
    inside = slice(None) if apart is None or bool(apart.all()) else ~apart
    parts: list[tuple[ChannelStatistics, LayerDistribution | None]] = [
        (pooled, statistics.pooled_distribution())
    ]
    if config.granularity == "per_modality":
        for modality in MODALITIES:
            known = statistics.parts[modality].n > 0
            found = (statistics.parts[modality], statistics.distributions.get(modality))
            parts.append(found if known else parts[0])
    edges, lows, highs = [], [], []
    for part, distribution in parts:
        edge = float(part.absmax[inside].max())
        if config.range.name == "percentile":
            assert distribution is not None, "percentiles need histograms"
            quantile = distribution.magnitudes.quantile(config.range.percentile / 100)
            edge = min(edge, quantile) if quantile > 0 else edge
        edges.append(edge)
        lows.append(float(part.lo[inside].min()))
        highs.append(float(part.hi[inside].max()))
    shape = (-1, 1) if config.granularity == "per_modality" else (-1,)

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=pooled.lo.device).reshape(shape)

    if config.symmetric:
        edge_column = column(edges)
        affine = torch.zeros_like(edge_column, dtype=torch.bool)
        start = StaticRange(-edge_column, edge_column, affine)
    else:
        lo, hi = column(lows), column(highs)
        start = StaticRange(lo, hi, torch.ones_like(lo, dtype=torch.bool))
    return _as_configured(start, config)


def _as_configured(start: StaticRange, config: ActivationConfig) -> StaticRange:
    start = replace(start, kind=config.grid, towards_zero=config.range.shrink == "towards_zero")
    ratio = config.range.clip_ratio
    return start if ratio == 1.0 else start.shrunk(ratio)


__all__ = [
    "STORAGE_BITS",
    "DynamicQuantizer",
    "FormatQuantizer",
    "StaticQuantizer",
    "dynamic_quantizer",
    "static_range",
    "tensor_range",
]
