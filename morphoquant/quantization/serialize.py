"""Static activation quantizers and compensations on disk, as safetensors.

One file holds, for every input group, the tensors of its quantizer (step, offset, codes) and of its
compensation (mask, limit or residual). Read back into a model whose linears are in place, it gives
bitwise the same outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from morphoquant.errors import HarnessError
from morphoquant.models.structure import Block
from morphoquant.quantization.activation import StaticQuantizer
from morphoquant.quantization.compensation import DynamicCompensation, StaticBias
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.ranges import StaticRange


class SavedRangesError(HarnessError):
    """A file of quantizers that does not fit the model."""


def _sources(blocks: Iterable[Block]) -> dict[str, GroupInput]:
    found = {}
    for block in blocks:
        for group in block.groups:
            module = block.linear(group.linears[0])
            if isinstance(module, QuantizedLinear):
                found[f"{block.name}.{group.name}"] = module.source
    return found


def quantizer_tensors(blocks: Iterable[Block]) -> dict[str, torch.Tensor]:
    """Name -> tensor, on the CPU; empty where no quantizer is static."""
    return {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, source in _sources(blocks).items()
        for part in ("quantizer", "compensation")
        for key, value in _state(source, part).items()
    }


def _state(source: GroupInput, part: str) -> dict[str, torch.Tensor]:
    module = getattr(source, part)
    if module is None:
        return {}
    return {f"{part}.{key}": value for key, value in module.state_dict().items()}


def save_quantizers(blocks: Iterable[Block], path: Path) -> None:
    """Write all static quantizers of ``blocks`` to ``path``.

    Raises:
        OSError: it could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(quantizer_tensors(blocks), path)
    except SafetensorError as error:  # how it reports a full disk
        raise OSError(str(error)) from error


def load_quantizers(blocks: Iterable[Block], path: Path) -> None:
    """Put saved quantizers and compensations in place.

    Args:
        blocks: of a model whose linears are :class:`QuantizedLinear`.
        path: a file written by :func:`save_quantizers`.

    Raises:
        SavedRangesError: the file is for other groups or other widths.
    """
    from safetensors.torch import load_file

    tensors = load_file(path)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        group, part, key = name.rsplit(".", 2)
        groups.setdefault(group, {})[f"{part}.{key}"] = value
    sources = _sources(blocks)
    if set(groups) != set(sources):
        odd = sorted(set(groups) ^ set(sources))
        raise SavedRangesError(
            f"{path}: holds {len(groups)} input groups, the model has {len(sources)} quantized "
            f"ones; not in both: {', '.join(odd[:3])}. It belongs to another model or scope"
        )
    for name, found in groups.items():
        source = sources[name]
        device = _device(source, found)
        found = {key: value.to(device) for key, value in found.items()}
        step = found["quantizer.step"]
        placeholder = StaticRange(-step, step, torch.zeros_like(step, dtype=torch.bool))
        quantizer = StaticQuantizer(placeholder, bits=8)
        quantizer.load_state_dict(
            {k.removeprefix("quantizer."): v for k, v in found.items() if "quantizer." in k}
        )
        source.quantizer = quantizer
        mask = found.get("compensation.mask")
        if mask is None:
            source.compensation = None
        elif "compensation.residual" in found:
            source.compensation = StaticBias(found["compensation.residual"], mask)
        else:
            source.compensation = DynamicCompensation(mask, found.get("compensation.limit"))


def _device(source: GroupInput, found: dict[str, torch.Tensor]) -> torch.device:
    """Where the group computes: with what is there already."""
    for module in (source.quantizer, source.compensation):
        for value in module.state_dict().values() if module is not None else ():
            return torch.device(value.device)
    return found["quantizer.step"].device
