"""How the weights of an input group are rounded, and what that may look at.

Most methods round a weight as soon as its block is reached, so that activations are observed behind
rounded weights. Two need ranges or masks that follow from activations and round *late*: folded
weights (SPEC 2.11) and mixed precision by channel, unless weights alone say which channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from morphoquant.config.schema import BitsConfig, CompensationConfig, MethodConfig
from morphoquant.models.structure import Tower
from morphoquant.quantization import folding
from morphoquant.quantization.awq_clip import awq_clip
from morphoquant.quantization.gptq import gptq
from morphoquant.quantization.low_rank import (
    LowRank,
    has_branch,
    rank_of,
    truncated,
    whitened,
)
from morphoquant.quantization.mixed import mixed_weight
from morphoquant.quantization.modality import ModalityBranches, ModalityScale
from morphoquant.quantization.ranges import StaticGrid
from morphoquant.quantization.weights import QuantizedWeight, describe_int, quantize_weight


@dataclass(frozen=True)
class GroupData:
    """What rounding may know of the input that the group's linears read.

    Attributes:
        mask: bool [channels] of compensated channels, or None.
        grid: the final static grid, for folding, or None.
        second_moment: [channels, channels], sum of x x^T over calibration tokens (any scale), or
            None.
        tokens: [rows, channels], some calibration tokens, or None.
        moments_by_kind: the second moment of every kind of token that gets a branch of its own.
        scale: what divides the input by the scales of every kind, or None.
    """

    mask: torch.Tensor | None = None
    grid: StaticGrid | None = None
    second_moment: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    moments_by_kind: Mapping[str, torch.Tensor] = field(default_factory=dict)
    scale: ModalityScale | None = None


@dataclass(frozen=True)
class RoundedWeight:
    """A weight after its round trip, the branch beside it, and what the manifest says."""

    weight: torch.Tensor
    description: dict[str, Any]
    branch: LowRank | ModalityBranches | None = None


def splits(method: MethodConfig, bits: BitsConfig) -> bool:
    """Whether masked columns of a weight have a width of their own."""
    if bits.weight >= 16 or method.compensation.name != "mixed_precision":
        return False
    return _rounds_activations(method, bits) or method.compensation.mask.by_weights


def rounds_late(method: MethodConfig, bits: BitsConfig) -> bool:
    """Whether weights wait for the masks and ranges of their block."""
    folds = method.weight.fold and bits.weight < 16 and _rounds_activations(method, bits)
    return folds or (splits(method, bits) and not method.compensation.mask.by_weights)


def _rounds_activations(method: MethodConfig, bits: BitsConfig) -> bool:
    return bits.activation < 16 and method.activation.format != "none"


def needs_second_moment(method: MethodConfig, bits: BitsConfig) -> bool:
    """Whether rounding looks at the activations' second moment."""
    compensation = method.compensation
    one_branch = compensation.name == "low_rank" and not compensation.per_modality
    by_branch = one_branch and compensation.whitened
    return bits.weight < 16 and (by_branch or method.weight.algorithm == "gptq")


def needs_moments_by_kind(method: MethodConfig, bits: BitsConfig) -> bool:
    """Whether branches of every kind of token look at the second moment of that kind."""
    compensation = method.compensation
    return bits.weight < 16 and compensation.name == "low_rank" and compensation.per_modality


def needs_tokens(method: MethodConfig, bits: BitsConfig) -> bool:
    """Whether rounding looks at single tokens."""
    return bits.weight < 16 and method.weight.format == "int" and method.weight.clip == "awq"


def method_of(method: MethodConfig, tower: Tower, group: str) -> MethodConfig:
    """The method as it applies to an input group: without a branch where it gets none."""
    compensation = method.compensation
    if compensation.name != "low_rank" or has_branch(compensation, tower, group):
        return method
    return method.model_copy(update={"compensation": CompensationConfig()})


def round_weight(
    weight: torch.Tensor,
    method: MethodConfig,
    bits: BitsConfig,
    data: GroupData,
    name: str = "",
) -> RoundedWeight:
    """Round one weight [out, in] as the method says.

    Args:
        weight: the original, never one that was rounded before.
        name: of the linear; AWQ leaves the clipping of queries and keys alone.
        method: the weight slot, and the compensation where it keeps part of the weight.
        bits: widths; 16-bit weights come back as they are.
        data: of the input group.
    """
    weight = weight.detach()
    compensation = method.compensation
    if needs_moments_by_kind(method, bits):
        return _with_branches(weight, method, bits, data, name)
    if bits.weight < 16 and compensation.name == "low_rank":
        return _with_branch(weight, method, bits, data, name)
    if splits(method, bits):
        return _mixed(weight, method, bits, data, name)
    if rounds_late(method, bits):
        return _folded(weight, method, bits, data)
    found = _on_grid(weight, method, bits, data, name)
    return RoundedWeight(found.dequantized, found.description)


QUERIES_AND_KEYS = ("q_proj", "k_proj", "attn.q", "attn.k")


def _on_grid(
    weight: torch.Tensor, method: MethodConfig, bits: BitsConfig, data: GroupData, name: str
) -> QuantizedWeight:
    """The weight slot's algorithm on a matrix [out, in]."""
    config = method.weight
    clips = needs_tokens(method, bits) and not name.endswith(QUERIES_AND_KEYS)
    if config.format != "int" or bits.weight >= 16 or (config.algorithm == "rtn" and not clips):
        if config.clip == "awq":
            config = config.model_copy(update={"clip": "minmax"})
        return quantize_weight(weight, config, bits.weight)
    if clips:
        assert data.tokens is not None
        found = awq_clip(
            weight, data.tokens, bits.weight, config.group_size, symmetric=config.symmetric
        )
    else:
        assert data.second_moment is not None
        found = gptq(
            weight,
            data.second_moment,
            bits.weight,
            config.granularity,
            config.group_size,
            config.symmetric,
            "mse" if config.clip == "mse" else "minmax",
            act_order=config.act_order,
            damping=config.damping,
        )
    description = describe_int(weight, config, bits.weight)
    if not clips:
        description["algorithm"] = "gptq"
    return QuantizedWeight(found.dequantized.to(weight.dtype), description)


def _with_branch(
    weight: torch.Tensor, method: MethodConfig, bits: BitsConfig, data: GroupData, name: str
) -> RoundedWeight:
    """SPEC 4.12: the branch first and the rest rounded, or rounded first and the loss fitted."""
    config = method.compensation
    rank = rank_of(config, weight)

    def nearest(matrix: torch.Tensor) -> LowRank:
        if config.whitened:
            assert data.second_moment is not None
            return whitened(matrix, data.second_moment, rank)
        return truncated(matrix, rank)

    if config.order == "before":
        branch = nearest(weight)
        found = _on_grid(weight - branch.product, method, bits, data, name)
    else:
        found = _on_grid(weight, method, bits, data, name)
        branch = nearest(weight - found.dequantized)
    description = dict(found.description)
    description["effective_bits"] += branch.storage_bits()
    description["branch_rank"] = branch.rank
    return RoundedWeight(found.dequantized, description, branch)


def _with_branches(
    weight: torch.Tensor, method: MethodConfig, bits: BitsConfig, data: GroupData, name: str
) -> RoundedWeight:
    """SPEC 4.13: one weight, smoothed for text, and what every other kind of token misses in it.

    ``weight`` is ``W S_t``. The branch of kind m is fitted to ``W S_m - Q(W S_t)``, which holds
    both the difference of the scales and what rounding lost.
    """
    config = method.compensation
    rank = rank_of(config, weight)
    found = _on_grid(weight, method, bits, data, name)
    branches = {}
    for kind, moment in data.moments_by_kind.items():
        ratio = None if data.scale is None else data.scale.ratio_of(kind)
        own = weight if ratio is None else weight * ratio.to(weight.dtype)
        left = own - found.dequantized
        branches[kind] = whitened(left, moment, rank) if config.whitened else truncated(left, rank)
    together = ModalityBranches(branches, config.joint_vision)
    description = dict(found.description)
    description["effective_bits"] += together.storage_bits()
    description["branch_rank"] = together.rank
    description["branches"] = list(together.names)
    return RoundedWeight(found.dequantized, description, together)


def _mixed(
    weight: torch.Tensor, method: MethodConfig, bits: BitsConfig, data: GroupData, name: str
) -> RoundedWeight:
    """Masked columns at the higher width, the others rounded as if those were not there."""
    assert data.mask is not None
    high, mask = method.compensation.outlier_bits, data.mask
    others = weight.masked_fill(mask, 0.0)
    if data.second_moment is not None and mask.any() and not mask.all():
        # GPTQ would let masked columns make up for errors of others, and that would be lost.
        apart = mask[:, None] | mask
        data = replace(data, second_moment=data.second_moment.masked_fill(apart, 0.0))
    found = _on_grid(others, method, bits, data, name)
    description = dict(found.description)
    share = float(mask.double().mean())
    description["effective_bits"] += share * (high - bits.weight)
    description["columns_in_high_precision"] = int(mask.sum())
    description["high_precision_bits"] = high
    mixed = mixed_weight(weight, found.dequantized, mask, high)
    return RoundedWeight(mixed, description)


def _folded(
    weight: torch.Tensor, method: MethodConfig, bits: BitsConfig, data: GroupData
) -> RoundedWeight:
    """Static channel scales folded in; in the channel reading masked columns stay in 16 bits."""
    assert data.grid is not None
    config = method.weight
    group = config.group_size if config.granularity == "per_group" else None
    mask = data.mask if method.compensation.name == "dabc" else None
    excluded = mask is not None and method.compensation.reading == "channel"
    clip: Literal["minmax", "mse"] = "mse" if config.clip == "mse" else "minmax"
    folded = folding.fold_weight(
        weight, data.grid, mask, bits.weight, group, clip=clip, exclude_masked=excluded
    )
    description: dict[str, Any] = {
        "format": "int",
        "bits": bits.weight,
        "effective_bits": folded.storage_bits(),
        "granularity": config.granularity,
        "symmetric": True,
        "clip": config.clip,
        "folded": True,
        "columns_in_16_bits": int(mask.sum()) if mask is not None and excluded else 0,
    }
    if group is not None:
        description["group_size"] = group
    return RoundedWeight(folded.dequantized, description)
