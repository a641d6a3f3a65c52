"""The shared group input and its counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from morphoquant.config.schema import ActivationConfig
from morphoquant.quantization.activation import StaticQuantizer, dynamic_quantizer
from morphoquant.quantization.compensation import DynamicCompensation
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.ranges import StaticRange


class Unchanged(nn.Module):
    """A quantizer whose grid holds everything."""

    def forward(self, x: torch.Tensor, labels: object = None) -> torch.Tensor:
        return x


class Counting(nn.Module):
    """Adds one, and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, labels: object = None) -> torch.Tensor:
        self.calls += 1
        return x + 1


def group(readers: int, **parts: Any) -> tuple[GroupInput, list[QuantizedLinear]]:
    torch.manual_seed(0)
    source = GroupInput(readers, parts.pop("online", None))
    for name, part in parts.items():
        setattr(source, name, part)
    linears = [
        QuantizedLinear(torch.randn(5, 8), torch.randn(5) if i else None, source)
        for i in range(readers)
    ]
    return source, linears


def test_without_a_quantizer_the_input_is_untouched() -> None:
    source, linears = group(2)
    x = torch.randn(3, 8)
    assert source(x) is x
    for layer in linears:
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert (source.tokens, source.elements, source.bypassed) == (0, 0, 0)


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_quantizer_runs_once_per_group(readers: int) -> None:
    counting = Counting()
    source, linears = group(readers, quantizer=counting)
    for _ in range(4):
        x = torch.randn(2, 3, 8)
        for layer in linears:
            assert torch.equal(layer(x), F.linear(x + 1, layer.weight, layer.bias))
    assert counting.calls == 4
    assert [layer.calls for layer in linears] == [4] * readers
    assert source.tokens == 4 * 6
    assert source.elements == 4 * 48


def test_result_is_dropped_after_the_last_reader() -> None:
    source, linears = group(3, quantizer=Counting())
    x = torch.randn(2, 8)
    linears[0](x)
    linears[1](x)
    assert source._result is not None
    linears[2](x)
    assert source._result is None
    assert source._source is None


def test_equal_values_in_another_tensor_are_another_input() -> None:
    counting = Counting()
    _, linears = group(2, quantizer=counting)
    x = torch.randn(2, 8)
    linears[0](x)
    linears[1](x.clone())
    assert counting.calls == 2


def test_interrupted_forward_does_not_leak_into_the_next() -> None:
    """The walk stops forwards half way; the next input must not get the old result."""
    _, linears = group(2, quantizer=Counting())
    linears[0](torch.full((1, 8), 100.0))
    x = torch.randn(2, 8)
    for layer in linears:
        assert torch.equal(layer(x), F.linear(x + 1, layer.weight, layer.bias))


def test_same_tensor_twice_is_computed_again() -> None:
    counting = Counting()
    _, linears = group(2, quantizer=counting)
    x = torch.randn(2, 8)
    first = [layer(x) for layer in linears]
    x.add_(1)
    second = [layer(x) for layer in linears]
    assert counting.calls == 2
    assert not torch.equal(first[0], second[0])


def test_disabled_quantizer_does_nothing() -> None:
    counting = Counting()
    source, linears = group(1, quantizer=counting)
    source.enabled = False
    x = torch.randn(2, 8)
    assert torch.equal(linears[0](x), F.linear(x, linears[0].weight))
    assert counting.calls == source.tokens == 0


def test_observer_sees_what_reaches_the_quantizer() -> None:
    """Behind the online rewrite, before rounding, once per forward."""
    seen: list[torch.Tensor] = []
    source, linears = group(2, online=Counting(), quantizer=Unchanged())
    x = -torch.rand(4, 8)
    with linears[0].observe_input(seen.append):
        for layer in linears:
            layer(x)
    linears[0](x)
    assert len(seen) == 1
    assert torch.equal(seen[0], x + 1)
    assert source.observer is None


def test_observer_is_removed_after_an_error() -> None:
    source, linears = group(1)

    def fail(x: torch.Tensor) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), linears[0].observe_input(fail):
        linears[0](torch.zeros(1, 8))
    assert source.observer is None


def test_bypassed_elements_are_counted() -> None:
    mask = torch.zeros(8, dtype=torch.bool)
    mask[:2] = True
    source, linears = group(2, quantizer=Unchanged(), compensation=DynamicCompensation(mask))
    for _ in range(3):
        x = torch.randn(5, 8)
        for layer in linears:
            layer(x)
    assert source.elements == 3 * 40
    assert source.bypassed == 3 * 10
    source.reset()
    assert (source.tokens, source.elements, source.bypassed) == (0, 0, 0)


def test_element_bypass_is_counted_per_element() -> None:
    mask = torch.ones(8, dtype=torch.bool)
    compensation = DynamicCompensation(mask, torch.full((8,), 0.5))
    source, linears = group(1, quantizer=Unchanged(), compensation=compensation)
    total = 0
    for seed in range(3):
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))
        linears[0](x)
        total += int((x.abs() > 0.5).sum())
    assert source.bypassed == total > 0
    assert isinstance(source.bypassed, int)


@pytest.mark.parametrize("kind", ["per_token", "per_group", "static"])
def test_decoding_a_token_equals_its_row_in_the_prefill(kind: str) -> None:
    """M15."""
    if kind == "static":
        edge = torch.rand(8) + 0.5
        quantizer: nn.Module = StaticQuantizer(
            StaticRange(-edge, edge, torch.zeros(8, dtype=torch.bool)), 4
        )
    else:
        quantizer = dynamic_quantizer(
            ActivationConfig(format="int", granularity=kind, group_size=3),  # type: ignore[arg-type]
            4,
        )
    mask = torch.tensor([True, False] * 4)
    source, (layer,) = group(
        1, quantizer=quantizer, compensation=DynamicCompensation(mask, torch.full((8,), 0.7))
    )
    layer.double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    prefill = layer(x)
    for token in range(6):
        assert torch.equal(source(x[:, token : token + 1]), source(x)[:, token : token + 1])
        torch.testing.assert_close(layer(x[:, token : token + 1]), prefill[:, token : token + 1])


def test_shape_is_reported() -> None:
    _, (layer,) = group(1)
    assert (layer.in_features, layer.out_features) == (8, 5)
    assert "in_features=8, out_features=5" in repr(layer)
    assert not any(p.requires_grad for p in layer.parameters())
