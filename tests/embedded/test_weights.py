"""The shipped weights: they load unmodified, answer, and their outliers differ by modality."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from experiments.tiny_omni import architecture, data, evaluate, outliers
from experiments.tiny_omni.release import WEIGHTS
from morphoquant.embedded import benchmarks

FOLDERS = ("tiny_omni", "tiny_omni_as_trained")


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[evaluate.Asked]:
    """A few dozen questions of the evaluation split."""
    root = benchmarks.build(tmp_path_factory.mktemp("weights") / "benchmarks", 40, 4)
    return list(evaluate.samples(root))


@pytest.fixture(scope="module", params=FOLDERS)
def loaded(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """Folder name, model and processor."""
    return request.param, *evaluate.load(WEIGHTS / request.param)


def test_files_are_safetensors_and_text_only() -> None:
    files = [path for name in FOLDERS for path in (WEIGHTS / name).iterdir()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert sum(path.stat().st_size for path in files) < 16 * 2**20


def test_it_answers_held_out_questions(
    loaded: tuple[str, Any, Any], asked: list[evaluate.Asked]
) -> None:
    _, model, processor = loaded
    scores = evaluate.accuracy(model, processor, asked)
    for modality in outliers.MODALITIES:
        right, total = scores[modality]
        assert total >= 30
        assert right / total >= 0.8, (modality, right, total)


def test_batches_do_not_change_answers(
    loaded: tuple[str, Any, Any], asked: list[evaluate.Asked]
) -> None:
    _, model, processor = loaded
    for modality in outliers.MODALITIES:
        part = [item.sample for item in asked if item.sample.modality == modality][:6]
        alone = evaluate.answers(model, processor, part, size=1)
        assert alone == evaluate.answers(model, processor, part)
        assert all(answer[0] in "ABCD" and answer[1:3] == ". " for answer in alone)


def test_token_counts(loaded: tuple[str, Any, Any], asked: list[evaluate.Asked]) -> None:
    _, model, processor = loaded
    wanted = {"text": 0, "image": 16, "audio": 32, "video": 36}
    for modality, count in wanted.items():
        sample = next(item.sample for item in asked if item.sample.modality == modality)
        inputs = evaluate.encode(processor, [sample])
        labels = outliers.token_modality(model, inputs["input_ids"], inputs["attention_mask"])
        media = int((labels > 0).sum())
        assert media == count
        assert media == int((labels == outliers.MODALITIES.index(modality)).sum()) or not count


def test_training_sequences_equal_evaluation_inputs(
    loaded: tuple[str, Any, Any], asked: list[evaluate.Asked]
) -> None:
    _, _, processor = loaded
    builder = data.Builder(processor)
    for modality in outliers.MODALITIES:
        kind = next(item.kind for item in asked if item.sample.modality == modality)
        item = data.draw("dev", modality, kind, 0)
        batch = builder.batch(modality, [item])
        template = [{"type": modality}] if modality != "text" else []
        text = {"type": "text", "text": data.prompt(item.questions[0], modality)}
        chat = processor.apply_chat_template(
            [{"role": "user", "content": [*template, text]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        tokens = processor.tokenizer(chat)["input_ids"]
        prompt = batch.input_ids[0, : int(batch.first[0])].tolist()
        media = builder._media_tokens
        assert [t for t in prompt if t not in media] == [t for t in tokens if t not in media]
        said = batch.labels[0][batch.labels[0] != -100]
        assert processor.tokenizer.decode(said) == data.answer(item.questions[0]) + "<|im_end|>"


def test_fast_towers_compute_the_same_and_leave_no_trace(
    loaded: tuple[str, Any, Any], asked: list[evaluate.Asked]
) -> None:
    import transformers.models.qwen2_5_omni.modeling_qwen2_5_omni as qwen

    _, model, processor = loaded
    original = qwen.Qwen2_5OmniVisionAttention.forward
    for modality in ("image", "audio", "video"):
        part = [item.sample for item in asked if item.sample.modality == modality][:4]
        inputs = evaluate.encode(processor, part)
        with torch.no_grad():
            slow = model(**inputs).logits
            with architecture.fast_towers():
                fast = model(**inputs).logits
        assert torch.allclose(slow, fast, atol=1e-3)
    assert qwen.Qwen2_5OmniVisionAttention.forward is original


def test_outlier_channels_differ_by_modality(asked: list[evaluate.Asked]) -> None:
    prompts = [item.sample for item in asked]
    found = {}
    for name in FOLDERS:
        model, processor = evaluate.load(WEIGHTS / name)
        found[name] = outliers.statistics(outliers.norm_outputs(model, processor, prompts))
    engineered, plain = found["tiny_omni"], found["tiny_omni_as_trained"]
    for modality in outliers.MODALITIES:
        assert engineered["max_over_median"][modality] > 6
        assert engineered["max_over_median"][modality] > plain["max_over_median"][modality]
        assert engineered["kurtosis"][modality] > 20
    overlap = engineered["jaccard"]
    assert all(value < 0.25 for pair, value in overlap.items() if pair != "image-video")


def test_both_folders_hold_the_same_function(asked: list[evaluate.Asked]) -> None:
    prompts = [item.sample for item in asked[::4]]
    said = []
    for name in FOLDERS:
        model, processor = evaluate.load(WEIGHTS / name)
        assert model.config.tie_word_embeddings == (name == "tiny_omni_as_trained")
        said.append(evaluate.answers(model, processor, prompts))
    same = sum(a == b for a, b in zip(*said, strict=True))
    assert same >= 0.95 * len(prompts)  # bfloat16 rounding may turn a close call


def test_engineering_preserves_the_function(asked: list[evaluate.Asked]) -> None:
    model, processor = evaluate.load(WEIGHTS / "tiny_omni_as_trained")
    prompts = [item.sample for item in asked]
    inputs = evaluate.encode(processor, prompts[:4])
    with torch.no_grad():
        before = model(**inputs).logits
        channels = outliers.engineer(model, processor, prompts)
        after = model(**inputs).logits
    assert len(set(channels)) == 4 * outliers.PER_MODALITY
    valid = inputs["attention_mask"].bool()
    assert float((after - before)[valid].abs().max()) < 1e-3


def test_round_to_nearest_hurts_the_engineered_weights_most(asked: list[evaluate.Asked]) -> None:
    right = {}
    for name in FOLDERS:
        for bits in ((8, 8), (4, 4)):
            model, processor = evaluate.load(WEIGHTS / name)
            assert evaluate.quantize_decoder(model, *bits) == 28
            scores = evaluate.accuracy(model, processor, asked)
            right[name, bits] = sum(scores[m][0] for m in outliers.MODALITIES)
    assert right["tiny_omni", (4, 4)] < 0.9 * right["tiny_omni_as_trained", (4, 4)]
    assert right["tiny_omni", (8, 8)] > 0.95 * right["tiny_omni_as_trained", (8, 8)]


@pytest.mark.parametrize("name", FOLDERS)
def test_the_card_reports_what_was_measured(name: str) -> None:
    card = (WEIGHTS / name / "README.md").read_text()
    summary = json.loads((WEIGHTS / name / "training_log.json").read_text())
    for modality in outliers.MODALITIES:
        right, total = summary["accuracy"][modality]
        assert f"| {modality} | {100 * right / total:.1f} | {total} |" in card
    assert ("engineered.**" in card) == (name == "tiny_omni")
