"""Models of one decoder block with the shapes of the published ones, and how work is timed.

Weights are random, and a few channels of the residual stream are large as in trained models. The
towers in front of the block are the embedded model's, cut down to a layer and widened to the
block's width, so that its processor and calibration prompts serve every size and every method takes
the very code path of a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from morphoquant.compat import prepare_torchvision
from morphoquant.config.schema import ModelConfig
from morphoquant.models import loading
from morphoquant.models.adapter import OmniAdapter
from morphoquant.models.qwen_omni import text_model
from morphoquant.models.structure import Block


@dataclass(frozen=True)
class Shape:
    """Of a decoder block: channels, and heads of 128 channels."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int


SHAPES = {"3b": Shape(2048, 11008, 16, 2), "7b": Shape(3584, 18944, 28, 4)}
"""Qwen2.5-Omni's decoders (SPEC 4)."""
EMBEDDED = ModelConfig(name="tiny_omni", path="embedded:tiny_omni", dtype="float64", threads=1)


def embedded_model() -> OmniAdapter:
    """The shipped small model as a run loads it: float64, one thread."""
    return OmniAdapter.load(EMBEDDED)


def one_block_model(shape: Shape, seed: int = 0) -> OmniAdapter:
    """A thinker of one random decoder block, float32, with the embedded model's processor."""
    prepare_torchvision()
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
    )

    folder: Path = loading.embedded_folder("tiny_omni")
    config: Any = Qwen2_5OmniThinkerConfig.from_pretrained(folder)
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    text.hidden_size, text.intermediate_size = shape.hidden, shape.intermediate
    text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.kv_heads
    text.num_hidden_layers, text.layer_types = 1, ["full_attention"]
    text.rope_parameters = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    }
    vision.depth, vision.fullatt_block_indexes, vision.out_hidden_size = 1, [0], shape.hidden
    audio.encoder_layers, audio.output_dim = 1, shape.hidden
    for part in (config, text, vision, audio):
        part.initializer_range = 0.02
    torch.manual_seed(seed)
    model: Any = Qwen2_5OmniThinkerForConditionalGeneration(config)
    with torch.no_grad():
        decoder = text_model(model)
        decoder.embed_tokens.weight.mul_(50)  # as far from zero as what the projectors put out
        decoder.layers[0].input_layernorm.weight[::200] *= 30
        decoder.layers[0].post_attention_layernorm.weight[::200] *= 30
    described = EMBEDDED.model_copy(update={"name": "random", "dtype": "float32", "threads": None})
    processor = Qwen2_5OmniProcessor.from_pretrained(folder)
    return OmniAdapter(model.float().eval().requires_grad_(False), processor, described)


def linears(block: Block) -> dict[str, Any]:
    """The linears of a block by name."""
    return {name: block.linear(name) for group in block.groups for name in group.linears}


def fastest(work: Callable[[], Any], prepare: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of some calls; ``prepare`` runs before each, untimed."""
    best = float("inf")
    for _ in range(repeats):
        prepare()
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
