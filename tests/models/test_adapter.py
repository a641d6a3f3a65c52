"""Encoding and generation: what a batch is must not matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from morphoquant.config.schema import MediaConfig, ModelConfig, ScopeConfig
from morphoquant.models.adapter import OmniAdapter, pick_dtype
from morphoquant.models.loading import ModelError, embedded_folder
from morphoquant.models.media import MediaError, read_clip
from morphoquant.models.placement import pick_device


def text(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": content}]}]


def test_batch_equals_singles(omni: Any, mixed: Any) -> None:
    together = omni.logits(omni.encode(mixed))
    alone = torch.cat([omni.logits(omni.encode([c])) for c in mixed])
    assert (together - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert torch.equal(together.argmax(-1), alone.argmax(-1))


@given(order=st.permutations(range(5)), size=st.integers(1, 5))
@settings(max_examples=4)
def test_order_of_a_batch_does_not_matter(
    omni: Any, mixed: Any, order: list[int], size: int
) -> None:
    chosen = order[:size]
    moved = omni.logits(omni.encode([mixed[i] for i in chosen]))
    for row, i in zip(moved, chosen, strict=True):
        alone = omni.logits(omni.encode([mixed[i]]))[0]
        assert (row - alone).abs().max() <= 1e-4 * alone.abs().max()


def test_answers_of_a_batch_equal_singles(omni: Any, mixed: Any) -> None:
    together = omni.generate(mixed, max_new_tokens=5)
    alone = [omni.generate([c], max_new_tokens=5)[0] for c in mixed]
    assert together == alone
    assert len({g.text for g in together}) > 1, "the random model answers differently"


def test_generation_does_not_remember_the_last_batch(omni: Any, mixed: Any) -> None:
    first = omni.generate([mixed[2]], max_new_tokens=4)
    omni.generate([mixed[4]], max_new_tokens=4)
    assert omni.generate([mixed[2]], max_new_tokens=4) == first
    logits = omni.logits(omni.encode([mixed[0]]))
    omni.generate([mixed[2]], max_new_tokens=2)
    assert torch.equal(omni.logits(omni.encode([mixed[0]])), logits)


def test_token_counts(omni: Any, mixed: Any) -> None:
    batch = omni.encode(mixed)
    found = omni.generate(mixed, max_new_tokens=3)
    assert [g.input_tokens for g in found] == batch["attention_mask"].sum(1).tolist()
    assert all(1 <= g.output_tokens <= 3 for g in found)


def test_generation_stops_at_the_end_of_turn(fresh_omni: Any, mixed: Any) -> None:
    """A model that always says <|im_end|> writes one token, and its text is empty."""
    stop = fresh_omni.processor.tokenizer.eos_token_id
    fresh_omni.untie_head()
    head = fresh_omni.model.lm_head
    head.register_forward_hook(lambda _m, _a, out: out.index_fill(-1, torch.tensor([stop]), 1e4))
    assert [(g.text, g.output_tokens) for g in fresh_omni.generate(mixed[:2], 5)] == [("", 1)] * 2


def test_generation_is_greedy_and_cached_decode_is_right(omni: Any, mixed: Any) -> None:
    """Token by token with the cache gives what a fresh prefill of the longer prompt gives."""
    batch = omni.encode([mixed[4]])
    omni.model.rope_deltas = None
    with torch.inference_mode():
        out = omni.model.generate(**batch, do_sample=False, max_new_tokens=3, min_new_tokens=3)
    grown = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    for step in range(3):
        length = batch["input_ids"].shape[1] + step
        ids = out[:, :length]
        logits = omni.logits(
            {**grown, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        ).clone()
        stop = omni.processor.tokenizer.eos_token_id
        logits[:, [stop, omni.processor.tokenizer.pad_token_id]] = -torch.inf
        assert int(logits.argmax()) == int(out[0, length])


def test_padding_is_left_and_masked(omni: Any) -> None:
    batch = omni.encode([text("a"), text("a much longer question about nothing at all")])
    mask = batch["attention_mask"]
    assert mask[0, 0] == 0
    assert mask[:, -1].tolist() == [1, 1]
    assert mask[1].all()
    assert (mask[0].diff() >= 0).all()


def test_system_prompt_comes_first(omni: Any) -> None:
    config = omni.config.model_copy(update={"system_prompt": "only one word"})
    adapter = OmniAdapter(omni.model, omni.processor, config)
    decode = omni.processor.tokenizer.decode
    without = decode(omni.encode([text("which color")])["input_ids"][0])
    prompted = decode(adapter.encode([text("which color")])["input_ids"][0])
    assert "only one word" not in without
    assert prompted.index("only one word") < prompted.index("which color")
    assert prompted.index("system") < prompted.index("only one word")


def test_own_system_turn_is_kept(omni: Any) -> None:
    turns = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}, *text("hi")]
    decoded = omni.processor.tokenizer.decode(omni.encode([turns])["input_ids"][0])
    assert "be brief" in decoded


def test_order_of_parts_is_the_order_of_tokens(omni: Any, one_of_each: Any) -> None:
    image = next(p for p in one_of_each["image"].messages[0]["content"] if p["type"] == "image")
    words = {"type": "text", "text": "which color"}
    token = omni.model.config.image_token_id

    def first_image(parts: list[Any]) -> int:
        ids = omni.encode([[{"role": "user", "content": parts}]])["input_ids"][0]
        return int((ids == token).nonzero()[0])

    assert first_image([image, words]) < first_image([words, image])


def test_media_go_to_their_own_conversation(omni: Any) -> None:
    """Images are flattened over the batch for the processor: each must come back to its prompt."""
    colors = [(255, 0, 0), (0, 0, 255), (255, 255, 255)]
    question = {"type": "text", "text": "which color"}
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": Image.new("RGB", (64, 64), c)}, question],
            }
        ]
        for c in colors
    ]
    together = omni.logits(omni.encode(conversations))
    for row, conversation in zip(together, conversations, strict=True):
        alone = omni.logits(omni.encode([conversation]))[0]
        assert (row - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("limit", [2, 4, 8])
def test_every_clip_has_its_own_rate(omni: Any, mini_root: Any, limit: int) -> None:
    """Seconds per temporal patch follow the frames that were really taken."""
    paths = sorted((mini_root / "videos").glob("*.mp4"))[:2]
    conversations = [
        [{"role": "user", "content": [{"type": "video", "video": str(p)}]}] for p in paths
    ]
    media = MediaConfig(video_max_frames=limit)
    adapter = OmniAdapter(
        omni.model, omni.processor, omni.config.model_copy(update={"media": media})
    )
    batch = adapter.encode(conversations)
    rates = [read_clip(p, 2.0, limit).fps for p in paths]
    assert batch["video_second_per_grid"].tolist() == pytest.approx([2 / rate for rate in rates])
    assert (rates[0] < 1.5) == (limit < 8)


def test_pixels_per_image_can_be_limited(omni: Any) -> None:
    picture = Image.new("RGB", (128, 128), (9, 90, 200))
    conversation = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    grid = omni.encode([conversation])["image_grid_thw"].prod()
    media = MediaConfig(image_min_pixels=32 * 32, image_max_pixels=32 * 32)
    small = OmniAdapter(omni.model, omni.processor, omni.config.model_copy(update={"media": media}))
    patch = omni.model.config.vision_config.patch_size
    assert small.encode([conversation])["image_grid_thw"].prod() == (32 // patch) ** 2 < grid


def test_frames_per_clip_are_limited(omni: Any, one_of_each: Any) -> None:
    media = MediaConfig(video_max_frames=2)
    short = OmniAdapter(omni.model, omni.processor, omni.config.model_copy(update={"media": media}))
    messages = one_of_each["video"].messages
    assert short.encode([messages])["video_grid_thw"][0, 0] == 1
    assert omni.encode([messages])["video_grid_thw"][0, 0] > 1


def test_unknown_part_is_refused(omni: Any) -> None:
    with pytest.raises(ValueError, match="unknown content type 'smell'"):
        omni.encode([[{"role": "user", "content": [{"type": "smell", "smell": 1}]}]])


def test_broken_image_is_refused(omni: Any) -> None:
    with pytest.raises(MediaError, match="expected a PIL image"):
        omni.encode([[{"role": "user", "content": [{"type": "image", "image": b"png"}]}]])


def test_bfloat16_runs_every_modality(omni: Any, mixed: Any, copied: Any) -> None:
    """The default on a GPU: inputs made in float32 must find their way into the towers."""
    adapter = copied(omni)
    adapter.model.bfloat16()
    batch = adapter.encode(mixed)
    low, high = adapter.logits(batch), omni.logits(batch)
    assert low.dtype == torch.float32
    assert torch.cosine_similarity(low, high, dim=-1).min() > 0.99


def test_load_from_a_saved_folder(omni: Any, mixed: Any, tmp_path: Any) -> None:
    omni.model.save_pretrained(tmp_path)
    omni.processor.save_pretrained(tmp_path)
    config = ModelConfig(
        name="saved",
        path=str(tmp_path),
        device="cpu",
        scope=ScopeConfig(),
        media=MediaConfig(video_max_frames=8),
    )
    loaded = OmniAdapter.load(config)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    expected = omni.logits(omni.encode(mixed))
    found = loaded.logits(loaded.encode(mixed))
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_devices_and_dtypes() -> None:
    def config(**changes: str) -> ModelConfig:
        return ModelConfig(name="x", path="y", **changes)

    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_device(config(device="cpu")) == cpu
    assert pick_dtype(config(), cpu) == torch.float32
    assert pick_dtype(config(), gpu) == torch.bfloat16
    assert pick_dtype(config(dtype="float16"), cpu) == torch.float16
    assert pick_dtype(config(dtype="float32"), gpu) == torch.float32
    if not torch.cuda.is_available():
        assert pick_device(config()) == cpu
        with pytest.raises(ModelError, match=r"model\.device=cpu"):
            pick_device(config(device="cuda"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    weights = embedded_folder("tiny_omni") / "model.safetensors"
    for path in weights.parent.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tensors = load_file(weights)
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 5] = value
    (tmp_path / weights.name).unlink()
    save_file(tensors, tmp_path / weights.name, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 NaN or infinite values in \S*layers\.1\.mlp\.up_proj"):
        OmniAdapter.load(ModelConfig(name="damaged", path=str(tmp_path)))
