"""A decoder with quantized keys and values: T2, T11, Q9, one layer by hand, who gets what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from morphoquant.calibration.walk import enter, run_block
from morphoquant.quantization.attention import install_kv_cache, kv_report, remove_kv_cache
from morphoquant.quantization.hadamard import hadamard
from morphoquant.quantization.kv_cache import KVCacheError, KVQuantizer, KVSettings
from morphoquant.quantization.transforms.check import largest_relative_change

TOLERANCE = 1e-10
INT4 = KVSettings(bits=4)
SETTINGS = {
    "int8": KVSettings(bits=8),
    "int4": INT4,
    "groups": KVSettings(bits=4, group_size=8, clip_ratio=0.95),
    "symmetric": KVSettings(bits=4, symmetric=True),
    "rotated": KVSettings(bits=4, rotate=True),
    "rotated groups": KVSettings(bits=3, group_size=16, rotate=True),
}
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 32


@pytest.fixture(scope="module")
def exact(omni: Any, copied: Any, in_float64: Any) -> Any:
    """The random thinker in float64 from end to end; shared, never changed."""
    adapter = copied(omni)
    in_float64(adapter.model)
    for i in range(LAYERS):  # sharper attention: wrong scores must show
        attention(adapter, i).k_proj.weight.mul_(3)
    return adapter


@pytest.fixture(scope="module")
def batch(exact: Any, mixed: Any) -> Any:
    """Text, image, video, audio and all of them in one prompt, left-padded to one length."""
    return exact.encode(mixed)


@pytest.fixture(scope="module")
def before(exact: Any, batch: Any) -> torch.Tensor:
    return logits(exact, batch)


@torch.no_grad()
def logits(adapter: Any, batch: Any) -> torch.Tensor:
    """[tokens, vocabulary] of every token that is no padding."""
    adapter.model.rope_deltas = None
    out = adapter.model(**batch, use_cache=False).logits
    return out[batch["attention_mask"].bool()]


def attention(adapter: Any, layer: int) -> Any:
    return adapter.blocks("decoder")[layer].module.self_attn


# ------------------------------------------------------------------------ R3, 16 bits


def test_r3_alone_leaves_the_logits(
    exact: Any, copied: Any, batch: Any, before: torch.Tensor
) -> None:
    """T2: behind the rotary embedding, with biases, for every modality and under padding."""
    adapter = copied(exact)
    install_kv_cache(adapter, KVSettings(rotate=True))
    assert largest_relative_change(before, logits(adapter, batch)) <= TOLERANCE


def test_16_bits_are_the_identity(
    exact: Any, copied: Any, batch: Any, before: torch.Tensor
) -> None:
    """Q9: bitwise, though every layer went through it."""
    adapter = copied(exact)
    report = install_kv_cache(adapter, KVSettings())
    assert torch.equal(before, logits(adapter, batch))
    assert report.idle() == ()
    assert all(found.elements == 0 for found in report.quantizers.values())


# ------------------------------------------------------------------------ what is rounded


@pytest.mark.parametrize("name", SETTINGS)
def test_one_layer_by_hand(exact: Any, copied: Any, name: str) -> None:
    """Softmax over quantized keys and values, every query head with the kv head of its group."""
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

    settings = SETTINGS[name]
    adapter = copied(exact)
    install_kv_cache(adapter, settings)
    module, tokens = attention(adapter, 1), 7
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, tokens, HEADS * HEAD_DIM, dtype=torch.float64, generator=draw)
    angles = torch.randn(2, tokens, HEAD_DIM // 2, dtype=torch.float64, generator=draw)
    angles = angles.repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    with torch.no_grad():
        found, _ = module(
            hidden,
            attention_mask=causal.expand(2, 1, -1, -1),
            position_embeddings=(cos, sin),
        )

        def split(x: torch.Tensor) -> torch.Tensor:
            return x.view(2, tokens, -1, HEAD_DIM).transpose(1, 2)

        q, k = split(module.q_proj(hidden)), split(module.k_proj(hidden))
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        if settings.rotate:
            matrix = hadamard(HEAD_DIM) / HEAD_DIM**0.5
            q, k = q @ matrix, k @ matrix
        rounded = KVQuantizer(settings, HEAD_DIM, None).quantize
        k, v = rounded(k), rounded(split(module.v_proj(hidden)))
        heads = []
        for head in range(HEADS):
            source = head // (HEADS // KV_HEADS)
            scores = q[:, head] @ k[:, source].transpose(1, 2) / HEAD_DIM**0.5
            weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
            heads.append(weights @ v[:, source])
        expected = module.o_proj(torch.stack(heads, dim=2).flatten(2))
    assert largest_relative_change(expected, found) <= TOLERANCE


@pytest.mark.parametrize("name", ["int4", "rotated groups"])
def test_neither_batch_nor_padding_matters(exact: Any, copied: Any, mixed: Any, name: str) -> None:
    adapter = copied(exact)
    install_kv_cache(adapter, SETTINGS[name])
    together = adapter.encode(mixed)
    found = logits(adapter, together).split(together["attention_mask"].sum(1).tolist())
    for conversation, part in zip(mixed, found, strict=True):
        alone = logits(adapter, adapter.encode([conversation]))
        assert largest_relative_change(alone, part) <= TOLERANCE


@pytest.mark.parametrize("name", SETTINGS)
def test_decoding_with_a_cache_equals_prefill(
    exact: Any, copied: Any, batch: Any, name: str
) -> None:
    """T11: four tokens written for padded prompts of all modalities, against one long pass."""
    from transformers import GenerationConfig

    adapter = copied(exact)
    install_kv_cache(adapter, SETTINGS[name])
    config, head = adapter.model.config, adapter.model.lm_head
    media = (config.image_token_id, config.video_token_id, config.audio_token_id)
    plan = GenerationConfig(
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=None,
        pad_token_id=0,
        suppress_tokens=[0, *media],  # they would mean something else in a prompt
    )
    written: list[torch.Tensor] = []
    adapter.model.rope_deltas = None
    hook = head.register_forward_hook(lambda _head, _args, out: written.append(out[:, -1]))
    sequences = adapter.model.generate(**batch, generation_config=plan)
    hook.remove()
    whole = batch | {"input_ids": sequences[:, :-1]}
    whole["attention_mask"] = nn.functional.pad(batch["attention_mask"], (0, 3), value=1)
    lengths = whole["attention_mask"].sum(1).tolist()
    for i, rows in enumerate(logits(adapter, whole).split(lengths)):
        found = torch.stack([step[i] for step in written])
        assert largest_relative_change(rows[-4:], found) <= TOLERANCE


def test_more_bits_are_closer(exact: Any, copied: Any, batch: Any, before: torch.Tensor) -> None:
    adapter = copied(exact)
    errors = []
    for bits in (2, 4, 6, 8, 16):
        install_kv_cache(adapter, KVSettings(bits=bits))
        errors.append(float((logits(adapter, batch) - before).norm() / before.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 4 * errors[2] > 0
    assert errors[-1] == 0


def test_rotation_helps_a_model_whose_keys_have_an_outlier_channel(
    exact: Any, copied: Any, batch: Any
) -> None:
    """A large bias on the keys: the scores barely know of it, the grid does."""
    adapter = copied(exact)
    for i in range(LAYERS):
        # The slowest of the rotary frequencies, so that the outlier stays in its channel.
        attention(adapter, i).k_proj.bias.view(KV_HEADS, HEAD_DIM)[:, HEAD_DIM // 2 - 1] += 40.0
    exactly = logits(adapter, batch)
    errors = {}
    for rotate in (False, True):
        install_kv_cache(adapter, replace(INT4, rotate=rotate))
        errors[rotate] = float((logits(adapter, batch) - exactly).norm())
    assert errors[True] < 0.9 * errors[False]


# ------------------------------------------------------------------------ installing


def test_the_eager_function_is_wrapped_as_well(exact: Any, copied: Any, mixed: Any) -> None:
    """Chosen before installing or after, for the name is looked up in every pass.

    Its softmax is float32, where a padding row of float64 masks is NaN: one prompt, no padding.
    """
    outputs = []
    batch = exact.encode(mixed[-1:])
    for late in (None, False, True):
        adapter = copied(exact)
        if late is False:
            adapter.model.set_attn_implementation("eager")
        report = install_kv_cache(adapter, INT4)
        if late:
            adapter.model.set_attn_implementation("eager")
        outputs.append(logits(adapter, batch))
        assert report.idle() == ()
    sdpa, early, late_ = outputs
    assert torch.equal(early, late_)
    assert not torch.equal(sdpa, early)
    assert largest_relative_change(sdpa, early) < 1e-2


def test_other_functions_are_refused(exact: Any, copied: Any) -> None:
    adapter = copied(exact)
    adapter.blocks("decoder")[0].module.self_attn.config._attn_implementation = "flash_attention_2"
    with pytest.raises(KVCacheError, match=r"model\.attention.*flash_attention_2.*eager, sdpa"):
        install_kv_cache(adapter, INT4)
    assert kv_report(adapter) is None


def test_counters(exact: Any, copied: Any, batch: Any, mixed: Any) -> None:
    """Every token once per layer, however often later steps read it again."""
    adapter = copied(exact)
    report = install_kv_cache(adapter, INT4)
    assert len(report.quantizers) == LAYERS
    assert report.idle() == tuple(report.quantizers)
    logits(adapter, batch)
    tokens = batch["input_ids"].numel()
    per_token = 2 * KV_HEADS * HEAD_DIM
    for found in report.quantizers.values():
        assert (found.tokens, found.elements) == (tokens, tokens * per_token)
    report.reset()
    assert report.idle() == tuple(report.quantizers)
    [answer] = adapter.generate([mixed[0]], max_new_tokens=4)
    length = adapter.encode([mixed[0]])["input_ids"].shape[1]
    assert answer.output_tokens > 1, "else no token was read from a cache"
    # The last token is written and never read.
    for found in report.quantizers.values():
        assert found.tokens == length + answer.output_tokens - 1


def test_towers_are_left_alone(exact: Any, copied: Any, batch: Any) -> None:
    adapter = copied(exact)
    report = install_kv_cache(adapter, INT4)
    owners = {n.rpartition(".")[0] for n, m in adapter.model.named_modules() if _is_quantizer(m)}
    assert owners == set(report.quantizers)
    decoder = [block.name for block in adapter.blocks("decoder")]
    assert all(any(owner.startswith(f"{name}.") for name in decoder) for owner in owners)
    with torch.no_grad():
        images = {key: batch[key] for key in ("pixel_values", "image_grid_thw")}
        adapter.model.get_image_features(**images)
    assert report.idle() == tuple(report.quantizers)


def _is_quantizer(module: nn.Module) -> bool:
    return isinstance(module, KVQuantizer)


def test_installing_again_replaces_and_removing_restores(
    exact: Any, copied: Any, batch: Any, before: torch.Tensor
) -> None:
    adapter = copied(exact)
    configs = [attention(adapter, i).config for i in range(LAYERS)]
    state = set(adapter.model.state_dict())
    install_kv_cache(adapter, INT4)
    once = logits(adapter, batch)
    install_kv_cache(adapter, KVSettings(bits=2, rotate=True))
    report = install_kv_cache(adapter, INT4)
    assert torch.equal(once, logits(adapter, batch))
    assert not torch.equal(once, before)
    assert kv_report(adapter) == report
    assert set(adapter.model.state_dict()) == state
    assert remove_kv_cache(adapter)
    assert not remove_kv_cache(adapter)
    assert kv_report(adapter) is None
    assert all(attention(adapter, i).config is configs[i] for i in range(LAYERS))
    assert torch.equal(before, logits(adapter, batch))


def test_models_do_not_interfere(exact: Any, copied: Any, batch: Any, before: torch.Tensor) -> None:
    """Two models built with one config object, other settings in each, and a third without."""
    one, two, plain = copied(exact), copied(exact), copied(exact)
    for i in range(LAYERS):
        attention(two, i).config = attention(plain, i).config = attention(one, i).config
    expected = {}
    for bits in (3, 4):
        alone = copied(exact)
        install_kv_cache(alone, KVSettings(bits=bits))
        expected[bits] = logits(alone, batch)
    first = install_kv_cache(one, KVSettings(bits=3))
    install_kv_cache(two, KVSettings(bits=4))
    assert torch.equal(logits(two, batch), expected[4])
    assert first.idle() == tuple(first.quantizers)
    assert torch.equal(logits(one, batch), expected[3])
    assert torch.equal(logits(plain, batch), before)
    remove_kv_cache(one)
    assert torch.equal(logits(two, batch), expected[4])


def test_a_deep_copy_keeps_settings_and_counts_for_itself(
    exact: Any, copied: Any, batch: Any, before: torch.Tensor
) -> None:
    adapter = copied(exact)
    report = install_kv_cache(adapter, INT4)
    twin = copied(adapter)
    assert torch.equal(logits(adapter, batch), logits(twin, batch))
    again = kv_report(twin)
    assert again is not None
    assert again.settings == INT4
    assert [q.tokens for q in again.quantizers.values()] == [
        q.tokens for q in report.quantizers.values()
    ]
    report.reset()
    assert again.idle() == ()
    remove_kv_cache(twin)
    assert torch.equal(before, logits(twin, batch))
    assert kv_report(adapter) is not None


def test_the_walk_goes_through_it(exact: Any, copied: Any, batch: Any) -> None:
    """Layer by layer with caught arguments: the same hidden states as the whole model's."""
    adapter = copied(exact)
    [plain] = enter(adapter, "decoder", [batch])
    report = install_kv_cache(adapter, INT4)
    [segment] = enter(adapter, "decoder", [batch])
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        inside = adapter.model(**batch, output_hidden_states=True).hidden_states
        report.reset()
        for index, block in enumerate(adapter.blocks("decoder")[:-1]):
            segment.hidden = run_block(block, index, segment)
            plain.hidden = run_block(block, index, plain)
            assert torch.equal(segment.hidden[seen], inside[index + 1][seen])
            assert torch.equal(segment.hidden, plain.hidden), "entered before it was installed"
    assert len(report.idle()) == 1, "the last layer was not called"


# ------------------------------------------------------------------------ description


def test_description(exact: Any, copied: Any, batch: Any) -> None:
    adapter = copied(exact)
    report = install_kv_cache(adapter, KVSettings(bits=4, group_size=16, rotate=True))
    logits(adapter, batch)
    found = report.describe()
    layers = found.pop("layers")
    assert found == {
        "format": "int",
        "bits": 4,
        "effective_bits": 4 + (16 + 4) / 16,
        "granularity": "per_token_head_group",
        "group_size": 16,
        "symmetric": False,
        "clip_ratio": 1.0,
        "rotation": "hadamard 32 = 1 * 32",
    }
    assert [layer["name"] for layer in layers] == list(report.quantizers)
    assert {layer["tokens"] for layer in layers} == {batch["input_ids"].numel()}


def test_settings_that_do_not_fit_the_heads_change_nothing(exact: Any, copied: Any) -> None:
    adapter = copied(exact)
    with pytest.raises(KVCacheError, match="24 does not divide the 32"):
        install_kv_cache(adapter, KVSettings(bits=4, group_size=24))
    assert kv_report(adapter) is None
