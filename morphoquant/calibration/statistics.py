"""Streaming, mergeable statistics of activations, per channel and per modality (SPEC 2.1, 6).

The result does not depend on batch size, batch order or padding: minima and maxima are exact,
sums and central moments are kept in float64 and merged pairwise (Chan et al. 1979, Pebay 2008).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch

from morphoquant.errors import ActivationError
from morphoquant.models.structure import MODALITIES, Modality

ROWS = 4096  # rows converted to float64 at a time, to bound memory on wide layers
Score = Literal["log1p", "mean"]


class ChannelStatistics:
    """Moments of the columns of everything shown to it.

    Attributes (each [channels], float64 except the range, which keeps the activation's values):
        n: rows seen (an int).
        lo, hi: minimum and maximum.
        mean, m2, m3, m4: mean and central moment *sums*.
        abs_sum: sum of absolute values.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.lo = torch.full((channels,), torch.inf, device=device)
        self.hi = torch.full((channels,), -torch.inf, device=device)
        shape = {"size": (channels,), "dtype": torch.float64, "device": device}
        self.mean, self.m2, self.m3, self.m4, self.abs_sum = (
            torch.zeros(**shape)  # type: ignore[call-overload]
            for _ in range(5)
        )

    def update(self, x: torch.Tensor) -> None:
        """Add rows [rows, channels].

        Raises:
            ActivationError: a value is NaN or infinite (the sums would be silently void).
        """
        if x.shape[0] == 0:
            return
        if not torch.isfinite(x).all():
            raise ActivationError("activation statistics met a NaN or infinite value")
        for rows in x.split(ROWS):
            part = ChannelStatistics.__new__(ChannelStatistics)
            values = rows.double()
            part.n = values.shape[0]
            part.lo, part.hi = rows.float().aminmax(dim=0)
            part.mean = values.mean(0)
            part.abs_sum = values.abs().sum(0)
            centred = values - part.mean
            square = centred * centred
            part.m2 = square.sum(0)
            part.m3 = (square * centred).sum(0)
            part.m4 = (square * square).sum(0)
            self.merge(part)

    def merge(self, other: ChannelStatistics) -> None:
        """Add another accumulator's rows; associative and commutative up to rounding."""
        if other.n == 0:
            return
        self.lo = torch.minimum(self.lo, other.lo)
        self.hi = torch.maximum(self.hi, other.hi)
        self.abs_sum = self.abs_sum + other.abs_sum
        a, b = float(self.n), float(other.n)
        n = a + b
        d = other.mean - self.mean
        m2, m3, m4 = self.m2, self.m3, self.m4
        self.m4 = (
            m4
            + other.m4
            + d**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * d**2 * (a * a * other.m2 + b * b * m2) / n**2
            + 4 * d * (a * other.m3 - b * m3) / n
        )
        self.m3 = (
            m3 + other.m3 + d**3 * a * b * (a - b) / n**2 + 3 * d * (a * other.m2 - b * m2) / n
        )
        self.m2 = m2 + other.m2 + d * d * a * b / n
        self.mean = self.mean + d * (b / n)
        self.n += other.n

    @classmethod
    def merged(cls, parts: Iterable[ChannelStatistics]) -> ChannelStatistics:
        """A new accumulator holding everything in ``parts`` (at least one)."""
        found = list(parts)
        total = cls(found[0].lo.numel(), found[0].lo.device)
        for part in found:
            total.merge(part)
        return total

    # ------------------------------------------------------------------- derived, each [channels]

    @property
    def absmax(self) -> torch.Tensor:
        return torch.maximum(self.lo.abs(), self.hi.abs()).double()

    @property
    def abs_mean(self) -> torch.Tensor:
        return self.abs_sum / max(self.n, 1)

    @property
    def std(self) -> torch.Tensor:
        return (self.m2 / max(self.n, 1)).sqrt()

    @property
    def rms(self) -> torch.Tensor:
        return (self.m2 / max(self.n, 1) + self.mean**2).sqrt()

    @property
    def excess_kurtosis(self) -> torch.Tensor:
        """n * M4 / M2^2 - 3; zero for a constant channel."""
        flat = self.m2 <= 0
        value = self.n * self.m4 / self.m2.masked_fill(flat, 1.0) ** 2 - 3.0
        return value.masked_fill(flat, 0.0)

    @property
    def crest(self) -> torch.Tensor:
        """max|x| / rms; zero for an all-zero channel."""
        return self.absmax / self.rms.clamp_min(torch.finfo(torch.float64).tiny)

    def dispersion(self, score: Score = "log1p") -> torch.Tensor:
        """How long-tailed each channel is, float64 [channels] (SPEC 2.2).

        ``log1p``: (hi - lo) / ln(1 + mean|x| + 1e-5), the public implementation's.
        ``mean``: (hi - lo) / (mean|x| + 1e-5), the arXiv text's, free of scale.
        """
        spread = (self.hi - self.lo).double().clamp_min(0.0)
        centre = self.abs_mean + 1e-5
        return spread / (torch.log1p(centre) if score == "log1p" else centre)


class ModalityStatistics:
    """One :class:`ChannelStatistics` per modality for the input of one group of linears."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.parts = {m: ChannelStatistics(channels, device) for m in MODALITIES}

    def update(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        """Add activations [..., channels] with modality labels [...]; padding is skipped."""
        rows, kinds = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
        for modality, part in self.parts.items():
            part.update(rows[kinds == int(modality)])

    def merge(self, other: ModalityStatistics) -> None:
        for modality, part in self.parts.items():
            part.merge(other.parts[modality])

    @property
    def present(self) -> dict[Modality, ChannelStatistics]:
        """The modalities that occurred."""
        return {m: part for m, part in self.parts.items() if part.n}

    def pooled(self) -> ChannelStatistics:
        """Statistics over all non-padding tokens, whatever their modality."""
        return ChannelStatistics.merged(self.parts.values())
