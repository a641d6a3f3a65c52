"""Static clipping ranges of activation channels, and the grid that a range spans (SPEC 2.6)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from morphoquant.calibration.statistics import ChannelStatistics

SymmetricGrid = Literal["restricted", "full", "sym15"]

SPAN_FLOOR = 1e-8  # keeps the step of an all-zero channel positive


@dataclass(frozen=True)
class StaticGrid:
    """``x_hat = step * (clip(round(x / step - offset), low, high) + offset)``, per channel.

    Attributes (each float32 [channels]):
        step: distance of two levels.
        offset: integer shift; 0 on symmetric channels.
        low, high: code range.
    """

    step: torch.Tensor
    offset: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., channels] -> the nearest level of every element."""
        codes = torch.div(x, self.step).sub_(self.offset).round_()
        return codes.clamp_(self.low, self.high).add_(self.offset).mul_(self.step)


@dataclass(frozen=True)
class StaticRange:
    """A clipping range per channel.

    Attributes:
        lo, hi: float32 [channels]; ``lo = -hi`` where the channel is symmetric.
        affine: bool [channels]; True where the grid spans [lo, hi] and zero need not be on it.
        kind: the grid of symmetric channels (SPEC 1.2): ``restricted`` has codes -Q..Q and step
            ``edge / Q``; ``full`` one more code at the bottom; ``sym15`` the same codes at step
            ``2 edge / (2^b - 1)``, so that ``+edge`` itself is out of reach.
        towards_zero: shrink ranges of one sign by multiplying both ends (SPEC 2.6, marked [D]).
    """

    lo: torch.Tensor
    hi: torch.Tensor
    affine: torch.Tensor
    kind: SymmetricGrid = "restricted"
    towards_zero: bool = False

    @property
    def edge(self) -> torch.Tensor:
        """Largest magnitude inside the range, [channels]."""
        return torch.maximum(self.lo.abs(), self.hi.abs())

    def shrunk(self, ratio: torch.Tensor | float) -> StaticRange:
        """The range at ``ratio`` (a number, or one per channel).

        A range with zero inside shrinks towards zero. A sign-constant one keeps the edge next to
        zero and pulls in the far one, so its levels stay where the values are (unless it is
        ``towards_zero``).
        """
        lo, hi = self.lo * ratio, self.hi * ratio
        if not self.towards_zero:
            one_sided = self.affine & ((self.lo >= 0) | (self.hi <= 0))
            negative = one_sided & (self.hi <= 0)
            span = (self.hi - self.lo) * ratio
            lo = torch.where(one_sided, torch.where(negative, self.hi - span, self.lo), lo)
            hi = torch.where(one_sided, torch.where(negative, self.hi, self.lo + span), hi)
        return replace(self, lo=lo, hi=hi)

    def grid(self, bits: int) -> StaticGrid:
        """Levels: 2^b - 1 for ``restricted`` channels, 2^b for all others."""
        top = 2 ** (bits - 1) - 1
        steps = (2**bits - 1) / 2 if self.kind == "sym15" else top
        symmetric = self.edge.clamp_min(SPAN_FLOOR) / steps
        affine = (self.hi - self.lo).clamp_min(SPAN_FLOOR) / (2**bits - 1)
        step = torch.where(self.affine, affine, symmetric)
        offset = torch.where(
            self.affine, (self.lo / step).round() + 2 ** (bits - 1), torch.zeros_like(step)
        )
        low = torch.full_like(step, -top)
        low -= torch.ones_like(step) if self.kind != "restricted" else self.affine.to(step.dtype)
        return StaticGrid(step, offset, low, torch.full_like(step, top))


def initial_range(
    statistics: ChannelStatistics,
    mask: torch.Tensor | None = None,
    affine_when_sign_constant: bool = False,
) -> StaticRange:
    """The range a channel starts from (SPEC 2.6).

    Args:
        statistics: of all non-padding tokens.
        mask: bool [channels], the compensated outlier channels. On a sign-changing masked
            channel the *smaller* of the two edges is taken: what lies beyond is compensated.
        affine_when_sign_constant: give channels that never change sign a grid over [lo, hi].
    """
    lo, hi = statistics.lo.float(), statistics.hi.float()
    far = torch.maximum(lo.abs(), hi.abs())
    near = torch.minimum(lo.abs(), hi.abs())
    constant = lo * hi > 0
    affine = constant if affine_when_sign_constant else torch.zeros_like(constant)
    alpha = far if mask is None else torch.where(mask & ~constant, near, far)
    return StaticRange(torch.where(affine, lo, -alpha), torch.where(affine, hi, alpha), affine)
