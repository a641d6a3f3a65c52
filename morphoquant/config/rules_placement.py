"""Rules of where a model lies: over several GPUs, or on one device."""

from __future__ import annotations

import re
from collections.abc import Iterator

from morphoquant.config.schema import RunConfig


def placement(cfg: RunConfig) -> Iterator[str]:
    """What cannot be said of where the parts of a model lie."""
    model, transform = cfg.model, cfg.method.transform
    learns = {
        "spin": transform.steps > 0,
        "modality_smooth": transform.steps > 0,
        "smooth": transform.balance == "gradient",
    }
    if model.device_map is not None and learns.get(transform.name):
        yield (
            f"model.device_map={model.device_map!r} with method.transform.name={transform.name!r}: "
            "what it learns from gradients was proven on one device only. Set "
            "model.device_map=null, or a transform that learns nothing."
        )
    if model.device_map is not None and model.device == "cpu":
        yield (
            f"model.device_map={model.device_map!r} with model.device='cpu': it spreads a model "
            "over GPUs. Set model.device=auto, or model.device_map=null."
        )
    if model.max_memory is None:
        return
    if model.device_map is None:
        yield (
            f"model.max_memory={model.max_memory} with model.device_map=null: without a map the "
            "model goes to one device, whole. Set model.device_map=auto, or model.max_memory=null."
        )
    if not model.max_memory:
        yield "model.max_memory={}: names no GPU. Set it to null, or to e.g. {0: 20GiB}."
    for device, size in model.max_memory.items():
        if isinstance(device, str) or device < 0:
            yield (
                f"model.max_memory names {device!r}: only GPUs, by number. Weights offloaded to "
                "the CPU or the disk are read anew for every pass, so what is quantized in place "
                "would be lost. Name GPUs only, e.g. {0: 20GiB}."
            )
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?(GiB|MiB|GB|MB)", size) is None:
            yield (
                f"model.max_memory.{device}={size!r}: not a size. Give a number with GiB, MiB, GB "
                "or MB and no space, e.g. 20GiB."
            )
