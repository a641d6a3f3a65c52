"""Quantized keys and values, and the online rotation R3 (QuaRot, arXiv 2404.00456; SPEC 4.5).

Attention reads its keys and values from the cache. Here every token's key and value is put on an
integer grid of its own, head by head and in groups of neighbouring channels, between the cache
and the attention product. No scale is shared between tokens, so quantizing what comes out of the
cache is the same as having stored it quantized, and a token written step by step attends to
exactly what it would attend to inside one long pass (SPEC T11). Notable choices:

- The prompt's own pass attends to quantized keys and values too. A kernel that keeps the prompt's
  pass in high precision would give slightly better first tokens than are measured here.
- R3 multiplies queries and keys by H / sqrt(head_dim) behind the rotary embedding, wherever the
  positions put it. Their products do not change (H is orthogonal), but the outlier channels of
  the keys are spread over the head before they are rounded. Values need no online rotation: R2 is
  folded into the weights.
- Nothing of transformers is patched. One attention function is registered beside theirs; the
  attention modules of the decoder are given a config of their own that names it, and everything
  that it needs to know is in a :class:`KVQuantizer` on the module. Models in one process do not
  interfere, and a deep copy of a model is a model with the same settings and counters of its own.
- This is fake quantization: the cache itself keeps its dtype, and every step rounds all cached
  tokens again. It measures what the rounding costs in quality, not what it saves in memory or time.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from morphoquant.errors import HarnessError
from morphoquant.formats.integer import fake_quantize_activation
from morphoquant.formats.weights import int_storage_bits
from morphoquant.models.adapter import OmniAdapter
from morphoquant.quantization.hadamard import HadamardTransform

ATTENTION = "quantized_kv"  # what the function is called among transformers' attention functions
CHILD = "kv_quantizer"  # name of the quantizer on its attention module
WRAPPED = ("eager", "sdpa")


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


@dataclass(frozen=True)
class KVReport:
    """The quantizers at work in a model, live: their counters go on counting.

    Attributes:
        settings: what they were installed with.
        quantizers: by the dotted name of their attention module, in order of depth.
    """

    settings: KVSettings
    quantizers: dict[str, KVQuantizer]

    def reset(self) -> None:
        """Count from zero in every layer."""
        for quantizer in self.quantizers.values():
            quantizer.reset()

    def idle(self) -> tuple[str, ...]:
        """Attention modules whose quantizer did not run since the last reset."""
        return tuple(name for name, found in self.quantizers.items() if found.tokens == 0)

    def describe(self) -> dict[str, Any]:
        """For the manifest: the layers' common description, and what every layer counted."""
        first = next(iter(self.quantizers.values()))
        layers = [
            {"name": name, "tokens": found.tokens, "elements": found.elements}
            for name, found in self.quantizers.items()
        ]
        return {**first.describe(), "layers": layers}


# --------------------------------------------------------------------------- the function


def _wrapped(module: nn.Module, name: str | None) -> Callable[..., Any]:
    """The attention function called ``name``, as ``module``'s own class would look it up.

    Raises:
        KVCacheError: another one than those that work with any module (flash attention chooses
            its kernel by the name in the module's config).
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in WRAPPED:
        raise KVCacheError(
            f"model.attention: {name!r} cannot read a quantized cache; use one of "
            f"{', '.join(WRAPPED)}"
        )
    # The eager function is no entry of the interface: every modelling file brings its own.
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(name, own)
    if found is None:
        raise KVCacheError(f"{type(module).__name__} comes without an eager attention function")
    return found


def quantized_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention function for transformers: quantize, then do what ``module`` did before.

    Args:
        module: an attention module that holds a :class:`KVQuantizer`.
        query, key, value: see :meth:`KVQuantizer.forward`.
        attention_mask: made for the function that the decoder's config names; passed on.
        options: scaling, dropout and whatever else the wrapped function takes.

    Returns:
        output [batch, new tokens, heads, head_dim], and the attention weights or None.
    """
    quantizer: KVQuantizer = getattr(module, CHILD)
    attend = _wrapped(module, quantizer.config._attn_implementation)
    query, key, value = quantizer(query, key, value)
    output, weights = attend(module, query, key, value, attention_mask, **options)
    return output, weights


# --------------------------------------------------------------------------- installing


def _attention_modules(adapter: OmniAdapter) -> Iterator[tuple[str, Any]]:
    """(dotted name, module) of every decoder layer's attention: the owner of q, k and v."""
    for block in adapter.blocks("decoder"):
        inputs = next(group for group in block.groups if group.name == "attn_in")
        name = inputs.linears[0].rpartition(".")[0]
        yield f"{block.name}.{name}", block.module.get_submodule(name)


def kv_report(adapter: OmniAdapter) -> KVReport | None:
    """What is installed in ``adapter``'s decoder, or None."""
    found = {
        name: getattr(module, CHILD)
        for name, module in _attention_modules(adapter)
        if hasattr(module, CHILD)
    }
    if not found:
        return None
    return KVReport(next(iter(found.values())).settings, found)


def install_kv_cache(adapter: OmniAdapter, settings: KVSettings) -> KVReport:
    """Quantize the keys and values of every decoder layer from now on; the towers keep theirs.

    What an earlier call installed is taken out first. The walk calls the decoder's layers one by
    one and meets the quantizers too, so whatever is calibrated behind them sees their errors.

    Args:
        adapter: changed in place.
        settings: bits, groups, grid and rotation.

    Returns:
        the live report of what was installed, all counters at zero.

    Raises:
        KVCacheError: settings that do not fit the heads, or an attention function other than
            ``eager`` and ``sdpa``. Nothing has been changed then.
    """
    from transformers import AttentionInterface

    modules = dict(_attention_modules(adapter))
    quantizers = {}
    for name, module in modules.items():
        kept = getattr(module, CHILD, None)
        config = module.config if kept is None else kept.config
        _wrapped(module, config._attn_implementation)
        quantizers[name] = KVQuantizer(settings, module.head_dim, config)
    remove_kv_cache(adapter)
    AttentionInterface.register(ATTENTION, quantized_attention)
    for name, module in modules.items():
        # The decoder makes its masks by the config that all layers share, and other models may
        # have been built with the very same object: only a copy can name another function.
        module.config = copy.copy(module.config)
        module.config._attn_implementation = ATTENTION
        module.add_module(CHILD, quantizers[name])
    return KVReport(settings, quantizers)


def remove_kv_cache(adapter: OmniAdapter) -> bool:
    """Give every decoder layer its config and attention function back. True if any had changed."""
    removed = False
    for _, module in _attention_modules(adapter):
        if hasattr(module, CHILD):
            module.config = getattr(module, CHILD).config
            delattr(module, CHILD)
            removed = True
    return removed
