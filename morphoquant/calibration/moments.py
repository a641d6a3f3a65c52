"""Streaming, mergeable moments and ranges of the columns of a matrix (SPEC 2.1, 2.2).

Minima and maxima are exact. Power sums are float64 and taken about a pivot close to the mean
(Chan et al. 1979; Pebay 2008 for the change of pivot).

Notable choices:
    * Rows are worked on in pieces that stay in the second-level cache, and sums over rows are
      matrix-vector products.
    * The pivot is the mean of the first piece and stays. Those n1 of finally n rows are among the
      rows seen, so a central sum of k-th powers is at least n1 d^k, where d is how far off the
      pivot is (Jensen), and what cancels is at most n d^k: of 16 digits at most log10(n / n1) are
      lost, and none because the mean is large against the standard deviation.
    * NaN and infinity are not looked for: they surface in the sum of absolute values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import torch

from morphoquant.errors import ActivationError

PIECE = 1 << 16  # elements worked on at a time: 512 KiB of float64
EPSILON = 1e-5
SMALLEST_LOGARITHM = 1e-12

Score = Literal["log1p", "mean", "log_l1", "log_mean", "absmax"]


class ChannelStatistics:
    """Moments of the columns of everything shown to it.

    Attributes (each [channels], float64 except the range, which keeps the activation's values:
    float64 for float64, else float32):
        n: rows seen (an int).
        lo, hi: minimum and maximum; infinities of the wrong sign before the first row.
        mean, m2, m3, m4: mean and central moment *sums*; of a constant channel exactly zero.
        abs_sum: sum of absolute values.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.lo = torch.full((channels,), torch.inf, device=device)
        self.hi = torch.full((channels,), -torch.inf, device=device)
        self._pivot = torch.zeros(channels, dtype=torch.float64, device=device)
        # Rows: sums of |x|, y, y^2, y^3 and y^4, with y = x - pivot.
        self._sums = torch.zeros(5, channels, dtype=torch.float64, device=device)

    def update(self, x: torch.Tensor) -> None:
        """Add rows [rows, channels].

        Raises:
            ActivationError: a value is NaN or infinite (the sums would be silently void).
        """
        for rows in x.split(piece_rows(x.shape[1])):
            self.add(rows)

    def add(self, x: torch.Tensor) -> None:
        """Add one piece, [rows, channels], at once: temporaries are of its size in float64.

        Raises:
            ActivationError: a value is NaN or infinite; the piece is not counted.
        """
        rows = x.shape[0]
        if rows == 0:
            return
        values = x.double()
        ones = values.new_ones(rows)
        powers = [ones @ values.abs()]
        if not math.isfinite(float(powers[0].sum())):
            raise ActivationError("activation statistics met a NaN or infinite value")
        self.lo = torch.minimum(self.lo, x.amin(0))
        self.hi = torch.maximum(self.hi, x.amax(0))
        if self.n == 0:
            self._pivot = (ones @ values) / rows
        y = values - self._pivot
        square = y * y
        powers += [ones @ y, ones @ square, ones @ y.mul_(square), ones @ square.mul_(square)]
        self._sums = self._sums + torch.stack(powers)
        self.n += rows

    def _about(self, pivot: torch.Tensor) -> torch.Tensor:
        """The sums, [5, channels], with y taken from ``pivot`` instead."""
        d = pivot - self._pivot
        n = self.n
        size, s1, s2, s3, s4 = self._sums
        return torch.stack(
            [
                size,
                s1 - n * d,
                s2 - 2 * d * s1 + n * d**2,
                s3 - 3 * d * s2 + 3 * d**2 * s1 - n * d**3,
                s4 - 4 * d * s3 + 6 * d**2 * s2 - 4 * d**3 * s1 + n * d**4,
            ]
        )

    def merge(self, other: ChannelStatistics) -> None:
        """Add another accumulator's rows; associative and commutative up to rounding."""
        if other.n == 0:
            return
        self.lo = torch.minimum(self.lo, other.lo)
        self.hi = torch.maximum(self.hi, other.hi)
        mean = other.mean
        if self.n:
            mean = self.mean + (mean - self.mean) * (other.n / (self.n + other.n))
        self._sums = self._about(mean) + other._about(mean)
        self._pivot = mean
        self.n += other.n

    @classmethod
    def merged(cls, parts: Iterable[ChannelStatistics]) -> ChannelStatistics:
        """A new accumulator holding everything in ``parts`` (at least one)."""
        found = list(parts)
        total = cls(found[0].lo.numel(), found[0].lo.device)
        for part in found:
            total.merge(part)
        return total

    def cpu(self) -> ChannelStatistics:
        """Move everything to the CPU, in place."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value.cpu())
        return self

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that is known, as tensors; :meth:`restored` takes it up bit for bit."""
        n = torch.tensor(self.n)
        return {"n": n, "lo": self.lo, "hi": self.hi, "pivot": self._pivot, "sums": self._sums}

    @classmethod
    def restored(cls, state: Mapping[str, torch.Tensor]) -> ChannelStatistics:
        """An accumulator from its :meth:`state`, on the state's device."""
        found = cls(state["lo"].numel(), state["lo"].device)
        found.n = int(state["n"])
        found.lo, found.hi = state["lo"], state["hi"]
        found._pivot, found._sums = state["pivot"], state["sums"]
        return found

    # ------------------------------------------------------------------- moments, each [channels]

    @property
    def abs_sum(self) -> torch.Tensor:
        return self._sums[0]

    @property
    def mean(self) -> torch.Tensor:
        return self._pivot + self._sums[1] / max(self.n, 1)

    @property
    def m2(self) -> torch.Tensor:
        return self._central(2)

    @property
    def m3(self) -> torch.Tensor:
        return self._central(3)

    @property
    def m4(self) -> torch.Tensor:
        return self._central(4)

    def _central(self, power: int) -> torch.Tensor:
        # Constant channels give exactly zero: all that is left of them are whole multiples of the
        # last bit of the mean, and these add up without rounding.
        value = self._about(self.mean)[power]
        return value if power == 3 else value.clamp_min(0.0)

    # ------------------------------------------------------------------- derived, each [channels]

    @property
    def absmax(self) -> torch.Tensor:
        """Largest magnitude; zero before the first row."""
        if self.n == 0:
            return torch.zeros_like(self._pivot)
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
        return excess_kurtosis(self.n, self.m2, self.m4)

    @property
    def layer_kurtosis(self) -> float:
        """Excess kurtosis of all elements of all channels as one sample; zero if all are equal."""
        count = self.n * self._pivot.numel()
        mean = self.mean
        d = mean - mean.mean()
        m2, m3, m4 = self.m2, self.m3, self.m4
        second = (m2 + self.n * d**2).sum()
        fourth = (m4 + 4 * d * m3 + 6 * d**2 * m2 + self.n * d**4).sum()
        return float(excess_kurtosis(count, second, fourth))

    @property
    def crest(self) -> torch.Tensor:
        """max|x| / rms; zero for an all-zero channel."""
        return self.absmax / self.rms.clamp_min(torch.finfo(torch.float64).tiny)

    def dispersion(self, score: Score = "log1p") -> torch.Tensor:
        """How long-tailed each channel is, float64 [channels] (SPEC 2.2).

        With the spread ``hi - lo``, the mean magnitude ``a`` and ``eps = 1e-5``:

        ``log1p``: spread / ln(1 + a + eps), the public implementation's.
        ``mean``: spread / (a + eps), free of scale.
        ``log_l1``: spread / ln(n a + eps), eq. 5 to the letter: it depends on the token count.
        ``log_mean``: spread / ln(a + eps), eq. 5 with the mean that its text speaks of.
        ``absmax``: max|x|, the plain outlier score of LLM.int8 and Atom.

        The last two logarithms are negative below one, and so are their scores, as the formula
        has it. At one they are zero: a magnitude below 1e-12 is raised to that, keeping its sign
        (zero counts as positive), so that scores are large but finite. A channel without spread
        scores zero under all but ``absmax``.
        """
        if score == "absmax":
            return self.absmax
        spread = (self.hi.double() - self.lo.double()).clamp_min(0.0)
        if score == "mean":
            return spread / (self.abs_mean + EPSILON)
        if score == "log1p":
            return spread / torch.log1p(self.abs_mean + EPSILON)
        size = (self.abs_sum if score == "log_l1" else self.abs_mean) + EPSILON
        logarithm = size.log()
        singular = logarithm.abs() < SMALLEST_LOGARITHM
        floor = torch.where(logarithm < 0, -SMALLEST_LOGARITHM, SMALLEST_LOGARITHM)
        # Adding zero turns a negative zero into zero.
        return spread / torch.where(singular, floor, logarithm) + 0.0


def excess_kurtosis(n: int, m2: torch.Tensor, m4: torch.Tensor) -> torch.Tensor:
    """n * M4 / M2^2 - 3 of central moment sums over ``n`` values; zero where M2 is zero."""
    flat = m2 <= 0
    value = n * m4 / m2.masked_fill(flat, 1.0) ** 2 - 3.0
    return value.masked_fill(flat, 0.0)


def piece_rows(channels: int) -> int:
    """Rows worked on at a time."""
    return max(16, PIECE // channels)
