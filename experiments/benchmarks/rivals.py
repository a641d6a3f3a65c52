"""GPTQ and AWQ's scale search of this package and of llm-compressor, ready to be timed.

Both get the same tensors and the same settings; neither is charged for importing or for reading
activations. llm-compressor is a test dependency: None stands for it where it is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from morphoquant.compat import prepare_torchvision
from morphoquant.config.schema import BitsConfig, WeightConfig
from morphoquant.models.structure import Block, InputGroup
from morphoquant.quantization.transforms.scales import awq_scale
from morphoquant.quantization.transforms.smooth_search import Losses, rounded

Rounded = Callable[[], torch.Tensor]
EXPONENTS = tuple(i / 19 for i in range(20))  # llm-compressor's grid; the paper's ends at 0.95
GROUP = 128


def activations(tokens: int, channels: int, draw: torch.Generator) -> torch.Tensor:
    """[tokens, channels], float32: 64 shared directions, noise, every 200th channel 30 times."""
    shared = torch.randn(64, channels, generator=draw) / 8
    x = torch.randn(tokens, 64, generator=draw) @ shared
    x += torch.randn(tokens, channels, generator=draw) / 2
    x[:, ::200] *= 30
    return x


def their_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, symmetric: bool, group: int | None
) -> Rounded | None:
    """llm-compressor's GPTQ with its own scales, or None where it is not installed."""
    prepare_torchvision()
    try:
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.utils import calculate_qparams
        from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    except ImportError:
        return None
    arguments = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group is None else "group",
        group_size=group,
    )

    def run() -> torch.Tensor:
        parts = weight.reshape(len(weight), -1, group or weight.shape[1])
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
        found, _, fallback = quantize_weight(  # it works in place
            weight[None].clone(), hessian[None].clone(), scale[None], zero[None], None, arguments
        )
        if fallback.any():
            raise RuntimeError("llm-compressor fell back to rounding to nearest")
        result: torch.Tensor = found[0]
        return result

    return run


class Mlp(nn.Module):
    """A gated MLP, the part whose output judges the scales of gate and up."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, intermediate, bias=False)
        self.up = nn.Linear(hidden, intermediate, bias=False)
        self.down = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@torch.no_grad()
def our_awq(mlp: Mlp, x: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """The search of :mod:`smooth_search` on one group: the best exponent, and its error."""
    block, group = Block("mlp", "decoder", mlp, ()), InputGroup("mlp_in", ("gate", "up"))
    weight = WeightConfig(format="int", granularity="per_group", group_size=GROUP, symmetric=False)
    losses = Losses(len(EXPONENTS), "mse")
    magnitude = x.reshape(-1, x.shape[-1]).abs().double().mean(0)
    labels = torch.zeros(x.shape[:-1], dtype=torch.int8)
    for i, exponent in enumerate(EXPONENTS):
        scale = awq_scale(magnitude, exponent)
        with rounded(block, group, scale, weight, BitsConfig(weight=4), False):
            losses.add(i, exact, mlp(x), labels)
    found = losses.result()
    best = min(range(len(found)), key=found.__getitem__)
    return EXPONENTS[best], found[best]


@torch.no_grad()
def their_awq(
    mlp: Mlp, x: torch.Tensor, exact: torch.Tensor
) -> Callable[[], tuple[float, float]] | None:
    """llm-compressor's search on the same group, or None where it is not installed."""
    prepare_torchvision()
    try:
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationScheme,
            disable_quantization,
            initialize_module_for_quantization,
        )
        from llmcompressor.modifiers.transform.awq.base import AWQModifier
        from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
        from llmcompressor.pipelines.cache import IntermediatesCache
    except ImportError:
        return None
    arguments = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    # It writes into the weights: they are its own.
    its = Mlp(mlp.down.out_features, mlp.down.in_features).requires_grad_(False)
    its.load_state_dict(mlp.state_dict())
    balanced = [its.gate, its.up]
    for linear in balanced:
        initialize_module_for_quantization(linear, scheme)
        disable_quantization(linear)  # as its pipelines do: it writes rounded weights by itself
    originals = {linear: linear.weight.clone() for linear in balanced}
    norm = nn.LayerNorm(x.shape[-1])
    mapping = ResolvedMapping("norm", norm, balanced, ["gate", "up"], its, "mlp")
    rows = x.reshape(-1, x.shape[-1])
    cache = IntermediatesCache(None, None)
    cache.append({"x": x})

    def run() -> tuple[float, float]:
        modifier: Any = AWQModifier(duo_scaling=False, n_grid=len(EXPONENTS))
        count = torch.tensor(len(rows))
        modifier._smooth_activation_stats = {"norm": [rows.abs().sum(0), count]}
        modifier._parent_args_cache = {its: cache}
        modifier._compute_best_scale(mapping, [exact], originals)
        return float("nan"), float(modifier._error_metrics[0]["best_error"])

    return run


def awq_pair(
    hidden: int, intermediate: int, tokens: int, seed: int = 0
) -> dict[str, Callable[[], tuple[float, float]] | None]:
    """Both searches over gate and up of one random MLP: ``() -> (exponent, error)``."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    mlp = Mlp(hidden, intermediate).requires_grad_(False)
    x = activations(tokens, hidden, draw)[None]
    with torch.no_grad():
        exact = mlp(x)
    return {"ours": partial(our_awq, mlp, x, exact), "theirs": their_awq(mlp, x, exact)}
