"""The linears of a checkpoint, told from its ``config.json`` alone: no weight, no torch.

A sweep over layers needs to know how many there are before anything is loaded, and a pattern that
matches no linear should be refused at once. The names are those of the thinker's modules; the
loaded model is compared with what was configured again (:func:`morphoquant.pipeline.run`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from morphoquant.config.schema import ModelConfig, ScopeConfig
from morphoquant.models.loading import ModelError, resolve

Groups = dict[str, tuple[str, ...]]

DECODER: Groups = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}
VISION: Groups = {
    "attn_in": ("attn.q", "attn.k", "attn.v"),
    "attn_out": ("attn.proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_out": ("mlp.down_proj",),
}
MERGER: Groups = {"merger_in": ("mlp.0",), "merger_out": ("mlp.2",)}
AUDIO: Groups = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.out_proj",),
    "mlp_in": ("fc1",),
    "mlp_out": ("fc2",),
}
"""Input group -> linears that read the same activation, relative to the block, in call order."""

DEPTHS = {
    "decoder": ("text_config", "num_hidden_layers"),
    "vision": ("vision_config", "depth"),
    "audio": ("audio_config", "encoder_layers"),
}
"""Tower -> where ``config.json`` says how many blocks it has."""
STACKS = {"decoder": "model.layers", "vision": "visual.blocks", "audio": "audio_tower.layers"}
MERGER_BLOCK = "visual.merger"


@dataclass(frozen=True)
class OutlinedLinear:
    """One linear that can be in scope."""

    name: str
    """Full dotted name: ``model.layers.3.mlp.down_proj``."""
    tower: str
    block: str
    """Name of its block within the tower: its number, or ``merger``."""
    stack: str
    """Dotted name of what the block lies in: ``model.layers``."""
    group: str
    """Its input group."""


def outline(config: ModelConfig) -> tuple[OutlinedLinear, ...]:
    """Every linear of the towers in ``config.scope``, whatever its patterns; in running order.

    Raises:
        ModelError: ``config.json`` cannot be had, or does not say how deep a tower is.
    """
    depths = _depths(config.path, config.revision)
    return linears(config.scope, dict(depths))


def linears(scope: ScopeConfig, depths: dict[str, int]) -> tuple[OutlinedLinear, ...]:
    """The linears of the towers in scope, of which ``depths`` has the number of blocks."""
    found = []
    for tower, groups in (("vision", VISION), ("audio", AUDIO), ("decoder", DECODER)):
        if not getattr(scope, tower):
            continue
        stack = STACKS[tower]
        blocks = [(str(i), f"{stack}.{i}", groups) for i in range(depths[tower])]
        if tower == "vision":
            blocks.append(("merger", MERGER_BLOCK, MERGER))
        for block, prefix, members in blocks:
            for group, names in members.items():
                for name in names:
                    parent = prefix.rpartition(".")[0]
                    found.append(OutlinedLinear(f"{prefix}.{name}", tower, block, parent, group))
    return tuple(found)


@lru_cache(maxsize=64)
def _depths(path: str, revision: str | None) -> tuple[tuple[str, int], ...]:
    """Tower -> number of blocks."""
    described, where = _read(path, revision)
    thinker = described.get("thinker_config", described)
    depths = {}
    for tower, (part, field) in DEPTHS.items():
        depth = (thinker.get(part) or {}).get(field)
        if not isinstance(depth, int):
            raise ModelError(f"{where}: {part}.{field} does not say how many blocks there are")
        depths[tower] = depth
    return tuple(depths.items())


def _read(path: str, revision: str | None) -> tuple[dict[str, Any], Path]:
    """``config.json`` of a checkpoint, of the hub's where ``path`` is an id."""
    folder = resolve(ModelConfig(name="", path=path, revision=revision))
    if folder is not None:
        file = folder / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        try:
            file = Path(hf_hub_download(path, "config.json", revision=revision))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"model.path: config.json of {path!r} could not be had from the hub: "
                f"{' '.join(str(error).split())}. Download the checkpoint elsewhere and give its "
                "folder: model.path=FOLDER"
            ) from error
    try:
        described = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not a readable JSON object ({error})") from error
    if not isinstance(described, dict):
        raise ModelError(f"{file}: not a JSON object")
    return described, file
