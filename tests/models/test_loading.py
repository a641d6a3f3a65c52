"""Checkpoint checks: every unusable folder is refused with a message that says what to do."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from morphoquant.config.schema import ModelConfig
from morphoquant.errors import HarnessError
from morphoquant.models.loading import (
    ModelError,
    check,
    embedded_folder,
    model_hash,
    resolve,
    safetensors_size,
)


def config(path: str | Path, **changes: str) -> ModelConfig:
    return ModelConfig(name="x", path=str(path), **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that passes: config and one real safetensors file."""
    target = tmp_path / "checkpoint"
    target.mkdir()
    (target / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni_thinker"}))
    save_file({"a": torch.arange(100.0), "b": torch.ones(3, 4)}, target / "model.safetensors")
    return target


def refused(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        check(config(folder))
    assert isinstance(caught.value, HarnessError)
    return str(caught.value)


def test_good_folder_passes(folder: Path) -> None:
    assert check(config(folder)) == folder


def test_full_checkpoint_type_passes(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni"}))
    assert check(config(folder)) == folder


def test_no_such_folder() -> None:
    message = refused(Path("/nowhere/at/all"))
    assert "/nowhere/at/all" in message
    assert "embedded:tiny_omni" in message


@pytest.mark.parametrize("path", ["./missing/folder", "missing", "a/b/c", "~/missing"])
def test_paths_that_are_no_hub_id_must_exist(path: str) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        check(config(path))


def test_hub_id_is_left_to_the_hub() -> None:
    assert check(config("Qwen/Qwen2.5-Omni-7B")) is None
    assert model_hash(config("Qwen/Qwen2.5-Omni-7B", revision="abc")) == (
        "hub:Qwen/Qwen2.5-Omni-7B@abc"
    )


def test_unknown_embedded_model_lists_the_known() -> None:
    with pytest.raises(ModelError, match="no embedded model 'nothing'; available: "):
        resolve(config("embedded:nothing"))


def test_path_is_a_file(folder: Path) -> None:
    assert "is a file; give the folder" in refused(folder / "model.safetensors")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    message = refused(folder)
    assert "no config.json" in message
    assert str(folder) in message


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", '"qwen2_5_omni"', "null"])
def test_config_that_is_no_json_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in refused(folder)


@pytest.mark.parametrize("kind", ["llama", "qwen2_5_vl", None])
def test_foreign_architecture(folder: Path, kind: str | None) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    message = refused(folder)
    assert repr(kind) in message
    assert "qwen2_5_omni_thinker" in message


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert "no *.safetensors" in message
    assert "pickle" not in message


def test_only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refused(folder)
    assert "pytorch_model.bin is a pickle and is not read, convert it" in message


def write_index(folder: Path, *shards: str) -> None:
    weight_map = {f"w{i}": shard for i, shard in enumerate(shards)}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_missing_shard(folder: Path) -> None:
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (folder / "model.safetensors").rename(folder / shards[0])
    write_index(folder, *shards)
    message = refused(folder)
    assert shards[1] in message
    assert shards[0] not in message


def test_index_with_all_shards_passes(folder: Path) -> None:
    write_index(folder, "model.safetensors")
    assert check(config(folder)) == folder


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "model.saf', "{}", "[]"])
def test_damaged_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(folder)


@pytest.mark.parametrize("kept", [0.0, 0.02, 0.3, 0.99])
def test_truncated_weights(folder: Path, kept: float) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(kept * len(whole))])
    message = refused(folder)
    assert str(weights) in message
    assert "again" in message or "header" in message


def test_truncation_message_has_both_sizes(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    message = refused(folder)
    assert f"{len(whole) - 1} bytes" in message
    assert f"promises {len(whole)}" in message


def test_trailing_bytes_are_damage_too(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"x")
    assert "damaged" in refused(folder)


@pytest.mark.parametrize(
    "body",
    [b"\xff\xfe garbage", b"[]", b"3", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"not json"],
)
def test_garbage_header(folder: Path, body: bytes) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(body)) + body)
    assert "not a readable safetensors header" in refused(folder)


def test_absurd_header_length_is_not_read(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"x" * 100)
    assert "not a readable safetensors header" in refused(folder)


def test_promised_size_of_a_real_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    assert safetensors_size(weights) == weights.stat().st_size


def test_shipped_model_passes() -> None:
    folder = embedded_folder("tiny_omni")
    assert check(config(folder)) == folder


def test_hash_depends_on_weights_and_config(folder: Path) -> None:
    first = model_hash(config(folder))
    assert model_hash(config(folder)) == first
    (folder / "README.md").write_text("no part of the model")
    assert model_hash(config(folder)) == first
    save_file({"a": torch.arange(100.0) + 1e-3}, folder / "model.safetensors")
    second = model_hash(config(folder))
    assert second != first
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_omni", "x": 1}))
    assert model_hash(config(folder)) not in (first, second)
