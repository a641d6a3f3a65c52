"""MDQFO: the search for static clipping ranges under an Lp + cosine loss (SPEC 2.7).

For every channel c and shrink ratio r the loss is

    sum_t |x - x~(r)|^p / sum_t |x|^p  +  weight * (1 - cos(x_c, x~_c(r)))

with the compensated ``x~`` and the cosine over the channel's tokens. Sums run over all tokens of
all batches, so the result depends on neither batch size nor order (the public implementation's
moving average over batches, ``accumulate: ema``, does). All candidates of all channels are tried
while a chunk of the activation is in cache: each activation is read once.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from morphoquant.config.schema import CompensationConfig, RangeConfig
from morphoquant.errors import ActivationError
from morphoquant.quantization.ranges import StaticGrid, StaticRange

TIE = 1e-6  # losses closer than this (relative) count as equal; the larger ratio wins
CACHE_BYTES = 1 << 20  # chunk on a CPU, so that a candidate's passes stay in the L2 cache
TINY = torch.finfo(torch.float64).tiny


class Search(Protocol):
    """What every kind of range search offers."""

    initial: StaticRange

    def update(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add one batch: activations [rows, channels] without padding, their modalities [rows]."""

    def best_ratios(self) -> torch.Tensor:
        """float32 [channels]."""

    def result(self) -> StaticRange:
        """The chosen range of every channel."""


def shrink_ratios(config: RangeConfig) -> list[float]:
    """Log-spaced from ``min_ratio`` to exactly 1; only 1 where the search is off."""
    if not config.search or config.candidates == 1:
        return [1.0]
    low = math.log(config.min_ratio)
    count = config.candidates
    return [math.exp(low * (1 - i / (count - 1))) for i in range(count - 1)] + [1.0]


def chunk_rows(config: RangeConfig, x: torch.Tensor) -> int:
    """Rows of ``x`` [rows, channels] worked on at a time, within the memory bound."""
    budget = config.chunk_mb << 20
    if x.device.type == "cpu":
        budget = min(budget, 4 * CACHE_BYTES)
    return max(1, budget // (4 * 4 * x.shape[-1]))  # four float32 buffers of a chunk's size


class Sums:
    """Sums over tokens, float64: what the losses are made of.

    Attributes:
        error, residual, square: [candidates, channels], of |x~ - x|^p, (x~ - x)^2 and x~^2.
        norm, energy: [channels], of |x|^p and x^2.
        count: rows seen.
    """

    def __init__(self, candidates: int, channels: int, device: torch.device) -> None:

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.error, self.residual, self.square = (zeros(candidates, channels) for _ in range(3))
        self.norm, self.energy = zeros(channels), zeros(channels)
        self.count = 0


class RangeSearch:
    """Accumulates the losses of one input group over the search samples.

    Args:
        initial: the range at ratio 1.
        bits: width of the activation grid.
        config: ratios, p, cosine weight, how batches accumulate, memory bound.
        mask: bool [channels] of dynamically compensated channels, or None.
        compensation: reading and gate of the compensation, used where ``mask`` is given.
        ratios: float32 [candidates, channels] to try instead of the grid of ``config``; the last
            candidate is all ones.
    """

    def __init__(
        self,
        initial: StaticRange,
        bits: int,
        config: RangeConfig,
        mask: torch.Tensor | None,
        compensation: CompensationConfig,
        ratios: torch.Tensor | None = None,
    ) -> None:
        self.initial = initial
        self.config = config
        self.mask = mask
        self.by_element = mask is not None and compensation.reading == "element"
        device, channels = initial.lo.device, initial.lo.numel()
        self.ratios = shrink_ratios(config)
        if ratios is None:
            self.table = torch.tensor(self.ratios, dtype=torch.float32, device=device)[:, None]
            ranges = [initial.shrunk(ratio) for ratio in self.ratios]
        else:
            self.table = ratios
            ranges = [initial.shrunk(row) for row in ratios]
        self.grids: list[StaticGrid] = [candidate.grid(bits) for candidate in ranges]
        self.limits = [compensation.gate * candidate.edge for candidate in ranges]
        self.affine = bool(initial.affine.any())
        # Without affine channels every channel has the same codes: a number clamps faster.
        top = 2 ** (bits - 1) - 1
        self.codes = (-top if initial.kind == "restricted" else -top - 1, top)
        self.sums = Sums(len(ranges), channels, device)
        self.average: torch.Tensor | None = None

    def update(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add one batch of activations [rows, channels] (no padding rows); labels do not matter."""
        averaged = self.config.accumulate == "ema"
        if averaged:
            if x.shape[0] == 0:
                return
            self.sums = Sums(len(self.grids), x.shape[-1], x.device)
        for chunk in x.split(chunk_rows(self.config, x)):
            self._update_chunk(chunk.float())
        if averaged:
            loss, decay = self._losses(self.sums), self.config.ema_decay
            self.average = (
                loss if self.average is None else decay * self.average + (1 - decay) * loss
            )

    def _update_chunk(self, x: torch.Tensor) -> None:
        p, cosine, sums = self.config.p, self.config.cosine_weight > 0, self.sums
        sums.count += x.shape[0]
        sums.norm += power_sum(x, p)
        sums.energy += (x * x).sum(0)
        magnitude = x.abs() if self.by_element else None
        for i, grid in enumerate(self.grids):
            error, codes = self._error(x, grid, keep_codes=cosine)
            if magnitude is not None:
                assert self.mask is not None
                bypass = self.mask & (magnitude > self.limits[i])
                error.masked_fill_(bypass, 0.0)
            # In units of a step, errors of any channel are of the same size; high powers of a
            # channel that calibration never saw could overflow there.
            step = grid.step.double()
            if p > 2:
                sums.error[i] += power_sum(error * grid.step, p)
            else:
                sums.error[i] += power_sum(error, p) * step**p
            if not cosine:
                continue
            assert codes is not None
            value = codes.mul_(grid.step)
            if magnitude is not None:
                value = torch.where(bypass, x, value)
            sums.square[i] += (value * value).sum(0)
            if p != 2.0:
                sums.residual[i] += power_sum(error, 2.0) * step**2

    def _error(
        self, x: torch.Tensor, grid: StaticGrid, keep_codes: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(x~ - x) / step, and x~ / step where it is needed: float32 [rows, channels]."""
        scaled = x / grid.step
        if self.affine:
            codes = (scaled - grid.offset).round_().clamp_(grid.low, grid.high).add_(grid.offset)
        else:
            codes = scaled.round().clamp_(*self.codes)
        if keep_codes:
            return codes - scaled, codes
        return codes.sub_(scaled), None

    def losses(self) -> torch.Tensor:
        """float64 [candidates, channels], never negative.

        Raises:
            ActivationError: the search samples brought a NaN or infinite value.
        """
        return self._losses(self.sums) if self.average is None else self.average

    def _losses(self, sums: Sums) -> torch.Tensor:
        error, square = sums.error, sums.square
        residual = sums.error if self.config.p == 2.0 else sums.residual
        if self.mask is not None and not self.by_element:
            # The channel reading returns masked channels whole, whatever their range.
            error = error.masked_fill(self.mask & ~torch.isnan(error), 0.0)
            residual = residual.masked_fill(self.mask, 0.0)
            square = torch.where(self.mask, sums.energy, square)
        loss = error / (sums.norm.clamp_min(TINY) if self.config.normalize else max(sums.count, 1))
        if self.config.cosine_weight > 0:
            turned = one_minus_cosine(sums.energy, square, residual)
            loss = loss + self.config.cosine_weight * turned
        if not torch.isfinite(loss).all() or not torch.isfinite(sums.norm).all():
            raise ActivationError(
                "range search met a NaN or infinite value, or |x|^p beyond float32; "
                "check the search samples or lower method.activation.range.p"
            )
        return loss

    def best_ratios(self) -> torch.Tensor:
        """float32 [channels]; of equal losses the larger ratio, never worse than ratio 1."""
        loss = self.losses()
        good = loss <= loss.min(0).values * (1 + TIE) + 1e-300
        return torch.where(good, self.table, 0.0).max(0).values

    def result(self) -> StaticRange:
        """The chosen range of every channel."""
        return self.initial.shrunk(self.best_ratios())


def one_minus_cosine(
    energy: torch.Tensor, square: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """``1 - cos(x, x~)`` from sum x^2, sum x~^2 and sum (x~ - x)^2; broadcasts, in 0..2.

    1 - cos = (|x~ - x|^2 - (|x| - |x~|)^2) / (2 |x| |x~|); unlike 1 - x.x~ / |x||x~| it does not
    cancel where x~ is almost x, and rounding cannot make it negative.
    """
    a, b = energy.sqrt(), square.sqrt()
    turned = (residual - (a - b) ** 2).clamp_min(0.0) / (2 * a * b).clamp_min(TINY)
    # A candidate that rounds everything to nothing has no direction: cosine 0.
    turned = torch.where(a * b > 0, turned.clamp_max(2.0), 1.0)
    return turned.masked_fill((energy == 0).expand_as(turned), 0.0)


def power_sum(x: torch.Tensor, p: float) -> torch.Tensor:
    """sum over rows of |x|^p, [channels]."""
    if p == 2.0:
        return (x * x).sum(0)
    magnitude = x.abs()
    if p == 1.0:
        return magnitude.sum(0)
    if p == 0.5:
        return magnitude.sqrt_().sum(0)
    if p == 3.0:
        return (magnitude * x).mul_(x).sum(0)
    return magnitude.pow_(p).sum(0)
