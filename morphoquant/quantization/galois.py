"""Squares in finite fields: what Paley's Hadamard matrices are made of."""

from __future__ import annotations

import itertools

import torch

Polynomial = tuple[int, ...]  # coefficients, lowest degree first


def prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with q = p^k, p prime, k >= 1; None where q is no prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _reduced(product: list[int], modulus: Polynomial, p: int) -> Polynomial:
    """Remainder of a polynomial by a monic ``modulus`` over GF(p)."""
    k = len(modulus) - 1
    for top in range(len(product) - 1, k - 1, -1):
        lead = product[top] % p
        for i in range(k + 1):
            product[top - k + i] -= lead * modulus[i]
    return tuple(c % p for c in product[:k])


def _times(a: Polynomial, b: Polynomial, modulus: Polynomial, p: int) -> Polynomial:
    product = [0] * (len(a) + len(b) - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            product[i + j] += x * y
    return _reduced(product, modulus, p)


def _irreducible(p: int, k: int) -> Polynomial:
    """A monic polynomial of degree k over GF(p) that no monic of degree <= k/2 divides."""
    for low in itertools.product(range(p), repeat=k):
        candidate = (*low, 1)
        divisors = (
            (*tail, 1)
            for degree in range(1, k // 2 + 1)
            for tail in itertools.product(range(p), repeat=degree)
        )
        if all(any(_reduced(list(candidate), divisor, p)) for divisor in divisors):
            return candidate
    raise AssertionError(f"every finite field exists, but no GF({p}^{k}) was found")


def quadratic_character(q: int) -> torch.Tensor:
    """Jacobsthal matrix of GF(q), q an odd prime power.

    Returns:
        int64 [q, q], entry (i, j) = chi(a_i - a_j): 0 on the diagonal, 1 where the difference is
        a square in GF(q), -1 where it is not. Symmetric for q = 1 mod 4, skew for q = 3 mod 4.
    """
    found = prime_power(q)
    if found is None or found[0] == 2:
        raise ValueError(f"{q} is no odd prime power")
    p, k = found
    modulus = _irreducible(p, k)
    elements = list(itertools.product(range(p), repeat=k))
    weights = torch.tensor([p**i for i in range(k)])
    squares = {_times(a, a, modulus, p) for a in elements if any(a)}
    chi = torch.full((q,), -1, dtype=torch.int64)
    chi[(torch.tensor(sorted(squares)) * weights).sum(dim=1)] = 1
    chi[0] = 0
    table = torch.tensor(elements)
    difference = (table[:, None, :] - table[None, :, :]) % p
    return chi[(difference * weights).sum(dim=-1)]
