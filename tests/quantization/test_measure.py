"""Errors by layer and modality against first principles, on the random thinker."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from morphoquant.calibration.walk import walk
from morphoquant.config.schema import (
    BitsConfig,
    CompensationConfig,
    MaskConfig,
    MethodConfig,
    TransformConfig,
)
from morphoquant.models.structure import MODALITIES
from morphoquant.quantization.activation import DynamicQuantizer
from morphoquant.quantization.choose import make_search
from morphoquant.quantization.engine import (
    PROBE,
    PROBE_QUANTIZED,
    SEARCH,
    STATISTICS,
    BlockQuantizer,
)
from morphoquant.quantization.measure import decibel
from morphoquant.quantization.transforms import rotate

W4A4 = BitsConfig(weight=4, activation=4)


@pytest.fixture(scope="module")
def measured(omni: Any, copied: Any, encode: Any) -> Any:
    """Walks a copy of the thinker with probe prompts and returns it with its quantizer."""

    def make(
        method: MethodConfig, bits: BitsConfig = W4A4, towers: Any = ("decoder",)
    ) -> tuple[Any, BlockQuantizer]:
        adapter, quantizer = copied(omni), BlockQuantizer(method, bits)
        probes = encode("search", 2)
        sets = {STATISTICS: encode("samples"), PROBE: probes, PROBE_QUANTIZED: probes}
        if quantizer.searches:
            sets[SEARCH] = encode("search")
        walk(adapter, towers, sets, quantizer, early=(PROBE,))
        return adapter, quantizer

    return make


def hidden_states(adapter: Any, batch: Any) -> list[torch.Tensor]:
    """Outputs of all decoder blocks in an ordinary forward."""
    found: list[torch.Tensor] = []
    hooks = [
        b.module.register_forward_hook(
            lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple) else out)
        )
        for b in adapter.blocks("decoder")
    ]
    adapter.logits(batch)
    for hook in hooks:
        hook.remove()
    return found


def test_depth_is_the_distance_of_two_ordinary_forwards(
    measured: Any, omni: Any, methods: Any, encode: Any
) -> None:
    adapter, quantizer = measured(methods["morphoquant"])
    sums: dict[tuple[int, str], list[float]] = {}
    for batch in encode("search", 2):
        labels = omni.modality_map(batch)
        pairs = zip(hidden_states(omni, batch), hidden_states(adapter, batch), strict=True)
        for block, (a, b) in enumerate(pairs):
            for modality in MODALITIES:
                of = labels == int(modality)
                if of.any():
                    total = sums.setdefault((block, modality.name.lower()), [0.0, 0.0])
                    total[0] += float((a[of].double() ** 2).sum())
                    total[1] += float(((a[of] - b[of]).double() ** 2).sum())
    rows = {(r["block"], r["modality"]): r for r in quantizer.meter.depth}
    assert rows.keys() == sums.keys()
    for key, (energy, error) in sums.items():
        assert rows[key]["relative_error"] == pytest.approx(math.sqrt(error / energy), rel=0.02)
        assert 0 < rows[key]["cosine"] < 1


@pytest.mark.parametrize("name", ["rtn", "morphoquant", "element"])
def test_errors_of_a_group_from_first_principles(
    measured: Any, omni: Any, methods: Any, encode: Any, name: str
) -> None:
    """The original network's own activations, through the quantizer that is in place."""
    adapter, quantizer = measured(methods[name])
    key = (adapter.blocks("decoder")[1].name, "mlp_in")
    block = {b.name: b for b in omni.blocks("decoder")}[key[0]]
    replaced = {b.name: b for b in adapter.blocks("decoder")}[key[0]]
    source = replaced.linear("mlp.gate_proj").source
    parts: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    hook = block.linear("mlp.gate_proj").register_forward_pre_hook(
        lambda _m, args: parts.append(args[0].flatten(0, -2))
    )
    for batch in encode("search", 2):
        labels.append(omni.modality_map(batch).flatten())
        omni.logits(batch)
    hook.remove()
    x, kinds = torch.cat(parts).double(), torch.cat(labels)
    rounded = source.quantizer(x)
    value = source.compensate(x, rounded)[0]
    low, high = source.quantizer.bounds(x)
    clipped = x.clamp(low.double(), high.double())
    rows = {r["modality"]: r for r in quantizer.meter.errors if (r["layer"], r["group"]) == key}
    seen = 0
    for modality in MODALITIES:
        of = kinds == int(modality)
        if not of.any():
            continue
        seen += 1
        row = rows[modality.name.lower()]
        assert row["tokens"] == int(of.sum())

        def sqnr(signal: torch.Tensor, error: torch.Tensor) -> float:
            return 10 * math.log10(float((signal**2).sum() / (error**2).sum()))

        assert row["activation_sqnr_db"] == pytest.approx(sqnr(x[of], (x - value)[of]), abs=0.05)
        below = float((x[of] < low.double().expand_as(x)[of]).double().mean())
        assert row["clip_rate_low"] == pytest.approx(below, abs=2e-3)
        lost = float(((x - rounded)[of] ** 2).sum())
        split = float(((x - clipped)[of] ** 2).sum()) / lost
        assert row["clip_energy_share"] == pytest.approx(split, abs=0.01)
        # Outside of the range all that is lost is clipping, inside of it rounding: no cross term.
        total = row["clip_energy_share"] + row["rounding_energy_share"]
        assert total == pytest.approx(1.0, abs=1e-6)
        names = ("mlp.gate_proj", "mlp.up_proj")
        exact = torch.cat([F.linear(x[of], block.linear(n).weight.double()) for n in names])
        rough = torch.cat([F.linear(x[of], replaced.linear(n).weight.double()) for n in names])
        final = torch.cat([F.linear(value[of], replaced.linear(n).weight.double()) for n in names])
        assert row["output_sqnr_db"] == pytest.approx(sqnr(exact, exact - final), abs=0.05)
        assert row["output_sqnr_weight_db"] == pytest.approx(sqnr(exact, exact - rough), abs=0.05)
        found = row["output_sqnr_activation_db"]
        assert found == pytest.approx(sqnr(exact, rough - final), abs=0.05)
        if name == "rtn":
            assert row["bypass_rate"] == 0
            assert "own_ratio_median" not in row
        else:
            gate = source.compensation.gate(x).expand_as(x)[of]
            assert row["bypass_rate"] == pytest.approx(float(gate.double().mean()), abs=1e-3)
            touched = float(gate.any(-1).double().mean())
            assert row["tokens_with_bypass"] == pytest.approx(touched, abs=0.05)
            search = make_search(quantizer.choices[key], methods[name], W4A4, [])
            search.update(x[of].float())
            own = float(search.best_ratios().median())
            assert row["own_ratio_median"] == pytest.approx(own, abs=0.04)
    assert seen == len(rows) >= 3


def test_nothing_is_lost_where_everything_is_returned(measured: Any, methods: Any) -> None:
    """M1: all channels compensated, weights left alone: both streams are one."""
    everything = CompensationConfig(name="dabc", mask=MaskConfig(all_channels=("*",)))
    method = methods["morphoquant"].model_copy(update={"compensation": everything})
    _, quantizer = measured(method, BitsConfig(weight=16, activation=4))
    assert all(r["activation_sqnr_db"] == math.inf for r in quantizer.meter.errors)
    assert all(r["bypass_rate"] == 1 for r in quantizer.meter.errors)
    assert all(r["relative_error"] < 1e-5 for r in quantizer.meter.depth)
    assert all(r["clip_energy_share"] <= 1 for r in quantizer.meter.errors)


def test_residual_bias_share_predicts_the_static_bias(measured: Any, methods: Any) -> None:
    """(E r)^2 / E r^2 is what remains of it after the mean was taken away (SPEC 2.5)."""
    method = methods["static"]
    _, quantizer = measured(method)
    shares = [r["residual_bias_share"] for r in quantizer.meter.errors]
    assert all(0 <= s <= 1 for s in shares)
    assert max(shares) > 0


def test_error_grows_with_fewer_bits_in_every_tower(measured: Any, methods: Any) -> None:
    towers = ("vision", "audio", "decoder")
    errors = []
    for bits in (8, 4):
        method = methods["static"]
        width = BitsConfig(weight=bits, activation=bits)
        _, quantizer = measured(method, width, towers)
        assert {r["tower"] for r in quantizer.meter.depth} == set(towers)
        errors.append(
            {(r["layer"], r["modality"]): r["relative_error"] for r in quantizer.meter.depth}
        )
    assert all(errors[1][key] > 2 * value for key, value in errors[0].items())


def test_walk_leaves_the_model_as_without_probes(
    measured: Any, quantize: Any, methods: Any, probe: Any
) -> None:
    with_probes, _ = measured(methods["morphoquant"])
    without, _ = quantize("morphoquant", towers=["decoder"])
    assert torch.equal(with_probes.logits(probe), without.logits(probe))


def test_a_rotated_input_is_measured_behind_its_rotation(
    omni: Any, copied: Any, methods: Any, encode: Any
) -> None:
    """The quantizer of down_proj reads the rotated activation, and so does the meter."""
    adapter, quantizer = copied(omni), BlockQuantizer(methods["rtn"], W4A4, observe=False)
    rotate(adapter.residual_stream(), TransformConfig(r1=False, r2=False, r4=True))
    turn = adapter.blocks("decoder")[0].linear("mlp.down_proj").transform
    batch = encode("search", 2)[0]
    sets = {STATISTICS: [batch], PROBE: [batch], PROBE_QUANTIZED: [batch]}
    walk(adapter, ["decoder"], sets, quantizer, early=(PROBE,))
    seen: list[torch.Tensor] = []
    down = omni.blocks("decoder")[0].linear("mlp.down_proj")
    hook = down.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    omni.logits(batch)
    hook.remove()
    text = omni.modality_map(batch) == int(MODALITIES[0])
    x = turn(seen[0])[text].double()
    lost = x - DynamicQuantizer(4, True, 1.0, None)(x)
    (row,) = (
        r
        for r in quantizer.meter.errors
        if r["layer"].endswith(".0") and r["group"] == "mlp_out" and r["modality"] == "text"
    )
    expected = 10 * math.log10(float(x.square().sum() / lost.square().sum()))
    assert row["activation_sqnr_db"] == pytest.approx(expected, abs=0.05)
    assert row["output_sqnr_weight_db"] > 10, "against the rotated weight"


def test_decibel() -> None:
    assert decibel(100.0, 1.0) == pytest.approx(20.0)
    assert decibel(1.0, 0.0) == math.inf
    assert decibel(0.0, 1.0) < -1000
