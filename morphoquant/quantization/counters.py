"""What quantizers counted, and the identity of what was quantized, over several ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from morphoquant.models.structure import Block
from morphoquant.quantization.attention import KVReport
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.manifest import Manifest
from morphoquant.ranks import Ranks

COUNTERS = ("tokens", "passed", "elements", "_bypassed", "_quantized")
CHUNK = 1 << 24  # elements that are summed at a time
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _modules(blocks: Iterable[Block]) -> Iterator[QuantizedLinear]:
    for block in blocks:
        for group in block.groups:
            for name in group.linears:
                module = block.linear(name)
                if isinstance(module, QuantizedLinear):
                    yield module


def add_up(ranks: Ranks, blocks: Iterable[Block], cache: KVReport | None) -> None:
    """Give every rank the sums of what all ranks counted.

    Raises:
        RankError: a rank failed.
    """
    places: list[tuple[Any, str]] = []
    sources: dict[int, GroupInput] = {}
    for module in _modules(blocks):
        places.append((module, "calls"))
        sources[id(module.source)] = module.source
    places += [(s, name) for s in sources.values() for name in COUNTERS]
    if cache is not None:
        places += [(q, name) for q in cache.quantizers.values() for name in ("tokens", "elements")]
    own = [int(getattr(owner, name)) for owner, name in places]
    totals = [sum(column) for column in zip(*ranks.gather("counters", own), strict=True)]
    for (owner, name), total in zip(places, totals, strict=True):
        setattr(owner, name, total)


def checksum(tensor: torch.Tensor) -> int:
    """A sum over the bits of a tensor in which every position counts differently.

    Integers are added, so no order of summation changes it; it is computed where the tensor lies.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.dtype == torch.bool:
        flat = flat.to(torch.uint8)
    total = 0
    for start in range(0, flat.numel(), CHUNK):
        bits = flat[start : start + CHUNK].view(INTEGERS[flat.element_size()]).long()
        place = torch.arange(start, start + bits.numel(), device=bits.device)
        total += int((bits * (2 * (place % 1_000_003) + 1)).sum())
    return total % (1 << 64)


def model_identity(model: torch.nn.Module, manifest: Manifest) -> str:
    """sha256 over the manifest and the checksum of every weight, range and mask in the model."""
    digest = hashlib.sha256(json.dumps(manifest.to_dict(), sort_keys=True).encode())
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(f"\0{name} {tuple(value.shape)} {checksum(value)}".encode())
    return digest.hexdigest()[:16]
