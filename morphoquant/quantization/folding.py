"""Folding per-channel activation scales into the weight (SPEC 2.11).

A static scale per input channel lies on the reduction index of ``x W^T``, so no integer product
can apply it afterwards. It is multiplied into the weight before the weight is rounded:

    x_hat_k = s_k (q_k + z_k),   W~_nk = W_nk s_k ~ u_ng p_nk   (group g of k)

Outlier channels have large ``s_k``, and their folded columns would set the range of every group
they are in. They are left out (code 0) and their original columns kept beside, as a 16-bit panel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from morphoquant.formats.integer import expand_slices
from morphoquant.formats.weights import Clip, fake_quantize_weight
from morphoquant.quantization.ranges import StaticGrid

UNQUANTIZED = 16  # bits that stand for "folded, and left in floating point"


@dataclass(frozen=True)
class FoldedWeight:
    """A weight [N, K] on the grid of ``W_nk s_k``.

    Attributes:
        codes: int8 [N, K], 0 in the columns of ``channels``; at 16 bits the folded weight itself
            in float64.
        scale: ``u``, one per row and group [N, G], float32 (float64 for float64 weights).
        step: ``s``, float32 [K].
        panel: [N, kappa], the original columns of ``channels`` in the dtype of the original.
        channels: int64 [kappa], ascending: what the integer path leaves out.
        bits: width of the codes, 2 to 8, or 16.
        group_size: channels per group, or None for one group per row. The last group is shorter
            where K is not a multiple.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    step: torch.Tensor
    panel: torch.Tensor
    channels: torch.Tensor
    bits: int
    group_size: int | None

    @property
    def group_width(self) -> int:
        """Channels per group; K where a row is one group."""
        return self.codes.shape[1] if self.group_size is None else self.group_size

    @property
    def dequantized(self) -> torch.Tensor:
        """The weight that the activation ``x_tilde`` meets: [N, K], dtype of the original.

        ``u p / s``, and the original columns for ``channels``. A channel with ``s = 0`` has only
        the level zero, and weight 0.
        """
        k = self.codes.shape[1]
        scale = expand_slices(self.scale.double(), k, "per_group", self.group_width)
        step = self.step.double()
        # In place where that is safe: on a large layer these are the largest tensors around.
        values = self.codes.to(torch.float64, copy=True).mul_(scale)
        values = values.div_(torch.where(step > 0, step, 1.0)).to(self.panel.dtype)
        values[:, self.channels] = self.panel
        return values

    def storage_bits(self) -> float:
        """Bits per weight: codes (those of left-out columns too), 16-bit scales, 16-bit panel."""
        if self.bits == UNQUANTIZED:
            return float(UNQUANTIZED)
        extra = self.scale.shape[1] + self.channels.numel()
        return self.bits + 16 * extra / self.codes.shape[1]


def fold_weight(
    weight: torch.Tensor,
    grid: StaticGrid,
    mask: torch.Tensor | None,
    bits: int,
    group_size: int | None = 128,
    clip: Clip = "minmax",
    exclude_masked: bool = True,
) -> FoldedWeight:
    """Multiply the activation steps into ``weight`` and round once (SPEC 2.11).

    The product is formed in float64, where that of two float32 numbers is exact, so the only
    rounding is the one to the grid (to float32 before it, for weights below float64).

    Args:
        weight: [N, K], the original: not one that was rounded before.
        grid: activation grid, steps [K], or [1] for the whole tensor.
        mask: bool [K] of compensated outlier channels, or None.
        bits: 2 to 8 (restricted symmetric grid), or 16: folded and not rounded.
        group_size: channels per scale along K; None for one scale per row. Groups are counted
            over all K channels, so leaving channels out moves no other channel.
        clip: ``mse`` searches the range of every group (SPEC 1.4), in the folded domain.
        exclude_masked: leave masked channels to the panel. Off for the residual variant, in which
            they stay in the integer path.

    Raises:
        ValueError: the weight is not a matrix, mask or grid do not match it, a step is negative
            or not finite, or the bits are out of range.
    """
    if weight.ndim != 2:
        raise ValueError(f"expected a weight [out, in], got shape {tuple(weight.shape)}")
    k = weight.shape[1]
    if grid.step.shape not in ((k,), (1,)):
        raise ValueError(f"{k} input channels, but steps of shape {tuple(grid.step.shape)}")
    if mask is not None and (mask.shape != (k,) or mask.dtype != torch.bool):
        raise ValueError(f"expected a bool mask [{k}], got {mask.dtype} {tuple(mask.shape)}")
    if not (torch.isfinite(grid.step) & (grid.step >= 0)).all():
        raise ValueError("activation steps must be finite and not negative")

    weight = weight.detach()
    step = grid.step.detach().expand(k).clone()
    out = mask if mask is not None and exclude_masked else torch.zeros_like(step, dtype=torch.bool)
    channels = out.nonzero().flatten()
    folded = (weight.double() * step.double()).masked_fill_(out, 0.0)
    panel = weight[:, channels].clone()
    if bits == UNQUANTIZED:
        one = torch.ones_like(folded[:, :1])
        return FoldedWeight(folded, one, step, panel, channels, bits, None)

    if weight.dtype != torch.float64:
        folded = folded.float()
    found = fake_quantize_weight(
        folded,
        bits,
        "per_channel" if group_size is None else "per_group",
        k if group_size is None else group_size,
        clip=clip,
    )
    return FoldedWeight(found.codes, found.scale, step, panel, channels, bits, group_size)
