"""Muon for the matrices of the blocks, AdamW for everything else.

In a trial of 200 steps Muon (rate 2e-3) was ahead of AdamW (1.2e-3) in every modality, image for
example 68 to 40 percent; rates were not tuned and one seed was run. Matrices of one shape are
orthogonalized together: on two idle cores 0.14 s a step instead of 0.25 s.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

MOMENTUM = 0.95
DECAY = 0.05
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al., 2024


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximately the nearest semi-orthogonal matrices of ``[N, rows, columns]``, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] < matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT.contiguous() if wide else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x.mT @ x
        x = torch.baddbmm(x, x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
    return x.mT if wide else x


class Optimizers:
    """Both optimizers behind one ``step``; Muon's updates are scaled to AdamW's size."""

    def __init__(self, model: Any) -> None:
        self.matrices: dict[torch.Size, list[torch.Tensor]] = defaultdict(list)
        decayed, plain = [], []
        for name, parameter in model.named_parameters():
            block = any(part in name for part in ("layers", "blocks", "merger"))
            if block and parameter.ndim == 2:
                self.matrices[parameter.shape].append(parameter)
            elif parameter.ndim >= 2 and "embed" not in name:
                decayed.append(parameter)
            else:
                plain.append(parameter)
        self.momentum = {
            shape: torch.zeros(len(listed), *shape) for shape, listed in self.matrices.items()
        }
        groups = [
            {"params": decayed, "weight_decay": DECAY},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), fused=True)

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update at learning rate ``rate``; clears the gradients."""
        for shape, listed in self.matrices.items():
            # A micro-batch of one modality leaves no gradient in the other modalities' towers.
            gradients = torch.stack(
                [torch.zeros_like(p) if p.grad is None else p.grad for p in listed]
            )
            momentum = self.momentum[shape]
            momentum.lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonalize(gradients.lerp(momentum, MOMENTUM)).float()
            scale = 0.2 * max(shape) ** 0.5  # AdamW's usual root mean square
            for parameter, update in zip(listed, updates, strict=True):
                parameter.mul_(1 - rate * DECAY).add_(update, alpha=-rate * scale)
                parameter.grad = None
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
