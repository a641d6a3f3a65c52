"""Mixed precision by channel: outlier channels at a higher width (Atom, LLM.int8(); SPEC 7.3).

The honest neighbour of the channel reading of DABC: the same mask, but the other channels' scale
is taken without the outliers, and the outliers' weight columns are kept at the higher width too.
With the mask of :mod:`morphoquant.quantization.rotated_mean` it is MQuant's RMS.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from morphoquant.formats import fake_quantize_activation, fake_quantize_weight
from morphoquant.quantization.activation import DynamicQuantizer, FormatQuantizer


class ExcludingQuantizer(nn.Module):
    """A dynamic quantizer whose ranges do not see masked channels.

    Args:
        inner: quantizes the others; masked channels come out as zero.
        mask: bool [channels].
    """

    mask: torch.Tensor

    def __init__(self, inner: DynamicQuantizer | FormatQuantizer, mask: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """[..., channels] -> the same shape and dtype."""
        rounded: torch.Tensor = self.inner(x.masked_fill(self.mask, 0.0), labels)
        return rounded

    def bounds(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels of the other channels; masked channels have no bounds."""
        low, high = self.inner.bounds(x.masked_fill(self.mask, 0.0), labels)
        low, high = low.expand_as(x), high.expand_as(x)
        return (
            torch.where(self.mask, torch.full_like(low, -torch.inf), low),
            torch.where(self.mask, torch.full_like(high, torch.inf), high),
        )


class HigherPrecision(nn.Module):
    """Returns masked channels at 8 bits per token, or as they are.

    Args:
        mask: bool [channels].
        bits: 8 (one symmetric scale per token over the masked channels) or 16.
    """

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor, bits: Literal[8, 16]) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.bits = bits
        self.masked = int(mask.sum())

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """Which elements stay in 16 bits: bool, broadcastable to ``x``."""
        return self.mask if self.bits == 16 else torch.zeros_like(self.mask)

    def forward(
        self, x: torch.Tensor, rounded: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | int]:
        """(x, x_hat) [..., channels] -> x_tilde and how many elements stayed in 16 bits."""
        tokens = x.numel() // x.shape[-1]
        if self.masked == 0:
            return rounded, 0
        if self.bits == 16:
            return torch.where(self.mask, x, rounded), self.masked * tokens
        out = rounded.clone()
        out[..., self.mask] = fake_quantize_activation(x[..., self.mask], self.bits)
        return out, 0

    def flops_per_token(self, outputs: int) -> int:
        """Nothing is computed twice: masked channels leave the low-width product."""
        return 0


def mixed_weight(
    weight: torch.Tensor, low: torch.Tensor, mask: torch.Tensor, bits: Literal[8, 16]
) -> torch.Tensor:
    """A weight whose masked columns have the higher width.

    Args:
        weight: the original, [out, in].
        low: the same with masked columns zero, rounded to the lower width.
        mask: bool [in].
        bits: of masked columns; 8 is one symmetric scale per output channel.
    """
    columns = weight[:, mask]
    if bits == 8 and columns.numel():
        columns = fake_quantize_weight(columns, 8).dequantized.to(weight.dtype)
    mixed = low.clone()
    mixed[:, mask] = columns
    return mixed
