"""Slot 4: what is done about the residual of outlier channels (SPEC 2.4, 2.5).

Dynamic (DABC): the residual ``x - x_hat`` of masked channels goes through the quantized weight and
is added to the output, which is the same as letting those values through unquantized:
``W (x_hat + (x - x_hat) * E) = W (E ? x : x_hat)``. It preserves every outlier and costs a second,
skinny product in 16 bits.

Static: only the *mean* residual of masked channels is returned, ``delta_b = W E[(x - x_hat) * m]``,
one vector for all tokens or one per modality. It folds into the bias and costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from morphoquant.config.schema import CompensationConfig
from morphoquant.models.structure import MODALITIES
from morphoquant.quantization.low_rank import LowRank
from morphoquant.quantization.mixed import HigherPrecision
from morphoquant.quantization.modality import ModalityBranches

Returned = tuple[torch.Tensor, torch.Tensor | int]
"""(x_tilde [..., channels], number of elements that bypassed the grid)."""


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
        self, x: torch.Tensor, rounded: torch.Tensor, labels: torch.Tensor | None = None
    ) -> Returned:
        """(x, x_hat) [..., channels] -> x_tilde and how many elements bypassed."""
        gate = self.gate(x)
        tokens = x.numel() // x.shape[-1]
        bypassed = self.masked * tokens if self.limit is None else gate.sum()
        return torch.where(gate, x, rounded), bypassed

    def flops_per_token(self, outputs: int) -> int:
        """Extra operations of the 16-bit product, for ``outputs`` output channels."""
        return 2 * self.masked * outputs


class StaticBias(nn.Module):
    """Adds the mean residual of masked channels, which is a bias behind the linear.

    Args:
        residual: float32 [1, channels], for all tokens, or [1 + modalities, channels]: that row
            first, then one for every modality in the order of ``MODALITIES``. Zero outside the
            mask.
        mask: bool [channels].
    """

    residual: torch.Tensor
    mask: torch.Tensor

    def __init__(self, residual: torch.Tensor, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("residual", residual)
        self.register_buffer("mask", mask)
        self.masked = int(mask.sum())

    @property
    def per_modality(self) -> bool:
        return self.residual.shape[0] > 1

    def forward(
        self, x: torch.Tensor, rounded: torch.Tensor, labels: torch.Tensor | None = None
    ) -> Returned:
        """x_hat plus the residual of each token's modality (of all, without labels)."""
        if self.per_modality and labels is not None:
            # Padding is labelled -1 and takes the row of all tokens.
            offset = self.residual[labels.long().clamp_min(-1) + 1]
        else:
            offset = self.residual[0]
        return rounded + offset.to(rounded.dtype), 0

    def bias(self, weight: torch.Tensor) -> torch.Tensor:
        """What to add to the bias of a linear with ``weight`` [out, in]: [rows, out]."""
        return self.residual.to(weight.dtype) @ weight.T

    def flops_per_token(self, outputs: int) -> int:
        return 0


class ResidualMeans:
    """Accumulates the mean residual of masked channels by modality (SPEC 2.5, ii).

    Args:
        mask: bool [channels].
    """

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask
        shape = (len(MODALITIES), mask.numel())
        self.sums = torch.zeros(shape, dtype=torch.float64, device=mask.device)
        self.counts = torch.zeros(shape[0], dtype=torch.float64, device=mask.device)

    def update(self, x: torch.Tensor, rounded: torch.Tensor, labels: torch.Tensor) -> None:
        """Add residuals of [..., channels] with modality labels [...]; padding is skipped."""
        residual = (x - rounded).reshape(-1, x.shape[-1])
        kinds = labels.reshape(-1)
        for row, modality in enumerate(MODALITIES):
            chosen = residual[kinds == int(modality)]
            self.sums[row] += chosen.double().sum(0)
            self.counts[row] += chosen.shape[0]

    def result(self, per_modality: bool) -> StaticBias:
        """The compensation; a modality that calibration never showed takes the overall mean."""
        pooled = self.sums.sum(0, keepdim=True) / self.counts.sum().clamp_min(1)
        if per_modality:
            means = self.sums / self.counts.clamp_min(1)[:, None]
            means = torch.where(self.counts[:, None] > 0, means, pooled)
            pooled = torch.cat([pooled, means])
        return StaticBias((pooled * self.mask).float(), self.mask)


def build_compensation(
    config: CompensationConfig, mask: torch.Tensor, edge: torch.Tensor | None
) -> DynamicCompensation | HigherPrecision:
    """The dynamic compensation of an input group.

    Args:
        config: its name and reading.
        mask: bool [channels].
        edge: float32 [channels], where the final static range ends; only the element reading asks.
    """
    if config.name == "mixed_precision":
        return HigherPrecision(mask, config.outlier_bits)
    if config.reading == "channel":
        return DynamicCompensation(mask)
    assert edge is not None, "the element reading needs static ranges"
    return DynamicCompensation(mask, config.gate * edge)


def describe_compensation(
    config: CompensationConfig, module: nn.Module | None, outputs: int
) -> dict[str, Any]:
    """What the compensation of one linear with ``outputs`` channels costs, for the manifest."""
    if not isinstance(module, DynamicCompensation | StaticBias | HigherPrecision):
        return {}
    channels, extra = module.mask.numel(), module.flops_per_token(outputs)
    described: dict[str, Any] = {
        "name": config.name,
        "masked_channels": module.masked,
        "channels": channels,
        "extra_flops_per_token": extra,
        "extra_flops_share": extra / (2 * channels * outputs),
    }
    if isinstance(module, HigherPrecision):
        described["outlier_bits"] = module.bits
    elif isinstance(module, StaticBias):
        described["per_modality"] = module.per_modality
        described["stored_numbers"] = module.residual.shape[0] * outputs
    else:
        described["reading"] = config.reading
    return described


def describe_branch(branch: LowRank | ModalityBranches) -> dict[str, Any]:
    """What the low-rank branch of one linear costs, for the manifest.

    Of several branches a token goes through one at most, but all of them are stored.
    """
    kinds = branch.names if isinstance(branch, ModalityBranches) else ()
    one = branch.branch(kinds[0]) if isinstance(branch, ModalityBranches) else branch
    outputs, channels = one.up.shape[0], one.down.shape[1]
    extra = branch.flops_per_token()
    described: dict[str, Any] = {
        "name": "low_rank",
        "rank": branch.rank,
        "masked_channels": 0,
        "channels": channels,
        "extra_flops_per_token": extra,
        "extra_flops_share": extra / (2 * channels * outputs),
        "stored_numbers": max(len(kinds), 1) * branch.rank * (outputs + channels),
    }
    if kinds:
        described |= {"per_modality": True, "branches": list(kinds)}
    return described
