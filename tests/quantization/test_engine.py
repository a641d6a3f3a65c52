"""The engine through the real walk, on a random thinker with every modality."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.walk import walk
from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.quantization.engine import STATISTICS, BlockQuantizer
from morphoquant.quantization.linear import QuantizedLinear
from morphoquant.quantization.manifest import complete, describe_scope, reset_counters
from morphoquant.quantization.weights import quantize_weight

TOWERS = ("vision", "audio", "decoder")
W4A4 = BitsConfig(weight=4, activation=4)


def blocks_of(adapter: Any, towers: Any = TOWERS) -> list[Any]:
    return [b for t in towers for b in adapter.blocks(t)]


def sources(adapter: Any, towers: Any = TOWERS) -> dict[tuple[str, str], Any]:
    return {
        (b.name, g.name): b.linear(g.linears[0]).source
        for b in blocks_of(adapter, towers)
        for g in b.groups
    }


@pytest.mark.parametrize("name", ["rtn", "static", "tensor", "morphoquant", "element"])
def test_every_linear_in_scope_is_replaced_and_runs(
    methods: Any, omni: Any, quantize: Any, mixed: Any, name: str
) -> None:
    """M18, on all three towers, through encode and generate."""
    adapter, quantizer = quantize(name)
    blocks = blocks_of(adapter)
    replaced = [b.linear(n) for b in blocks for g in b.groups for n in g.linears]
    assert all(isinstance(m, QuantizedLinear) for m in replaced)
    assert not isinstance(adapter.model.lm_head, QuantizedLinear)
    total = sum(isinstance(m, QuantizedLinear) for m in adapter.model.modules())
    assert total == len(replaced) == len(quantizer.records)
    reset_counters(blocks)
    adapter.generate(mixed, max_new_tokens=3)
    manifest = quantizer.manifest
    complete(manifest, blocks, methods[name], W4A4)
    assert manifest.scope_hash == describe_scope(blocks_of(omni)).scope_hash
    for record in manifest.linears:
        assert record.calls > 0
        assert record.tokens > 0
        assert record.weight["bits"] == record.activation["bits"] == 4


def test_scope_is_respected(omni: Any, quantize: Any) -> None:
    adapter, quantizer = quantize("rtn", towers=["decoder"])
    assert {r.tower for r in quantizer.records} == {"decoder"}
    for block in blocks_of(adapter, ["vision", "audio"]):
        for group in block.groups:
            assert isinstance(block.linear(group.linears[0]), torch.nn.Linear)
    assert {key[0] for key in quantizer.collected} == {b.name for b in omni.blocks("decoder")}


@pytest.mark.parametrize("name", ["rtn", "morphoquant"])
def test_16_bits_is_the_identity(omni: Any, quantize: Any, probe: Any, name: str) -> None:
    """Q9: the whole machinery in place, and not one bit moved."""
    adapter, quantizer = quantize(name, BitsConfig())
    assert all(s.quantizer is None for s in sources(adapter).values())
    assert torch.equal(adapter.logits(probe), omni.logits(probe))
    assert quantizer.manifest.weight_bits == quantizer.manifest.activation_bits == 16


def test_observing_alone_changes_nothing(omni: Any, quantize: Any, probe: Any) -> None:
    adapter, quantizer = quantize(MethodConfig(), BitsConfig())
    assert torch.equal(adapter.logits(probe), omni.logits(probe))
    assert quantizer.records == []
    assert len(quantizer.collected) == sum(len(b.groups) for b in blocks_of(omni))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).square().sum() / b.square().sum())


@pytest.mark.parametrize("name", ["rtn", "static", "morphoquant"])
def test_more_bits_are_closer(omni: Any, quantize: Any, probe: Any, name: str) -> None:
    exact = omni.logits(probe)
    found = [
        distance(quantize(name, BitsConfig(weight=b, activation=b))[0].logits(probe), exact)
        for b in (8, 4)
    ]
    assert 0 < found[0] < 0.1
    assert found[1] > 5 * found[0]


def test_weights_and_activations_both_count(
    methods: Any, omni: Any, quantize: Any, probe: Any
) -> None:
    method, exact = methods["rtn"], omni.logits(probe)
    weights, _ = quantize(method, BitsConfig(weight=4, activation=16))
    activations, _ = quantize(method, BitsConfig(weight=16, activation=4))
    both, _ = quantize(method)
    logits = [adapter.logits(probe) for adapter in (weights, activations, both)]
    assert all(distance(found, exact) > 1e-6 for found in logits)
    assert distance(logits[0], logits[2]) > 1e-6
    assert distance(logits[1], logits[2]) > 1e-6


def test_weights_are_the_slot_s(methods: Any, omni: Any, quantize: Any) -> None:
    """Every weight is the original's round trip; biases are not touched."""
    adapter, _ = quantize("morphoquant")
    for block, original in zip(blocks_of(adapter), blocks_of(omni), strict=True):
        for name in (n for g in block.groups for n in g.linears):
            found: Any = block.linear(name)
            plain: Any = original.linear(name)
            expected = quantize_weight(plain.weight, methods["morphoquant"].weight, 4)
            assert torch.equal(found.weight, expected.dequantized)
            assert (found.bias is None) == (plain.bias is None)
            assert found.bias is None or torch.equal(found.bias, plain.bias)


def test_a_copy_keeps_the_sharing(quantize: Any, copied: Any, probe: Any) -> None:
    adapter, _ = quantize("morphoquant")
    twin = copied(adapter)
    assert torch.equal(twin.logits(probe), adapter.logits(probe))
    assert (
        len({id(s) for s in sources(twin).values()} & {id(s) for s in sources(adapter).values()})
        == 0
    )
    block = twin.blocks("decoder")[0]
    first, second = (block.linear(f"self_attn.{n}_proj") for n in "qk")
    assert first.source is second.source


def test_tower_that_calibration_never_reaches(
    methods: Any, omni: Any, copied: Any, one_of_each: Any
) -> None:
    """Text prompts cannot set the static ranges of the vision tower: say so."""
    batch = omni.encode([one_of_each["text"].messages])
    for method in ("static", "morphoquant"):
        quantizer = BlockQuantizer(methods[method], W4A4)
        with pytest.raises(CalibrationError, match=r"vision tower.*model\.scope\.vision=false"):
            walk(copied(omni), ["vision"], {STATISTICS: [batch]}, quantizer)
    dynamic = BlockQuantizer(methods["rtn"], W4A4)
    walk(copied(omni), ["vision"], {STATISTICS: [batch]}, dynamic)
    assert len(dynamic.records) > 0


def test_statistics_are_collected_per_modality(omni: Any, quantize: Any) -> None:
    _, quantizer = quantize("rtn")
    assert len(quantizer.collected) == sum(len(b.groups) for b in blocks_of(omni))
    names = {
        b.name: {m.name for m in quantizer.collected[b.name, b.groups[0].name].present}
        for b in blocks_of(omni)
    }
    for tower, kinds in (
        ("decoder", {"TEXT", "IMAGE", "VIDEO", "AUDIO"}),
        ("vision", {"IMAGE", "VIDEO"}),
        ("audio", {"AUDIO"}),
    ):
        assert all(names[b.name] == kinds for b in omni.blocks(tower))
    _, silent = quantize("static", observe=False)
    assert silent.collected == {}


def test_non_finite_activations_stop_the_walk(
    methods: Any, omni: Any, copied: Any, probe: Any
) -> None:
    adapter = copied(omni)
    adapter.blocks("decoder")[1].linear("mlp.up_proj").weight[3] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        walk(adapter, ["decoder"], {STATISTICS: [probe]}, BlockQuantizer(methods["rtn"], W4A4))
