"""T1, T8: scales are the published formulas, and folding them leaves the network as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.config.schema import BitsConfig, ScopeConfig, TransformConfig, WeightConfig
from morphoquant.models.structure import Modality
from morphoquant.quantization.transforms import rotate
from morphoquant.quantization.transforms.check import largest_relative_change
from morphoquant.quantization.transforms.scales import (
    Heads,
    awq_scale,
    fold_scales,
    smoothquant_scale,
)
from morphoquant.quantization.transforms.smooth import SmoothSettings, smooth

TOLERANCE = 1e-10
INT4 = WeightConfig(format="int")
W4A4 = BitsConfig(weight=4, activation=4)
PRESENT = (Modality.TEXT, Modality.IMAGE, Modality.AUDIO)
NAMES = ("text", "image", "video", "audio", "mixed")


def doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def original(request: pytest.FixtureRequest, build_adapter: Any, biased: Any) -> Any:
    return biased(build_adapter(ScopeConfig(), tie=request.param))


@pytest.fixture(scope="module")
def prompts(original: Any, mixed: Any) -> dict[str, dict[str, torch.Tensor]]:
    """One encoded prompt of text, image, video, audio, and one with all of them."""
    return {n: doubled(original.encode([m])) for n, m in zip(NAMES, mixed, strict=True)}


def logits(adapter: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return adapter.model(**batch, use_cache=False).logits


def largest_change(before: Any, adapter: Any, prompts: Any) -> float:
    return max(largest_relative_change(before[n], logits(adapter, prompts[n])) for n in NAMES)


@pytest.fixture(scope="module")
def before(original: Any, prompts: Any) -> dict[str, torch.Tensor]:
    return {name: logits(original, batch) for name, batch in prompts.items()}


def random_scales(layer: Any, heads: Heads, seed: int) -> dict[str, torch.Tensor]:
    """Over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    widths = {
        "attn_in": layer.q.in_features,
        "attn_out": heads.values * heads.width,
        "mlp_in": layer.gate.in_features,
        "mlp_out": layer.down.in_features,
    }
    return {n: 10 ** (4 * torch.rand(w, generator=generator) - 2) for n, w in widths.items()}


# --------------------------------------------------------------------------- folding


@pytest.mark.parametrize("group", ["attn_in", "attn_out", "mlp_in", "mlp_out", "all"])
def test_folding_moves_no_logit(
    original: Any, prompts: Any, before: Any, copied: Any, group: str
) -> None:
    adapter = copied(original)
    stream = adapter.residual_stream()
    heads = Heads.of(stream)
    assert heads.grouped
    for i, layer in enumerate(stream.layers):
        scales = random_scales(layer, heads, i)
        fold_scales(layer, {n: s for n, s in scales.items() if group in (n, "all")}, heads)
    assert largest_change(before, adapter, prompts) <= TOLERANCE
    then, now = (dict(a.model.named_parameters()) for a in (original, adapter))
    moved = {name for name in then if not torch.equal(then[name], now[name])}
    ends = {
        "attn_in": ("input_layernorm.weight", "q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "attn_out": ("v_proj.weight", "v_proj.bias", "o_proj.weight"),
        "mlp_in": ("post_attention_layernorm.weight", "gate_proj.weight", "up_proj.weight"),
        "mlp_out": ("up_proj.weight", "up_proj.bias", "down_proj.weight"),
    }
    wanted = set().union(*(ends[n] for n in ends if group in (n, "all")))
    assert all("layers." in name and "visual" not in name for name in moved)
    assert {end for end in wanted if any(name.endswith(end) for name in moved)} == wanted
    assert all(any(name.endswith(end) for end in wanted) for name in moved)


@pytest.mark.parametrize(("group", "linear"), [("attn_out", "v"), ("mlp_out", "up")])
def test_biases_matter(
    original: Any, prompts: Any, before: Any, copied: Any, group: str, linear: str
) -> None:
    adapter = copied(original)
    stream = adapter.residual_stream()
    heads = Heads.of(stream)
    layer = stream.layers[0]
    bias = getattr(layer, linear).bias
    kept = bias.data.clone()
    fold_scales(layer, {group: random_scales(layer, heads, 0)[group]}, heads)
    bias.data.copy_(kept)
    assert largest_relative_change(before["mixed"], logits(adapter, prompts["mixed"])) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [
        SmoothSettings(alpha=0.8, skip_grouped_attn_out=False),
        SmoothSettings(search=True, balance="mean", skip_grouped_attn_out=False, grid=(0.5, 0.9)),
        SmoothSettings.awq(quantize_activations=True, grid=(0.2, 0.9)),
    ],
    ids=["smoothquant", "searched", "awq"],
)
def test_smoothing_moves_no_logit(
    original: Any, prompts: Any, before: Any, copied: Any, settings: SmoothSettings
) -> None:
    adapter = copied(original)
    report = smooth(adapter, [prompts["image"], prompts["audio"]], settings, INT4, W4A4)
    assert largest_change(before, adapter, prompts) <= TOLERANCE
    expected = 4 - len(report.skipped)
    assert len(report.groups) == expected * len(adapter.residual_stream().layers)
    assert all(g.largest > 1.01 * g.smallest > 0 for g in report.groups)


def test_decoding_with_a_cache_equals_prefill(original: Any, prompts: Any, copied: Any) -> None:
    """T11."""
    adapter = copied(original)
    smooth(adapter, [prompts["mixed"]], SmoothSettings(skip_grouped_attn_out=False), INT4, W4A4)
    prompt, extra = prompts["mixed"], torch.tensor([[401, 402, 403]])
    whole = dict(prompt)
    whole["input_ids"] = torch.cat([prompt["input_ids"], extra], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        expected = original.model(**whole).logits
        adapter.model.rope_deltas = None
        out = adapter.model(**prompt, use_cache=True)
        steps = [out.logits]
        for token in extra.split(1, dim=1):
            past = out.past_key_values
            out = adapter.model(input_ids=token, past_key_values=past, use_cache=True)
            steps.append(out.logits)
    assert largest_relative_change(expected, torch.cat(steps, dim=1)) <= TOLERANCE


def test_a_weight_with_two_scales_is_rounded_once(omni: Any, copied: Any) -> None:
    adapter = copied(omni)
    adapter.model.to(torch.bfloat16)
    stream = adapter.residual_stream()
    layer, heads = stream.layers[0], Heads.of(stream)
    scales = random_scales(layer, heads, 3)
    ideal = layer.up.weight.double() * scales["mlp_in"] / scales["mlp_out"][:, None].double()
    fold_scales(layer, scales, heads)
    assert torch.equal(layer.up.weight, ideal.to(torch.bfloat16))
    assert {p.dtype for p in adapter.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"attn": torch.ones(256)}, "unknown input groups"),
        ({"attn_in": torch.ones(3)}, "expected 256 scales"),
        ({"mlp_in": torch.ones(256), "mlp_out": torch.zeros(512)}, "finite and positive"),
        ({"attn_in": torch.full((256,), torch.nan)}, "finite and positive"),
    ],
)
def test_bad_scales_change_nothing(omni: Any, copied: Any, scales: Any, message: str) -> None:
    adapter = copied(omni)
    stream = adapter.residual_stream()
    with pytest.raises(ValueError, match=message):
        fold_scales(stream.layers[0], scales, Heads.of(stream))
    for old, new in zip(omni.model.parameters(), adapter.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_an_online_rotation_is_refused(omni: Any, copied: Any, prompts: Any) -> None:
    adapter = copied(omni)
    config = TransformConfig(name="rotate", r1=False, r2=False, r4=True)
    rotate(adapter.residual_stream(), config)
    with pytest.raises(ValueError, match="rotated online"):
        smooth(adapter, [prompts["text"]], SmoothSettings(), INT4, W4A4)


# --------------------------------------------------------------------------- formulas

magnitudes = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=9)


@given(magnitudes, st.data())
def test_smoothquant_formula(values: list[float], data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.floats(1e-2, 10), min_size=len(values), max_size=len(values)))
    alpha = data.draw(st.floats(0, 1))
    found = smoothquant_scale(torch.tensor(values), torch.tensor(weights), alpha)
    for s, x, w in zip(found.tolist(), values, weights, strict=True):
        assert s == pytest.approx(max(x**alpha / w ** (1 - alpha), 1e-5), rel=1e-5)


@given(magnitudes, st.floats(0, 1))
def test_awq_formula_is_centred(values: list[float], exponent: float) -> None:
    found = awq_scale(torch.tensor(values, dtype=torch.float64), exponent)
    assert float(found.max() * found.min()) == pytest.approx(1.0)
    assert (found / found[0]).tolist() == pytest.approx(
        [max(x**exponent, 1e-4) / max(values[0] ** exponent, 1e-4) for x in values]
    )


def test_exponent_ends() -> None:
    x, w = torch.tensor([4.0, 0.25]), torch.tensor([2.0, 0.5])
    assert smoothquant_scale(x, w, 1.0).tolist() == [4.0, 0.25]
    assert smoothquant_scale(x, w, 0.0).tolist() == [0.5, 2.0]
    assert awq_scale(x, 0.0).tolist() == [1.0, 1.0]


def test_dead_channels_and_columns() -> None:
    """What calibration never saw keeps scale 1; a column of zeros divides by no zero."""
    x, w = torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 1.0])
    found = smoothquant_scale(x, w, 0.5)
    assert found.tolist() == pytest.approx([1.0, 1e-5**-0.5, 1.0])
    assert torch.isfinite(awq_scale(x, 0.5)).all()


@pytest.mark.parametrize("balance", ["none", "mean"])
@pytest.mark.parametrize("formula", ["smoothquant", "awq"])
def test_scales_of_a_model_are_the_formula(
    original: Any, prompts: Any, copied: Any, formula: Any, balance: Any
) -> None:
    """All four groups of a layer, from activations that a plain hook saw."""
    adapter = copied(original)
    names = ("text", "image", "audio")
    layer = original.residual_stream().layers[1]
    seen: dict[str, list[torch.Tensor]] = {"q": [], "o": [], "gate": [], "down": []}
    hooks = [
        getattr(layer, n).register_forward_pre_hook(lambda _m, a, n=n: seen[n].append(a[0][0]))
        for n in seen
    ]
    for name in names:
        logits(original, prompts[name])
    for hook in hooks:
        hook.remove()
    kinds = torch.cat([original.modality_map(prompts[name])[0] for name in names])
    settings = SmoothSettings(
        formula=formula, alpha=0.7, balance=balance, skip_grouped_attn_out=False
    )
    smooth(adapter, [prompts[name] for name in names], settings, INT4, W4A4)
    new = adapter.residual_stream().layers[1]
    heads = Heads.of(adapter.residual_stream())
    expected = {}
    for name, readers in (("q", "qkv"), ("o", "o"), ("gate", ("gate", "up")), ("down", ("down",))):
        x = torch.cat(seen[name]).abs()
        parts = [x] if balance == "none" else [x[kinds == int(m)] for m in PRESENT]
        found = torch.stack([p.amax(0) if formula == "smoothquant" else p.mean(0) for p in parts])
        activation = found.mean(0)
        weight = torch.cat([getattr(layer, r).weight.abs() for r in readers]).amax(0)
        if name == "o":
            grouped = activation.view(heads.values, -1, heads.width)
            activation = grouped.amax(1) if formula == "smoothquant" else grouped.mean(1)
            activation = activation.flatten()
            weight = weight.view(heads.values, -1, heads.width).amax(1).flatten()
        if formula == "smoothquant":
            expected[name] = activation**0.7 / weight**0.3
        else:
            expected[name] = activation**0.7
            expected[name] /= (expected[name].max() * expected[name].min()).sqrt()
    got = {
        "q": layer.input_norm.weight / new.input_norm.weight,
        "o": layer.v.bias / new.v.bias,
        "gate": layer.post_norm.weight / new.post_norm.weight,
        "down": layer.up.bias / new.up.bias,
    }
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=0.0)


def test_alpha_zero_with_unit_weights_is_the_identity(omni: Any, copied: Any, prompts: Any) -> None:
    adapter = copied(omni)
    for layer in adapter.residual_stream().layers:
        for name in ("q", "k", "v", "o", "gate", "up", "down"):
            weight = getattr(layer, name).weight
            weight.data.copy_(torch.where(weight < 0, -1.0, 1.0))
    old = [p.clone() for p in adapter.model.parameters()]
    settings = SmoothSettings(alpha=0.0, skip_grouped_attn_out=False)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in prompts["image"].items()}
    smooth(adapter, [batch], settings, INT4, W4A4)
    for before, after in zip(old, adapter.model.parameters(), strict=True):
        assert torch.equal(before, after)
