"""MDQFO with one ratio for all masked and one for all other channels (SPEC 2.7).

The paper's cosine compares a token's values over all channels before and after. It cannot be
searched channel by channel; with a ratio per mask group, all pairs of ratios can be tried: what a
pair needs of a token is a sum over its two groups of channels, so the pairs cost nothing per
element.
"""

from __future__ import annotations

import torch

from morphoquant.config.schema import CompensationConfig, RangeConfig
from morphoquant.errors import ActivationError
from morphoquant.quantization.mdqfo import TIE, TINY, chunk_rows, one_minus_cosine, shrink_ratios
from morphoquant.quantization.ranges import StaticRange


class JointSearch:
    """Accumulates losses of all pairs (ratio of other channels, ratio of masked channels).

    Args:
        initial: the range at ratio 1.
        bits: width of the activation grid.
        config: ratios, p, cosine, weights between channels, memory bound.
        mask: bool [channels] of dynamically compensated channels, or None (all are 'other').
        compensation: reading and gate, used where ``mask`` is given.
        importance: float [channels], squared norm of the weight columns that read each channel
            (``output_weighting``), or None for equal weights.
        ratios: float32 [candidates, channels] instead of the grid of ``config``.
    """

    def __init__(
        self,
        initial: StaticRange,
        bits: int,
        config: RangeConfig,
        mask: torch.Tensor | None,
        compensation: CompensationConfig,
        importance: torch.Tensor | None = None,
        ratios: torch.Tensor | None = None,
    ) -> None:
        self.initial, self.config, self.mask = initial, config, mask
        self.by_element = mask is not None and compensation.reading == "element"
        device, channels = initial.lo.device, initial.lo.numel()
        self.ratios = shrink_ratios(config)
        if ratios is None:
            column = torch.tensor(self.ratios, dtype=torch.float32, device=device)[:, None]
            ratios = column.expand(-1, channels)
        self.table = ratios
        ranges = [initial.shrunk(row) for row in ratios]
        self.grids = [candidate.grid(bits) for candidate in ranges]
        self.limits = [compensation.gate * candidate.edge for candidate in ranges]
        members = torch.zeros((channels, 2), dtype=torch.float64, device=device)
        masked = mask if mask is not None else torch.zeros_like(initial.affine)
        members[:, 0], members[:, 1] = (~masked).double(), masked.double()
        self.members = members
        weights = torch.ones_like(members[:, 0]) if importance is None else importance.double()
        self.weights = weights / weights.mean().clamp_min(TINY)
        count = len(ranges)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        # Weighted error of each group at each candidate; sums over tokens of 1 - cos of each pair.
        self.error, self.turned = zeros(count, 2), zeros(count, count)
        self.residual, self.square = zeros(count, channels), zeros(count, channels)
        self.energy = zeros(channels)
        self.norm, self.tokens = 0.0, 0
        self.average: torch.Tensor | None = None

    def update(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add one batch of activations [rows, channels] (no padding rows); labels do not matter."""
        if x.shape[0] == 0:
            return
        averaged = self.config.accumulate == "ema"
        if averaged:
            for sums in (self.error, self.turned, self.residual, self.square, self.energy):
                sums.zero_()
            self.norm, self.tokens = 0.0, 0
        for chunk in x.split(max(1, chunk_rows(self.config, x) // 4)):
            self._update_chunk(chunk.double())
        if averaged:
            loss, decay = self._losses(), self.config.ema_decay
            self.average = (
                loss if self.average is None else decay * self.average + (1 - decay) * loss
            )

    def _update_chunk(self, x: torch.Tensor) -> None:
        config, p = self.config, self.config.p
        magnitude = x.abs()
        self.tokens += x.shape[0]
        self.norm += float((magnitude.pow(p) @ self.weights).sum())
        self.energy += (x * x).sum(0)
        by_token = config.cosine == "token" and config.cosine_weight > 0
        residuals, squares = [], []  # [tokens, 2] for every candidate
        for i, grid in enumerate(self.grids):
            candidate = grid(x)
            if self.mask is not None:
                gate = self.mask & (magnitude > self.limits[i]) if self.by_element else self.mask
                candidate = torch.where(gate, x, candidate)
            difference = candidate - x
            error = difference.abs().pow(p)
            self.error[i] += (error * self.weights).sum(0) @ self.members
            if by_token:
                residuals.append((difference * difference) @ self.members)
                squares.append((candidate * candidate) @ self.members)
            elif config.cosine_weight > 0:
                self.residual[i] += (difference * difference).sum(0)
                self.square[i] += (candidate * candidate).sum(0)
        if by_token:
            residual, square = torch.stack(residuals), torch.stack(squares)
            pairs = one_minus_cosine(
                (x * x).sum(1),
                square[:, None, :, 0] + square[None, :, :, 1],
                residual[:, None, :, 0] + residual[None, :, :, 1],
            )
            self.turned += pairs.sum(-1)

    def losses(self) -> torch.Tensor:
        """float64 [candidates of other channels, candidates of masked channels].

        Raises:
            ActivationError: the search samples brought a NaN or infinite value.
        """
        return self._losses() if self.average is None else self.average

    def _losses(self) -> torch.Tensor:
        error = self.error[:, None, 0] + self.error[None, :, 1]
        size = self.norm if self.config.normalize else self.tokens * self.energy.numel()
        loss = error / max(size, TINY)
        weight = self.config.cosine_weight
        if weight > 0 and self.config.cosine == "token":
            loss = loss + weight * self.turned / max(self.tokens, 1)
        elif weight > 0:
            turned = one_minus_cosine(self.energy, self.square, self.residual) @ self.members
            total = self.energy.numel()
            loss = loss + weight * (turned[:, None, 0] + turned[None, :, 1]) / total
        if not torch.isfinite(loss).all():
            raise ActivationError(
                "range search met a NaN or infinite value; check the search samples or lower "
                "method.activation.range.p"
            )
        return loss

    def best_ratios(self) -> torch.Tensor:
        """float32 [channels]; of equal losses the larger ratios, never worse than ratio 1."""
        loss = self.losses()
        good = loss <= loss.min() * (1 + TIE) + 1e-300
        # The last good pair in order of candidates is the widest: other channels first.
        other, masked = (int(i) for i in good.nonzero()[-1])
        chosen = self.mask if self.mask is not None else torch.zeros_like(self.initial.affine)
        return torch.where(chosen, self.table[masked], self.table[other])

    def result(self) -> StaticRange:
        """The chosen range of every channel."""
        return self.initial.shrunk(self.best_ratios())
