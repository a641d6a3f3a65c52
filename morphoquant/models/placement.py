"""Where the model goes: one device, or a map of its parts over several GPUs.

A map is made by accelerate from the sizes of the parts, before any weight is read, and its hooks
move activations from part to part. Blocks are never split, so a quantized linear finds its input,
its ranges and its group on one device; only what crosses blocks has to be moved.

Offloading is refused: accelerate reads offloaded weights anew for every pass, so whatever is
quantized in place would be lost in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from morphoquant.config.schema import ModelConfig
from morphoquant.models.loading import ModelError
from morphoquant.models.structure import Block
from morphoquant.ranks import Ranks

Device = int | str | torch.device
OFFLOADED = ("cpu", "disk", "meta")


def pick_device(config: ModelConfig) -> torch.device:
    """``auto`` takes a GPU when there is one; of several processes on a machine each takes its own.

    Raises:
        ModelError: ``cuda`` was asked for and there is none, or there are fewer than processes.
    """
    found = torch.cuda.is_available()
    if config.device == "cuda" and not found:
        raise ModelError("model.device: 'cuda' but torch sees no GPU; use model.device=cpu or auto")
    if config.device == "cpu" or not found:
        return torch.device("cpu")
    ranks = Ranks.of_process()
    if ranks.size == 1:
        return torch.device("cuda")
    if ranks.local >= torch.cuda.device_count():
        raise ModelError(
            f"process {ranks.local} of this machine finds {torch.cuda.device_count()} GPUs: every "
            f"process needs one of its own. Start fewer (torchrun --nproc_per_node), or set "
            f"model.device=cpu"
        )
    device = torch.device("cuda", ranks.local)
    torch.cuda.set_device(device)
    return device


def plan(
    config: ModelConfig, source: str | Path, options: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Device] | None:
    """Part of the model -> GPU, or None where the whole model goes to one device.

    Args:
        config: with ``device_map`` and ``max_memory``.
        source: folder or hub id; only its config is read.
        options: for ``from_pretrained``.
        dtype: of the weights, which decides their size.

    Raises:
        ModelError: there is no GPU, several processes share the machine, or the GPUs do not hold
            the model.
    """
    if config.device_map is None:
        return None
    where = f"model.device_map: {config.device_map!r}"
    if not torch.cuda.is_available():
        raise ModelError(f"{where} but torch sees no GPU; set model.device_map=null")
    if Ranks.of_process().size > 1:
        raise ModelError(
            f"{where} with {Ranks.of_process().size} processes: each would spread over all GPUs. "
            f"Start one process to spread a model, or set model.device_map=null to give every "
            f"process a GPU"
        )
    from accelerate import infer_auto_device_map, init_empty_weights
    from accelerate.utils import get_balanced_memory, get_max_memory
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

    described = Thinker.config_class.from_pretrained(source, **options)
    with init_empty_weights():
        empty = Thinker._from_config(described, dtype=dtype)
    empty.tie_weights()
    whole = sorted(empty._no_split_modules)
    memory = dict(config.max_memory or {}) or None
    if config.device_map == "sequential":
        memory = get_max_memory(memory)
    else:
        memory = get_balanced_memory(empty, memory, no_split_module_classes=whole, dtype=dtype)
    found: dict[str, Device] = dict(
        infer_auto_device_map(empty, memory, no_split_module_classes=whole, dtype=dtype)
    )
    refuse_offloading(found, where)
    return found


def refuse_offloading(found: Mapping[str, Device], where: str) -> None:
    """Refuse a map that leaves parts on the CPU or the disk.

    Raises:
        ModelError: naming them.
    """
    left = [part for part, device in found.items() if str(device) in OFFLOADED]
    if left:
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        raise ModelError(
            f"{where} finds no room on the GPUs for {len(left)} of {len(found)} parts ({shown}). "
            f"Offloaded weights cannot be quantized in place. Give more GPUs (or more of them: "
            f"model.max_memory), or a smaller model.dtype"
        )


def check_blocks(blocks: Sequence[Block]) -> None:
    """Make sure that no block is spread over two devices.

    Raises:
        ModelError: one is; its name and its devices.
    """
    for block in blocks:
        devices = {str(parameter.device) for parameter in block.module.parameters()}
        if len(devices) > 1 or devices & {"meta"}:
            raise ModelError(
                f"model.device_map puts the block {block.name} on {' and '.join(sorted(devices))}; "
                f"a block is quantized as a unit on one device. Raise model.max_memory"
            )
