"""A 16-bit branch of low rank beside a quantized weight (SPEC 4.12, 4.13).

``Y = x_hat W_hat^T + (x down^T) up^T + b``: the branch reads the activation as it is, before its
quantizer. Two orders: SVDQuant takes the largest singular directions out of the weight before the
rest is rounded, so the rest has a smaller range; the other way round the branch is fitted to what
rounding lost, in the weight's own norm or, *whitened*, where it matters for the outputs on
calibration data (MASQuant, arXiv 2603.04800).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from morphoquant.config.schema import CompensationConfig
from morphoquant.models.structure import Tower

DAMPING = 1e-4  # of the mean diagonal: keeps the second moment invertible


@dataclass(frozen=True)
class LowRank:
    """``up @ down``: [out, rank] and [rank, in], the weight's dtype."""

    up: torch.Tensor
    down: torch.Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def product(self) -> torch.Tensor:
        """[out, in]."""
        return self.up @ self.down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return (x @ self.down.T) @ self.up.T

    def storage_bits(self) -> float:
        """Bits per weight of the matrix that it stands beside (16 per stored number)."""
        outputs, inputs = self.up.shape[0], self.down.shape[1]
        return 16 * self.rank * (outputs + inputs) / (outputs * inputs)

    def flops_per_token(self) -> int:
        """Operations that the branch adds."""
        return 2 * self.rank * (self.up.shape[0] + self.down.shape[1])


def has_branch(config: CompensationConfig, tower: Tower, group: str) -> bool:
    """Whether the linears of an input group get a branch.

    Branches per modality belong to the decoder: in a tower all tokens are of one modality, and
    nothing is smoothed there.
    """
    if config.name != "low_rank":
        return False
    if tower != "decoder":
        return not config.per_modality
    return group in config.groups


def rank_of(config: CompensationConfig, weight: torch.Tensor) -> int:
    """The rank of the branch beside ``weight`` [out, in]: at least 1."""
    if config.rank_share is None:
        return config.rank
    return max(1, round(config.rank_share * min(weight.shape)))


def truncated(matrix: torch.Tensor, rank: int) -> LowRank:
    """The nearest matrix of at most ``rank`` in the Frobenius norm (Eckart and Young).

    Args:
        matrix: [out, in].
        rank: larger ranks than the matrix has are cut to it.
    """
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = min(rank, s.numel())
    root = s[:kept].sqrt()
    up, down = u[:, :kept] * root, root[:, None] * vh[:kept]
    return LowRank(up.to(matrix.dtype), down.to(matrix.dtype))


def whitened(matrix: torch.Tensor, second_moment: torch.Tensor, rank: int) -> LowRank:
    """The matrix L of at most ``rank`` with the least ``E |x (matrix - L)^T|^2``.

    Args:
        matrix: [out, in], what is to be made up for.
        second_moment: [in, in], sum of x x^T over calibration tokens (any positive scale).
        rank: of the branch.
    """
    moment = second_moment.double()
    scale = moment.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    root = torch.linalg.cholesky(moment / scale + DAMPING * eye)  # moment = root root^T
    u, s, vh = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
    kept = min(rank, s.numel())
    half = s[:kept].sqrt()
    # vh root^-1, by a triangular solve from the right
    back = torch.linalg.solve_triangular(root, half[:, None] * vh[:kept], upper=False, left=False)
    return LowRank((u[:, :kept] * half).to(matrix.dtype), back.to(matrix.dtype))
