"""Rounding through the engine: branches, second moments, ranges per tensor and modality."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from morphoquant.config.schema import (
    BitsConfig,
    CompensationConfig,
    MethodConfig,
    RangeConfig,
    WeightConfig,
)
from morphoquant.quantization.low_rank import truncated, whitened
from morphoquant.quantization.manifest import ManifestError, complete, reset_counters
from morphoquant.quantization.rounding import GroupData, round_weight, rounds_late
from morphoquant.quantization.weights import quantize_weight

W4A16 = BitsConfig(weight=4, activation=16)
W4A4 = BitsConfig(weight=4, activation=4)
INT = WeightConfig(format="int", granularity="per_group", group_size=32)


def low_rank(**changes: Any) -> MethodConfig:
    compensation = CompensationConfig(name="low_rank", rank=8, **changes)
    return MethodConfig(name="x", weight=INT, compensation=compensation)


def correlated(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 64, generator=draw)
    weight += 5 * torch.randn(24, 1, generator=draw) @ torch.randn(1, 64, generator=draw)
    x = torch.randn(300, 64, generator=draw) * torch.logspace(-1, 1, 64)
    return weight, x


def test_branch_before_rounding_is_taken_out() -> None:
    weight, _ = correlated()
    found = round_weight(weight, low_rank(order="before"), W4A16, GroupData())
    branch = truncated(weight, 8)
    expected = quantize_weight(weight - branch.product, INT, 4).dequantized
    torch.testing.assert_close(found.weight, expected)
    assert found.branch is not None
    plain = quantize_weight(weight, INT, 4).dequantized
    lost = (weight - found.weight - found.branch.product).square().sum()
    assert lost < 0.5 * (weight - plain).square().sum(), "the rest has a smaller range"
    bits = quantize_weight(weight, INT, 4).description["effective_bits"]
    assert found.description["effective_bits"] == pytest.approx(bits + branch.storage_bits())


def test_branch_after_rounding_is_fitted_to_the_loss() -> None:
    weight, x = correlated()
    moment = (x.T @ x).double()
    plain = quantize_weight(weight, INT, 4).dequantized
    outputs = {}
    for white in (False, True):
        method = low_rank(order="after", whitened=white)
        found = round_weight(weight, method, W4A16, GroupData(second_moment=moment))
        assert torch.equal(found.weight, plain)
        loss = weight - plain
        expected = whitened(loss, moment, 8) if white else truncated(loss, 8)
        assert found.branch is not None
        torch.testing.assert_close(found.branch.product, expected.product)
        left = F.linear(x, weight - found.weight - found.branch.product)
        outputs[white] = float(left.square().sum())
    assert outputs[True] < outputs[False] < float(F.linear(x, weight - plain).square().sum())


def test_sixteen_bits_leave_weights_alone() -> None:
    weight, _ = correlated()
    sixteen = BitsConfig(weight=16, activation=4)
    found = round_weight(weight, low_rank(), sixteen, GroupData())
    assert torch.equal(found.weight, weight)
    assert found.branch is None


def test_who_rounds_late() -> None:
    folded = MethodConfig(name="x", weight=INT.model_copy(update={"fold": True}))
    assert not rounds_late(folded, W4A4), "nothing to fold without quantized activations"
    assert not rounds_late(low_rank(), W4A4)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("white", [False, True])
def test_branches_through_the_engine(
    methods: Any, omni: Any, quantize: Any, mixed: Any, order: str, white: bool
) -> None:
    compensation = CompensationConfig(name="low_rank", rank=8, order=order, whitened=white)
    method = methods["rtn"].model_copy(update={"compensation": compensation, "weight": INT})
    adapter, quantizer = quantize(method, towers=["decoder"])
    blocks = list(adapter.blocks("decoder"))
    reset_counters(blocks)
    adapter.generate(mixed, max_new_tokens=2)
    complete(quantizer.manifest, blocks, method, W4A4)
    original = {b.name: b for b in omni.blocks("decoder")}
    for block in blocks:
        for group in block.groups:
            for name in group.linears:
                module, weight = block.linear(name), original[block.name].linear(name).weight
                plain = quantize_weight(weight, INT, 4).dequantized
                whole = module.weight + module.branch_up @ module.branch_down
                lost = float((weight - whole).square().sum())
                assert lost < float((weight - plain).square().sum()) or white
    cost = quantizer.manifest.compensation_cost()
    assert cost["masked_share"] == 0
    assert cost["extra_flops_share"] > 0
    assert quantizer.manifest.weight_bits > 4.5
    blocks[0].linear("mlp.up_proj").branch_up = None
    with pytest.raises(ManifestError, match="no low-rank branch"):
        complete(quantizer.manifest, blocks, method, W4A4)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_modality"])
@pytest.mark.parametrize("name", ["minmax", "percentile", "mse"])
def test_ranges_of_a_tensor_through_the_engine(
    methods: Any, quantize: Any, encode: Any, probe: Any, granularity: str, name: str
) -> None:
    activation = methods["tensor"].activation.model_copy(
        update={
            "granularity": granularity,
            "range": RangeConfig(name=name, percentile=99.0, min_ratio=0.2),
        }
    )
    method = methods["tensor"].model_copy(update={"activation": activation})
    adapter, quantizer = quantize(method, BitsConfig(weight=4, activation=8), towers=["decoder"])
    if granularity == "per_modality":
        assert quantizer.needs_labels
        adapter.follow_labels(quantizer.labels)
    rows = 5 if granularity == "per_modality" else 1
    shrunk = 0
    for (layer, group), choice in quantizer.choices.items():
        statistics = quantizer.collected[layer, group]
        edge = float(statistics.pooled().absmax.max())
        assert choice.final.hi.numel() == rows
        assert float(choice.final.hi.flatten()[0]) <= edge * (1 + 1e-6)
        shrunk += int(float(choice.final.hi.flatten()[0]) < 0.999 * edge)
        for row, (modality, part) in enumerate(statistics.parts.items(), 1):
            if rows == 5 and name == "minmax" and part.n:
                found = float(choice.final.hi.flatten()[row])
                assert found == pytest.approx(float(part.absmax.max()), rel=1e-5), modality
    assert (shrunk == 0) == (name == "minmax")
    assert torch.isfinite(adapter.logits(probe)).all()


def test_per_modality_decoding_takes_the_text_scale(
    methods: Any, quantize: Any, mixed: Any
) -> None:
    """A written token is text, in the prefill and with the cache alike."""
    activation = methods["tensor"].activation.model_copy(update={"granularity": "per_modality"})
    method = methods["tensor"].model_copy(update={"activation": activation})
    adapter, quantizer = quantize(method, BitsConfig(weight=16, activation=8), towers=["decoder"])
    adapter.follow_labels(quantizer.labels)
    adapter.model.double()
    ids = adapter.encode(mixed[:1])["input_ids"]
    model = adapter.model
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        model.rope_deltas = None
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        at = torch.full((3, 1, 1), ids.shape[1] - 1)
        last = model(
            input_ids=ids[:, -1:], position_ids=at, past_key_values=cache, use_cache=True
        ).logits[:, -1]
    assert (whole - last).abs().max() <= 1e-4 * whole.abs().max()
