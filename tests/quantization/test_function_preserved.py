"""T1, T2, T11: every choice of slot 1 leaves the unquantized outputs as they were.

In float64 to 1e-10, on a model whose biases and norm gains are all random, with a tied and an
untied head, for prompts of text, image, video, audio and of all of them, padded to one length.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import nn

from morphoquant.calibration.samples import Calibration
from morphoquant.config import load
from morphoquant.config.schema import RunConfig, ScopeConfig
from morphoquant.config.store import register
from morphoquant.quantization.attention import install_kv_cache
from morphoquant.quantization.kv_cache import KVSettings
from morphoquant.quantization.transforms import TransformInput, apply_transform, rotate
from morphoquant.quantization.transforms.check import largest_relative_change

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(p.stem for p in (CONF / "method" / "transform").glob("*.yaml"))
TOLERANCE = 1e-10


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def original(request: pytest.FixtureRequest, build_adapter: Any, in_float64: Any) -> Any:
    adapter = build_adapter(ScopeConfig(), tie=request.param, layers=3)  # first, middle, last
    in_float64(adapter.model)
    stream = adapter.residual_stream()
    projectors = [projector.bias for projector in stream.projectors]
    for bias in (*projectors, *(layer.v.bias for layer in stream.layers)):
        assert bias is not None
        assert bias.abs().min() > 0, "a bias of zero would hide that it was forgotten"
    return adapter


@pytest.fixture(scope="module")
def configs() -> dict[str, RunConfig]:
    """Every transform in front of a method that has both weights and activations to round."""
    register()
    few = "method.transform.steps=2"
    found = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for name in CHOICES:
            # Scales per modality ask for what makes up for them in the rounded weights.
            method = "masquant" if name == "modality_smooth" else "rtn"
            overrides = [f"method={method}", f"method/transform={name}", few]
            found[name] = load(compose("config", overrides=overrides))
    return found


@torch.no_grad()
def logits(adapter: Any, batch: Any) -> list[torch.Tensor]:
    """Of every prompt, [tokens, vocabulary]."""
    adapter.model.rope_deltas = None
    out = adapter.model(**batch, use_cache=False).logits
    return [o[m.bool()] for o, m in zip(out, batch["attention_mask"], strict=True)]


@pytest.mark.parametrize(
    ("choice", "r3"),
    [(c, False) for c in CHOICES]
    + [(c, True) for c in CHOICES if c.startswith(("rotate", "spin"))],
)
def test_no_logit_moves(
    original: Any,
    copied: Any,
    mixed: Any,
    calibration: Calibration,
    configs: dict[str, RunConfig],
    choice: str,
    r3: bool,
) -> None:
    """R3 beside R1, R2 and R4, too: it turns queries and keys while the model runs."""
    config = configs[choice]
    batch = original.encode(mixed)
    before = logits(original, batch)
    adapter = copied(original)
    adapter.untie_head()
    few = calibration.samples[:2]  # what the scales are does not matter, only that they are undone
    encoded = [adapter.encode([s.messages for s in few])]
    given = TransformInput(adapter, config.method, config.bits, encoded, few)
    report = apply_transform(given)
    assert (report is None) == (config.method.transform.name == "none")
    if r3:
        install_kv_cache(adapter, KVSettings(rotate=True))
    names = ("text", "image", "video", "audio", "mixed")
    for name, then, now in zip(names, before, logits(adapter, batch), strict=True):
        assert largest_relative_change(then, now) <= TOLERANCE, name
    if report is not None:
        old, new = original.model.state_dict(), adapter.model.state_dict()
        moved = [n for n, value in old.items() if n in new and not torch.equal(value, new[n])]
        assert any("layers.0" in name for name in moved), "nothing was rewritten"


def test_block_diagonal_rotations_are_named(
    original: Any, copied: Any, configs: dict[str, RunConfig]
) -> None:
    """A width without a Hadamard matrix, here 92: refused, or rotated in blocks that are named."""
    stream = copied(original).residual_stream()
    for layer in stream.layers:  # 92 = 4 * 23
        for linear in (layer.gate, layer.up):
            linear.weight = nn.Parameter(linear.weight[:92].clone(), requires_grad=False)
            linear.bias = None if linear.bias is None else nn.Parameter(linear.bias[:92].clone())
            linear.out_features = 92
        layer.down.weight = nn.Parameter(layer.down.weight[:, :92].clone(), requires_grad=False)
        layer.down.in_features = 92
    narrow = type(stream)(**{**vars(stream), "intermediate_size": 92})
    with pytest.raises(ValueError, match=r"92.*rotate_block"):
        rotate(narrow, configs["rotate"].method.transform)
    report = asdict(rotate(narrow, configs["rotate_block"].method.transform))
    assert report["r4"] == "hadamard 23 blocks of 4"
