"""The small thinker's configuration, and a faster form of its towers for training.

Two things differ from a scaled-down 7B. The width axis of the multimodal rotary embedding gets the
lowest frequencies; with theta 10,000 and a head of 32 channels one step to the right turns them by
0.003 rad at most. Theta 300 and sections [2, 4, 10] give 0.12 rad. Two position ids per second keep
the text near its video. Neither was tried against the original by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from morphoquant.compat import prepare_torchvision
from morphoquant.embedded.processor import AUDIO_CHUNK, MEL_BINS, PATCH

HIDDEN = 256
ROPE_THETA = 300.0
MROPE_SECTION = [2, 4, 10]


def configuration(tokenizer: Any, initializer_range: float = 0.06) -> Any:
    """The ``Qwen2_5OmniThinkerConfig`` of the small model."""
    from transformers import Qwen2_5OmniThinkerConfig

    def token(name: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(name))

    end, pad = token("<|im_end|>"), token("<|endoftext|>")
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": HIDDEN,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE_THETA,
                "mrope_section": MROPE_SECTION,
            },
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": pad,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 64,
            "out_hidden_size": HIDDEN,
            "fullatt_block_indexes": [2],
        },
        audio_config={
            "num_mel_bins": MEL_BINS,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 256,
            "d_model": 128,
            "max_source_positions": AUDIO_CHUNK * 100,
            "n_window": 100,
            "output_dim": HIDDEN,
        },
        audio_token_index=token("<|AUDIO|>"),
        image_token_index=token("<|IMAGE|>"),
        video_token_index=token("<|VIDEO|>"),
        audio_start_token_id=token("<|audio_bos|>"),
        audio_end_token_id=token("<|audio_eos|>"),
        # Not declared fields, but get_rope_index needs the first; keywords survive the round trip.
        vision_start_token_id=token("<|vision_bos|>"),
        vision_end_token_id=token("<|vision_eos|>"),
        user_token_id=tokenizer.encode("user", add_special_tokens=False)[0],
        position_id_per_seconds=2,
        seconds_per_chunk=2,
        tie_word_embeddings=True,
        pad_token_id=pad,
        eos_token_id=end,
    )
    for part in (config, config.text_config, config.vision_config, config.audio_config):
        part.initializer_range = initializer_range
    return config


def _attend(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor
) -> torch.Tensor:
    """Attention within equal-length segments, all at once: ``[tokens, heads, dim]`` each."""
    lengths = bounds[1:] - bounds[:-1]
    length = int(lengths[0])
    if not bool((lengths == length).all()):
        raise ValueError("the fast towers need media of one shape in a batch")
    heads, dim = q.shape[1:]

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, length, heads, dim).transpose(1, 2)

    weights = (split(q) @ split(k).transpose(-1, -2) * module.scaling).float().softmax(-1)
    return (weights.to(v.dtype) @ split(v)).transpose(1, 2).reshape(-1, heads * dim)


@contextmanager
def fast_towers() -> Iterator[None]:
    """Replace the towers' attention, which loops over segments, by the same maths in a batch.

    For training only; afterwards the classes are as they were, and so they are measured.
    """
    prepare_torchvision()
    import transformers.models.qwen2_5_omni.modeling_qwen2_5_omni as qwen

    def vision(self, hidden_states, cu_seqlens, position_embeddings=None, **kwargs):  # type: ignore[no-untyped-def]
        shape = (hidden_states.shape[0], self.num_heads, -1)
        q, k, v = (f(hidden_states).reshape(shape) for f in (self.q, self.k, self.v))
        q, k = qwen.apply_rotary_pos_emb_vision(q, k, *position_embeddings)
        return self.proj(_attend(self, q.to(v.dtype), k.to(v.dtype), v, cu_seqlens))

    def audio(self, hidden_states, cu_seqlens, **kwargs):  # type: ignore[no-untyped-def]
        shape = (hidden_states.shape[0], self.num_heads, -1)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(hidden_states).reshape(shape) for f in projections)
        return self.out_proj(_attend(self, q, k, v, cu_seqlens))

    def patches(self, hidden_states):  # type: ignore[no-untyped-def]
        return functional.linear(hidden_states, self.proj.weight.reshape(self.embed_dim, -1))

    replacements = {
        qwen.Qwen2_5OmniVisionAttention: vision,
        qwen.Qwen2_5OmniAudioAttention: audio,
        qwen.Qwen2_5_VisionPatchEmbed: patches,
    }
    originals = {module: module.forward for module in replacements}
    for module, forward in replacements.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in originals.items():
            module.forward = forward
