"""Smoothing scales by gradient steps: the least error of a group's outputs (SPEC 4.13).

The objective is MASQuant's (arXiv 2603.04800, eq. 12-14), ``mean |Q(X/s) Q(W s)^T - X W^T|`` over
the tokens of one kind. Kinds share nothing in it, so each is solved by itself and the published
weights between them drop out. The released code measures the error at the block's output instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from morphoquant.errors import ActivationError

Round = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class LearnedScale:
    """Scales, and the mean absolute error of the outputs at the start and with them."""

    scale: torch.Tensor
    before: float
    after: float


def straight_through(x: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """``rounded`` in value; its gradient knows that the step grows with the row's largest value.

    A symmetric min-max quantizer is ``Q(x) = d(x) round(x / d(x))`` with ``d`` proportional to
    ``max |x|`` of the row. Rounding passes the gradient on unchanged, the step its own.

    Args:
        x: [rows, columns].
        rounded: ``Q(x)``.
    """
    step = x.abs().amax(-1, keepdim=True)
    held = step.detach().clamp_min(torch.finfo(x.dtype).tiny)
    return x + step * ((rounded - x) / held).detach()


def learn_scale(
    tokens: torch.Tensor,
    weights: Sequence[torch.Tensor],
    start: torch.Tensor,
    round_weight: Round,
    round_activation: Round,
    steps: int,
    learning_rate: float,
    expand: Round = lambda scale: scale,
) -> LearnedScale:
    """Adam on the logarithm of the scales; the best of all steps wins, the start among them.

    Args:
        tokens: unsmoothed inputs of the group [tokens, in].
        weights: unsmoothed [out, in] of every linear that reads them.
        start: positive, [shared].
        round_weight, round_activation: fake quantizers of [out, in] and of [tokens, in].
        steps: 0 measures the start alone.
        learning_rate: of Adam, in natural logarithms of a scale.
        expand: [shared] -> [in], where channels share scales.

    Raises:
        ActivationError: the error is NaN or infinite from the start.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    x = tokens.to(dtype)
    matrices = [weight.detach().to(dtype) for weight in weights]
    exact = [F.linear(x, matrix) for matrix in matrices]
    outputs = sum(y.numel() for y in exact)
    best, lowest, first = start.double(), float("inf"), float("nan")
    with torch.enable_grad():
        log = start.to(dtype).log().requires_grad_()
        adam = torch.optim.Adam([log], lr=learning_rate)
        for step in range(steps + 1):
            scale = expand(log.exp())
            smooth = x / scale
            smooth = straight_through(smooth, round_activation(smooth.detach()))
            loss = x.new_zeros(())
            for matrix, wanted in zip(matrices, exact, strict=True):
                scaled = matrix * scale
                scaled = straight_through(scaled, round_weight(scaled.detach()))
                loss = loss + (F.linear(smooth, scaled) - wanted).abs().sum() / outputs
            value = float(loss.detach())
            if step == 0:
                first = value
                if not torch.isfinite(loss):
                    raise ActivationError(
                        "learning smoothing scales met NaN or infinite outputs; check the "
                        "calibration samples, or set model.dtype=float32"
                    )
            if value < lowest:
                # At the start the scales are kept as they are, not as exp(log) gives them back.
                best = start.double() if step == 0 else log.detach().double().exp()
                lowest = value
            if step < steps:
                adam.zero_grad()
                loss.backward()
                adam.step()
    return LearnedScale(best, first, lowest)
