"""Smoothing scales and how they are folded into a decoder layer (SPEC 4.2, 4.3; invariants T1, T8).

Every linear of an input group reads ``x / s`` and has its weight columns multiplied by ``s``, so
its output stays what it was. What produces ``x`` puts out ``x / s`` by itself, at no cost:

==========  ==================  =====================================================
group       read by             produced by
==========  ==================  =====================================================
attn_in     q, k, v             the gain of the norm in front of the attention
attn_out    o                   rows and bias of v: attention mixes tokens, not channels
mlp_in      gate, up            the gain of the norm in front of the MLP
mlp_out     down                rows and bias of up, the linear factor of the gated product
==========  ==================  =====================================================

With grouped-query attention several query heads read one head of values, so ``attn_out`` has one
scale per channel of the *values*, shared by those heads. Embeddings and lm_head are not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from morphoquant.models.structure import DecoderLayer, ResidualStream

SMALLEST_WEIGHT = 1e-5  # SmoothQuant's, of a column's largest weight and of the scale itself
SMALLEST_AWQ = 1e-4  # AWQ's, of the scale before it is normalised


@dataclass(frozen=True)
class Heads:
    """How channels of the attention output are laid out: query heads of one group are adjacent."""

    queries: int
    values: int
    width: int

    @classmethod
    def of(cls, stream: ResidualStream) -> Heads:
        return cls(stream.num_heads, stream.num_kv_heads, stream.head_dim)

    @property
    def grouped(self) -> bool:
        """Whether several query heads share one head of values."""
        return self.queries != self.values

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[queries * width] -> [values, query heads of the group, width]."""
        return x.view(self.values, self.queries // self.values, self.width)

    def expand(self, x: torch.Tensor) -> torch.Tensor:
        """[values * width] -> [queries * width]: every query head gets its values' channels."""
        shared = x.view(self.values, 1, self.width)
        return shared.expand(-1, self.queries // self.values, -1).reshape(-1)


def smoothquant_scale(activation: torch.Tensor, weight: torch.Tensor, alpha: float) -> torch.Tensor:
    """``max|X|^alpha / max|W|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, eq. 4).

    A channel that calibration only ever saw at zero keeps scale 1: the formula would divide the
    first other value that comes along by 1e-5.

    Args:
        activation: largest magnitude of every channel [K].
        weight: largest magnitude of every input column, over all readers [K].
        alpha: how much of the range goes into the weights, 0 to 1.

    Returns:
        float64 [K], positive.
    """
    activation = activation.double()
    scale = activation**alpha / weight.double().clamp_min(SMALLEST_WEIGHT) ** (1 - alpha)
    return torch.where(activation > 0, scale.clamp_min(SMALLEST_WEIGHT), 1.0)


def awq_scale(activation: torch.Tensor, exponent: float) -> torch.Tensor:
    """``mean|X|^exponent``, then divided by ``sqrt(max s * min s)`` (AWQ, arXiv 2306.00978).

    Args:
        activation: mean magnitude of every channel [K].
        exponent: 0 to 1; at 0 every scale is 1.

    Returns:
        float64 [K], positive, with ``max s * min s = 1``.
    """
    scale = (activation.double() ** exponent).clamp_min(SMALLEST_AWQ)
    return scale / (scale.max() * scale.min()).sqrt()


def readers(layer: DecoderLayer) -> dict[str, tuple[nn.Linear, ...]]:
    """The linears that read the input of each group."""
    return {
        "attn_in": (layer.q, layer.k, layer.v),
        "attn_out": (layer.o,),
        "mlp_in": (layer.gate, layer.up),
        "mlp_out": (layer.down,),
    }


def largest_weights(linears: tuple[nn.Linear, ...]) -> torch.Tensor:
    """Largest magnitude of every input column over all ``linears``, float64 [in]."""
    columns = [linear.weight.detach().abs().amax(0) for linear in linears]
    return torch.stack(columns).amax(0).double()


def _rewrite(
    linear: nn.Linear, inputs: torch.Tensor | None = None, outputs: torch.Tensor | None = None
) -> None:
    """``W_nk <- W_nk inputs_k / outputs_n`` and ``b_n <- b_n / outputs_n``, rounded once each."""
    weight = linear.weight.detach().double()
    if inputs is not None:
        weight = weight * inputs
    if outputs is not None:
        weight = weight / outputs[:, None]
        if linear.bias is not None:
            linear.bias.data.copy_(linear.bias.detach().double() / outputs)
    linear.weight.data.copy_(weight)


def _check(name: str, scale: torch.Tensor, expected: int) -> None:
    if scale.shape != (expected,):
        raise ValueError(f"{name}: expected {expected} scales, got shape {tuple(scale.shape)}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{name}: scales must be finite and positive")


@torch.no_grad()
def fold_scales(layer: DecoderLayer, scales: Mapping[str, torch.Tensor], heads: Heads) -> None:
    """Smooth the groups named in ``scales`` in place; the layer's function stays what it was.

    All groups are folded together, in float64, so that a weight with a scale on both sides (v
    and up) is still rounded only once.

    Args:
        layer: its parameters change; their dtype does not.
        scales: per group [in_features], except ``attn_out``: [value heads * head_dim].
        heads: layout of the attention's channels.

    Raises:
        ValueError: an unknown group, a scale of the wrong shape, or one that is not positive.
            Nothing has been changed then.
    """
    unknown = set(scales) - set(readers(layer))
    if unknown:
        raise ValueError(f"unknown input groups {sorted(unknown)}")
    for name, linears in readers(layer).items():
        if name in scales:
            width = linears[0].in_features
            if name == "attn_out":
                width = heads.values * heads.width
            _check(name, scales[name], width)
    on = {n: s.to(layer.q.weight.device, torch.float64) for n, s in scales.items()}
    attn_in, attn_out = on.get("attn_in"), on.get("attn_out")
    mlp_in, mlp_out = on.get("mlp_in"), on.get("mlp_out")
    for norm, scale in ((layer.input_norm, attn_in), (layer.post_norm, mlp_in)):
        if scale is not None:
            gain: torch.Tensor = norm.weight  # type: ignore[assignment]
            gain.data.copy_(gain.detach().double() / scale)
    wide = None if attn_out is None else heads.expand(attn_out)
    plan = (
        (layer.q, attn_in, None),
        (layer.k, attn_in, None),
        (layer.v, attn_in, attn_out),
        (layer.o, wide, None),
        (layer.gate, mlp_in, None),
        (layer.up, mlp_in, mlp_out),
        (layer.down, mlp_out, None),
    )
    for linear, inputs, outputs in plan:
        if inputs is not None or outputs is not None:
            _rewrite(linear, inputs, outputs)
