"""The low-rank branch: best approximations, and what it adds to a linear."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.low_rank import LowRank, truncated, whitened


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(rank=st.integers(1, 14), rows=st.integers(2, 12), columns=st.integers(2, 12))
def test_truncation_is_the_best_of_its_rank(rank: int, rows: int, columns: int) -> None:
    """Eckart and Young: what is left has the energy of the smaller singular values."""
    matrix = draw(rows, columns)
    found = truncated(matrix, rank)
    assert found.rank == min(rank, rows, columns)
    left = torch.linalg.svdvals(matrix)[found.rank :]
    lost = torch.linalg.matrix_norm(matrix - found.product) ** 2
    assert float(lost) == pytest.approx(float((left**2).sum()), abs=1e-9)


@given(rank=st.integers(1, 5), seed=st.integers(0, 20))
def test_whitening_wins_on_the_data_it_was_made_for(rank: int, seed: int) -> None:
    matrix, mix = draw(9, 8, seed=seed), draw(8, 8, seed=seed + 1)
    x = draw(200, 8, seed=seed + 2) @ mix * torch.logspace(-1, 1, 8, dtype=torch.float64)
    plain, white = truncated(matrix, rank), whitened(matrix, x.T @ x, rank)

    def lost(found: LowRank) -> float:
        return float(((x @ (matrix - found.product).T) ** 2).sum())

    assert lost(white) <= lost(plain) * (1 + 1e-9)
    # No other matrix of that rank does better: try to improve it along random directions.
    for i in range(5):
        other = LowRank(white.up + 1e-3 * draw(9, rank, seed=i), white.down)
        assert lost(white) <= lost(other) * (1 + 1e-3)


def test_isotropic_data_need_no_whitening() -> None:
    matrix = draw(7, 6)
    a, b = truncated(matrix, 3).product, whitened(matrix, 5 * torch.eye(6).double(), 3).product
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_singular_data_are_survived() -> None:
    x = draw(3, 8)
    found = whitened(draw(5, 8), x.T @ x, 2)
    assert torch.isfinite(found.product).all()


def test_full_rank_gives_the_matrix_back() -> None:
    matrix = draw(4, 6)
    torch.testing.assert_close(truncated(matrix, 99).product, matrix)
    torch.testing.assert_close(whitened(matrix, torch.eye(6).double(), 99).product, matrix)


class Coarse(torch.nn.Module):
    """Rounds to whole numbers."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return x.round()


def test_the_branch_reads_the_activation_before_its_quantizer() -> None:
    source = GroupInput(2)
    source.quantizer = Coarse()
    branch = truncated(draw(5, 8), 2)
    first = QuantizedLinear(draw(5, 8, seed=1), draw(5, seed=2), source)
    second = QuantizedLinear(draw(3, 8, seed=3), None, source)
    first.set_branch(branch)
    for x in (draw(4, 8, seed=4), draw(2, 3, 8, seed=5)):
        expected = F.linear(x.round(), first.weight, first.bias) + F.linear(x, branch.product)
        torch.testing.assert_close(first(x), expected)
        torch.testing.assert_close(second(x), F.linear(x.round(), second.weight))
    assert source.tokens == 4 + 6, "the quantizer still runs once for both"


def test_costs() -> None:
    found = truncated(draw(100, 50), 10)
    assert found.storage_bits() == pytest.approx(16 * 10 * 150 / 5000)
    assert found.flops_per_token() == 2 * 10 * 150
