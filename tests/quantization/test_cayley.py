"""Descent over orthogonal matrices, against the exact Cayley transform and closed-form losses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.quantization.transforms.cayley import (
    LearnedRotation,
    cayley_step,
    cosine_rate,
    orthogonality_error,
    orthonormalized,
    skew_descent,
)


def noise(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def random_rotation(n: int, seed: int) -> torch.Tensor:
    return orthonormalized(noise(n, n, seed=seed))


def exact_step(rotation: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
    """The Cayley transform with a solved linear system, at the same capped step."""
    direction = skew_descent(rotation, gradient)
    half = min(rate, 1 / (float(direction.abs().sum(0).max()) + 1e-8)) / 2 * direction
    identity = torch.eye(len(rotation), dtype=torch.float64)
    return torch.linalg.solve(identity - half, (identity + half) @ rotation)


SIZES, SEEDS = st.integers(2, 24), st.integers(0, 10**6)
RATES = st.floats(1e-4, 10.0)  # far beyond the cap as well


@given(SIZES, SEEDS, RATES)
def test_iterated_to_convergence_it_is_the_cayley_transform(n: int, seed: int, rate: float) -> None:
    rotation, gradient = random_rotation(n, seed), noise(n, n, seed=seed + 1)
    found = cayley_step(rotation, gradient, rate, iterations=60)
    torch.testing.assert_close(found, exact_step(rotation, gradient, rate), rtol=0, atol=1e-13)
    assert orthogonality_error(found) < 1e-13


@given(SIZES, SEEDS, RATES)
def test_every_round_leaves_at_most_half_of_the_error(n: int, seed: int, rate: float) -> None:
    rotation, gradient = random_rotation(n, seed), noise(n, n, seed=seed + 1)
    exact = exact_step(rotation, gradient, rate)
    # In the norm in which the step is capped: multiplication by the direction then halves at least.
    errors = [
        float(
            torch.linalg.matrix_norm(cayley_step(rotation, gradient, rate, rounds) - exact, ord=1)
        )
        for rounds in range(8)
    ]
    for before, after in pairwise(errors):
        assert after <= before / 2 + 1e-13


@given(SIZES, SEEDS)
def test_the_direction_is_skew_and_descends(n: int, seed: int) -> None:
    """Along it the loss changes at the rate -|W|^2: nothing of the gradient is lost."""
    rotation, target = random_rotation(n, seed), noise(n, n, seed=seed + 1)

    def loss(matrix: torch.Tensor) -> torch.Tensor:
        return torch.sin(matrix * target).sum()

    leaf = rotation.clone().requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    direction = skew_descent(rotation, leaf.grad)
    assert torch.equal(direction, -direction.T)
    step = 1e-6
    slope = float(
        loss(cayley_step(rotation, leaf.grad, step)) - loss(cayley_step(rotation, leaf.grad, -step))
    ) / (2 * step)
    assert slope == pytest.approx(-float(direction.square().sum()), rel=1e-4, abs=1e-7)


def test_a_gradient_without_tangent_moves_nothing() -> None:
    rotation, square = random_rotation(9, 0), noise(9, 9, seed=1)
    outward = (square + square.T) @ rotation
    moved = cayley_step(rotation, outward, 1.5)
    torch.testing.assert_close(moved, rotation, rtol=0, atol=1e-12)


def test_a_known_quadratic_is_solved() -> None:
    """The best rotation of one cloud of points onto another, where it is known."""
    points, target = noise(40, 6, seed=0), random_rotation(6, 1)
    aim = points @ target
    rotation = random_rotation(6, 2)
    if torch.linalg.det(rotation) * torch.linalg.det(target) < 0:
        rotation[:, 0] *= -1  # rotations and reflections are not connected

    def loss() -> float:
        return float((points @ rotation - aim).square().mean())

    losses = [loss()]
    for _ in range(150):
        gradient = 2 * points.T @ (points @ rotation - aim) / aim.numel()
        rotation = orthonormalized(cayley_step(rotation, gradient, 0.5))
        losses.append(loss())
    assert all(later <= earlier for earlier, later in pairwise(losses))
    torch.testing.assert_close(rotation, target, rtol=0, atol=1e-6)


def test_orthonormalizing_keeps_what_is_orthogonal_and_mends_what_is_not() -> None:
    rotation = random_rotation(16, 3)
    torch.testing.assert_close(orthonormalized(rotation), rotation, rtol=0, atol=1e-14)
    reflection = torch.diag(torch.tensor([1.0, -1.0, 1.0]))
    torch.testing.assert_close(orthonormalized(reflection), reflection.double())
    drifted = rotation + 1e-3 * noise(16, 16, seed=4)
    assert orthogonality_error(drifted) > 1e-4
    mended = orthonormalized(drifted.float())
    assert orthogonality_error(mended) < 1e-14
    assert float((mended - rotation).abs().max()) < 2e-2


def test_the_rate_falls_as_half_a_cosine() -> None:
    rates = [cosine_rate(1.5, step, 100) for step in range(100)]
    assert rates[0] == 1.5
    assert rates[50] == pytest.approx(0.75)
    assert all(later < earlier for earlier, later in pairwise(rates))
    assert 0 < rates[-1] < 1e-3


def test_a_learned_rotation_turns_back_and_gathers_gradients() -> None:
    start = random_rotation(8, 5)
    rotation = LearnedRotation(start)
    x, weight = noise(3, 8, seed=6).float(), noise(3, 8, seed=7).float()
    torch.testing.assert_close(rotation.inverse(rotation(x)), x)
    assert rotation(x).dtype == torch.float32
    assert rotation.matrix.dtype == torch.float64
    (rotation(x) * weight).sum().backward()
    (rotation.inverse(x) * weight).sum().backward()
    rotation.descend(0.1, iterations=5)
    gradient = (x.T @ weight + weight.T @ x).double()
    torch.testing.assert_close(
        rotation.matrix, cayley_step(start, gradient, 0.1), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(rotation(x), x @ rotation.matrix.float())
    with pytest.raises(AssertionError, match="no backward pass"):
        rotation.descend(0.1, iterations=5)


def test_projecting_reports_the_drift() -> None:
    rotation = LearnedRotation(random_rotation(8, 8) * 1.01)
    assert rotation.project() == pytest.approx(1.01**2 - 1)
    assert rotation.error == orthogonality_error(rotation.matrix) < 1e-14
    assert math.isclose(rotation.project(), 0.0, abs_tol=1e-14)
