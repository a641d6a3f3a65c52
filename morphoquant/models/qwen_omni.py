"""Where things are in a Qwen2.5-Omni thinker, on the unmodified transformers classes.

Releases of transformers place the towers and the text model differently (``model.model`` is the
text model itself in some, and holds ``language_model`` in others), so nothing here spells a full
path: parts are found by what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from morphoquant.models import outline
from morphoquant.models.structure import (
    Block,
    DecoderLayer,
    InputGroup,
    Modality,
    ResidualStream,
    Tower,
)


def _input_groups(named: outline.Groups) -> tuple[InputGroup, ...]:
    return tuple(InputGroup(name, linears) for name, linears in named.items())


DECODER_GROUPS = _input_groups(outline.DECODER)
VISION_GROUPS = _input_groups(outline.VISION)
MERGER_GROUPS = _input_groups(outline.MERGER)
AUDIO_GROUPS = _input_groups(outline.AUDIO)


def text_model(model: nn.Module) -> Any:
    """The decoder: embedding, layers and final norm."""
    inner: Any = model.model
    return getattr(inner, "language_model", inner)


def vision_tower(model: nn.Module) -> Any:
    return model.visual if hasattr(model, "visual") else model.model.visual  # type: ignore[union-attr]


def audio_tower(model: nn.Module) -> Any:
    return model.audio_tower if hasattr(model, "audio_tower") else model.model.audio_tower  # type: ignore[union-attr]


def blocks(model: nn.Module, tower: Tower) -> tuple[Block, ...]:
    """The blocks of one tower in the order in which they run.

    The vision tower ends with its merger. The audio tower's last projection is no block of its
    own and stays in high precision (as does every convolution).
    """
    if tower == "decoder":
        found: list[tuple[nn.Module, tuple[InputGroup, ...]]] = [
            (layer, DECODER_GROUPS) for layer in text_model(model).layers
        ]
    elif tower == "vision":
        visual = vision_tower(model)
        found = [(block, VISION_GROUPS) for block in visual.blocks]
        found.append((visual.merger, MERGER_GROUPS))
    else:
        found = [(layer, AUDIO_GROUPS) for layer in audio_tower(model).layers]
    names = {id(module): name for name, module in model.named_modules()}
    return tuple(Block(names[id(m)], tower, m, groups) for m, groups in found)


def untie_head(model: nn.Module) -> bool:
    """Give lm_head a weight of its own where it shares the embedding's. True if it did.

    A transform changes the two in different ways; editing shared storage would apply both
    changes to both.
    """
    embedding, head = text_model(model).embed_tokens, model.lm_head
    if head.weight.data_ptr() != embedding.weight.data_ptr():  # type: ignore[union-attr, operator]
        return False
    head.weight = nn.Parameter(  # type: ignore[union-attr]
        embedding.weight.detach().clone(), requires_grad=False
    )
    for config in (model.config, text_model(model).config):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return True


def residual_stream(model: nn.Module) -> ResidualStream:
    """Everything that writes into or reads from the decoder's residual stream (SPEC 4.5)."""
    text = text_model(model)
    layers = tuple(
        DecoderLayer(
            input_norm=b.module.input_layernorm,  # type: ignore[arg-type]
            post_norm=b.module.post_attention_layernorm,  # type: ignore[arg-type]
            q=b.linear("self_attn.q_proj"),  # type: ignore[arg-type]
            k=b.linear("self_attn.k_proj"),  # type: ignore[arg-type]
            v=b.linear("self_attn.v_proj"),  # type: ignore[arg-type]
            o=b.linear("self_attn.o_proj"),  # type: ignore[arg-type]
            gate=b.linear("mlp.gate_proj"),  # type: ignore[arg-type]
            up=b.linear("mlp.up_proj"),  # type: ignore[arg-type]
            down=b.linear("mlp.down_proj"),  # type: ignore[arg-type]
            block=b,
        )
        for b in blocks(model, "decoder")
    )
    attention: Any = text.layers[0].self_attn
    audio = audio_tower(model)
    extra = (audio.audio_bos_eos_token,) if hasattr(audio, "audio_bos_eos_token") else ()
    return ResidualStream(
        embedding=text.embed_tokens,
        projectors=(vision_tower(model).merger.mlp[2], audio.proj),
        layers=layers,
        final_norm=text.norm,
        lm_head=model.lm_head,  # type: ignore[arg-type]
        hidden_size=text.config.hidden_size,
        intermediate_size=text.config.intermediate_size,
        head_dim=attention.head_dim,
        num_heads=attention.config.num_attention_heads,
        num_kv_heads=attention.config.num_key_value_heads,
        extra_embeddings=extra,
    )


def modality_map(
    config: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor
) -> torch.Tensor:
    """Label every token.

    Args:
        config: the thinker's config, which names the placeholder tokens.
        input_ids: [batch, tokens].
        attention_mask: [batch, tokens], 0 where padding.

    Returns:
        int8 [batch, tokens] of :class:`Modality`; special tokens around media count as text.
    """
    labels = torch.full_like(input_ids, int(Modality.TEXT), dtype=torch.int8)
    labels[input_ids == config.image_token_id] = int(Modality.IMAGE)
    labels[input_ids == config.video_token_id] = int(Modality.VIDEO)
    labels[input_ids == config.audio_token_id] = int(Modality.AUDIO)
    labels[attention_mask == 0] = int(Modality.PADDING)
    return labels
