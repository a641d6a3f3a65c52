"""A part quantized: some tokens, some linears, some widths; what is outside stays bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.walk import walk
from morphoquant.config.method import FIXED_WIDTH, TOKEN_KINDS
from morphoquant.config.schema import (
    ActivationConfig,
    BitsConfig,
    MethodConfig,
    ScopeConfig,
    WeightConfig,
    WidthOverride,
)
from morphoquant.errors import HarnessError
from morphoquant.models.structure import TokenLabels
from morphoquant.quantization.activation import dynamic_quantizer
from morphoquant.quantization.compensation import DynamicCompensation
from morphoquant.quantization.engine import SEARCH, STATISTICS, BlockQuantizer
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.manifest import ManifestError, complete, reset_counters
from morphoquant.quantization.weights import quantize_weight, storage_bits

W4A4 = BitsConfig(weight=4, activation=4)
W16A4 = BitsConfig(weight=16, activation=4)


def restricted(method: MethodConfig, *kinds: str) -> MethodConfig:
    activation = method.activation.model_copy(update={"modalities": kinds})
    return method.model_copy(update={"activation": activation})


def source_of(labels: torch.Tensor, only: set[int] | None, mask: torch.Tensor | None) -> GroupInput:
    source = GroupInput(1)
    source.quantizer = dynamic_quantizer(ActivationConfig(format="int"), 4)
    source.compensation = None if mask is None else DynamicCompensation(mask)
    source.labels = TokenLabels()
    source.labels.current = labels
    source.only = None if only is None else frozenset(only)
    return source


@given(st.integers(0, 10**6), st.sets(st.integers(0, 3), min_size=1, max_size=4), st.booleans())
def test_other_tokens_pass_bit_for_bit(seed: int, only: set[int], masked: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 7, 16, generator=generator)
    labels = torch.randint(-1, 4, (3, 7), generator=generator, dtype=torch.int8)
    mask = torch.rand(16, generator=generator) > 0.8 if masked else None
    whole, some = source_of(labels, None, mask), source_of(labels, only, mask)
    every, found = whole(x), some(x)
    chosen = torch.isin(labels, torch.tensor(sorted(only), dtype=torch.int8))
    assert torch.equal(found[chosen], every[chosen])
    assert torch.equal(found[~chosen], x[~chosen])
    low, high = some.bounds(x)
    assert bool(torch.isinf(low.expand_as(x)[~chosen]).all())
    assert bool(torch.isfinite(high.expand_as(x)[chosen]).all())
    kept = int(mask.sum()) if mask is not None else 0
    expected = int((~chosen).sum()) * 16 + int(chosen.sum()) * kept
    assert some.bypassed == expected
    assert some.spared_all == (not bool(chosen.any()))


def test_tokens_of_unknown_modality_are_refused() -> None:
    source = source_of(torch.zeros(1, 2, dtype=torch.int8), {0}, None)
    with pytest.raises(HarnessError, match="modality of an activation"):
        source(torch.randn(1, 5, 16))


@pytest.mark.parametrize("name", ["rtn", "morphoquant"])
def test_a_modality_moves_its_own_prompts_only(
    methods: Any, omni: Any, quantize: Any, one_of_each: Any, name: str
) -> None:
    method = restricted(methods[name], "image")
    adapter, quantizer = quantize(method, W16A4, ["decoder"])
    adapter.follow_labels(quantizer.labels)
    reset_counters(adapter.blocks("decoder"))
    for modality, sample in one_of_each.items():
        batch = omni.encode([sample.messages])
        same = torch.equal(adapter.logits(batch), omni.logits(batch))
        assert same == (modality != "image"), modality
    manifest = quantizer.manifest
    complete(manifest, adapter.blocks("decoder"), method, W16A4)
    labels = [omni.modality_map(omni.encode([s.messages])) for s in one_of_each.values()]
    images, tokens = (sum(int((la == 1).sum()) for la in labels), sum(la.numel() for la in labels))
    if name == "rtn":  # without compensation, what is not an image token is what bypassed
        assert manifest.activation_bits == pytest.approx(16 - 12 * images / tokens)
    assert 4 < manifest.activation_bits < 16
    assert manifest.weight_bits == 16
    assert manifest.linears[0].activation["modalities"] == ["image"]
    reset_counters(adapter.blocks("decoder"))
    adapter.logits(omni.encode([one_of_each["text"].messages]))
    with pytest.raises(ManifestError, match="no token of image"):
        complete(manifest, adapter.blocks("decoder"), method, W16A4)


@pytest.mark.parametrize("name", ["rtn", "element"])
def test_all_modalities_are_full_quantization(
    methods: Any, quantize: Any, probe: Any, name: str
) -> None:
    """Named one by one through the gate, and not gated at all: the same on every real token."""
    whole, _ = quantize(name, W4A4, ["decoder"])
    named, quantizer = quantize(restricted(methods[name], *TOKEN_KINDS), W4A4, ["decoder"])
    assert quantizer.only is None
    expected = whole.logits(probe)
    assert torch.equal(named.logits(probe), expected)
    for block in named.blocks("decoder"):
        for group in block.groups:
            block.linear(group.linears[0]).source.only = frozenset(range(4))
            block.linear(group.linears[0]).source.labels = quantizer.labels
    named.follow_labels(quantizer.labels)
    torch.testing.assert_close(named.logits(probe), expected, rtol=0, atol=1e-6)


def overridden(*overrides: tuple[str, int | None, int | None], base: int = 4) -> BitsConfig:
    found = [
        WidthOverride.model_validate({"linears": p, "weight": w, "activation": a})
        for p, w, a in overrides
    ]
    return BitsConfig.model_validate({"weight": base, "activation": base, "overrides": found})


MIXED = overridden(("model.layers.0.*", 8, 8), ("*.mlp.down_proj", 16, 16), ("*.v_proj", 3, None))


@pytest.mark.parametrize("name", ["rtn", "morphoquant", "static"])
def test_overrides_change_the_named_linears_exactly(
    methods: Any, omni: Any, quantize: Any, probe: Any, name: str
) -> None:
    adapter, quantizer = quantize(name, MIXED, ["decoder"])
    for block, original in zip(adapter.blocks("decoder"), omni.blocks("decoder"), strict=True):
        for group in block.groups:
            for linear in group.linears:
                full, found = f"{block.name}.{linear}", block.linear(linear)
                width = MIXED.at(full)
                config = methods[name].weight
                expected = quantize_weight(original.linear(linear).weight, config, width.weight)
                assert torch.equal(found.weight, expected.dequantized), full
                assert (found.source.quantizer is None) == (width.activation == 16), full
                assert width.activation < 16 or found.source.compensation is None
    records = {r.name: r for r in quantizer.manifest.linears}
    told = {n: (r.weight["bits"], r.activation["bits"]) for n, r in records.items()}
    assert told["model.layers.0.self_attn.q_proj"] == (8, 8)
    assert told["model.layers.0.self_attn.v_proj"] == (3, 8)
    assert told["model.layers.2.mlp.up_proj"] == (4, 4)
    assert told["model.layers.0.mlp.down_proj"] == told["model.layers.3.mlp.down_proj"] == (16, 16)
    blocks = adapter.blocks("decoder")
    reset_counters(blocks)
    adapter.logits(probe)
    manifest = quantizer.manifest
    complete(manifest, blocks, methods[name], MIXED)
    inputs = {(r.name.rsplit(".", 1)[0], r.group): r for r in manifest.linears}.values()
    assert len({r.tokens for r in inputs}) == 1, "what is in 16 bits counts as much"
    sizes = sum(r.in_features for r in inputs)
    spent = sum(r.in_features * r.activation["effective_bits"] for r in inputs)
    assert manifest.activation_bits == pytest.approx(spent / sizes)
    assert manifest.activation_bits > 8
    with pytest.raises(ManifestError, match=r"down_proj.*stayed in 16 bits"):
        complete(quantizer.manifest, blocks, methods[name], W4A4)


@pytest.mark.parametrize("name", ["rtn", "static"])
def test_overrides_of_everything_are_another_width(quantize: Any, probe: Any, name: str) -> None:
    plain, _ = quantize(name, BitsConfig(weight=8, activation=8), ["decoder"])
    by_name, _ = quantize(name, overridden(("*", 8, 8)), ["decoder"])
    from_16, _ = quantize(name, overridden(("*", 8, 8), base=16), ["decoder"])
    expected = plain.logits(probe)
    assert torch.equal(by_name.logits(probe), expected)
    assert torch.equal(from_16.logits(probe), expected)


def test_a_scope_leaves_other_linears_alone(
    methods: Any, omni: Any, copied: Any, encode: Callable[..., list[Any]], probe: Any
) -> None:
    scope = ScopeConfig(only=("model.layers.1.*", "*.3.mlp.down_proj"))
    for name in ("rtn", "morphoquant"):
        adapter = copied(omni)
        adapter.config = omni.config.model_copy(update={"scope": scope})
        quantizer = BlockQuantizer(methods[name], W4A4)
        sets = {STATISTICS: encode("samples")}
        if quantizer.searches:
            sets[SEARCH] = encode("search")
        walk(adapter, ["decoder"], sets, quantizer)
        changed = {
            name for name, m in adapter.model.named_modules() if isinstance(m, QuantizedLinear)
        }
        assert changed == {record.name for record in quantizer.records}
        assert len(changed) == 8
        assert not torch.equal(adapter.logits(probe), omni.logits(probe))


FORMATS = ["int", *FIXED_WIDTH]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_storage_bits_are_what_the_round_trip_says(name: str, granularity: str) -> None:
    changes: dict[str, Any] = {"granularity": granularity, "group_size": 32, "symmetric": False}
    config = WeightConfig.model_validate({"format": name, "fallback_format": "int"} | changes)
    weight = torch.randn(24, 96)
    for bits in (3, 4, 8, 16):
        told = quantize_weight(weight, config, bits).description["effective_bits"]
        assert storage_bits((24, 96), config, bits) == pytest.approx(told, rel=1e-12)
