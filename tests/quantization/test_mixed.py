"""Mixed precision by channel: outliers apart, the others as if they were not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphoquant.config.schema import (
    BitsConfig,
    CompensationConfig,
    MaskConfig,
    MethodConfig,
    WeightConfig,
)
from morphoquant.formats import fake_quantize_activation, fake_quantize_weight
from morphoquant.quantization.activation import DynamicQuantizer
from morphoquant.quantization.manifest import complete, reset_counters
from morphoquant.quantization.mixed import ExcludingQuantizer, HigherPrecision, mixed_weight

W4A4 = BitsConfig(weight=4, activation=4)
MASK = torch.zeros(32, dtype=torch.bool)
MASK[[3, 20]] = True


def activations() -> torch.Tensor:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 50
    return x


@pytest.mark.parametrize("group", [None, 8])
def test_other_channels_do_not_feel_the_outliers(group: int | None) -> None:
    x = activations()
    inner = DynamicQuantizer(4, True, 1.0, group)
    found = ExcludingQuantizer(inner, MASK)(x)
    tame = x.masked_fill(MASK, 0.0)
    assert torch.equal(found, inner(tame))
    plain = (inner(x) - x)[:, ~MASK].square().sum()
    assert (found - x)[:, ~MASK].square().sum() < 0.2 * plain
    low, high = ExcludingQuantizer(inner, MASK).bounds(x)
    assert torch.isinf(low[:, MASK]).all()
    assert (x <= high + 1e-6).all()


def test_eight_bits_and_sixteen() -> None:
    x, rounded = activations(), torch.zeros(5, 32)
    out, bypassed = HigherPrecision(MASK, 8)(x, rounded)
    assert torch.equal(out[:, MASK], fake_quantize_activation(x[:, MASK], 8))
    assert torch.equal(out[:, ~MASK], rounded[:, ~MASK])
    assert bypassed == 0
    out, bypassed = HigherPrecision(MASK, 16)(x, rounded)
    assert torch.equal(out[:, MASK], x[:, MASK])
    assert bypassed == 2 * 5
    nothing = HigherPrecision(torch.zeros_like(MASK), 8)
    assert torch.equal(nothing(x, rounded)[0], rounded)


@pytest.mark.parametrize("bits", [8, 16])
def test_weight_columns(bits: Any) -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    low = fake_quantize_weight(weight.masked_fill(MASK, 0.0), 4).dequantized
    found = mixed_weight(weight, low, MASK, bits)
    assert torch.equal(found[:, ~MASK], low[:, ~MASK])
    columns = weight[:, MASK]
    expected = columns if bits == 16 else fake_quantize_weight(columns, 8).dequantized
    assert torch.equal(found[:, MASK], expected)


def masked(name: str, **changes: Any) -> CompensationConfig:
    rules = MaskConfig(score="absmax", rules=("top_share",), top_share=0.05, max_share=1.0)
    return CompensationConfig(name=name, mask=rules, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("compensation", "bits"),
    [
        (masked("mixed_precision", outlier_bits=8), 8),
        (masked("mixed_precision", outlier_bits=16), 16),
        (masked("dabc"), 16),
    ],
    ids=["8 bits", "16 bits", "dabc on dynamic ranges"],
)
def test_through_the_engine(
    methods: Any, quantize: Any, mixed: Any, compensation: CompensationConfig, bits: int
) -> None:
    """Bits are counted, in activations and in weights."""
    plain: MethodConfig = methods["rtn"].model_copy(
        update={"weight": WeightConfig(format="int", granularity="per_group", group_size=32)}
    )
    method = plain.model_copy(update={"compensation": compensation})
    adapter, quantizer = quantize(method)
    blocks = [b for t in ("vision", "audio", "decoder") for b in adapter.blocks(t)]
    reset_counters(blocks)
    adapter.generate(mixed, max_new_tokens=2)
    complete(quantizer.manifest, blocks, method, W4A4)
    for record in quantizer.records:
        share = record.compensation["masked_channels"] / record.in_features
        assert record.compensation["masked_channels"] == round(0.05 * record.in_features)
        expected = 4 + share * (bits - 4)
        assert record.activation["effective_bits"] == pytest.approx(expected)
        if compensation.name == "mixed_precision":
            assert record.weight["high_precision_bits"] == bits
            floor = 4 + share * (bits - 4)
            assert floor < record.weight["effective_bits"] < floor + 1.01
    assert quantizer.manifest.compensation_cost()["masked_share"] == pytest.approx(0.05, abs=0.02)
