"""The manifest: silent failures are loud, and bits are honest (M18, F1, F2)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from morphoquant.config.schema import (
    ActivationConfig,
    BitsConfig,
    CompensationConfig,
    MethodConfig,
    WeightConfig,
)
from morphoquant.errors import HarnessError
from morphoquant.models.structure import Block, InputGroup
from morphoquant.quantization.compensation import DynamicCompensation
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.manifest import (
    LinearRecord,
    Manifest,
    ManifestError,
    complete,
    describe_scope,
    reset_counters,
)

METHOD = MethodConfig(
    name="rtn", weight=WeightConfig(format="int"), activation=ActivationConfig(format="int")
)
BITS = BitsConfig(weight=4, activation=4)
GROUPS = (InputGroup("attn_in", ("q", "k")), InputGroup("attn_out", ("o",)))


class Unchanged(nn.Module):
    """A quantizer whose grid holds everything."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return x


def plain_block(name: str = "layers.0") -> Block:
    module = nn.Module()
    for linear in ("q", "k", "o"):
        setattr(module, linear, nn.Linear(8, 6))
    return Block(name, "decoder", module, GROUPS)


def quantized_block(mask: torch.Tensor | None = None) -> tuple[Block, Manifest]:
    block, records = plain_block(), []
    for group in GROUPS:
        source = GroupInput(len(group.linears))
        source.quantizer = Unchanged()
        if mask is not None:
            source.compensation = DynamicCompensation(mask)
        for name in group.linears:
            linear: Any = block.linear(name)
            block.replace(name, QuantizedLinear(linear.weight, linear.bias, source))
            records.append(
                LinearRecord(
                    name=f"{block.name}.{name}",
                    tower="decoder",
                    group=group.name,
                    in_features=8,
                    out_features=6,
                    weight={"format": "int", "bits": 4, "effective_bits": 4.5},
                    activation={"format": "int", "bits": 4, "effective_bits": 4.0},
                    compensation={} if mask is None else {"name": "dabc"},
                )
            )
    return block, Manifest(records)


def run(block: Block, tokens: int = 3) -> None:
    x, y = torch.randn(tokens, 8), torch.randn(tokens, 8)
    block.linear("q")(x)
    block.linear("k")(x)
    block.linear("o")(y)


def test_everything_quantized_and_run_passes() -> None:
    block, manifest = quantized_block()
    run(block)
    run(block)
    complete(manifest, [block], METHOD, BITS)
    assert [r.calls for r in manifest.linears] == [2, 2, 2]
    assert [r.tokens for r in manifest.linears] == [6, 6, 6]


def failure(manifest: Manifest, block: Block, method: MethodConfig = METHOD) -> str:
    with pytest.raises(ManifestError) as caught:
        complete(manifest, [block], method, BITS)
    assert isinstance(caught.value, HarnessError)
    return str(caught.value)


def test_linear_left_plain() -> None:
    block, manifest = quantized_block()
    block.replace("k", nn.Linear(8, 6))
    run(block)
    message = failure(manifest, block)
    assert "layers.0.k: still a Linear" in message
    assert "layers.0.q" not in message


def test_linear_that_never_ran() -> None:
    block, manifest = quantized_block()
    x = torch.randn(1, 8)
    block.linear("q")(x)
    block.linear("k")(x)
    message = failure(manifest, block)
    assert "layers.0.o: never ran" in message
    assert "layers.0.k" not in message


@pytest.mark.parametrize("how", ["missing", "disabled"])
def test_activation_quantizer_that_never_ran(how: str) -> None:
    """The W4A16 that calls itself W4A4."""
    block, manifest = quantized_block()
    source: Any = block.linear("q").source
    if how == "missing":
        source.quantizer = None
    else:
        source.enabled = False
    run(block)
    message = failure(manifest, block)
    assert "layers.0.q: its activation quantizer never ran" in message
    assert "layers.0.k: its activation quantizer never ran" in message
    assert "layers.0.o" not in message


def test_weights_left_in_16_bits() -> None:
    block, manifest = quantized_block()
    manifest.linears[2].weight = {"format": "none", "bits": 16, "effective_bits": 16.0}
    run(block)
    assert "layers.0.o: weights stayed in 16 bits" in failure(manifest, block)


def test_long_lists_are_cut() -> None:
    blocks = [plain_block(f"layers.{i}") for i in range(5)]
    with pytest.raises(ManifestError, match=r"(?s)layers\.0\.q.*and 5 more"):
        complete(describe_scope(blocks), blocks, METHOD, BITS)


def test_unquantized_model_passes() -> None:
    block = plain_block()
    manifest = describe_scope([block])
    complete(manifest, [block], MethodConfig(), BitsConfig())
    complete(manifest, [block], METHOD, BitsConfig())
    assert (manifest.weight_bits, manifest.activation_bits) == (16, 16)
    assert [r.name for r in manifest.linears] == ["layers.0.q", "layers.0.k", "layers.0.o"]
    assert (manifest.linears[0].in_features, manifest.linears[0].out_features) == (8, 6)


def test_effective_bits_count_what_bypassed() -> None:
    """F2: 4 + 12 * bypass."""
    mask = torch.zeros(8, dtype=torch.bool)
    mask[3] = True
    block, manifest = quantized_block(mask)
    run(block)
    complete(manifest, [block], METHOD, BITS)
    for record in manifest.linears:
        assert record.activation["effective_bits"] == pytest.approx(4 + 12 / 8)
        assert record.compensation["bypass_rate"] == pytest.approx(1 / 8)
    assert manifest.activation_bits == pytest.approx(4 + 12 / 8)
    assert manifest.weight_bits == pytest.approx(4.5)


def test_activation_bits_weigh_groups_by_their_traffic() -> None:
    """q and k share one activation: it counts once, as often as it ran."""
    block, manifest = quantized_block()
    run(block)
    o: Any = block.linear("o")
    for _ in range(3):
        o(torch.randn(3, 8))
    complete(manifest, [block], METHOD, BITS)
    manifest.linears[2].activation["effective_bits"] = 10.0
    assert manifest.activation_bits == pytest.approx((4 * 3 + 10 * 12) / 15)


def test_weight_bits_weigh_linears_by_their_size() -> None:
    _, manifest = quantized_block()
    manifest.linears[0].out_features = 60
    manifest.linears[0].weight["effective_bits"] = 8.0
    assert manifest.weight_bits == pytest.approx((8 * 60 + 4.5 * 12) / 72)


def test_reset_forgets_calibration() -> None:
    """Counters prove that the quantizers ran *in evaluation*."""
    block, manifest = quantized_block()
    run(block)
    reset_counters([block, plain_block()])
    assert "never ran" in failure(manifest, block)


def test_scope_hash() -> None:
    """F1: the same for every method on one scope, another for another scope."""
    _, manifest = quantized_block()
    assert manifest.scope_hash == describe_scope([plain_block()]).scope_hash
    fewer = Manifest(manifest.linears[:2])
    assert fewer.scope_hash != manifest.scope_hash
    turned = Manifest(manifest.linears[::-1])
    assert turned.scope_hash == manifest.scope_hash


def test_manifest_is_json() -> None:
    import json

    block, manifest = quantized_block()
    run(block)
    complete(manifest, [block], METHOD, BITS)
    found = json.loads(json.dumps(manifest.to_dict()))
    assert found["linears"][0]["calls"] == 1
    assert found["counted_on"] == "evaluation"
    assert copy.deepcopy(found["scope_hash"]) == manifest.scope_hash


def test_compensation_must_be_installed() -> None:
    """A method that promises dabc and has none in place is not that method."""
    block, manifest = quantized_block()
    run(block)
    method = METHOD.model_copy(update={"compensation": CompensationConfig(name="dabc")})
    assert "layers.0.q: no dabc compensation" in failure(manifest, block, method)
