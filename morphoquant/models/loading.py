"""From a configured path to a checked checkpoint folder, before a single weight is read."""

from __future__ import annotations

import hashlib
import json
import struct
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from morphoquant.config.schema import ModelConfig
from morphoquant.errors import HarnessError

EMBEDDED = "embedded:"
SUPPORTED_TYPES = ("qwen2_5_omni", "qwen2_5_omni_thinker")


class ModelError(HarnessError, ValueError):
    """A checkpoint that cannot be used; the message names the folder or file and the remedy."""


def embedded_folder(name: str) -> Path:
    """The folder of weights that ship with the package.

    Raises:
        ModelError: there is no such embedded model.
    """
    root = Path(str(files("morphoquant.embedded"))) / "weights"
    folder = root / name
    if not folder.is_dir():
        known = sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
        raise ModelError(
            f"model.path: no embedded model {name!r}; available: {', '.join(known) or 'none'}"
        )
    return folder


def resolve(config: ModelConfig) -> Path | None:
    """The local folder of the checkpoint, or None when ``path`` is a hub id.

    A path counts as local when it exists or cannot be a hub id (``owner/name``).
    """
    if config.path.startswith(EMBEDDED):
        return embedded_folder(config.path.removeprefix(EMBEDDED))
    folder = Path(config.path).expanduser()
    if folder.exists():
        return folder
    looks_like_hub = config.path.count("/") == 1 and not config.path.startswith((".", "/", "~"))
    if looks_like_hub:
        return None
    raise ModelError(
        f"model.path: {config.path!r} does not exist; give a checkpoint folder, a hub id such as "
        f"'Qwen/Qwen2.5-Omni-7B', or 'embedded:tiny_omni'"
    )


def safetensors_size(path: Path) -> int:
    """The size in bytes that the header of a safetensors file promises.

    Raises:
        ModelError: the header itself is cut off or is not a safetensors header.
    """
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise ModelError(f"{path}: truncated, {len(head)} bytes; download or copy it again")
        (length,) = struct.unpack("<Q", head)
        body = file.read(length) if length < 100_000_000 else b""
    try:
        header = json.loads(body)
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelError(
            f"{path}: not a readable safetensors header ({error}); download or copy it again"
        ) from error
    return 8 + length + max(ends, default=0)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where it has one.

    Raises:
        ModelError: none there, one missing, a damaged index, or only pickled weights.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise ModelError(
                f"{index}: not a readable index of weights ({error}); download or copy it again"
            ) from error
        missing = [n for n in names if not (folder / n).is_file()]
        if missing:
            raise ModelError(f"{folder}: the index names {missing[0]}, which is not there")
        return [folder / n for n in names]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        pickled = [p.name for p in folder.glob("*.bin")]
        hint = f"; {pickled[0]} is a pickle and is not read, convert it" if pickled else ""
        raise ModelError(f"{folder}: no *.safetensors weights in this model folder{hint}")
    return found


def check(config: ModelConfig) -> Path | None:
    """Refuse an unusable local checkpoint in milliseconds; see :func:`resolve` for the result.

    Raises:
        ModelError: no config.json, a foreign architecture, missing or truncated weights.
    """
    folder = resolve(config)
    if folder is None:
        return None
    if not folder.is_dir():
        raise ModelError(f"model.path: {folder} is a file; give the folder that holds it")
    described = folder / "config.json"
    if not described.is_file():
        raise ModelError(f"{folder}: no config.json in this model folder")
    try:
        kind = json.loads(described.read_text()).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{described}: not a JSON object ({error})") from error
    if kind not in SUPPORTED_TYPES:
        raise ModelError(
            f"{described}: model_type is {kind!r}; model.family={config.family} reads "
            f"{' or '.join(SUPPORTED_TYPES)}"
        )
    for path in weight_files(folder):
        promised, found = safetensors_size(path), path.stat().st_size
        if found != promised:
            raise ModelError(
                f"{path}: {found} bytes, its header promises {promised}: the file is truncated or "
                f"damaged; download or copy it again"
            )
    return folder


@lru_cache(maxsize=1024)
def _file_hash(path: Path, size: int, modified: int) -> bytes:
    """sha256 of a file, once per process: a sweep asks for the same checkpoint at every job."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _is_read(name: str) -> bool:
    if name.endswith((".safetensors", ".jinja")) or name == "merges.txt":
        return True
    parts = ("config", "tokenizer", "processor", "vocab", "template", "tokens", "index")
    return name.endswith(".json") and any(part in name for part in parts)


def read_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that loading reads: a model card or a log changes nothing."""
    return sorted(p for p in folder.iterdir() if p.is_file() and _is_read(p.name))


def model_hash(config: ModelConfig, weights: bool = True) -> str:
    """Identity of a checkpoint: sha256 over the files of a local one, or the hub revision.

    Args:
        config: where it is.
        weights: with them; without, what tokenizes and processes prompts.
    """
    folder = resolve(config)
    if folder is None:
        return f"hub:{config.path}@{config.revision or 'main'}"
    digest = hashlib.sha256()
    relevant = [p for p in read_files(folder) if weights or p.suffix != ".safetensors"]
    for path in relevant:
        digest.update(path.name.encode())
        state = path.stat()
        digest.update(_file_hash(path, state.st_size, state.st_mtime_ns))
    return digest.hexdigest()
