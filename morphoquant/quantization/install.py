"""A block gets its quantized linears, and the manifest its records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from morphoquant.config.method import TokenKind
from morphoquant.config.schema import ActivationConfig
from morphoquant.models.structure import Block, Modality, TokenLabels
from morphoquant.quantization.activation import STORAGE_BITS
from morphoquant.quantization.choose import GroupChoice
from morphoquant.quantization.linear import GroupInput, QuantizedLinear, plain
from morphoquant.quantization.manifest import LinearRecord
from morphoquant.quantization.modality import RescaledInputLinear

NOTHING = {"format": "none", "bits": 16, "effective_bits": 16.0}


@dataclass(frozen=True)
class Visit:
    """Where the walk is: a block, its number, its groups' inputs, and the linears as they were."""

    index: int
    block: Block
    sources: dict[str, GroupInput]
    originals: Mapping[str, nn.Module]


def install(
    block: Block, labels: TokenLabels | None, only: Iterable[TokenKind] | None = None
) -> tuple[dict[str, GroupInput], list[LinearRecord]]:
    """Replace the block's linears by :class:`QuantizedLinear`, nothing rounded yet.

    Args:
        block: changed in place. A linear behind an online rewrite hands it to the shared input.
        labels: the modality of the tokens under way, where quantizers need to know it.
        only: the modalities whose tokens are quantized, or None for all tokens.

    Returns:
        the shared input of every group, and one record per linear.
    """
    sources: dict[str, GroupInput] = {}
    records = []
    for group in block.groups:
        online = getattr(block.linear(group.linears[0]), "transform", None)
        source = sources[group.name] = GroupInput(len(group.linears), online)
        source.labels = labels
        if only is not None:
            source.only = frozenset(int(Modality[kind.upper()]) for kind in only)
        for name in group.linears:
            original = block.linear(name)
            if labels is not None and isinstance(original, RescaledInputLinear):
                original.labels = labels
            linear = plain(original)
            block.replace(name, QuantizedLinear(linear.weight.detach(), linear.bias, source))
            records.append(
                LinearRecord(
                    name=f"{block.name}.{name}",
                    tower=block.tower,
                    group=group.name,
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    weight=dict(NOTHING),
                    activation=dict(NOTHING),
                    online_transform=getattr(online, "description", None),
                )
            )
    return sources, records


def describe_activation(
    config: ActivationConfig, bits: int, channels: int, choice: GroupChoice | None
) -> dict[str, Any]:
    """What the manifest says of a group's quantizer; ``choice`` where its range is static.

    ``base_bits`` counts the scales of every group of a token's channels (16 bits each, or what the
    format says); the one scale of a whole token is left out.
    """
    base = float(bits)
    if config.format in STORAGE_BITS:
        base = STORAGE_BITS[config.format]((1, channels))
        if config.format == "nvfp4":
            base -= 32 / channels  # its per-tensor scale is not a token's
    elif config.granularity == "per_group":
        base += 16 * math.ceil(channels / config.group_size) / channels
    described: dict[str, Any] = {
        "format": config.format,
        "bits": bits,
        "base_bits": base,
        "effective_bits": base,
        "granularity": config.granularity,
        "mode": config.mode,
        "range": config.range.name if config.mode == "static" else "minmax",
    }
    if config.grid != "restricted":
        described["grid"] = config.grid
    if config.quantizes_some:
        described["modalities"] = list(config.modalities)
    if choice is not None and choice.ratios is not None:
        ratios = choice.ratios.double()
        floor = config.range.min_ratio * (1 + 1e-6)
        described |= {
            "share_at_floor": float((ratios <= floor).double().mean()),
            "share_unshrunk": float((ratios >= 1).double().mean()),
            "ratio_min": float(ratios.min()),
            "ratio_median": float(ratios.median()),
            "ratio_max": float(ratios.max()),
        }
    return described
