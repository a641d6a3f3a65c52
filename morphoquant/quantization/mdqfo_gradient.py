"""MDQFO by gradient: learnable clipping ranges, as the paper words it (SPEC 2.7).

Every channel has a learnable ratio ``alpha / alpha_0``; rounding passes gradients straight
through, and Adam lowers ``Lp + weight * (1 - cos)`` batch by batch. The outcome depends on the
order of batches, as any stochastic optimizer's does, so it is only a proposal: a second pass
compares it with the unshrunk range on the exact sums, and the better of the two is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from morphoquant.config.schema import CompensationConfig, RangeConfig
from morphoquant.errors import ActivationError
from morphoquant.quantization.mdqfo import chunk_rows
from morphoquant.quantization.ranges import StaticRange

SMOOTH = 1e-3  # of a step: |e|^p below one power has no gradient at 0 without it
BETAS = (0.9, 0.999)


class GradientSearch:
    """Learns a ratio per channel from the search samples, in the order in which they come.

    Args:
        initial: the range at ratio 1.
        bits: width of the activation grid.
        config: p, cosine and its weight, steps per batch, learning rate, smallest ratio.
        mask: bool [channels] of dynamically compensated channels, or None.
        compensation: reading and gate, used where ``mask`` is given.
    """

    def __init__(
        self,
        initial: StaticRange,
        bits: int,
        config: RangeConfig,
        mask: torch.Tensor | None,
        compensation: CompensationConfig,
    ) -> None:
        self.bits, self.config, self.compensation = bits, config, compensation
        self.floor = math.log(config.min_ratio)
        # Tensors made in inference mode cannot take part in gradients: copies can.
        with torch.inference_mode(False):
            self.initial = replace(
                initial, lo=initial.lo.clone(), hi=initial.hi.clone(), affine=initial.affine.clone()
            )
            self.mask = None if mask is None else mask.clone()
            self.log_ratio = torch.zeros_like(self.initial.lo).requires_grad_()
        self.optimizer = torch.optim.Adam([self.log_ratio], lr=config.learning_rate, betas=BETAS)

    def update(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Take ``config.steps`` steps on one batch of activations [rows, channels].

        Raises:
            ActivationError: the batch holds a NaN or infinite value.
        """
        if x.shape[0] == 0:
            return
        if not torch.isfinite(x).all():
            raise ActivationError("range search met a NaN or infinite value in the search samples")
        with torch.inference_mode(False), torch.enable_grad():
            values = x.float().clone()
            norm = values.abs().pow(self.config.p).sum(0)
            for _ in range(self.config.steps):
                self.optimizer.zero_grad()
                for rows, columns in self._parts(values):  # gradients add up: memory is one part's
                    self._loss(values[rows, columns], columns, norm, x.shape).backward()
                self.optimizer.step()
                with torch.no_grad():
                    self.log_ratio.clamp_(self.floor, 0.0)

    def _parts(self, x: torch.Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows and columns that are worked on together.

        A token's direction needs all channels of a row; everything else is a sum over channels.
        """
        limit = max(1, chunk_rows(self.config, x) // 4)
        whole = slice(None)
        if self.config.cosine == "token" and self.config.cosine_weight > 0:
            for start in range(0, x.shape[0], limit):
                yield slice(start, start + limit), whole
            return
        width = max(1, limit * x.shape[1] // x.shape[0])
        for start in range(0, x.shape[1], width):
            yield whole, slice(start, start + width)

    def _fake_quantize(self, x: torch.Tensor, columns: slice) -> torch.Tensor:
        """x~ with straight-through rounding; step and clipping carry gradients to the ratio."""
        first = self.initial
        part = replace(
            first, lo=first.lo[columns], hi=first.hi[columns], affine=first.affine[columns]
        )
        chosen = part.shrunk(self.log_ratio[columns].exp())
        grid = chosen.grid(self.bits)
        offset = grid.offset.detach()
        scaled = x / grid.step - offset
        rounded = scaled + (scaled.round() - scaled).detach()
        value = (torch.clamp(rounded, grid.low, grid.high) + offset) * grid.step
        if self.mask is None:
            return value
        gate = self.mask[columns]
        if self.compensation.reading == "element":
            gate = gate & (x.abs() > (self.compensation.gate * chosen.edge).detach())
        return torch.where(gate, x, value)

    def _loss(
        self, x: torch.Tensor, columns: slice, norm: torch.Tensor, shape: torch.Size
    ) -> torch.Tensor:
        """The share of one part in the loss of a batch of ``shape``."""
        config, (tokens, channels) = self.config, shape
        value = self._fake_quantize(x, columns)
        error = (value - x).abs()
        if config.p < 1:
            step = 2 * self.initial.edge[columns] / (2**self.bits - 1)
            error = error + (SMOOTH * step).clamp_min(SMOOTH**4)
        powered = error.pow(config.p).sum(0)
        if config.normalize:
            tiny = torch.finfo(x.dtype).tiny
            loss = (powered / norm[columns].clamp_min(tiny)).sum() / channels
        else:
            loss = powered.sum() / (tokens * channels)
        if config.cosine_weight > 0:
            by_token = config.cosine == "token"
            cosine = torch.cosine_similarity(x, value, dim=int(by_token), eps=SMOOTH**4)
            loss = loss + config.cosine_weight * (1 - cosine).sum() / shape[0 if by_token else 1]
        return loss

    def best_ratios(self) -> torch.Tensor:
        """The learned ratios, float32 [channels]."""
        return self.log_ratio.detach().exp()

    def result(self) -> StaticRange:
        """The range at the learned ratios."""
        return self.initial.shrunk(self.best_ratios())
