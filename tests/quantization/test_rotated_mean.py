"""MQuant's RMS: which columns gather a mean, and that setting them apart changes no function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.calibration.walk import walk
from morphoquant.config.schema import (
    ActivationConfig,
    BitsConfig,
    CompensationConfig,
    MaskConfig,
    MethodConfig,
    TransformConfig,
    WeightConfig,
)
from morphoquant.quantization.activation import StaticQuantizer, tensor_range
from morphoquant.quantization.engine import STATISTICS, BlockQuantizer
from morphoquant.quantization.hadamard import HadamardTransform, hadamard
from morphoquant.quantization.manifest import complete, reset_counters
from morphoquant.quantization.rotated_mean import rotated_mean_mask
from morphoquant.quantization.rounding import GroupData, round_weight
from morphoquant.quantization.transforms import rotate
from morphoquant.quantization.transforms.check import largest_relative_change

W4A8 = BitsConfig(weight=4, activation=8)
SPLIT = CompensationConfig(
    name="mixed_precision", outlier_bits=16, mask=MaskConfig(rules=("rotated_mean",))
)
ALWAYS = SPLIT.model_copy(update={"mask": MaskConfig(rules=("rotated_mean",), mean_share=0.0)})
MQUANT = MethodConfig(
    name="mquant",
    transform=TransformConfig(name="rotate"),
    weight=WeightConfig(format="int"),
    activation=ActivationConfig(format="int", granularity="per_modality", mode="static"),
    compensation=SPLIT,
)


def weight(outputs: int, channels: int, mean: float, affected: float = 1.0) -> torch.Tensor:
    """Unit normal, with ``mean`` added in a share of the rows; before any rotation."""
    draw = torch.Generator().manual_seed(0)
    found = torch.randn(outputs, channels, generator=draw, dtype=torch.float64)
    found[: round(affected * outputs)] += mean
    return found


@pytest.mark.parametrize("channels", [64, 12 * 16, 28 * 4])
def test_the_mean_gathers_in_channel_0(channels: int) -> None:
    """And a column is flagged where it holds the largest weight of enough rows."""
    online = HadamardTransform(channels)
    gathered = online(torch.ones(channels, dtype=torch.float64))
    assert gathered.square()[0] > 0.65 * channels, "most of a constant lies there"
    for mean, affected, flagged in ((0.0, 1.0, False), (1.0, 1.0, True), (1.0, 0.02, False)):
        mask = rotated_mean_mask([online(weight(100, channels, mean, affected))], online, 0.05)
        assert mask.nonzero().flatten().tolist() == ([0] if flagged else [])
    some = [online(weight(100, channels, m)) for m in (0.0, 1.0)]
    assert rotated_mean_mask(some, online, 0.3)[0], "over all linears that read the group"
    assert rotated_mean_mask([some[0]], online, 0.0)[0], "a share of 0 splits always"


def test_no_channel_is_special_without_a_constant_column() -> None:
    online = HadamardTransform(172)  # Williamson
    assert int(hadamard(172).sum(0).abs().max()) < 30
    rotated = online(weight(100, 172, 1.0))
    assert not rotated_mean_mask([rotated], online, 0.05).any()
    signs = torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0).double()
    signs = signs[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
    online = HadamardTransform(64)  # as R1 is built, with signs
    assert not rotated_mean_mask([online(weight(100, 64, 0.5) * signs)], online, 0.5).any()


def test_every_block_gathers_its_own_mean() -> None:
    online = HadamardTransform(48, block_diagonal=True)
    original = weight(100, 48, 0.0)
    original[:, 16:32] += 2.0
    mask = rotated_mean_mask([online(original)], online, 0.05)
    assert mask.nonzero().flatten().tolist() == [16]
    assert not rotated_mean_mask([original[:, :45]], HadamardTransform(45, True), 0.0).any()


@pytest.mark.parametrize("online", [None, nn.Identity()])
def test_only_an_online_hadamard_counts(online: nn.Module | None) -> None:
    assert not rotated_mean_mask([HadamardTransform(64)(weight(9, 64, 1.0))], online, 0.0).any()


def test_the_rest_is_rounded_as_if_the_column_were_not_there() -> None:
    """GPTQ, too: nothing of the other columns' errors is left to one that is not rounded."""
    online = HadamardTransform(64)
    rotated = online(weight(20, 64, 1.0))
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = x @ torch.randn(64, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moment = x.T @ x
    mask = rotated_mean_mask([rotated], online, 0.05)
    gptq = WeightConfig(format="int", algorithm="gptq", act_order=True)
    for config in (gptq, WeightConfig(format="int")):
        method = MQUANT.model_copy(update={"weight": config})
        found = round_weight(rotated, method, W4A8, GroupData(mask, second_moment=moment))
        plain = method.model_copy(update={"compensation": CompensationConfig()})
        alone = GroupData(second_moment=moment[1:, 1:])
        expected = round_weight(rotated[:, 1:], plain, W4A8, alone)
        torch.testing.assert_close(found.weight[:, 1:], expected.weight, rtol=1e-9, atol=1e-9)
        assert torch.equal(found.weight[:, 0], rotated[:, 0])
        whole = round_weight(rotated, plain, W4A8, GroupData(second_moment=moment))
        lost = (((w - rotated) @ x.T).square().sum() for w in (found.weight, whole.weight))
        assert next(lost) < 0.2 * next(lost), "what it is good for"
        bits = found.description["effective_bits"] - whole.description["effective_bits"]
        assert bits == pytest.approx(12 / 64)


def test_ranges_do_not_see_the_channel() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100
    seen = ModalityStatistics(8)
    seen.update(x, torch.arange(50) % 4)
    mask = torch.arange(8) == 0
    for granularity in ("per_tensor", "per_modality"):
        config = ActivationConfig(format="int", granularity=granularity, mode="static")
        found = tensor_range(config, seen, mask)
        assert float(found.hi.flatten()[0]) == pytest.approx(float(x[:, 1:].abs().max()))
        rounded = StaticQuantizer(found, 8)(x)
        assert (rounded - x)[:, 1:].abs().max() < 0.05


# ------------------------------------------------------------------ through the engine


@pytest.fixture(scope="module")
def rotated(copied: Any, in_float64: Any, omni: Any) -> Any:
    """float64, R4 on, and a mean in the down projection of the second layer."""
    adapter = copied(omni)
    in_float64(adapter.model)
    adapter.untie_head()
    stream = adapter.residual_stream()
    down = stream.layers[1].down.weight
    down += 2 * down.std()
    rotate(stream, MQUANT.transform)
    return adapter


@torch.no_grad()
@pytest.mark.parametrize("compensation", [SPLIT, ALWAYS], ids=["flagged", "all"])
def test_the_split_changes_no_function(
    rotated: Any, copied: Any, encode: Any, mixed: Any, compensation: CompensationConfig
) -> None:
    """T6, on text, image, video, audio and all of them; and what is said of it with rounding on."""
    adapter = copied(rotated)
    batch = adapter.encode(mixed)
    before = adapter.model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    method = MQUANT.model_copy(update={"compensation": compensation})
    quantizer = BlockQuantizer(method, W4A8, observe=False)
    walk(adapter, ["decoder"], {STATISTICS: encode("samples")}, quantizer)
    adapter.follow_labels(quantizer.labels)
    blocks, exact = adapter.blocks("decoder"), rotated.blocks("decoder")
    masks = {name: mask for (name, group), mask in quantizer.masks.items() if group == "mlp_out"}
    flags = [bool(masks[block.name][0]) for block in blocks]
    assert flags == [compensation is ALWAYS or i == 1 for i in range(len(blocks))]
    assert sum(int(mask.sum()) for mask in quantizer.masks.values()) == sum(flags)

    reset_counters(blocks)
    assert largest_relative_change(before[real], adapter.model(**batch).logits[real]) > 1e-3
    complete(quantizer.manifest, blocks, method, W4A8)
    for record in quantizer.records:
        block = next(i for i, b in enumerate(blocks) if record.name.startswith(b.name + "."))
        split = int(record.group == "mlp_out" and flags[block])
        extra = split / record.in_features
        assert record.compensation["masked_channels"] == split
        assert record.compensation["outlier_bits"] == 16
        assert record.weight["columns_in_high_precision"] == split
        assert record.activation["effective_bits"] == pytest.approx(8 + 8 * extra)
        scales = 16 / record.in_features
        assert record.weight["effective_bits"] == pytest.approx(4 + scales + 12 * extra)

    for block, original in zip(blocks, exact, strict=True):
        module, plain = (b.linear("mlp.down_proj") for b in (block, original))
        mask = masks[block.name]
        assert torch.equal(module.weight[:, mask], plain.linear.weight[:, mask])
        assert not torch.equal(module.weight[:, ~mask], plain.linear.weight[:, ~mask])
        for group in block.groups:
            source = block.linear(group.linears[0]).source
            source.quantizer = OthersAsTheyAre(source.compensation.mask)
            for name in group.linears:
                first = original.linear(name)
                block.linear(name).weight.data = getattr(first, "linear", first).weight.clone()
    after = adapter.model(**batch, use_cache=False).logits
    for then, now, of in zip(before, after, real, strict=True):
        assert largest_relative_change(then[of], now[of]) <= 1e-10


class OthersAsTheyAre(nn.Module):
    """No rounding; masked channels come out as zero, and only the compensation brings them back."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return x.masked_fill(self.mask, 0.0)


@torch.no_grad()
def test_sixteen_bit_activations_split_the_weight_alone(
    rotated: Any, copied: Any, encode: Any, mixed: Any
) -> None:
    bits = BitsConfig(weight=4, activation=16)
    adapter = copied(rotated)
    quantizer = BlockQuantizer(MQUANT, bits, observe=False)
    walk(adapter, ["decoder"], {STATISTICS: encode("samples")}, quantizer)
    blocks = adapter.blocks("decoder")
    reset_counters(blocks)
    adapter.model(**adapter.encode(mixed[:1]), use_cache=False)
    complete(quantizer.manifest, blocks, MQUANT, bits)
    columns = [r.weight["columns_in_high_precision"] for r in quantizer.records]
    assert sum(columns) == 1
    assert all(not r.compensation for r in quantizer.records)


def test_late_and_early_marks_are_joined(rotated: Any, copied: Any, encode: Any) -> None:
    """Beside a rule that looks at activations, past its cap; or as many channels drawn blindly."""
    rules = MaskConfig(
        score="absmax", rules=("top_share", "rotated_mean"), top_share=0.01, max_share=0.01
    )
    blind = ALWAYS.mask.model_copy(update={"score": "random"})
    found = {}
    for name, mask in {"joined": rules, "drawn": blind}.items():
        compensation = ALWAYS.model_copy(update={"mask": mask})
        method = MQUANT.model_copy(update={"compensation": compensation})
        quantizer = BlockQuantizer(method, W4A8, observe=False)
        walk(copied(rotated), ["decoder"], {STATISTICS: encode("samples")}, quantizer)
        found[name] = [m for (_, g), m in quantizer.masks.items() if g == "mlp_out"]
    cap = int(0.01 * found["joined"][1].numel())
    assert found["joined"][1][0]
    assert int(found["joined"][1].sum()) in (cap, cap + 1)
    assert [int(mask.sum()) for mask in found["drawn"]] == [1] * len(found["drawn"])
    assert not all(bool(mask[0]) for mask in found["drawn"])
