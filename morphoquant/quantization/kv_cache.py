"""Keys and values on integer grids, and the online rotation R3 (QuaRot, arXiv 2404.00456).

SPEC 4.5, item 3. Attention reads keys and values from the cache. Here those of every token are
put on integer grids of their own, head by head and in groups of neighbouring channels, between
the cache and the attention product (:mod:`morphoquant.quantization.attention` does it). Notable
choices:

- No scale is shared between tokens. So quantizing what comes out of the cache is the same as
  having stored it quantized, and a token written step by step attends to exactly what it would
  attend to inside one long pass (SPEC T11).
- The prompt's own pass attends to quantized keys and values too. A kernel that keeps the prompt's
  pass in high precision would give slightly better first tokens than are measured here.
- R3 multiplies queries and keys by H / sqrt(head_dim) behind the rotary embedding, whatever the
  positions are. Their products do not change (H is orthogonal), but outlier channels of the keys
  are spread over the head before they are rounded. Values need no online rotation: R2 is folded
  into the weights.
- This is fake quantization: the cache itself keeps its dtype, and every step rounds all cached
  tokens again. It measures what rounding costs in quality, not what it saves in memory or time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from morphoquant.errors import HarnessError
from morphoquant.formats.integer import fake_quantize_activation
from morphoquant.formats.weights import int_storage_bits
from morphoquant.quantization.hadamard import HadamardTransform


class KVCacheError(HarnessError, ValueError):
    """Settings that no cache can be quantized with, or a model whose attention cannot be."""


@dataclass(frozen=True)
class KVSettings:
    """How keys and values are stored.

    Attributes:
        bits: 2 to 8, or 16 (nothing is rounded; ``rotate`` still applies).
        group_size: channels that share a scale; a divisor of the head's width, or None for the
            whole head.
        symmetric: the odd-symmetric grid without zero points, else [min(lo, 0), max(hi, 0)].
        rotate: R3, queries and keys times H / sqrt(head_dim).
        clip_ratio: share of every group's range that the grid spans.

    Raises:
        KVCacheError: a value outside of what is allowed.
    """

    bits: int = 16
    group_size: int | None = None
    symmetric: bool = False
    rotate: bool = False
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.bits != 16 and not 2 <= self.bits <= 8:
            raise KVCacheError(f"kv_cache.bits: 2 to 8, or 16, got {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise KVCacheError(f"kv_cache.group_size: must be positive, got {self.group_size}")
        if not 0 < self.clip_ratio <= 1:
            raise KVCacheError(f"kv_cache.clip_ratio: above 0, at most 1, got {self.clip_ratio}")


class KVQuantizer(nn.Module):
    """Rounds the keys and values of one attention module and counts what it rounded.

    Args:
        settings: bits, groups, grid and rotation.
        head_dim: channels per head.
        config: the config that the decoder was built with. It keeps naming the attention function
            that does the work, so it may be changed as ever.

    Attributes:
        tokens: that were added to the cache, padding included. A token that later steps read
            again counts once.
        elements: of those tokens' keys and values that were put on a grid (none at 16 bits).

    Raises:
        KVCacheError: the group size does not divide the head's width, or R3 is asked for a width
            for which no Hadamard matrix is known.
    """

    def __init__(self, settings: KVSettings, head_dim: int, config: Any) -> None:
        super().__init__()
        self.settings = settings
        self.head_dim = head_dim
        self.config = config
        self.group_size = settings.group_size or head_dim
        if head_dim % self.group_size:
            raise KVCacheError(
                f"kv_cache.group_size: {self.group_size} does not divide the {head_dim} channels "
                f"of a head"
            )
        self.rotation: HadamardTransform | None = None
        if settings.rotate:
            try:
                self.rotation = HadamardTransform(head_dim)
            except ValueError as error:
                raise KVCacheError(f"kv_cache.rotate: {error}") from error
        self.reset()

    def reset(self) -> None:
        """Count from zero."""
        self.tokens = 0
        self.elements = 0

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [..., head_dim] on their grid: same shape and dtype, ``x`` at 16 bits."""
        if self.settings.bits == 16:
            return x
        return fake_quantize_activation(
            x,
            self.settings.bits,
            "per_group",
            self.group_size,
            symmetric=self.settings.symmetric,
            clip_ratio=self.settings.clip_ratio,
        )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attention is computed from.

        Args:
            query: [batch, heads, new tokens, head_dim], behind the rotary embedding.
            key, value: [batch, kv heads, cached and new tokens, head_dim].

        Returns:
            the three in their shapes and dtypes.
        """
        new = query.shape[0] * query.shape[2]
        self.tokens += new
        if self.settings.bits != 16:
            self.elements += new * (key.shape[1] * key.shape[3] + value.shape[1] * value.shape[3])
        if self.rotation is not None:
            query, key = self.rotation(query), self.rotation(key)
        return query, self.quantize(key), self.quantize(value)

    @property
    def effective_bits(self) -> float:
        """Bits per cached element: a 16-bit scale per group, and a zero point unless symmetric."""
        bits, symmetric = self.settings.bits, self.settings.symmetric
        if bits == 16:
            return 16.0
        shape = (1, self.head_dim)
        return int_storage_bits(shape, bits, "per_group", self.group_size, symmetric)

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        rounded = self.settings.bits != 16
        return {
            "format": "int" if rounded else "none",
            "bits": self.settings.bits,
            "effective_bits": self.effective_bits,
            "granularity": "per_token_head_group" if rounded else "none",
            "group_size": self.group_size,
            "symmetric": self.settings.symmetric,
            "clip_ratio": self.settings.clip_ratio,
            "rotation": None if self.rotation is None else self.rotation.description,
        }

    def extra_repr(self) -> str:
        return f"bits={self.settings.bits}, group_size={self.group_size}"
