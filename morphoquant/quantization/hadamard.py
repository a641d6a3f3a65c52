"""Hadamard matrices by construction, and the fast transform they give.

A Hadamard matrix H has entries +-1 and H H^T = n I. ``hadamard(n)`` builds one for every order
that these cover (everything a transformer's widths ask for):

- Sylvester: 1, 2 and doubling.
- Paley I: q + 1 for a prime power q = 3 mod 4.
- Paley II: 2 (q + 1) for a prime power q = 1 mod 4 (28 from 13, 148 from 73).
- Williamson: 172, from four symmetric circulants of order 43. No Paley matrix has this order.
- Kronecker products of the above.

The transform never forms H for a wide layer. ``factor(n)`` writes H as a Kronecker product
``B (x) S`` of a small base and a power of two, and the power of two is cut into factors of at most
128, so x H is two or three small matrix products over reshaped axes. They run at matrix speed on
CPUs and GPUs alike, which butterflies made of separate additions do not.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import nn

from morphoquant.errors import HarnessError
from morphoquant.quantization.galois import prime_power, quadratic_character

# First rows of four symmetric circulants A, B, C, D of order 43 with A^2 + B^2 + C^2 + D^2 = 172 I.
# Found by trying all 128^4 rows that are constant on the cosets of {+-1, +-6, +-36} mod 43.
WILLIAMSON_43 = (
    "++-+--++-+++----+++-++++-+++----+++-++--+-+",
    "+-+-+----++++-++++-++--++-++++-++++----+-+-",
    "+--+++--+-+--+-+++++-++-+++++-+--+-+--+++--",
    "+--++----+-+---+--++++++++--+---+-+----++--",
)
LARGEST_BASE = 512  # a base is a dense factor of the transform; beyond this it is no longer fast
LARGEST_FACTOR = 128  # per power-of-two factor: two products of 128 beat one of 16384


class HadamardError(HarnessError, ValueError):
    """A width for which no Hadamard matrix is known."""


def _circulant(row: torch.Tensor) -> torch.Tensor:
    """Row i is ``row`` rotated right by i: [n] -> [n, n]."""
    index = torch.arange(row.numel())
    return row[(index[None, :] - index[:, None]) % row.numel()]


def _williamson(rows: tuple[str, ...]) -> torch.Tensor:
    """The 4m x 4m array of four commuting symmetric m x m blocks (Williamson 1944)."""
    signs = [torch.tensor([1 if s == "+" else -1 for s in row]) for row in rows]
    a, b, c, d = (_circulant(row) for row in signs)
    blocks = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(row, dim=1) for row in blocks])


def _paley_first(q: int) -> torch.Tensor:
    """Order q + 1 for a prime power q = 3 mod 4: I + S with S skew-symmetric."""
    skew = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = quadratic_character(q)
    return skew + torch.eye(q + 1, dtype=torch.int64)


def _paley_second(q: int) -> torch.Tensor:
    """Order 2 (q + 1) for a prime power q = 1 mod 4, from a symmetric conference matrix."""
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = quadratic_character(q)
    sign, diagonal = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    identity = torch.eye(q + 1, dtype=torch.int64)
    return torch.kron(conference, sign) + torch.kron(identity, diagonal)


def _sylvester(n: int) -> torch.Tensor:
    """Order n, a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(n.bit_length() - 1):
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]]), matrix)
    return matrix


@cache
def _base(m: int) -> torch.Tensor | None:
    """A Hadamard matrix of order m that is not a doubling of a smaller one, int64, or None."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int64)
    if m % 4:
        return None
    if prime_power(m - 1) is not None:  # m - 1 = 3 mod 4
        return _paley_first(m - 1)
    half = m // 2 - 1
    if half % 4 == 1 and prime_power(half) is not None:
        return _paley_second(half)
    if m == 4 * len(WILLIAMSON_43[0]):
        return _williamson(WILLIAMSON_43)
    for left in range(12, math.isqrt(m) + 1, 4):  # e.g. 144 = 12 * 12
        if m % left == 0:
            first, second = _base(left), _base(m // left)
            if first is not None and second is not None:
                return torch.kron(first, second)
    return None


def factor(n: int) -> tuple[torch.Tensor, int]:
    """Write a Hadamard matrix of order n as ``kron(base, sylvester(k))``.

    Returns:
        base: int64 [m, m]; the smallest m for which a construction is known.
        k: the power of two with m * k = n.

    Raises:
        HadamardError: no construction covers n.
        ValueError: n is not positive.
    """
    if n < 1:
        raise ValueError(f"a Hadamard matrix has a positive order, got {n}")
    power = n & -n
    odd = n // power
    twos = 1
    while twos <= power and (odd * twos <= LARGEST_BASE or twos == 1):
        base = _base(odd * twos)
        if base is not None:
            return base, power // twos
        twos *= 2
    raise HadamardError(
        f"no Hadamard matrix of order {n} = {odd} * {power} is known here. Set method/transform="
        f"rotate_block (block_diagonal=true): it rotates blocks of {power} instead"
    )


def hadamard(n: int) -> torch.Tensor:
    """A Hadamard matrix: float64 [n, n] of +-1 with ``H H^T = n I``. Not always symmetric.

    Raises:
        HadamardError: no construction covers n.
    """
    base, power = factor(n)
    return torch.kron(base, _sylvester(power)).to(torch.float64)


def _power_factors(k: int) -> list[int]:
    """Cut a power of two into near-equal powers of two of at most :data:`LARGEST_FACTOR`."""
    exponent = k.bit_length() - 1
    parts = math.ceil(exponent / (LARGEST_FACTOR.bit_length() - 1))
    return [1 << (exponent // parts + (i < exponent % parts)) for i in range(parts)]


class HadamardTransform(nn.Module):
    """``x -> x H / sqrt(n)`` along the last axis, orthonormal and fast.

    H need not be symmetric: :meth:`forward` multiplies by H, :meth:`inverse` by its transpose.
    Half-precision inputs are computed in float32 and come back in their own dtype. The module has
    no parameters and nothing in the state dict; its small factors follow the input's device.

    Args:
        n: width of the last axis.
        block_diagonal: instead of one matrix of order n, rotate blocks whose width is the largest
            power of two that divides n. No mixing between blocks, but it exists for every n.

    Attributes:
        n: the width.
        block: width of the blocks that are mixed (n, unless block-diagonal).
        description: what was built, for the manifest.
    """

    def __init__(self, n: int, block_diagonal: bool = False) -> None:
        super().__init__()
        self.n = n
        if block_diagonal:
            self.block = n & -n
            base, power = torch.ones(1, 1, dtype=torch.int64), self.block
            self.description = f"hadamard {n // self.block} blocks of {self.block}"
        else:
            self.block = n
            base, power = factor(n)
            self.description = f"hadamard {n} = {base.shape[0]} * {power}"
        matrices = [_sylvester(size) for size in _power_factors(power)] if power > 1 else []
        if base.shape[0] > 1:
            matrices.insert(0, base)
        self._factors = [m.to(torch.float64) / math.sqrt(m.shape[0]) for m in matrices]
        self._placed: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}

    def _matrices(self, like: torch.Tensor) -> list[torch.Tensor]:
        key = (like.device, like.dtype)
        if key not in self._placed:
            self._placed[key] = [m.to(device=like.device, dtype=like.dtype) for m in self._factors]
        return self._placed[key]

    def _apply_factors(self, x: torch.Tensor, transpose: bool) -> torch.Tensor:
        if x.shape[-1] != self.n:
            raise ValueError(f"expected {self.n} channels, got shape {tuple(x.shape)}")
        work = x if x.dtype == torch.float64 else x.float()
        for matrix in self._matrices(work):
            # One axis of the Kronecker product at a time: bring it last, multiply, and let the
            # next round find its own axis last. After all rounds the axes are back in order.
            size = matrix.shape[0]
            work = work.reshape(-1, size, self.block // size).transpose(1, 2)
            work = torch.matmul(work, matrix.T if transpose else matrix)
        return work.reshape(x.shape).to(x.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> x H / sqrt(n), [..., n]."""
        return self._apply_factors(x, transpose=False)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> x H^T / sqrt(n), [..., n]; undoes :meth:`forward`."""
        return self._apply_factors(x, transpose=True)

    def extra_repr(self) -> str:
        return self.description
