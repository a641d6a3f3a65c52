"""MDQFO: the search for static clipping ranges under an Lp + cosine loss (SPEC 2.7).

For every channel c and shrink ratio r the loss is

    sum_t |x - x~(r)|^p / sum_t |x|^p  +  weight * (1 - cos(x_c, x~_c(r)))

with the compensated ``x~`` and the cosine over the channel's tokens. Sums run over all tokens of
all batches, so the result depends on neither batch size nor order (the public implementation's
moving average over batches does). All candidates of all channels are tried while a chunk of the
activation is in cache: each activation is read once.
"""

from __future__ import annotations

import math

import torch

from morphoquant.config.schema import CompensationConfig, RangeConfig
from morphoquant.errors import ActivationError
from morphoquant.quantization.ranges import StaticGrid, StaticRange

TIE = 1e-6  # losses closer than this (relative) count as equal; the larger ratio wins
CACHE_BYTES = 1 << 20  # chunk on a CPU, so that a candidate's passes stay in the L2 cache


def shrink_ratios(config: RangeConfig) -> list[float]:
    """Log-spaced from ``min_ratio`` to exactly 1; only 1 where the search is off."""
    if not config.search or config.candidates == 1:
        return [1.0]
    low = math.log(config.min_ratio)
    count = config.candidates
    return [math.exp(low * (1 - i / (count - 1))) for i in range(count - 1)] + [1.0]


class RangeSearch:
    """Accumulates the losses of one input group over the search samples.

    Args:
        initial: the range at ratio 1.
        bits: width of the activation grid.
        config: ratios, p, cosine weight, memory bound.
        mask: bool [channels] of compensated channels, or None.
        compensation: reading and gate of the compensation, used where ``mask`` is given.
    """

    def __init__(
        self,
        initial: StaticRange,
        bits: int,
        config: RangeConfig,
        mask: torch.Tensor | None,
        compensation: CompensationConfig,
    ) -> None:
        self.initial = initial
        self.config = config
        self.mask = mask
        self.by_element = mask is not None and compensation.reading == "element"
        self.ratios = shrink_ratios(config)
        ranges = [initial.shrunk(ratio) for ratio in self.ratios]
        self.grids: list[StaticGrid] = [candidate.grid(bits) for candidate in ranges]
        self.limits = [compensation.gate * candidate.edge for candidate in ranges]
        shape = (len(self.ratios), initial.lo.numel())
        device = initial.lo.device
        # Sums over tokens of |x~ - x|^p, (x~ - x)^2, x~^2; then of |x|^p and x^2.
        self.error, self.residual, self.square = (
            torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3)
        )
        self.norm, self.energy = (
            torch.zeros(shape[1], dtype=torch.float64, device=device) for _ in range(2)
        )

    def update(self, x: torch.Tensor) -> None:
        """Add activations [rows, channels] (no padding rows)."""
        budget = self.config.chunk_mb << 20
        if x.device.type == "cpu":
            budget = min(budget, 4 * CACHE_BYTES)
        rows = max(1, budget // (4 * 4 * x.shape[-1]))  # four float32 buffers of a chunk's size
        for chunk in x.split(rows):
            self._update_chunk(chunk.float())

    def _update_chunk(self, x: torch.Tensor) -> None:
        p, cosine = self.config.p, self.config.cosine_weight > 0
        self.norm += _power_sum(x, p)
        if cosine:
            self.energy += (x * x).sum(0)
        magnitude = x.abs() if self.by_element else None
        for i, grid in enumerate(self.grids):
            candidate = grid(x)
            if magnitude is not None:
                assert self.mask is not None
                bypass = self.mask & (magnitude > self.limits[i])
                candidate = torch.where(bypass, x, candidate)
            elif self.mask is not None:
                candidate = torch.where(self.mask, x, candidate)
            if cosine:
                self.square[i] += (candidate * candidate).sum(0)
            difference = candidate.sub_(x)
            self.error[i] += _power_sum(difference, p)
            if cosine and p != 2.0:
                self.residual[i] += _power_sum(difference, 2.0)

    def losses(self) -> torch.Tensor:
        """float64 [candidates, channels], never negative.

        Raises:
            ActivationError: the search samples brought a NaN or infinite value.
        """
        tiny = torch.finfo(torch.float64).tiny
        loss = self.error / self.norm.clamp_min(tiny)
        if self.config.cosine_weight > 0:
            residual = self.error if self.config.p == 2.0 else self.residual
            a, b = self.energy.sqrt(), self.square.sqrt()
            # 1 - cos = (|x~ - x|^2 - (|x| - |x~|)^2) / (2 |x| |x~|); unlike 1 - x.x~ / |x||x~| it
            # does not cancel where x~ is almost x, and rounding cannot make it negative.
            turned = (residual - (a - b) ** 2).clamp_min(0.0) / (2 * a * b).clamp_min(tiny)
            # A candidate that rounds a channel to nothing has no direction: cosine 0.
            turned = torch.where(a * b > 0, turned.clamp_max(2.0), 1.0)
            silent = self.energy == 0
            loss = loss + self.config.cosine_weight * turned.masked_fill(silent, 0.0)
        if not torch.isfinite(loss).all():
            raise ActivationError(
                "range search met a NaN or infinite value, or |x|^p beyond float32; "
                "check the search samples or lower method.activation.range.p"
            )
        return loss

    def best_ratios(self) -> torch.Tensor:
        """float32 [channels]; of equal losses the larger ratio, never worse than ratio 1."""
        loss = self.losses()
        best = loss.min(0).values
        good = loss <= best * (1 + TIE) + 1e-300
        ratios = torch.tensor(self.ratios, dtype=torch.float32, device=loss.device)
        return torch.where(good, ratios[:, None], 0.0).max(0).values

    def result(self) -> StaticRange:
        """The chosen range of every channel."""
        return self.initial.shrunk(self.best_ratios())


def _power_sum(x: torch.Tensor, p: float) -> torch.Tensor:
    """sum over rows of |x|^p, [channels]; may overwrite ``x``'s copy, never ``x``."""
    if p == 2.0:
        return (x * x).sum(0)
    magnitude = x.abs()
    if p == 1.0:
        return magnitude.sum(0)
    if p == 0.5:
        return magnitude.sqrt_().sum(0)
    return magnitude.pow_(p).sum(0)
