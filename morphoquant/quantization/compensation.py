"""Slot 4: dynamic bias compensation of outlier channels, DABC (SPEC 2.2 - 2.5).

The outlier mask comes from the dispersion of calibration activations. At run time the residual
``x - x_hat`` of masked channels goes through the quantized weight and is added to the output,
which is the same as letting those values through unquantized:
``W (x_hat + (x - x_hat) * E) = W (E ? x : x_hat)``.
"""

from __future__ import annotations

import torch
from torch import nn

from morphoquant.calibration.statistics import ChannelStatistics
from morphoquant.config.schema import CompensationConfig, MaskConfig
from morphoquant.quantization.ranges import StaticRange


def outlier_mask(statistics: ChannelStatistics, config: MaskConfig) -> torch.Tensor:
    """Long-tailed channels of one input group, bool [channels].

    A channel is marked when its dispersion reaches mean + threshold * std over the group's
    channels; of more than ``max_share`` of them, the highest scores stay.
    """
    score = statistics.dispersion(config.score)
    channels = score.numel()
    threshold = score.mean() + config.std_threshold * score.std(unbiased=channels > 1)
    # Where all channels are alike the threshold is their mean, and none of them stands out.
    mask = (score >= threshold) & (score.max() > score.min())
    allowed = int(config.max_share * channels)
    if int(mask.sum()) > allowed:
        # A stable sort: of equal scores the lower channel number stays, on every device.
        ranked = torch.sort(score, descending=True, stable=True).indices[:allowed]
        capped = torch.zeros_like(mask)
        capped[ranked] = True
        mask &= capped
    return mask


class DynamicCompensation(nn.Module):
    """Lets the residual of outlier channels through.

    Args:
        mask: bool [channels].
        limit: float32 [channels], the magnitude past which an element of a masked channel
            bypasses (element reading), or None for all of them (channel reading, paper eq. 7).
    """

    mask: torch.Tensor
    limit: torch.Tensor | None

    def __init__(self, mask: torch.Tensor, limit: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("limit", limit)
        self.masked = int(mask.sum())

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """Which elements bypass: bool, broadcastable to ``x``."""
        if self.limit is None:
            return self.mask
        return self.mask & (x.abs() > self.limit)

    def forward(
        self, x: torch.Tensor, rounded: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """(x, x_hat) [..., channels] -> (x_tilde, number of elements that bypassed)."""
        gate = self.gate(x)
        tokens = x.numel() // x.shape[-1]
        bypassed = self.masked * tokens if self.limit is None else gate.sum()
        return torch.where(gate, x, rounded), bypassed


def build_compensation(
    config: CompensationConfig, mask: torch.Tensor, chosen: StaticRange
) -> DynamicCompensation:
    """The run-time module for a mask and the final clipping range."""
    if config.reading == "channel":
        return DynamicCompensation(mask)
    return DynamicCompensation(mask, config.gate * chosen.edge)
