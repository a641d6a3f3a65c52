"""What a family adapter says about an architecture: blocks, input groups, the residual stream.

These are plain records of references to the live modules. The rest of the package never spells
a module path of a particular architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Literal

import torch
from torch import nn

Tower = Literal["decoder", "vision", "audio"]


class Modality(IntEnum):
    """What a token is. Padding belongs to no modality and is counted nowhere."""

    PADDING = -1
    TEXT = 0
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3


MODALITIES = (Modality.TEXT, Modality.IMAGE, Modality.VIDEO, Modality.AUDIO)


class TokenLabels:
    """The modality labels of the forward pass under way, for what depends on a token's modality.

    Attributes:
        current: int8 [batch, tokens] of :class:`Modality`, or None outside the decoder.
    """

    def __init__(self) -> None:
        self.current: torch.Tensor | None = None

    def matching(self, x: torch.Tensor) -> torch.Tensor | None:
        """Labels of the rows of ``x`` [..., channels], or None where they have another shape.

        They are handed out on the device of ``x``.
        """
        if self.current is None or self.current.shape != x.shape[:-1]:
            return None
        return self.current.to(x.device)


@dataclass(frozen=True)
class InputGroup:
    """Linears that read the same activation: statistics, ranges and masks belong to the group."""

    name: str
    """``attn_in`` (q, k, v), ``attn_out`` (o), ``mlp_in`` (gate, up), ``mlp_out`` (down)."""
    linears: tuple[str, ...]
    """Dotted names relative to the block, in the order in which the block calls them."""


@dataclass(frozen=True)
class Block:
    """One block of a tower, quantized as a unit by the walk."""

    name: str
    """Dotted name in the model, e.g. ``model.language_model.layers.3``."""
    tower: Tower
    module: nn.Module
    groups: tuple[InputGroup, ...]

    def linear(self, name: str) -> nn.Module:
        """The (possibly already replaced) module called ``name`` in this block."""
        return self.module.get_submodule(name)

    def replace(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the linear called ``name``."""
        parent, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(parent) if parent else self.module, leaf, module)

    def names(self, group: InputGroup) -> list[str]:
        """Full names of the linears of one of its groups."""
        return [f"{self.name}.{name}" for name in group.linears]

    def narrowed(self, wanted: Callable[[str], bool]) -> Block:
        """The block with those of its linears whose full names are ``wanted``, maybe none."""
        groups = []
        for group in self.groups:
            kept = tuple(name for name in group.linears if wanted(f"{self.name}.{name}"))
            if kept:
                groups.append(replace(group, linears=kept))
        return replace(self, groups=tuple(groups))


@dataclass(frozen=True)
class DecoderLayer:
    """The parts of one decoder layer that a rotation or a smoothing has to touch."""

    input_norm: nn.Module
    post_norm: nn.Module
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    block: Block


@dataclass(frozen=True)
class ResidualStream:
    """Everything that writes into or reads from the decoder's residual stream.

    ``projectors`` are the last linears of the vision merger and the audio projector: their
    outputs (weights *and* biases) overwrite rows of the embedding, so they produce into the
    stream just as the embedding does. ``extra_embeddings`` likewise (audio bos/eos).
    """

    embedding: nn.Embedding
    projectors: tuple[nn.Linear, ...]
    layers: tuple[DecoderLayer, ...]
    final_norm: nn.Module
    lm_head: nn.Linear
    hidden_size: int
    intermediate_size: int
    head_dim: int
    num_heads: int
    num_kv_heads: int
    extra_embeddings: tuple[nn.Embedding, ...] = field(default=())

    def producers(self) -> Iterator[nn.Linear]:
        """Linears whose output is added to (or placed in) the residual stream."""
        yield from self.projectors
        for layer in self.layers:
            yield layer.o
            yield layer.down

    def consumers(self) -> Iterator[tuple[nn.Module, tuple[nn.Linear, ...]]]:
        """(RMSNorm, linears that read its output), in order of depth."""
        for layer in self.layers:
            yield layer.input_norm, (layer.q, layer.k, layer.v)
            yield layer.post_norm, (layer.gate, layer.up)
        yield self.final_norm, (self.lm_head,)
