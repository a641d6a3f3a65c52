"""Attention of the decoder with a quantized cache, beside the functions of transformers.

Nothing of transformers is patched. One attention function is registered beside theirs; the
attention modules of the decoder are given a config of their own that names it, and everything
that it needs to know is in a :class:`~morphoquant.quantization.kv_cache.KVQuantizer` on the
module. Models in one process do not interfere, and a deep copy of a model is a model with the
same settings and counters of its own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from morphoquant.models.adapter import OmniAdapter
from morphoquant.quantization.kv_cache import KVCacheError, KVQuantizer, KVSettings

ATTENTION = "quantized_kv"  # what the function is called among transformers' attention functions
CHILD = "kv_quantizer"  # name of the quantizer on its attention module
WRAPPED = ("eager", "sdpa")


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

    What an earlier call installed is replaced. The walk calls the decoder's layers one by
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
    AttentionInterface.register(ATTENTION, quantized_attention)
    for name, module in modules.items():
        # The decoder makes its masks by the config that all layers share, and other models may
        # have been built with the very same object: only a copy can name another function.
        module.config = copy.copy(quantizers[name].config)
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
