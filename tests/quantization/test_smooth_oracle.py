"""Scales against llm-compressor's own, on one layer; skipped where it is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
    prepare_torchvision()
    return pytest.importorskip("llmcompressor", reason="llm-compressor is not installed")


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


def test_awq_search(llmcompressor: Any, mlp: Mlp, x: torch.Tensor) -> None:
    """The exponent, the scales and the losses of its grid search, W4 asymmetric per channel."""
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
    weight = WeightConfig(format="int", symmetric=False)
    bits = BitsConfig(weight=4, activation=16)
    exact = mlp(x)
    losses = Losses(len(exponents), "mse")
    scales = [awq_scale(x[0].abs().double().mean(0), e) for e in exponents]
    for i, scale in enumerate(scales):
        with rounded(block, group, scale, weight, bits, False):
            losses.add(i, exact, mlp(x), torch.zeros(1, x.shape[1], dtype=torch.int8))
    ours = losses.result()

    modifier = AWQModifier(duo_scaling=False, n_grid=20)
    arguments = QuantizationArgs(num_bits=4, symmetric=False, strategy="channel")
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
    assert ours[best] == pytest.approx(metrics["best_error"], rel=1e-3)
    assert 0 < best < 19
    assert GRIDS["awq"][-1] == 0.95
