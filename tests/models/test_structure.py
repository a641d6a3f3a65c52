"""Blocks, input groups and the residual stream name the live modules, all of them, once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from morphoquant.config.schema import ScopeConfig
from morphoquant.models import qwen_omni
from morphoquant.models.structure import Block, InputGroup, Modality


def linears_under(model: nn.Module, root: nn.Module) -> set[str]:
    names = {id(m): n for n, m in model.named_modules()}
    return {names[id(m)] for m in root.modules() if isinstance(m, nn.Linear)}


def grouped(adapter: Any, tower: Any) -> list[str]:
    return [
        f"{block.name}.{name}"
        for block in adapter.blocks(tower)
        for group in block.groups
        for name in group.linears
    ]


def test_decoder_groups_name_every_linear_once(omni: Any) -> None:
    found = grouped(omni, "decoder")
    assert max(Counter(found).values()) == 1
    assert set(found) == linears_under(omni.model, qwen_omni.text_model(omni.model))
    assert len(found) == 7 * omni.model.config.text_config.num_hidden_layers


def test_vision_groups_name_every_linear_once(omni: Any) -> None:
    found = grouped(omni, "vision")
    assert max(Counter(found).values()) == 1
    assert set(found) == linears_under(omni.model, qwen_omni.vision_tower(omni.model))


def test_audio_groups_name_every_linear_but_the_last_projection(omni: Any) -> None:
    found = grouped(omni, "audio")
    assert max(Counter(found).values()) == 1
    tower = qwen_omni.audio_tower(omni.model)
    assert linears_under(omni.model, tower) - set(found) == {
        next(n for n, m in omni.model.named_modules() if m is tower.proj)
    }
    assert set(found) <= linears_under(omni.model, tower)


@pytest.mark.parametrize("tower", ["decoder", "vision", "audio"])
def test_linears_of_a_group_are_called_in_order_with_one_tensor(
    omni: Any, mixed: Any, tower: Any
) -> None:
    """What the shared group input relies on: the same tensor *object*, nothing in between."""
    calls: list[tuple[str, int]] = []
    kept: list[torch.Tensor] = []  # keeps the tensors alive, so that ids stay unique
    handles = []
    for block in omni.blocks(tower):
        for group in block.groups:
            for name in group.linears:

                def hook(_m: Any, args: Any, label: str = f"{block.name}.{name}") -> None:
                    calls.append((label, id(args[0])))
                    kept.append(args[0])

                handles.append(block.linear(name).register_forward_pre_hook(hook))
    try:
        omni.logits(omni.encode(mixed[1:]))
    finally:
        for handle in handles:
            handle.remove()
    groups = [[f"{b.name}.{n}" for n in g.linears] for b in omni.blocks(tower) for g in b.groups]
    seen = 0
    while seen < len(calls):
        group = next(g for g in groups if g[0] == calls[seen][0])
        part = calls[seen : seen + len(group)]
        assert [name for name, _ in part] == group
        assert len({tensor for _, tensor in part}) == 1
        seen += len(group)
    assert {name for name, _ in calls} == {n for g in groups for n in g}


def test_residual_stream_is_complete(omni: Any) -> None:
    stream = omni.residual_stream()
    text = qwen_omni.text_model(omni.model)
    producers = [id(m) for m in stream.producers()]
    readers = [id(m) for _, linears in stream.consumers() for m in linears]
    named = {id(m): n for n, m in omni.model.named_modules()}
    inside = {id(m) for m in text.modules() if isinstance(m, nn.Linear)}
    values = {id(layer.v) for layer in stream.layers}
    assert inside <= set(producers) | set(readers)
    assert len(producers) == len(set(producers)) == 2 * len(text.layers) + 2
    assert len(readers) == len(set(readers))
    assert id(omni.model.lm_head) in readers
    assert not set(producers) & set(readers)
    assert values <= set(readers)
    assert {named[p].rsplit(".", 1)[-1] for p in producers} >= {"o_proj", "down_proj", "proj"}
    norms = [id(norm) for norm, _ in stream.consumers()]
    assert set(norms) == {id(m) for n, m in text.named_modules() if "RMSNorm" in type(m).__name__}
    assert stream.projectors[0].out_features == stream.hidden_size
    assert stream.projectors[1].out_features == stream.hidden_size
    assert stream.embedding.embedding_dim == stream.hidden_size
    assert stream.num_heads * stream.head_dim == stream.layers[0].q.out_features
    assert stream.num_kv_heads * stream.head_dim == stream.layers[0].v.out_features
    assert stream.intermediate_size == stream.layers[0].down.in_features


def test_zeroing_all_producers_silences_the_model(fresh_omni: Any, mixed: Any) -> None:
    """Nothing else writes into the residual stream, or the logits would not be zero."""
    stream = fresh_omni.residual_stream()
    batch = fresh_omni.encode(mixed)
    fresh_omni.untie_head()
    with torch.no_grad():
        stream.embedding.weight.zero_()
        for linear in stream.producers():
            linear.weight.zero_()
            if linear.bias is not None:
                linear.bias.zero_()
    assert fresh_omni.logits(batch).abs().max() == 0


def test_untying_keeps_the_function_and_separates_the_storage(fresh_omni: Any, mixed: Any) -> None:
    model = fresh_omni.model
    embedding = qwen_omni.text_model(model).embed_tokens
    assert model.lm_head.weight.data_ptr() == embedding.weight.data_ptr()
    batch = fresh_omni.encode(mixed[:1])
    before = fresh_omni.logits(batch)
    assert fresh_omni.untie_head() is True
    assert torch.equal(fresh_omni.logits(batch), before)
    embedding.weight.zero_()
    assert model.lm_head.weight.abs().max() > 0
    assert model.config.tie_word_embeddings is False
    assert fresh_omni.untie_head() is False


def test_untied_model_is_left_alone(build_adapter: Any) -> None:
    adapter = build_adapter(ScopeConfig(), tie=False)
    head = adapter.model.lm_head.weight
    assert adapter.untie_head() is False
    assert adapter.model.lm_head.weight is head


def test_replace_nested_and_direct() -> None:
    module = nn.Module()
    module.fc = nn.Linear(2, 2)
    module.mlp = nn.Sequential(nn.Linear(2, 2))
    block = Block("b", "audio", module, (InputGroup("x", ("fc", "mlp.0")),))
    first, second = nn.Linear(2, 3), nn.Linear(2, 4)
    block.replace("fc", first)
    block.replace("mlp.0", second)
    assert module.fc is first
    assert module.mlp[0] is second
    assert block.linear("mlp.0") is second


def test_modality_map_partitions_the_tokens(omni: Any, mixed: Any) -> None:
    """M11: every non-padding token in exactly one bucket, placeholders where the media are."""
    batch = omni.encode(mixed)
    labels = omni.modality_map(batch)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    assert labels.shape == ids.shape
    assert labels.dtype == torch.int8
    assert (~real).any(), "the batch has padding"
    assert ((labels == int(Modality.PADDING)) == ~real).all()
    buckets = [(labels == int(m)) for m in Modality]
    assert (torch.stack(buckets).sum(0) == 1).all()
    config = omni.model.config
    for modality, token in (
        (Modality.IMAGE, config.image_token_id),
        (Modality.VIDEO, config.video_token_id),
        (Modality.AUDIO, config.audio_token_id),
    ):
        assert ((labels == int(modality)) == ((ids == token) & real)).all()
        assert (labels == int(modality)).any()
    present = [set(row.tolist()) - {int(Modality.PADDING)} for row in labels]
    text, image, video, audio = (int(m) for m in list(Modality)[1:])
    assert present == [
        {text},
        {text, image},
        {text, video},
        {text, audio},
        {text, image, video, audio},
    ]


def test_media_tokens_match_the_towers_outputs(omni: Any, mixed: Any) -> None:
    batch = omni.encode(mixed)
    labels = omni.modality_map(batch)
    merge = omni.model.config.vision_config.spatial_merge_size**2
    count = {m: int((labels == int(m)).sum()) for m in Modality}
    assert count[Modality.IMAGE] == int(batch["image_grid_thw"].prod(-1).sum()) // merge
    assert count[Modality.VIDEO] == int(batch["video_grid_thw"].prod(-1).sum()) // merge
