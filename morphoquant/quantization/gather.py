"""What rounding a group's weights may want to know of its input, gathered in one pass."""

from __future__ import annotations

import math

import torch

from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.quantization.gptq import BALANCED, Hessian
from morphoquant.quantization.rounding import needs_second_moment, needs_tokens

MAX_TOKENS = 512  # that a clip search looks at (SPEC 4.3)


class Gathered:
    """Second moment and some tokens of one input group, where the method asks for them.

    Args:
        method, bits: what will be rounded, and how.
        batches: calibration batches to come; the kept tokens are spread over them.
    """

    def __init__(self, method: MethodConfig, bits: BitsConfig, batches: int) -> None:
        self.method = method
        self.moments = needs_second_moment(method, bits)
        self.keeps = needs_tokens(method, bits)
        self.share = math.ceil(MAX_TOKENS / max(batches, 1))
        self.hessian: Hessian | None = None
        self.rows: list[torch.Tensor] = []
        self.empty = True

    @property
    def wanted(self) -> bool:
        return self.moments or self.keeps

    def update(self, x: torch.Tensor, labels: torch.Tensor) -> None:
        """Add activations [..., channels] with modality labels [...]; padding is skipped."""
        kinds, rows = labels.reshape(-1), x.reshape(-1, x.shape[-1])
        real = rows[kinds >= 0]
        self.empty = self.empty and len(real) == 0
        if self.moments:
            if self.hessian is None:
                weights = BALANCED if self.method.weight.balanced else None
                dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
                self.hessian = Hessian(x.shape[-1], x.device, weights, dtype)
            self.hessian.update(rows, kinds)
        if self.keeps:
            self.rows.append(real[:: max(1, len(real) // self.share)][: self.share])

    @property
    def second_moment(self) -> torch.Tensor | None:
        """[channels, channels], at any scale."""
        return None if self.hessian is None else self.hessian.value()

    @property
    def tokens(self) -> torch.Tensor | None:
        """[at most about 512, channels]."""
        return torch.cat(self.rows) if self.rows else None
