"""AWQ's clip search: ranges of weight groups by the error of their outputs (SPEC 4.3).

Lin et al. 2024. A group's range is cut at ``ratio * max|w|`` on both sides. The ratio is the one
whose rounded weights lose least of the group's part of the output, ``sum_{k in group} w_k x_k``,
in mean square over calibration tokens.

Notable choice: that mean square is ``|x (w_hat - w)|^2 / T``, and a triangular R with
``R^T R = x^T x`` has the same norms, so tokens beyond the group size cost nothing per candidate
(QR; the product x^T x itself would square the condition number).
"""

from __future__ import annotations

import torch

from morphoquant.errors import ActivationError
from morphoquant.formats.integer import (
    Grid,
    dequantize,
    fake_quantize,
    quantize_codes,
    scale_from_range,
    slices,
)
from morphoquant.formats.weights import QuantizedWeight

RATIOS = tuple((20 - step) / 20 for step in range(10))
"""1.00, 0.95, ..., 0.55: candidates, widest first."""

MAX_TOKENS = 512
PIECE = 1 << 20  # weights worked on at a time: bounds the temporaries


def _thinned(x: torch.Tensor) -> torch.Tensor:
    """At most :data:`MAX_TOKENS` rows of x [tokens, channels], evenly spread."""
    return x[:: max(1, -(-x.shape[0] // MAX_TOKENS))]


def _clipped(part: torch.Tensor, ratio: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
    """Range of every slice of part [out, groups, width] cut at ratio * max|w|; [out, groups, 1]."""
    bounds = torch.aminmax(part, dim=-1, keepdim=True)
    edge = torch.maximum(bounds.min.abs(), bounds.max.abs()) * ratio
    return torch.maximum(bounds.min, -edge), torch.minimum(bounds.max, edge)


def _best_ratios(part: torch.Tensor, x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Ratio of every slice: part [out, groups, width], x [tokens, groups, width]."""
    reader = x.transpose(0, 1)  # [groups, tokens, width]
    if reader.shape[1] > reader.shape[2]:
        reader = torch.linalg.qr(reader, mode="r").R
    reader = reader.transpose(1, 2)
    rows = max(1, PIECE // (part.shape[1] * part.shape[2]))
    found = []
    for piece in part.split(rows):
        best_loss = piece.new_full(piece.shape[:2], torch.inf)
        best = torch.ones_like(best_loss)
        for ratio in RATIOS:
            scale, zero_point = scale_from_range(*_clipped(piece, ratio), grid)
            error = fake_quantize(piece, scale, zero_point, grid).sub_(piece)
            loss = torch.matmul(error.transpose(0, 1), reader).square().sum(-1).T
            better = loss < best_loss  # strict: of equals, the widest range
            best_loss = torch.where(better, loss, best_loss)
            best = torch.where(better, ratio, best)
        found.append(best)
    return torch.cat(found)


def clip_ratios(
    weight: torch.Tensor, x: torch.Tensor, bits: int, group_size: int = 128, symmetric: bool = False
) -> torch.Tensor:
    """The best clip of every group, as a part of its largest magnitude.

    Args:
        weight: [out, in].
        x: the layer's input on calibration tokens [tokens, in], without padding. Of more than
            :data:`MAX_TOKENS`, evenly spread ones are used.
        bits: 2 to 8.
        group_size: neighbours along ``in`` that share a range; ``in`` or more is the whole row.
        symmetric: the ``restricted`` grid, else the ``asymmetric`` one.

    Returns:
        [out, groups] of :data:`RATIOS`, float32 (float64 for float64 weights).

    Raises:
        ActivationError: there is no token, or one is NaN or infinite.
        ValueError: shapes do not fit, or bits are out of range.
    """
    if weight.ndim != 2 or x.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            "expected a weight [out, in] and activations [tokens, in], "
            f"got {tuple(weight.shape)} and {tuple(x.shape)}"
        )
    grid = Grid(bits, "restricted" if symmetric else "asymmetric")
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    seen = _thinned(x.detach()).to(weight.device, work)
    if seen.shape[0] == 0 or not torch.isfinite(seen).all():
        raise ActivationError("the clip search needs calibration tokens without NaN or infinity")
    size = min(group_size, weight.shape[1])
    parts = zip(
        slices(weight.detach().to(work), "per_group", size),
        slices(seen, "per_group", size),
        strict=True,
    )
    return torch.cat([_best_ratios(part, tokens, grid) for part, tokens in parts], dim=-1)


def awq_clip(
    weight: torch.Tensor, x: torch.Tensor, bits: int, group_size: int = 128, symmetric: bool = False
) -> QuantizedWeight:
    """Round a weight to nearest with the ranges that :func:`clip_ratios` finds.

    Arguments and errors as there. AWQ leaves out query and key projections, whose outputs meet
    in a product; that is for the caller to do.
    """
    ratios = clip_ratios(weight, x, bits, group_size, symmetric)
    grid = Grid(bits, "restricted" if symmetric else "asymmetric")
    size = min(group_size, weight.shape[1])
    codes, values, scales, zeros, at = [], [], [], [], 0
    for part in slices(weight.detach().to(ratios.dtype), "per_group", size):
        ratio = ratios[:, at : at + part.shape[1], None]
        at += part.shape[1]
        scale, zero_point = scale_from_range(*_clipped(part, ratio), grid)
        found = quantize_codes(part, scale, zero_point, grid)
        codes.append(found.flatten(1))
        values.append(dequantize(found, scale, zero_point).to(weight.dtype).flatten(1))
        scales.append(scale.squeeze(-1))
        if zero_point is not None:
            zeros.append(zero_point.squeeze(-1))
    return QuantizedWeight(
        dequantized=torch.cat(values, dim=-1),
        codes=torch.cat(codes, dim=-1),
        scale=torch.cat(scales, dim=-1),
        zero_point=torch.cat(zeros, dim=-1) if zeros else None,
    )
