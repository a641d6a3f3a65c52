"""Scales and output errors against llm-compressor's own, on one layer."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from morphoquant import formats
from morphoquant.compat import prepare_torchvision
from morphoquant.config.schema import BitsConfig, WeightConfig
from morphoquant.models.structure import Block, InputGroup
from morphoquant.quantization.transforms.scales import (
    awq_scale,
    largest_weights,
    smoothquant_scale,
)
from morphoquant.quantization.transforms.smooth_search import Losses, rounded
from morphoquant.quantization.transforms.smooth_settings import GRIDS

WIDTH = 64


@pytest.fixture(scope="module")
def llmcompressor() -> Any:
    prepare_torchvision()  # transformers, which it imports, may need it
    return importlib.import_module("llmcompressor")


class Mlp(nn.Module):
    """A gated MLP, the part that judges gate and up."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 96, bias=False)
        self.up = nn.Linear(WIDTH, 96, bias=False)
        self.down = nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


@pytest.fixture
def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp().requires_grad_(False)


@pytest.fixture
def x() -> torch.Tensor:
    """[1, tokens, WIDTH] with channels of very different size, and as much above as below zero."""
    generator = torch.Generator().manual_seed(1)
    size = torch.logspace(-1, 1.2, WIDTH)[torch.randperm(WIDTH, generator=generator)]
    half = torch.randn(1, 48, WIDTH, generator=generator) * size
    return torch.cat([half, -half], 1)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.8])
def test_smoothquant_scales(llmcompressor: Any, mlp: Mlp, x: torch.Tensor, alpha: float) -> None:
    """It takes ranges (max - min) for magnitudes: of symmetric data twice ours, on both sides."""
    from llmcompressor.modifiers.transform.smoothquant.base import SmoothQuantModifier

    linears = (mlp.gate, mlp.up)
    modifier = SmoothQuantModifier(smoothing_strength=alpha)
    spread = x[0].amax(0) - x[0].amin(0)
    expected = modifier._calculate_smoothing_scales(list(linears), spread)
    found = smoothquant_scale(x[0].abs().amax(0), largest_weights(linears), alpha)
    factor = 2**alpha / 2 ** (1 - alpha)
    torch.testing.assert_close(found * factor, expected.double(), rtol=1e-5, atol=0.0)


def output_error(mlp: Mlp, x: torch.Tensor, scale: torch.Tensor, bits: int) -> float:
    """Squared error of gate and up, smoothed and rounded, activations per token."""
    lost = 0.0
    for linear in (mlp.gate, mlp.up):
        w = linear.weight.double()
        rounded_w = formats.fake_quantize_weight(w * scale, bits).dequantized
        rounded_x = formats.fake_quantize_activation(x[0].double() / scale, bits)
        lost += float((rounded_x @ rounded_w.T - x[0].double() @ w.T).square().sum())
    return lost


@pytest.mark.parametrize("bits", [4, 8])
def test_smoothquant_loses_no_more(llmcompressor: Any, mlp: Mlp, bits: int) -> None:
    """On one layer with outlier channels; ranges are twice the magnitudes, as above."""
    from llmcompressor.modifiers.transform.smoothquant.base import SmoothQuantModifier

    half = torch.randn(1, 128, WIDTH, generator=torch.Generator().manual_seed(2))
    half[..., ::13] *= 20
    x, linears = torch.cat([half, -half], 1), (mlp.gate, mlp.up)
    spread = x[0].amax(0) - x[0].amin(0)
    modifier = SmoothQuantModifier(smoothing_strength=0.5)
    theirs = modifier._calculate_smoothing_scales(list(linears), spread).double()
    found = smoothquant_scale(x[0].abs().amax(0), largest_weights(linears), 0.5)
    error = output_error(mlp, x, found, bits)
    assert error <= 1.01 * output_error(mlp, x, theirs, bits)
    assert error < 0.5 * output_error(mlp, x, torch.ones(WIDTH, dtype=torch.float64), bits)


@pytest.mark.parametrize("group_size", [None, 32])
def test_awq_search(llmcompressor: Any, mlp: Mlp, x: torch.Tensor, group_size: int | None) -> None:
    """The exponent, the scales and the losses of its grid search, W4 asymmetric."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        disable_quantization,
        initialize_module_for_quantization,
    )
    from llmcompressor.modifiers.transform.awq.base import AWQModifier
    from llmcompressor.modifiers.transform.awq.mappings import ResolvedMapping
    from llmcompressor.pipelines.cache import IntermediatesCache

    exponents = tuple(i / 19 for i in range(20))  # its grid ends at 1, the paper's code at 0.95
    block = Block("mlp", "decoder", mlp, ())
    group = InputGroup("mlp_in", ("gate", "up"))
    weight = WeightConfig(
        format="int",
        symmetric=False,
        granularity="per_group" if group_size else "per_channel",
        group_size=group_size or 128,
    )
    bits = BitsConfig(weight=4, activation=16)
    exact = mlp(x)
    losses = Losses(len(exponents), "mse")
    scales = [awq_scale(x[0].abs().double().mean(0), e) for e in exponents]
    for i, scale in enumerate(scales):
        with rounded(block, group, scale, weight, bits, False):
            losses.add(i, exact, mlp(x), torch.zeros(1, x.shape[1], dtype=torch.int8))
    ours = losses.result()

    modifier = AWQModifier(duo_scaling=False, n_grid=20)
    strategy = "group" if group_size else "channel"
    arguments = QuantizationArgs(
        num_bits=4, symmetric=False, strategy=strategy, group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    originals = {linear: linear.weight.clone() for linear in (mlp.gate, mlp.up)}
    for linear in originals:
        initialize_module_for_quantization(linear, scheme)
        disable_quantization(linear)  # as its pipelines do: it writes rounded weights by itself
    norm = nn.LayerNorm(WIDTH)
    mapping = ResolvedMapping("norm", norm, [mlp.gate, mlp.up], ["gate", "up"], mlp, "mlp")
    modifier._smooth_activation_stats = {"norm": [x[0].abs().sum(0), torch.tensor(x.shape[1])]}
    cache = IntermediatesCache(None, None)
    cache.append({"x": x})
    modifier._parent_args_cache = {mlp: cache}
    expected = modifier._compute_best_scale(mapping, [exact], originals)

    best = min(range(20), key=ours.__getitem__)
    torch.testing.assert_close(scales[best], expected.double(), rtol=1e-4, atol=0.0)
    metrics = modifier._error_metrics[0]
    assert ours[0] == pytest.approx(metrics["initial_error"], rel=1e-3)
    assert ours[best] == pytest.approx(metrics["best_error"], rel=1e-3)  # no more than 1.01 times
    assert 0 < best < 19
    assert GRIDS["awq"][-1] == 0.95
