"""Rotation magnitude suppression: the channel in which a Hadamard matrix gathers the mean.

MQuant (arXiv 2502.00425, section 3.2, algorithm 2; SPEC 4.8). The first column of a Hadamard
matrix is constant, so behind an online rotation ``x H / sqrt(n)`` channel 0 is ``sqrt(n)`` times
the mean of x, and column 0 of the rotated weight that of each of its rows. Where it exceeds all
other entries of its row it alone sets the row's grid, and the others are rounded too coarsely. So

    ``Y = x_{1:} W_{1:}^T + x_0 w_0^T``

with ``x_0`` and ``w_0`` in high precision and out of the ranges of the rest: a mask of one channel
for :mod:`morphoquant.quantization.mixed`, from the weights alone.

Notable choices:
    * The condition (the paper's equation 9, read from accounts of it) compares within an output
      channel; a layer has many. It is flagged where the condition holds in a share of them
      (``mask.mean_share``). One split costs 12 bits in n for each weight and activation of the
      layer, so the share is low; random columns reach it never. The released code asks no
      condition: its switch splits every layer (a share of 0).
    * R4 is built without random signs, as in QuaRot, so the mean is the plain one. R1 has them
      (the sums are of entries with random signs, and no channel of the stream is special), and it
      is merged into weights: it is not looked at. Neither is R2, which is merged too.
    * Paley's matrices have one entry of the other sign in that column, which changes little.
      Williamson's (172, in the 11008 inputs of the 3B model's down projection) has no such column:
      the mean is spread over 172 channels, and nothing is flagged unless the weights say so.
    * A block-diagonal rotation gathers the mean of every block in the block's first channel; each
      of these is flagged by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from morphoquant.quantization.hadamard import HadamardTransform


def rotated_mean_mask(
    weights: Sequence[torch.Tensor], online: nn.Module | None, share: float
) -> torch.Tensor:
    """The channels that gather a mean and are to be kept apart.

    Args:
        weights: [out, channels] of the linears that read the group, rotated and not rounded.
        online: what the group's input goes through; only a Hadamard rotation gathers means.
        share: of output channels in which such a channel has to hold the largest weight.

    Returns:
        bool [channels], on the weights' device.
    """
    channels, device = weights[0].shape[1], weights[0].device
    mask = torch.zeros(channels, dtype=torch.bool, device=device)
    if not isinstance(online, HadamardTransform) or online.block == 1:
        return mask
    sizes = torch.cat([weight.detach().abs() for weight in weights])
    first = slice(0, None, online.block)
    means = sizes[:, first].clone()
    sizes[:, first] = 0
    largest = means > sizes.amax(1, keepdim=True)
    mask[first] = largest.double().mean(0) >= share
    return mask
