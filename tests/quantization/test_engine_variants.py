"""The engine with the choices beyond the clean preset: biases, folding, other searches, surveys."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from morphoquant.calibration.walk import walk
from morphoquant.config.schema import BitsConfig, CompensationConfig, MaskConfig, MethodConfig
from morphoquant.models.structure import MODALITIES
from morphoquant.quantization.choose import SearchingQuantizer, make_search
from morphoquant.quantization.engine import SEARCH, STATISTICS, BlockQuantizer
from morphoquant.quantization.folding import fold_weight
from morphoquant.quantization.integer_linear import IntegerLinear
from morphoquant.quantization.masks import ScoreMoments
from morphoquant.quantization.survey import survey

W4A4 = BitsConfig(weight=4, activation=4)
DECODER = ["decoder"]


def change(method: MethodConfig, slot: str, **changes: Any) -> MethodConfig:
    """The method with some fields of one slot changed (``range`` is the activation's)."""
    if slot == "range":
        found = method.activation.range.model_copy(update=changes)
        return change(method, "activation", range=found)
    return method.model_copy(update={slot: getattr(method, slot).model_copy(update=changes)})


def groups(adapter: Any) -> dict[tuple[str, str], tuple[Any, Any, Any]]:
    """(block name, group name) -> block, group, shared input."""
    return {
        (b.name, g.name): (b, g, b.linear(g.linears[0]).source)
        for b in adapter.blocks("decoder")
        for g in b.groups
    }


def inputs_of(adapter: Any, batches: list[Any]) -> dict[tuple[str, str], Any]:
    """Decoder activations as they reach the quantizers, and their labels, in one piece each."""
    seen: dict[Any, list[Any]] = {}
    labels: list[torch.Tensor] = []
    found = groups(adapter)
    for key, (_, _, source) in found.items():
        source.observer = lambda x, key=key: seen.setdefault(key, []).append(
            (x.flatten(0, -2), labels[-1].flatten())
        )
    for batch in batches:
        labels.append(adapter.modality_map(batch))
        adapter.logits(batch)
    for _, _, source in found.values():
        source.observer = None
    return {
        key: (torch.cat([x for x, _ in parts]), torch.cat([k for _, k in parts]))
        for key, parts in seen.items()
    }


# ----------------------------------------------------------------------------- static bias


@pytest.fixture(scope="module")
def biased(methods: Any, quantize: Any) -> Any:
    """MorphoQuant with a static bias per modality on every channel, and its quantizer."""
    compensation = CompensationConfig(
        name="static_bias", per_modality=True, mask=MaskConfig(all_channels=("*",))
    )
    method = methods["morphoquant"].model_copy(update={"compensation": compensation})
    adapter, quantizer = quantize(method, towers=DECODER)
    adapter.follow_labels(quantizer.labels)
    return adapter, quantizer, method


def test_static_bias_removes_the_mean_residual(
    biased: Any, methods: Any, quantize: Any, encode: Any
) -> None:
    """M12: on calibration data, per modality, in the outputs of every linear."""
    adapter, _, _ = biased
    plain = methods["morphoquant"].model_copy(update={"compensation": CompensationConfig()})
    weights = MethodConfig(name="w4a16", weight=plain.weight)
    inputs = inputs_of(quantize(weights, towers=DECODER)[0], encode("samples"))
    uncorrected = 0.0
    for key, (block, group, source) in groups(adapter).items():
        x, labels = inputs[key]
        rounded = source.quantizer(x)
        for name in group.linears:
            weight = block.linear(name).weight
            bias = source.compensation.bias(weight)
            for row, modality in enumerate(MODALITIES):
                of = labels == int(modality)
                if not of.any():
                    continue
                lost = F.linear(x[of] - rounded[of], weight)
                assert (lost.mean(0) - bias[row + 1]).abs().max() <= 2e-4 * lost.abs().max() + 1e-6
                uncorrected = max(uncorrected, float(lost.mean(0).abs().max()))
    assert uncorrected > 1e-2, "there was something to correct"


def test_every_token_takes_its_modality_s_bias(biased: Any, mixed: Any) -> None:
    """In ordinary forward passes; padding and new tokens too."""
    adapter, _, _ = biased
    batch = adapter.encode(mixed)
    labels = adapter.modality_map(batch)
    key = next(iter(groups(adapter)))
    _, _, source = groups(adapter)[key]
    shown: list[torch.Tensor] = []
    source.observer = shown.append
    try:
        adapter.logits(batch)
        adapter.generate(mixed[:1], max_new_tokens=3)
    finally:
        source.observer = None
    residual = source.compensation.residual
    assert not torch.equal(residual[1], residual[2])
    for x, kinds in ((shown[0], labels), (shown[-1], torch.zeros(1, 1, dtype=torch.int8))):
        adapter_labels = source.labels
        adapter_labels.current = kinds
        out, bypassed = source.compensate(x, source.quantizer(x))
        expected = source.quantizer(x) + residual[kinds.long() + 1]
        assert torch.equal(out, expected)
        assert bypassed == 0
    assert shown[-1].shape[1] == 1, "the last pass wrote one token"


def test_labels_follow_decoding(biased: Any, mixed: Any) -> None:
    adapter, quantizer, _ = biased
    batch = adapter.encode(mixed[:2])
    adapter.logits(batch)
    assert torch.equal(quantizer.labels.current, adapter.modality_map(batch))
    adapter.generate(mixed[:2], max_new_tokens=4)
    assert quantizer.labels.current.shape == (2, 1)
    assert (quantizer.labels.current == 0).all()


def test_static_bias_costs_nothing_at_run_time(biased: Any) -> None:
    _, quantizer, _ = biased
    for record in quantizer.records:
        assert record.compensation["extra_flops_per_token"] == 0
        assert record.compensation["stored_numbers"] == 5 * record.out_features
        assert record.activation["effective_bits"] == 4
    cost = quantizer.manifest.compensation_cost()
    assert cost["masked_share"] == 1.0
    assert cost["bypass_rate"] == 0.0


def test_modality_without_calibration_takes_the_overall_mean() -> None:
    from morphoquant.quantization.compensation import ResidualMeans

    means = ResidualMeans(torch.tensor([True, True, False]))
    x, labels = torch.tensor([[1.0, 2, 3], [3.0, 4, 5], [9, 9, 9]]), torch.tensor([0, 1, -1])
    means.update(x, torch.zeros_like(x), labels)
    residual = means.result(per_modality=True).residual
    assert residual[:, 2].tolist() == [0.0] * 5
    assert residual[:, 0].tolist() == [2.0, 1.0, 3.0, 2.0, 2.0]
    assert means.result(per_modality=False).residual.tolist() == [[2.0, 3.0, 0.0]]


# ----------------------------------------------------------------------------- folding


@pytest.mark.parametrize("name", ["morphoquant", "element"])
def test_folded_model_computes_what_its_integers_say(
    methods: Any, omni: Any, quantize: Any, encode: Any, name: str
) -> None:
    """M13 in the model: every linear equals its integer emulation, and is folded only once."""
    method = change(
        methods[name], "weight", format="int", granularity="per_group", group_size=64, fold=True
    )
    adapter, quantizer = quantize(method, towers=DECODER)
    adapter.model.double()
    original = {b.name: b for b in omni.blocks("decoder")}
    inputs = inputs_of(adapter, encode("search")[:1])
    for key, (block, group, source) in groups(adapter).items():
        choice = quantizer.choices[key]
        x = inputs[key][0].double()
        grid = choice.final.grid(4)
        exclude = name == "morphoquant"
        for linear in group.linears:
            weight = original[block.name].linear(linear).weight
            folded = fold_weight(weight, grid, choice.mask, 4, 64, exclude_masked=exclude)
            module = block.linear(linear)
            assert torch.equal(module.weight.float(), folded.dequantized.float())
            integers = IntegerLinear(
                folded, grid, module.bias, None if exclude else source.compensation
            )
            torch.testing.assert_close(integers(x), module(x), rtol=1e-4, atol=1e-4)
    record = quantizer.records[0]
    assert record.weight["folded"]
    kept = record.weight["columns_in_16_bits"]
    assert (kept > 0) == (name == "morphoquant")


def test_prompts_move_on_through_folded_weights(methods: Any, quantize: Any, encode: Any) -> None:
    """The second block is calibrated behind the first block's rounded weights, not before."""
    method = change(
        methods["morphoquant"], "weight", format="int", granularity="per_group", fold=True
    )
    adapter, quantizer = quantize(method, towers=DECODER)
    first, second = adapter.blocks("decoder")[:2]
    partly = copy.deepcopy(adapter)
    for block in partly.blocks("decoder"):
        for group in block.groups:
            block.linear(group.linears[0]).source.enabled = False
    inputs = inputs_of(partly, encode("samples"))
    x, labels = inputs[second.name, "attn_in"]
    found = quantizer.collected[second.name, "attn_in"].pooled()
    torch.testing.assert_close(found.hi.float(), x[labels >= 0].amax(0), rtol=1e-4, atol=1e-5)
    assert first.name != second.name


# ----------------------------------------------------------------------------- searches


def test_gradient_search_never_ends_above_ratio_one(
    methods: Any, quantize: Any, encode: Any
) -> None:
    """M5: what is learned is only taken where the exact sums say so."""
    method = change(methods["morphoquant"], "range", optimizer="gradient", min_ratio=0.1, steps=5)
    _adapter, quantizer = quantize(method, towers=DECODER)
    weights = MethodConfig(name="w4a16", weight=method.weight)
    inputs = inputs_of(quantize(weights, towers=DECODER)[0], encode("search"))
    learned = 0
    for key, choice in quantizer.choices.items():
        x, labels = inputs[key]
        assert choice.ratios is not None
        candidates = torch.stack([choice.ratios, torch.ones_like(choice.ratios)])
        search = make_search(choice, method, W4A4, [], candidates)
        search.update(x[labels >= 0])
        chosen, unshrunk = search.losses()
        assert (chosen <= unshrunk * (1 + 1e-3) + 1e-6).all()
        learned += int((choice.ratios < 1).sum())
    assert learned > 0


def test_search_behind_quantized_activations_is_the_public_implementation_s(
    methods: Any, omni: Any, copied: Any, quantize: Any, encode: Any
) -> None:
    """All layers search in the same forward, batch by batch; block by block gives the same."""
    method = change(
        methods["element"], "range", upstream="quantized", accumulate="ema", normalize=False
    )
    _, quantizer = quantize(method, towers=DECODER)
    weights = MethodConfig(name="w4a16", weight=method.weight)
    whole, _ = quantize(weights, towers=DECODER)
    searches = {}
    labels: list[torch.Tensor] = []
    for key, (_, _, source) in groups(whole).items():
        choice = quantizer.choices[key]
        search = searches[key] = make_search(choice, method, W4A4, [])

        def show(x: torch.Tensor, search: Any = search) -> None:
            search.update(x.flatten(0, -2)[labels[-1].flatten() >= 0])

        source.observer = show
        source.quantizer = SearchingQuantizer(search, 4, choice.mask, method.compensation)
    for batch in encode("search"):
        labels.append(whole.modality_map(batch))
        whole.logits(batch)
    same = total = 0
    for key, choice in quantizer.choices.items():
        ratios = searches[key].best_ratios()
        same, total = same + int((ratios == choice.ratios).sum()), total + ratios.numel()
    assert same >= 0.99 * total  # float32 noise may turn a near tie
    _clean, other = quantize(methods["element"], towers=DECODER)
    assert any(
        not torch.equal(other.choices[key].ratios, choice.ratios)
        for key, choice in quantizer.choices.items()
    )


def test_one_ratio_per_mask_group(methods: Any, quantize: Any) -> None:
    method = change(
        methods["element"],
        "range",
        ratio_per="mask_group",
        cosine="token",
        cosine_weight=0.75,
        output_weighting=True,
    )
    _, quantizer = quantize(method, towers=DECODER)
    for choice in quantizer.choices.values():
        assert choice.ratios is not None
        assert choice.mask is not None
        assert len(set(choice.ratios[~choice.mask].tolist())) == 1
        assert len(set(choice.ratios[choice.mask].tolist())) <= 1


@pytest.mark.parametrize("slot", ["range", "mask"])
def test_choices_of_a_group_do_not_depend_on_the_other_slot_s(
    methods: Any, quantize: Any, slot: str
) -> None:
    """One factor at a time: the start stays when the search is off, the mask when p changes."""
    base = methods["element"]
    _, first = quantize(base, towers=DECODER)
    if slot == "range":
        _, second = quantize(change(base, "range", search=False), towers=DECODER)
    else:
        _, second = quantize(change(base, "range", p=0.5), towers=DECODER)
    for key, choice in first.choices.items():
        other = second.choices[key]
        assert torch.equal(choice.start.lo, other.start.lo)
        assert torch.equal(choice.start.hi, other.start.hi)
        assert torch.equal(choice.mask, other.mask)


# ----------------------------------------------------------------------------- survey


def test_survey_changes_nothing_and_sees_every_layer(
    methods: Any, omni: Any, copied: Any, encode: Any, probe: Any
) -> None:
    mask = MaskConfig(rules=("local", "global"), max_share=1.0)
    method = change(methods["morphoquant"], "compensation", mask=mask)
    adapter = copied(omni)
    before = adapter.logits(probe)
    moments = survey(adapter, DECODER, encode("samples"), method, W4A4)
    assert torch.equal(adapter.logits(probe), before)
    assert moments is not None
    quantizer = BlockQuantizer(method, W4A4, moments=moments)
    sets = {STATISTICS: encode("samples"), SEARCH: encode("search")}
    walk(adapter, DECODER, sets, quantizer)
    joined = []
    for key, (_, group, _) in groups(adapter).items():
        score = quantizer.collected[key].pooled().dispersion("log1p")
        joined += [score] * len(group.linears)
    scores = torch.cat(joined)
    assert moments["all"].mean == pytest.approx(float(scores.mean()), rel=1e-4)
    assert moments["all"].std == pytest.approx(float(scores.std()), rel=1e-4)
    threshold = moments["all"].mean + 2 * moments["all"].std
    marked = 0
    for key, choice in quantizer.choices.items():
        score = quantizer.collected[key].pooled().dispersion("log1p")
        local = score >= score.mean() + 2 * score.std()
        expected = local | (score >= threshold)
        # A score at the very threshold may fall on either side between two walks.
        assert (choice.mask != expected).sum() <= 1
        marked += int((choice.mask & ~local).sum())
    assert marked > 0, "the global rule added something"


def test_no_survey_where_no_rule_asks(methods: Any, omni: Any) -> None:
    assert survey(omni, DECODER, [], methods["morphoquant"], W4A4) is None
    assert survey(omni, DECODER, [], methods["rtn"], W4A4) is None
    assert ScoreMoments(1.0, 2.0) == ScoreMoments(1.0, 2.0)
