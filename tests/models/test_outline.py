"""The outline of a checkpoint names what the loaded model has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from morphoquant.config.schema import ModelConfig, ScopeConfig
from morphoquant.models import loading
from morphoquant.models.outline import linears, outline

EVERYTHING = ScopeConfig(decoder=True, vision=True, audio=True)


def config(path: str = "embedded:tiny_omni", scope: ScopeConfig = EVERYTHING) -> ModelConfig:
    return ModelConfig(name="m", path=path, scope=scope)


def test_the_outline_is_the_loaded_model_s(omni: Any) -> None:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for linear in outline(config()):
        groups.setdefault((linear.tower, linear.block, linear.group), []).append(linear.name)
    assert list(groups.values()) == omni.input_groups()
    towers = [name for tower in ("vision", "audio", "decoder") for name in _names(omni, tower)]
    assert [linear.name for linear in outline(config())] == towers


def _names(adapter: Any, tower: str) -> list[str]:
    return [n for b in adapter.blocks(tower) for g in b.groups for n in b.names(g)]


def test_blocks_are_narrowed_to_the_scope(omni: Any) -> None:
    scope = EVERYTHING.model_copy(update={"only": ("model.layers.2.*", "*.fc1")})
    narrow = type(omni)(omni.model, omni.processor, config(scope=scope))
    assert len(narrow.blocks("decoder")) == len(omni.blocks("decoder"))
    assert [len(block.groups) for block in narrow.blocks("decoder")] == [0, 0, 4, 0]
    assert _names(narrow, "audio") == [f"audio_tower.layers.{i}.fc1" for i in range(2)]
    assert _names(narrow, "vision") == []
    assert narrow.input_groups() == omni.input_groups()


def test_a_full_checkpoint_nests_its_thinker(tmp_path: Path) -> None:
    inner = json.loads((loading.embedded_folder("tiny_omni") / "config.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "thinker_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert outline(config(str(tmp_path))) == outline(config())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not a readable JSON"),
        ("[]", "not a JSON object"),
        ('{"text_config": {}}', "text_config.num_hidden_layers"),
    ],
)
def test_unusable_configs(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(loading.ModelError, match=expected):
        outline(config(str(tmp_path)))


def test_depth_of_the_published_model() -> None:
    """28 decoder layers, 32 vision blocks and a merger, 32 audio layers (its config.json)."""
    found = linears(EVERYTHING, {"decoder": 28, "vision": 32, "audio": 32})
    assert len(found) == 28 * 7 + 32 * 7 + 2 + 32 * 6
    assert len({linear.name for linear in found}) == len(found)


def test_no_torch_is_needed() -> None:
    code = (
        "import sys; from morphoquant.config.units import names;"
        "from morphoquant.config.schema import ModelConfig;"
        "names(ModelConfig(name='t', path='embedded:tiny_omni'), ['cell']);"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
