"""MASQuant on the random thinker: its function, its labels and its costs (SPEC 4.13)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.walk import walk
from morphoquant.config.schema import (
    ActivationConfig,
    BitsConfig,
    CompensationConfig,
    MethodConfig,
    ScopeConfig,
    TransformConfig,
    WeightConfig,
)
from morphoquant.models.qwen_omni import text_model
from morphoquant.quantization.engine import (
    PROBE,
    PROBE_QUANTIZED,
    STATISTICS,
    BlockQuantizer,
)
from morphoquant.quantization.linear import QuantizedLinear
from morphoquant.quantization.manifest import ManifestError, complete
from morphoquant.quantization.modality import ModalityScale
from morphoquant.quantization.transforms.check import largest_relative_change
from morphoquant.quantization.transforms.modality_learn import learn_scale, straight_through
from morphoquant.quantization.transforms.modality_smooth import (
    ModalitySmoothSettings,
    modality_smooth,
    spread_out,
)
from morphoquant.quantization.transforms.smooth import SmoothSettings, smooth
from morphoquant.quantization.weights import quantize_weight

TOLERANCE = 1e-10
INT4 = WeightConfig(format="int")
W4A4, W4A16 = BitsConfig(weight=4, activation=4), BitsConfig(weight=4, activation=16)
W16A16 = BitsConfig(weight=16, activation=16)
NAMES = ("text", "image", "video", "audio", "mixed")
EVERYWHERE = ("attn_in", "attn_out", "mlp_in", "mlp_out")
FAST = ModalitySmoothSettings(steps=2, tokens=64)
WHOLE = ModalitySmoothSettings(
    groups=EVERYWHERE, skip_grouped_attn_out=False, steps=2, tokens=64, learning_rate=0.1
)


@pytest.fixture(scope="module")
def original(build_adapter: Any, biased: Any) -> Any:
    """Two layers in float64, with non-zero biases, on ``up`` too (this family has none there)."""
    adapter = build_adapter(ScopeConfig(), tie=False)
    text_model(adapter.model).layers = text_model(adapter.model).layers[:2]
    adapter.model.config.text_config.num_hidden_layers = 2
    return biased(adapter)


def doubled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}


@pytest.fixture(scope="module")
def prompts(original: Any, mixed: Any) -> dict[str, dict[str, torch.Tensor]]:
    """One encoded prompt of text, image, video, audio, and one with all of them."""
    return {n: doubled(original.encode([m])) for n, m in zip(NAMES, mixed, strict=True)}


def logits(adapter: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return adapter.model(**batch, use_cache=False).logits


@pytest.fixture(scope="module")
def before(original: Any, prompts: Any) -> dict[str, torch.Tensor]:
    return {name: logits(original, batch) for name, batch in prompts.items()}


def changes(before: Any, adapter: Any, prompts: Any) -> dict[str, float]:
    return {n: largest_relative_change(before[n], logits(adapter, prompts[n])) for n in NAMES}


def method(compensation: CompensationConfig | None = None, **transform: Any) -> MethodConfig:
    chosen = compensation or CompensationConfig(
        name="low_rank", per_modality=True, whitened=True, rank_share=0.05
    )
    return MethodConfig(
        name="masquant",
        transform=TransformConfig(name="modality_smooth", **transform),
        weight=INT4,
        activation=ActivationConfig(format="int"),
        compensation=chosen,
    )


def quantized(
    adapter: Any, chosen: MethodConfig, bits: BitsConfig, batches: Any, towers: Any = ("decoder",)
) -> BlockQuantizer:
    """The walk over a (smoothed) adapter, in place."""
    quantizer = BlockQuantizer(chosen, bits, observe=False)
    walk(adapter, towers, {STATISTICS: batches}, quantizer)
    assert quantizer.needs_labels
    adapter.follow_labels(quantizer.labels)
    return quantizer


def scale_modules(adapter: Any) -> list[ModalityScale]:
    found = [m for m in adapter.model.modules() if isinstance(m, ModalityScale)]
    return list(dict.fromkeys(found))


# --------------------------------------------------------------------------- function


@pytest.mark.parametrize("joint", [True, False], ids=["vision", "image-video"])
def test_smoothing_moves_no_logit(
    original: Any, prompts: Any, before: Any, copied: Any, joint: bool
) -> None:
    """Neither before the linears are replaced, nor behind, with nothing rounded."""
    adapter = copied(original)
    settings = ModalitySmoothSettings(
        groups=EVERYWHERE,
        skip_grouped_attn_out=False,
        joint_vision=joint,
        steps=2,
        tokens=64,
        learning_rate=0.1,
    )
    batches = [prompts["mixed"], prompts["text"]]
    report = modality_smooth(adapter, batches, settings, INT4, W4A4)
    assert max(changes(before, adapter, prompts).values()) <= TOLERANCE
    kinds = ("text", "vision", "audio") if joint else ("text", "image", "video", "audio")
    assert {g.kind for g in report.groups} == set(kinds)
    assert len(report.groups) == len(kinds) * 4 * len(adapter.residual_stream().layers)
    others = [g for g in report.groups if g.kind != "text"]
    assert all(g.spread > 0.01 and g.largest > g.smallest > 0 for g in others)
    assert all(g.loss_after <= g.loss_before for g in report.groups)
    assert not report.skipped

    quantized(adapter, method(joint_vision=joint), W16A16, [prompts["mixed"]])
    assert max(changes(before, adapter, prompts).values()) <= TOLERANCE
    # The scales do act: where the quantizer reads, media are not what they were.
    for module in scale_modules(adapter):
        module.undo = lambda x, labels=None: x  # type: ignore[method-assign]
    moved = changes(before, adapter, prompts)
    assert moved["text"] <= TOLERANCE
    assert min(moved[n] for n in NAMES if n != "text") > 1e-3


def test_decoding_with_a_cache_equals_prefill(original: Any, prompts: Any, copied: Any) -> None:
    """T11, with everything rounded: written tokens are text and get text's scales."""
    adapter = copied(original)
    modality_smooth(adapter, [prompts["mixed"]], FAST, INT4, W4A4)
    quantized(adapter, method(), W4A4, [prompts["mixed"]])
    prompt, extra = prompts["mixed"], torch.tensor([[401, 402, 403]])
    whole = dict(prompt)
    whole["input_ids"] = torch.cat([prompt["input_ids"], extra], dim=1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        expected = adapter.model(**whole).logits
        adapter.model.rope_deltas = None
        out = adapter.model(**prompt, use_cache=True)
        steps = [out.logits]
        for token in extra.split(1, dim=1):
            past = out.past_key_values
            out = adapter.model(input_ids=token, past_key_values=past, use_cache=True)
            steps.append(out.logits)
    assert largest_relative_change(expected, torch.cat(steps, dim=1)) <= 1e-8


def test_full_rank_branches_give_the_network_back(
    original: Any, prompts: Any, before: Any, copied: Any
) -> None:
    """Weights in 4 bits, activations in 16: nothing is lost once text has a branch too."""
    adapter = copied(original)
    modality_smooth(adapter, [prompts["mixed"]], WHOLE, INT4, W4A16)
    full = CompensationConfig(
        name="low_rank", per_modality=True, whitened=True, rank_share=1.0, text_branch=True
    )
    quantized(adapter, method(full, groups=EVERYWHERE), W4A16, [prompts["mixed"]])
    assert max(changes(before, adapter, prompts).values()) <= 1e-8
    module = adapter.blocks("decoder")[0].linear("mlp.up_proj")
    assert module.branches.rank == 256


def test_prompts_of_text_alone_are_smoothquant(original: Any, prompts: Any, copied: Any) -> None:
    ours, theirs = copied(original), copied(original)
    settings = ModalitySmoothSettings(steps=0)
    modality_smooth(ours, [prompts["text"]], settings, INT4, W4A4)
    smooth(theirs, [prompts["text"]], SmoothSettings.smoothquant(), INT4, W4A4)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not scale_modules(ours), "no other kind occurred: none has scales of its own"
    with pytest.raises(CalibrationError, match="pictures, clips or sounds"):
        quantized(ours, method(), W4A4, [prompts["text"]])


def test_a_modality_that_calibration_lacked_is_treated_as_text(
    original: Any, prompts: Any, copied: Any
) -> None:
    adapter = copied(original)
    modality_smooth(adapter, [prompts["image"]], FAST, INT4, W4A4)
    quantizer = quantized(adapter, method(), W4A4, [prompts["image"]])
    record = quantizer.manifest.linears[0]
    assert record.compensation["branches"] == ["vision"]
    assert record.online_transform == "scales of their own for vision"
    with_labels = logits(adapter, prompts["audio"])
    for module in adapter.model.modules():
        if isinstance(module, QuantizedLinear):
            module.source.labels = None
    torch.testing.assert_close(with_labels, logits(adapter, prompts["audio"]))


# --------------------------------------------------------------------------- invariance


def test_batches_order_and_padding_do_not_matter(
    original: Any, prompts: Any, mixed: Any, copied: Any
) -> None:
    """Scales, branches and outputs."""
    names = ("text", "image", "audio")
    together = [doubled(original.encode([mixed[NAMES.index(name)] for name in names]))]
    assert not bool(together[0]["attention_mask"].all()), "the batch is padded"
    single = [prompts[name] for name in reversed(names)]
    outputs, reports = [], []
    for batches in (together, single):
        adapter = copied(original)
        reports.append(modality_smooth(adapter, batches, FAST, INT4, W4A4))
        quantized(adapter, method(), W4A4, batches)
        outputs.append(adapter)
    for a, b in zip(reports[0].groups, reports[1].groups, strict=True):
        assert (a.layer, a.group, a.kind) == (b.layer, b.group, b.kind)
        for field in ("smallest", "largest", "spread", "loss_before", "loss_after"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-8)
    whole = logits(outputs[0], together[0])
    for row, name in enumerate(names):
        alone = logits(outputs[1], prompts[name])[0]
        torch.testing.assert_close(whole[row, -len(alone) :], alone, rtol=1e-6, atol=1e-6)


def test_tokens_are_taken_by_prompt() -> None:
    marked = torch.tensor([[0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    taken = spread_out(torch.zeros(2, 6), marked, 2)
    assert taken.tolist() == [1, 3, 10, 11]
    alone = spread_out(torch.zeros(1, 5), marked[:1, 1:], 2)
    assert (alone + 1).tolist() == [1, 3]


# --------------------------------------------------------------------------- learning


def test_the_step_of_the_grid_has_a_gradient() -> None:
    """``Q(c x) = c Q(x)``, so the derivative by c is ``Q(x)``, and not x."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor = torch.ones((), dtype=torch.float64, requires_grad=True)
    scaled = factor * x
    rounded = quantize_weight(scaled.detach(), INT4, 4).dequantized
    found = straight_through(scaled, rounded)
    torch.testing.assert_close(found, rounded)
    (gradient,) = torch.autograd.grad(found.sum(), factor)
    assert float(gradient) == pytest.approx(float(rounded.sum()))
    assert float(gradient) != pytest.approx(float(x.sum()), rel=1e-3)


def test_learning_finds_channels_that_the_formula_misjudges() -> None:
    """A rare outlier dictates SmoothQuant's scale; learned scales lose less on other tokens too."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(400, 24, generator=generator, dtype=torch.float64)
    x[:, ::5] *= 20
    x[0, 3] = 60.0
    weight = torch.randn(32, 24, generator=generator, dtype=torch.float64)

    def coarse(matrix: torch.Tensor) -> torch.Tensor:
        return quantize_weight(matrix, INT4, 4).dequantized

    start = (x.abs().amax(0) / weight.abs().amax(0)).sqrt()
    found = learn_scale(x[:200], [weight], start, coarse, coarse, 40, 0.05)
    assert found.after < 0.95 * found.before
    held = [learn_scale(x[200:], [weight], s, coarse, coarse, 0, 0.1) for s in (start, found.scale)]
    assert held[1].before < held[0].before
    still = learn_scale(x[:200], [weight], start, coarse, coarse, 0, 0.05)
    assert torch.equal(still.scale, start)
    assert still.before == still.after == found.before


# --------------------------------------------------------------------------- the record


def test_manifest_counts_every_branch_and_scale(omni: Any, copied: Any, encode: Any) -> None:
    adapter, batches = copied(omni), encode("samples")[:2]
    modality_smooth(adapter, batches, FAST, INT4, W4A4)
    compensation = CompensationConfig(
        name="low_rank",
        per_modality=True,
        whitened=True,
        rank_share=0.05,
        groups=("attn_in", "mlp_in"),
    )
    chosen = method(compensation)
    towers = ("vision", "decoder")
    quantizer = quantized(adapter, chosen, W4A4, batches, towers)
    bits = 0.0
    for record in quantizer.records:
        size = record.in_features * record.out_features
        bits += 4 * size + 16 * record.out_features
        branched = record.tower == "decoder" and record.group in ("attn_in", "mlp_in")
        assert (record.compensation.get("name") == "low_rank") == branched, record.name
        if branched:
            rank = round(0.05 * min(record.in_features, record.out_features))
            assert record.compensation["branches"] == ["vision", "audio"]
            one = rank * (record.in_features + record.out_features)
            assert record.compensation["stored_numbers"] == 2 * one
            assert record.compensation["extra_flops_per_token"] == 2 * one
            bits += 16 * 2 * one
    groups = 2 * len(adapter.blocks("decoder"))
    bits += 16 * 2 * 256 * groups  # S_m / S_t of vision and audio
    total = sum(r.in_features * r.out_features for r in quantizer.records)
    assert quantizer.manifest.weight_bits == pytest.approx(bits / total)

    blocks = [b for tower in towers for b in adapter.blocks(tower)]
    for batch in batches:
        adapter.logits(batch)
    complete(quantizer.manifest, blocks, chosen, W4A4)
    adapter.blocks("decoder")[0].linear("mlp.up_proj").branches = None
    with pytest.raises(ManifestError, match="no low-rank branch"):
        complete(quantizer.manifest, blocks, chosen, W4A4)


def test_errors_are_measured_against_the_original_function(
    original: Any, copied: Any, prompts: Any
) -> None:
    """Full-rank branches and 16-bit activations: the meter finds no error, for any modality."""
    adapter, batches = copied(original), [prompts["mixed"]]
    modality_smooth(adapter, batches, WHOLE, INT4, W4A16)
    full = CompensationConfig(
        name="low_rank", per_modality=True, whitened=True, rank_share=1.0, text_branch=True
    )
    quantizer = BlockQuantizer(method(full, groups=EVERYWHERE), W4A16, observe=False)
    sets = {STATISTICS: batches, PROBE: batches, PROBE_QUANTIZED: batches}
    walk(adapter, ["decoder"], sets, quantizer, early=(PROBE,))
    assert {r["modality"] for r in quantizer.meter.errors} == {"text", "image", "video", "audio"}
    assert all(r["output_sqnr_db"] > 100 for r in quantizer.meter.errors)
    assert all(r["relative_error"] < 1e-5 for r in quantizer.meter.depth)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 2.0}, "between 0 and 1"),
        ({"groups": ("attn",)}, "choose some"),
        ({"steps": -1}, "must not be negative"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModalitySmoothSettings(**changes)


def test_a_rewritten_decoder_and_no_prompts_are_refused(
    omni: Any, copied: Any, encode: Any
) -> None:
    adapter = copied(omni)
    with pytest.raises(CalibrationError, match="there are none"):
        modality_smooth(adapter, [], FAST, INT4, W4A4)
    modality_smooth(adapter, encode("samples")[:2], ModalitySmoothSettings(steps=0), INT4, W4A4)
    with pytest.raises(ValueError, match="rewritten online already"):
        modality_smooth(adapter, encode("samples"), FAST, INT4, W4A4)
