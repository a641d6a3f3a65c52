"""Gradient descent over orthogonal matrices by the Cayley transform (Li et al., arXiv 2002.01113).

For a square orthogonal R and the gradient G = dL/dR, the skew-symmetric

    W = (R G^T - G R^T) / 2

points downhill, and ``(I - tau/2 W)^-1 (I + tau/2 W) R`` is orthogonal for every step tau. The
inverse is avoided: the result is the fixed point of ``Y = R + tau/2 W (R + Y)``, which a few
rounds approximate. Each round divides the error by ``2 / (tau |W|)``, so tau is capped at 1 / |W|
(the largest absolute column sum), as in the authors' code. What is left of the error is removed by
:func:`orthonormalized` every few steps.
"""

from __future__ import annotations

import math

import torch

EPSILON = 1e-8  # keeps the cap on the step finite where the gradient vanishes


def skew_descent(rotation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The direction W of steepest descent, skew-symmetric: [n, n].

    Args:
        rotation: R, orthogonal [n, n].
        gradient: dL/dR [n, n], not necessarily tangent. Only its tangent part matters.
    """
    product = gradient @ rotation.T
    return (product.T - product) / 2


def cayley_step(
    rotation: torch.Tensor, gradient: torch.Tensor, rate: float, iterations: int = 5
) -> torch.Tensor:
    """One step downhill from ``rotation``, orthogonal up to the error of the iterations.

    Args:
        rotation: R, orthogonal [n, n].
        gradient: dL/dR [n, n].
        rate: step along the skew-symmetric direction; taken shorter where it exceeds 1 / |W|.
        iterations: rounds of the fixed-point iteration.

    Returns:
        [n, n]; of ``|R^T R - I|`` at most half is left by every round.
    """
    direction = skew_descent(rotation, gradient)
    largest = float(torch.linalg.matrix_norm(direction, ord=1))
    step = min(rate, 1.0 / (largest + EPSILON))
    moved = rotation + step * (direction @ rotation)
    for _ in range(iterations):
        moved = rotation + (step / 2) * (direction @ (rotation + moved))
    return moved


def orthonormalized(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal factor of ``matrix`` = Q R with a positive diagonal of R: float64 [n, n].

    The sign makes it unique, and a matrix that is orthogonal already stays as it is.
    """
    orthogonal, triangle = torch.linalg.qr(matrix.double())
    diagonal = triangle.diagonal()
    return orthogonal * torch.where(diagonal < 0, -1.0, 1.0).to(orthogonal)


def orthogonality_error(matrix: torch.Tensor) -> float:
    """``max |R^T R - I|``, computed in float64."""
    rotation = matrix.double()
    identity = torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
    return float((rotation.T @ rotation - identity).abs().max())


def cosine_rate(rate: float, step: int, steps: int) -> float:
    """The rate of step 0 .. steps - 1, falling from ``rate`` towards zero as half a cosine."""
    return rate * (1 + math.cos(math.pi * step / steps)) / 2


class LearnedRotation:
    """``x -> x R`` along the last axis, R [n, n] orthogonal and open to gradient steps.

    Attributes:
        n: width.
        matrix: R in float64; the products use copies in the dtypes and on the devices that x has.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.n = matrix.shape[0]
        self._copies: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}

    def _like(self, x: torch.Tensor) -> torch.Tensor:
        key = (x.dtype, x.device)
        if key not in self._copies:
            # One leaf for all products of a pass on a device: it gathers their gradients.
            copy = self.matrix.detach().to(device=x.device, dtype=x.dtype, copy=True)
            self._copies[key] = copy.requires_grad_()
        return self._copies[key]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> x R."""
        return x @ self._like(x)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """[..., n] -> x R^T."""
        return x @ self._like(x).T

    def descend(self, rate: float, iterations: int) -> None:
        """Take a step along the gradient that the last backward pass left."""
        assert self._copies, "no pass went through this rotation"
        found = [copy.grad for copy in self._copies.values() if copy.grad is not None]
        assert found, "no backward pass went through this rotation"
        gradient = torch.stack([grad.to(self.matrix) for grad in found]).sum(0)
        self._replace(cayley_step(self.matrix, gradient, rate, iterations))

    @property
    def error(self) -> float:
        """``max |R^T R - I|``."""
        return orthogonality_error(self.matrix)

    def project(self) -> float:
        """Re-orthonormalize; returns the error of before."""
        error = self.error
        self._replace(orthonormalized(self.matrix))
        return error

    def _replace(self, matrix: torch.Tensor) -> None:
        self.matrix, self._copies = matrix, {}
