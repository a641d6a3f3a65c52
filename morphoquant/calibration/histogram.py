"""Streaming, mergeable histograms of one layer's input: magnitudes and token energies (SPEC 6).

Buckets are the bfloat16 numbers themselves: a value is counted at the bfloat16 nearest to its
magnitude. Rounding is monotone, so every quantile of the histogram is the rounded exact order
statistic, whatever the batches were. Two bytes per element is also what makes counting cheap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

OCTAVES = (-40, 24)  # [9.1e-13, 1.7e7): below counts as zero, above at the upper end
MANTISSA_BITS = 7
TOKEN_BITS = 4  # 16 buckets per octave for token norms: the energy of a bucket is kept exactly
MASSIVE_SHARE = 0.001

_MAGNITUDE = 0x7FFF  # a bfloat16 without its sign
_FIRST = (OCTAVES[0] + 127) << MANTISSA_BITS  # bit pattern of the smallest magnitude counted
_BUCKETS = (OCTAVES[1] - OCTAVES[0]) << MANTISSA_BITS


def _buckets(x: torch.Tensor) -> torch.Tensor:
    """int16, shape of ``x``: 0 below the octaves, else 1.. by the bfloat16 nearest to |x|."""
    codes = x.to(torch.bfloat16).view(torch.int16) & _MAGNITUDE
    return codes.sub_(_FIRST - 1).clamp_(0, _BUCKETS)


class MagnitudeHistogram:
    """Counts of |x| over all elements of a layer's input.

    Attributes:
        counts: int64 [1 + 64 * 128]; first what is zero (or below 2^-40), then one bucket per
            bfloat16 up to 2^24, 128 per octave (relative width 0.4 to 0.8 %).
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(1 + _BUCKETS, dtype=torch.int64, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Count every element of ``x`` (any shape, finite)."""
        self.counts += torch.bincount(_buckets(x).reshape(-1), minlength=1 + _BUCKETS)

    def merge(self, other: MagnitudeHistogram) -> None:
        self.counts = self.counts + other.counts

    def quantile(self, share: float) -> float:
        """The smallest |x| that at least ``share`` of the elements do not exceed.

        Exact but for rounding to bfloat16 (0.4 %) between 2^-40 and 2^24; zero below, NaN
        without elements.
        """
        reached = self.counts.cumsum(0)
        total = int(reached[-1])
        if total == 0:
            return math.nan
        # The product may come out just above a whole number: 0.999 of 1000 elements is 999.
        rank = max(1, math.ceil(share * total * (1 - 1e-12)))
        bucket = int(torch.searchsorted(reached, rank))
        if bucket == 0:
            return 0.0
        code = torch.tensor(_FIRST + bucket - 1, dtype=torch.int16)
        return float(code.view(torch.bfloat16))


class TokenEnergies:
    """How the energy (sum of squares) of a layer's input is spread over its tokens.

    Attributes:
        counts: int64 [1 + 64 * 16], tokens by Euclidean norm; first what is zero (or below
            2^-40), then 16 buckets per octave up to 2^24.
        energy: float64, same shape, summed energy of a bucket's tokens.
        first: float64 scalar, energy of tokens that are their prompt's first.
        prompts: whether prompts were seen at all, not just rows.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        size = 1 + (_BUCKETS >> (MANTISSA_BITS - TOKEN_BITS))
        self.counts = torch.zeros(size, dtype=torch.int64, device=device)
        self.energy = torch.zeros(size, dtype=torch.float64, device=device)
        self.first = torch.zeros((), dtype=torch.float64, device=device)
        self.prompts = False

    def update(self, norms: torch.Tensor) -> None:
        """Add tokens by their norms, float64 [tokens]."""
        # Rounded up, so that 1..8 become 1 and only zero stays zero.
        bucket = -(-_buckets(norms).int() >> (MANTISSA_BITS - TOKEN_BITS))
        self.counts.index_add_(0, bucket, torch.ones_like(bucket, dtype=torch.int64))
        self.energy.index_add_(0, bucket, norms * norms)

    def update_first(self, energy: torch.Tensor) -> None:
        """Add the energy of first tokens, a float64 scalar (zero if the prompts had none here)."""
        self.first = self.first + energy
        self.prompts = True

    def merge(self, other: TokenEnergies) -> None:
        self.counts = self.counts + other.counts
        self.energy = self.energy + other.energy
        self.first = self.first + other.first
        self.prompts = self.prompts or other.prompts

    @property
    def first_share(self) -> float:
        """Share of all energy in the first non-padding tokens of prompts (attention sinks).

        NaN without prompts or energy.
        """
        total = float(self.energy.sum())
        return float(self.first) / total if self.prompts and total > 0 else math.nan

    def massive_share(self, tokens: float = MASSIVE_SHARE) -> float:
        """Share of all energy in the ``tokens`` (a share, at least one) of largest energy.

        Within the bucket at the border every token counts with the bucket's mean energy, which
        is at most 13 % off; NaN without energy.
        """
        total = float(self.energy.sum())
        if total <= 0:
            return math.nan
        counts, energy = self.counts.flip(0).double(), self.energy.flip(0)
        wanted = max(1, math.ceil(tokens * float(counts.sum()) * (1 - 1e-12)))
        taken = (wanted - (counts.cumsum(0) - counts)).clamp(min=0.0)
        part = (taken / counts.clamp_min(1.0)).clamp_max(1.0)
        return float((part * energy).sum()) / total


class LayerDistribution:
    """Both histograms of one layer's input, for the tokens of one modality or of all."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.magnitudes = MagnitudeHistogram(device)
        self.tokens = TokenEnergies(device)

    def update(self, x: torch.Tensor) -> None:
        """Add tokens, float [tokens, channels]."""
        self.magnitudes.update(x)
        self.tokens.update(torch.linalg.vector_norm(x, dim=1, dtype=torch.float64))

    def merge(self, other: LayerDistribution) -> None:
        self.magnitudes.merge(other.magnitudes)
        self.tokens.merge(other.tokens)

    def cpu(self) -> LayerDistribution:
        """Move the counts to the CPU, in place."""
        for part in (self.magnitudes, self.tokens):
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor):
                    setattr(part, name, value.cpu())
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """All counts, as tensors; :meth:`restored` takes them up bit for bit."""
        tokens = self.tokens
        return {
            "magnitudes": self.magnitudes.counts,
            "tokens": tokens.counts,
            "energy": tokens.energy,
            "first": tokens.first,
            "prompts": torch.tensor(tokens.prompts),
        }

    @classmethod
    def restored(cls, state: Mapping[str, torch.Tensor]) -> LayerDistribution:
        """Histograms from their :meth:`state`, on the state's device."""
        found = cls(state["magnitudes"].device)
        found.magnitudes.counts = state["magnitudes"]
        found.tokens.counts, found.tokens.energy = state["tokens"], state["energy"]
        found.tokens.first, found.tokens.prompts = state["first"], bool(state["prompts"])
        return found
