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
