"""MBQ: which tokens count how much, against gradients taken by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from morphoquant.calibration.samples import CalibrationError
from morphoquant.config.schema import BitsConfig, WeightConfig
from morphoquant.formats import fake_quantize_weight
from morphoquant.models.structure import Modality
from morphoquant.quantization.transforms.balance import (
    GradientBalance,
    counted_kinds,
    gradient_balance,
    with_answers,
)
from morphoquant.quantization.transforms.check import largest_relative_change
from morphoquant.quantization.transforms.smooth import SmoothSettings, smooth

INT4 = WeightConfig(format="int")
W4A8 = BitsConfig(weight=4, activation=8)


@pytest.fixture(scope="module")
def samples(one_of_each: Any) -> list[Any]:
    """One of each modality, with answers of different length."""
    written = {"text": "A", "image": "a red circle", "video": "B", "audio": "a low tone, twice"}
    return [dataclasses.replace(one_of_each[n], answer=a) for n, a in written.items()]


# --------------------------------------------------------------------------- answers


def test_answers_follow_their_prompts(omni: Any, samples: Any) -> None:
    tokenizer = omni.processor.tokenizer
    batch, answers = with_answers(omni, samples)
    real = batch["attention_mask"].bool()
    assert answers.shape == batch["input_ids"].shape == real.shape
    assert not bool((answers & ~real).any())
    for row, sample in enumerate(samples):
        ids = batch["input_ids"][row]
        written = ids[answers[row]]
        assert tokenizer.decode(written[:-1]) == sample.answer
        assert int(written[-1]) == tokenizer.eos_token_id
        prompt = omni.encode([sample.messages])["input_ids"][0]
        assert torch.equal(ids[real[row]], torch.cat([prompt, written]))
        # Padding is on the left, the answer at the very end.
        assert real[row].int().diff().min() >= 0
        assert answers[row].int().diff().min() >= 0
    assert bool((~real).any())


def test_prompts_with_answers_are_read_as_the_model_reads_them(omni: Any, samples: Any) -> None:
    """Neither the answers of neighbours nor padding change what a prompt leads to."""
    together, answers = with_answers(omni, samples)
    with torch.no_grad():
        found = omni.model(**together, use_cache=False).logits
        for row, sample in enumerate(samples):
            alone, marked = with_answers(omni, [sample])
            expected = omni.model(**alone, use_cache=False).logits[0][marked[0]]
            assert largest_relative_change(expected, found[row][answers[row]]) < 1e-4


def test_only_answers_and_media_count(omni: Any, samples: Any) -> None:
    batch, answers = with_answers(omni, samples)
    labels = omni.modality_map(batch)
    kinds = counted_kinds(labels, answers)
    assert torch.equal(kinds == int(Modality.TEXT), answers)
    for modality in (Modality.IMAGE, Modality.VIDEO, Modality.AUDIO):
        assert torch.equal(kinds == int(modality), labels == int(modality))
        assert bool((kinds == int(modality)).any())


# --------------------------------------------------------------------------- gradients


def by_hand(adapter: Any, sample: Any) -> dict[tuple[int, str], tuple[float, float]]:
    """(media, answer) mean |dL/dY| of every layer and part: one ordinary backward pass."""
    prompt = adapter.encode([sample.messages])
    tokenizer = adapter.processor.tokenizer
    ids = tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    answer = torch.tensor([[*ids, tokenizer.eos_token_id]])
    media = adapter.modality_map(prompt)[0] > 0
    start = prompt["input_ids"].shape[1]
    whole = dict(prompt)
    whole["input_ids"] = torch.cat([prompt["input_ids"], answer], 1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    caught: dict[tuple[int, str], torch.Tensor] = {}
    hooks = []
    for i, layer in enumerate(adapter.residual_stream().layers):
        for part, module in (("attn", layer.o), ("mlp", layer.down)):

            def keep(_m: Any, _a: Any, out: torch.Tensor, at: Any = (i, part)) -> None:
                out.retain_grad()
                caught[at] = out

            hooks.append(module.register_forward_hook(keep))
    embedding = adapter.residual_stream().embedding.weight.requires_grad_()
    logits = adapter.model(**whole, use_cache=False).logits
    F.cross_entropy(logits[0, start - 1 : -1], answer[0]).backward()
    embedding.requires_grad_(False).grad = None
    for hook in hooks:
        hook.remove()
    size = {at: out.grad[0].abs().mean(-1) for at, out in caught.items()}  # type: ignore[index]
    return {at: (float(g[:start][media].mean()), float(g[start:].mean())) for at, g in size.items()}


@pytest.mark.parametrize("kind", ["vision", "audio"])
def test_ratios_are_those_of_plain_autograd(
    omni: Any, copied: Any, samples: Any, kind: str
) -> None:
    """Every layer, two parts; picture and clip together are vision."""
    names = {"vision": ("image", "video"), "audio": ("audio",)}[kind]
    chosen = [s for s in samples if s.modality in names]
    balance = gradient_balance(omni, samples)
    own = copied(omni)
    hand = [by_hand(own, sample) for sample in chosen]
    layers = len(omni.residual_stream().layers)
    for part in ("attn", "mlp"):
        expected = [
            sum(h[i, part][0] for h in hand) / sum(h[i, part][1] for h in hand)
            for i in range(layers)
        ]
        assert balance.ratios(part, kind) == pytest.approx(expected, rel=1e-4)
        assert expected[0] > 0
        assert expected[-1] == 0  # nothing reads a media token behind the last attention


def test_the_model_is_left_as_it_was(omni: Any, samples: Any) -> None:
    before = {n: p.clone() for n, p in omni.model.named_parameters()}
    gradient_balance(omni, samples)
    for name, parameter in omni.model.named_parameters():
        assert torch.equal(before[name], parameter)
        assert not parameter.requires_grad
        assert parameter.grad is None


def test_order_of_samples_does_not_matter(omni: Any, samples: Any) -> None:
    one, two = (gradient_balance(omni, order) for order in (samples, samples[::-1]))
    for kind in ("vision", "audio"):
        assert one.ratios("mlp", kind) == pytest.approx(two.ratios("mlp", kind), rel=1e-9)


def test_small_ratios_are_raised_to_the_median() -> None:
    balance = GradientBalance()
    kinds = torch.tensor([[-1, int(Modality.IMAGE), int(Modality.VIDEO), int(Modality.TEXT)]])
    for layer, vision in enumerate((0.5, 0.2, 0.0, 0.3)):
        rows = torch.tensor([9.0, vision, 3 * vision, 2.0])
        gradient = rows[None, :, None] * torch.tensor([1.0, -1.0])
        balance.add(layer, "attn", gradient, kinds)
        balance.add(layer, "mlp", 2 * gradient.flip(1), kinds.flip(1))
    assert balance.ratios("attn", "vision") == pytest.approx([0.5, 0.2, 0.0, 0.3])
    result = balance.result(["a", "b", "c", "d"])
    assert [row.attn["vision"] for row in result] == pytest.approx([0.5, 0.25, 0.25, 0.3])
    assert [row.mlp for row in result] == [pytest.approx(row.attn) for row in result]
    assert [row.layer for row in result] == ["a", "b", "c", "d"]
    assert balance.ratios("attn", "audio") == []


def test_vanishing_gradients_are_refused() -> None:
    balance = GradientBalance()
    kinds = torch.tensor([[int(Modality.AUDIO), int(Modality.TEXT)]])
    balance.add(0, "attn", torch.zeros(1, 2, 4), kinds)
    with pytest.raises(CalibrationError, match="vanish"):
        balance.ratios("attn", "audio")


# --------------------------------------------------------------------------- the whole of MBQ


@pytest.mark.parametrize("activations", [False, True], ids=["w4a16", "w4a8"])
def test_mbq_on_a_model(
    omni: Any, copied: Any, samples: Any, mixed: Any, activations: bool
) -> None:
    adapter = copied(omni)
    settings = SmoothSettings.mbq(quantize_activations=activations, grid=(0.0, 0.3, 0.6))
    report = smooth(adapter, [], settings, INT4, W4A8, samples)
    probe = omni.encode(mixed)
    assert largest_relative_change(omni.logits(probe), adapter.logits(probe)) < 1e-4
    assert report.skipped == ("attn_out",)
    names = [layer.block.name for layer in omni.residual_stream().layers]
    assert report.balance == gradient_balance(omni, samples).result(names)
    for row in report.balance:
        assert set(row.attn) == set(row.mlp) == {"vision", "audio"}
    for group in report.groups:
        losses = dict(group.losses)
        assert losses[group.exponent] == min(losses.values()) <= losses[0.0]


def test_batches_of_the_search_do_not_matter(omni: Any, copied: Any, samples: Any) -> None:
    doubled = [*samples, *(dataclasses.replace(s, id=s.id + "'", answer="B") for s in samples)]
    reports = [
        smooth(
            copied(omni),
            [],
            SmoothSettings.mbq(grid=(0.0, 0.4), batch_size=size),
            INT4,
            W4A8,
            doubled,
        )
        for size in (1, 2)
    ]
    for one, two in zip(*(report.groups for report in reports), strict=True):
        assert one.exponent == two.exponent
        for (_, a), (_, b) in zip(one.losses, two.losses, strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_the_loss_is_the_sum_weighed_by_modality(omni: Any, samples: Any, copied: Any) -> None:
    """The reported loss of an unsmoothed down_proj, from its input and the reported weights."""
    settings = SmoothSettings.mbq(grid=(0.0, 0.5), groups=("mlp_out",))
    report = smooth(copied(omni), [], settings, INT4, W4A8, samples)
    layer = omni.residual_stream().layers[0]
    caught: list[torch.Tensor] = []
    hook = layer.down.register_forward_pre_hook(lambda _m, args: caught.append(args[0][0]))
    weights = {-1: 0.0, 0: 1.0}
    weights |= dict.fromkeys((1, 2), report.balance[0].mlp["vision"])
    weights[3] = report.balance[0].mlp["audio"]
    total, tokens = 0.0, 0
    rough = fake_quantize_weight(layer.down.weight, 4).dequantized
    for sample in samples:
        batch, answers = with_answers(omni, [sample])
        with torch.no_grad():
            omni.model(**batch, use_cache=False)
        kinds = counted_kinds(omni.modality_map(batch), answers)[0]
        error = (caught.pop() @ (rough - layer.down.weight).T).abs().mean(-1)
        factor = torch.tensor([weights[int(k)] for k in kinds])
        total += float((factor * error).sum())
        tokens += int((kinds >= 0).sum())
    hook.remove()
    assert report.groups[0].losses[0][1] == pytest.approx(total / tokens, rel=1e-4)
