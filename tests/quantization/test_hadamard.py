"""T3, T4: exact orthogonality of every construction; the fast transform equals the dense one."""

from __future__ import annotations

import math

import pytest
import torch

from morphoquant.quantization.galois import prime_power, quadratic_character
from morphoquant.quantization.hadamard import (
    WILLIAMSON_43,
    HadamardError,
    HadamardTransform,
    factor,
    hadamard,
)

WIDTHS = (2048, 3584, 11008, 18944, 4096, 14336, 1280, 5120, 32, 128, 256, 512)
# Paley I over primes (12, 20, 24, 44) and a prime power (28 from 27), Paley II over primes
# (76, 148) and prime powers (52 from 25, 100 from 49, 244 from 121), Williamson, products.
ORDERS = (1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 52, 64, 76, 100, 140, 144, 148, 172, 244)


@pytest.mark.parametrize("n", ORDERS)
def test_rows_are_orthogonal_in_exact_arithmetic(n: int) -> None:
    matrix = hadamard(n).to(torch.int64)
    assert bool((matrix.abs() == 1).all())
    identity = n * torch.eye(n, dtype=torch.int64)
    assert torch.equal(matrix @ matrix.T, identity)
    assert torch.equal(matrix.T @ matrix, identity)


def test_williamson_circulants_are_symmetric_and_sum_to_172() -> None:
    total = torch.zeros(43, dtype=torch.int64)
    for text in WILLIAMSON_43:
        row = torch.tensor([1 if sign == "+" else -1 for sign in text])
        assert torch.equal(row[1:], row[1:].flip(0))
        total += torch.stack([(row * row.roll(shift)).sum() for shift in range(43)])
    assert total.tolist() == [172] + [0] * 42


@pytest.mark.parametrize("q", [3, 9, 13, 25, 27, 49, 73])
def test_quadratic_character_of_a_field(q: int) -> None:
    """Known sums: rows vanish, S S^T = q I - J, symmetry follows q mod 4."""
    jacobsthal = quadratic_character(q)
    assert torch.equal(jacobsthal.sum(dim=1), torch.zeros(q, dtype=torch.int64))
    expected = q * torch.eye(q, dtype=torch.int64) - torch.ones(q, q, dtype=torch.int64)
    assert torch.equal(jacobsthal @ jacobsthal.T, expected)
    assert torch.equal(jacobsthal.T, jacobsthal if q % 4 == 1 else -jacobsthal)


def test_prime_powers() -> None:
    assert prime_power(27) == (3, 3)
    assert prime_power(73) == (73, 1)
    assert prime_power(1) is None
    assert prime_power(85) is None
    with pytest.raises(ValueError, match="no odd prime power"):
        quadratic_character(8)


@pytest.mark.parametrize(
    ("n", "base", "power"),
    [(2048, 1, 2048), (3584, 28, 128), (11008, 172, 64), (18944, 148, 128), (5120, 20, 256)],
)
def test_factors_of_model_widths(n: int, base: int, power: int) -> None:
    matrix, k = factor(n)
    assert (matrix.shape[0], k) == (base, power)


@pytest.mark.parametrize("n", WIDTHS)
def test_wide_transforms_are_orthogonal(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    transform = HadamardTransform(n)
    y = transform(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=0, atol=1e-9)
    torch.testing.assert_close(transform.inverse(y), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(transform(transform.inverse(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 12, 28, 172, 256, 512, 1280, 3584])
def test_fast_equals_dense(n: int) -> None:
    x = torch.randn(2, 3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    dense = hadamard(n) / math.sqrt(n)
    transform = HadamardTransform(n)
    torch.testing.assert_close(transform(x), x @ dense, rtol=0, atol=1e-11)
    torch.testing.assert_close(transform.inverse(x), x @ dense.T, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", WIDTHS)
def test_fast_equals_rows_of_the_dense(n: int) -> None:
    """T4 where the dense matrix would not fit: signs of kron(base, Sylvester), entry by entry.

    Sylvester's entry (i, j) is -1 to the number of ones that i and j have in common.
    """
    base, power = factor(n)
    draw = torch.Generator().manual_seed(n)
    rows = torch.tensor([0, n - 1, *torch.randint(n, (3,), generator=draw).tolist()])
    column, row = torch.arange(n), rows.unsqueeze(1)
    common = (row % power) & (column % power)
    ones = sum((common >> bit) & 1 for bit in range(power.bit_length()))
    signs = base[row // power, column // power] * (1 - 2 * (ones % 2))
    expected = signs.double() / math.sqrt(n)
    units = torch.zeros(len(rows), n, dtype=torch.float64)
    units[torch.arange(len(rows)), rows] = 1
    torch.testing.assert_close(HadamardTransform(n)(units), expected, rtol=0, atol=1e-14)
    # The inverse multiplies by the transpose: its output at `rows` is the dot product with them.
    x = torch.randn(n, dtype=torch.float64, generator=draw)
    found = HadamardTransform(n).inverse(x)[rows]
    torch.testing.assert_close(found, expected @ x, rtol=0, atol=1e-11)


def test_forward_and_inverse_differ_where_the_matrix_is_not_symmetric() -> None:
    x = torch.eye(12, dtype=torch.float64)
    transform = HadamardTransform(12)
    assert not torch.allclose(transform(x), transform.inverse(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3584, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = HadamardTransform(3584)(x)
    exact = HadamardTransform(3584)(x.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_unknown_order_is_refused_and_blocks_are_offered() -> None:
    with pytest.raises(HadamardError, match=r"3420.*rotate_block"):
        HadamardTransform(3420)
    with pytest.raises(ValueError, match="positive order"):
        factor(0)
    transform = HadamardTransform(18944, block_diagonal=True)
    assert transform.block == 512
    assert "37 blocks of 512" in transform.description
    x = torch.randn(2, 18944, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = hadamard(512) / math.sqrt(512)
    expected = (x.unflatten(-1, (37, 512)) @ block).flatten(-2)
    torch.testing.assert_close(transform(x), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(transform.inverse(transform(x)), x, rtol=0, atol=1e-11)


def test_module_has_no_state_and_refuses_other_widths() -> None:
    transform = HadamardTransform(64)
    assert not list(transform.state_dict())
    with pytest.raises(ValueError, match="expected 64 channels"):
        transform(torch.zeros(2, 32))


def test_an_outlier_is_spread_evenly() -> None:
    """What the rotation is for: one channel of 1 becomes n channels of 1/sqrt(n)."""
    x = torch.zeros(1, 11008, dtype=torch.float64)
    x[0, 7] = 1.0
    spread = HadamardTransform(11008)(x).abs()
    torch.testing.assert_close(spread, torch.full_like(spread, 11008**-0.5), rtol=1e-12, atol=0)
