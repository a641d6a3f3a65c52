"""Outlier masks and what the compensation lets through (M1 - M4, M10)."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from morphoquant.calibration.statistics import ChannelStatistics
from morphoquant.config.schema import CompensationConfig
from morphoquant.quantization.activation import StaticQuantizer
from morphoquant.quantization.compensation import (
    DynamicCompensation,
    build_compensation,
)
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.ranges import StaticRange, initial_range

CHANNELS = 40


def activations(seed: int = 0, rows: int = 60) -> torch.Tensor:
    x = torch.randn(rows, CHANNELS, generator=torch.Generator().manual_seed(seed))
    x[0, 3], x[1, 17], x[2, 8] = 60.0, -70.0, 65.0
    return x


def seen(x: torch.Tensor) -> ChannelStatistics:
    found = ChannelStatistics(x.shape[1])
    found.update(x)
    return found


def linear(x: torch.Tensor, mask: torch.Tensor | None, **config: object) -> QuantizedLinear:
    """A quantized linear at 4 bits with ranges from ``x``."""
    draw = torch.Generator().manual_seed(9)
    chosen = initial_range(seen(x), mask)
    source = GroupInput(1)
    source.quantizer = StaticQuantizer(chosen, 4)
    if mask is not None:
        settings = CompensationConfig(name="dabc", **config)  # type: ignore[arg-type]
        source.compensation = build_compensation(settings, mask, chosen.edge)
    weight = torch.randn(12, CHANNELS, generator=draw)
    return QuantizedLinear(weight, torch.randn(12, generator=draw), source)


ALL = torch.ones(CHANNELS, dtype=torch.bool)
NONE = ~ALL
SOME = NONE.clone()
SOME[[3, 8, 17, 30]] = True


def test_all_channels_masked_is_exact() -> None:
    """M1: independent of the ranges, and bitwise."""
    x = activations()
    layer = linear(x, ALL)
    for shown in (x, activations(1) * 100):
        assert torch.equal(layer(shown), F.linear(shown, layer.weight, layer.bias))


def test_no_channel_masked_is_static_rounding() -> None:
    """M2: alpha is the far edge."""
    x = activations()
    masked, plain = linear(x, NONE), linear(x, None)
    assert torch.equal(masked(x), plain(x))
    step = x.abs().amax(0) / 7
    expected = F.linear((x / step).round().clamp(-7, 7) * step, plain.weight, plain.bias)
    torch.testing.assert_close(plain(x), expected)
    assert masked.source.bypassed == 0


def test_channel_reading_is_the_paper_s_equation() -> None:
    """Y = W x_hat + b + W ((x - x_hat) * m)."""
    x = activations()
    layer = linear(x, SOME).double()
    x = x.double()
    rounded = layer.source.quantizer(x)
    expected = F.linear(rounded, layer.weight, layer.bias)
    expected = expected + F.linear((x - rounded) * SOME, layer.weight)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-10)


def test_infinite_gate_never_opens() -> None:
    """M3."""
    x = activations()
    layer = linear(x, SOME, reading="element", gate=1e30)
    chosen = initial_range(seen(x), SOME)
    assert torch.equal(layer.source(x), StaticQuantizer(chosen, 4)(x))
    assert layer.source.bypassed == 0


def test_open_gate_and_all_channels_is_the_identity() -> None:
    """M3: gamma 0 lets everything through but exact zeros, which are zero on the grid."""
    x = activations()
    x[5] = 0
    layer = linear(x, ALL, reading="element", gate=0.0)
    assert torch.equal(layer.source(x), x)
    assert layer.source.bypassed == int((x != 0).sum())


@pytest.mark.parametrize("gate", [0.5, 0.8, 1.0, 1.5])
def test_gate_is_within_the_mask_and_beyond_the_edge(gate: float) -> None:
    """M4."""
    x = activations()
    layer = linear(x, SOME, reading="element", gate=gate)
    edge = initial_range(seen(x), SOME).edge
    opened = layer.source.compensation.gate(x)
    assert opened.any()
    assert not opened[:, ~SOME].any()
    assert torch.equal(opened, SOME & (x.abs() > gate * edge))
    out, rounded = layer.source(x), layer.source.quantizer(x)
    assert torch.equal(out[opened], x[opened])
    assert torch.equal(out[~opened], rounded[~opened])
    assert layer.source.bypassed == int(opened.sum())


def test_gate_one_leaves_elements_in_range_quantized() -> None:
    """M4: at the edge itself still quantized, just beyond not."""
    chosen = StaticRange(torch.tensor([-2.0]), torch.tensor([2.0]), torch.tensor([False]))
    settings = CompensationConfig(name="dabc", reading="element", gate=1.0)
    compensation = build_compensation(settings, torch.tensor([True]), chosen.edge)
    x = torch.tensor([[2.0], [-2.0], [0.1], [2.001], [-7.0]])
    out, bypassed = compensation(x, StaticQuantizer(chosen, 4)(x))
    assert int(bypassed) == 2
    assert out[3:].tolist() == x[3:].tolist()
    assert out[2].item() == 0.0
    assert out[:2].tolist() == [[2.0], [-2.0]]


def test_dead_zone_above_gate_one() -> None:
    """SPEC 2.4: between L and gamma L an element is clipped and not compensated."""
    chosen = StaticRange(torch.tensor([-2.0]), torch.tensor([2.0]), torch.tensor([False]))
    settings = CompensationConfig(name="dabc", reading="element", gate=1.5)
    compensation = build_compensation(settings, torch.tensor([True]), chosen.edge)
    x = torch.tensor([[2.9], [3.1]])
    out, _ = compensation(x, StaticQuantizer(chosen, 4)(x))
    assert out.flatten().tolist() == pytest.approx([2.0, 3.1])


def test_compensation_helps() -> None:
    x = activations()
    exact = F.linear(x, linear(x, None).weight, linear(x, None).bias)
    error = [float((linear(x, mask)(x) - exact).square().mean()) for mask in (None, SOME, ALL)]
    assert error[0] > 1.5 * error[1] > error[2] == 0


def test_half_precision_keeps_its_dtype() -> None:
    compensation = DynamicCompensation(SOME, torch.ones(CHANNELS))
    x = activations().bfloat16()
    out, _ = compensation(x, torch.zeros_like(x))
    assert out.dtype == torch.bfloat16
