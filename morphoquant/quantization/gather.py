"""What rounding a group's weights may want to know of its input, gathered in one pass."""

from __future__ import annotations

import math

import torch

from morphoquant.calibration.samples import CalibrationError
from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.quantization.gptq import BALANCED, Hessian
from morphoquant.quantization.modality import TEXT, is_kind, kinds_of
from morphoquant.quantization.rounding import (
    needs_moments_by_kind,
    needs_second_moment,
    needs_tokens,
)

MAX_TOKENS = 512  # that a clip search looks at (SPEC 4.3)


def gathers(method: MethodConfig, bits: BitsConfig) -> bool:
    """Whether rounding looks at activations at all."""
    asked = (needs_second_moment, needs_moments_by_kind, needs_tokens)
    return any(needs(method, bits) for needs in asked)


class Gathered:
    """Second moment and some tokens of one input group, where the method asks for them.

    Args:
        method, bits: what will be rounded, and how.
        batches: calibration batches to come; the kept tokens are spread over them.
    """

    def __init__(self, method: MethodConfig, bits: BitsConfig, batches: int) -> None:
        self.method, self.bits = method, bits
        self.moments = needs_second_moment(method, bits)
        self.keeps = needs_tokens(method, bits)
        self.share = math.ceil(MAX_TOKENS / max(batches, 1))
        self.hessian: Hessian | None = None
        self.rows: list[torch.Tensor] = []
        self.empty = True
        self.kinds = {}
        if needs_moments_by_kind(method, bits):
            self.kinds = kinds_of(method.compensation.joint_vision)
            if not method.compensation.text_branch:
                del self.kinds[TEXT]
        self.by_kind: dict[str, Hessian] = {}

    @property
    def wanted(self) -> bool:
        return gathers(self.method, self.bits)

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
        for name, members in self.kinds.items():
            chosen = rows[is_kind(kinds, members)]
            if len(chosen):
                if name not in self.by_kind:
                    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
                    self.by_kind[name] = Hessian(x.shape[-1], x.device, None, dtype)
                self.by_kind[name].update(chosen)
        if self.keeps:
            self.rows.append(real[:: max(1, len(real) // self.share)][: self.share])

    def check(self) -> None:
        """Whether a kind of token that gets a branch has occurred.

        Raises:
            CalibrationError: none has.
        """
        if self.kinds and not self.by_kind:
            raise CalibrationError(
                "branches per modality need calibration prompts with pictures, clips or sounds, "
                "there are none: add a source with such media to calibration.sources, or set "
                "method.compensation.per_modality=false"
            )

    @property
    def second_moment(self) -> torch.Tensor | None:
        """[channels, channels], at any scale."""
        return None if self.hessian is None else self.hessian.value()

    @property
    def moments_by_kind(self) -> dict[str, torch.Tensor]:
        """[channels, channels] of every kind of token that gets a branch and occurred."""
        return {n: self.by_kind[n].value() for n in self.kinds if n in self.by_kind}

    @property
    def tokens(self) -> torch.Tensor | None:
        """[at most about 512, channels]."""
        return torch.cat(self.rows) if self.rows else None
