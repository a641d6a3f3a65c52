"""M16: quantizers that were written and read back give bitwise the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from morphoquant.config.schema import CompensationConfig, MaskConfig
from morphoquant.quantization.serialize import (
    SavedRangesError,
    load_quantizers,
    quantizer_tensors,
    save_quantizers,
)

TOWERS = ("vision", "audio", "decoder")


def blocks_of(adapter: Any, towers: Any = TOWERS) -> list[Any]:
    return [b for t in towers for b in adapter.blocks(t)]


def forget(adapter: Any) -> None:
    for block in blocks_of(adapter):
        for group in block.groups:
            source = block.linear(group.linears[0]).source
            source.quantizer = source.compensation = None


@pytest.mark.parametrize("name", ["static", "tensor", "morphoquant", "element", "bias"])
def test_reloaded_outputs_are_bitwise_equal(
    methods: Any, quantize: Any, copied: Any, probe: Any, tmp_path: Path, name: str
) -> None:
    method = methods.get(name)
    if method is None:
        bias = CompensationConfig(name="static_bias", mask=MaskConfig(max_share=0.2))
        method = methods["morphoquant"].model_copy(update={"compensation": bias})
    adapter, _ = quantize(method)
    before = adapter.logits(probe)
    save_quantizers(blocks_of(adapter), tmp_path / "q.safetensors")
    other = copied(adapter)
    forget(other)
    assert not torch.equal(other.logits(probe), before)
    load_quantizers(blocks_of(other), tmp_path / "q.safetensors")
    assert torch.equal(other.logits(probe), before)
    kept, again = quantizer_tensors(blocks_of(adapter)), quantizer_tensors(blocks_of(other))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[k], again[k]) for k in kept)


def test_other_scope_is_refused(quantize: Any, tmp_path: Path) -> None:
    adapter, _ = quantize("static")
    save_quantizers(blocks_of(adapter), tmp_path / "q.safetensors")
    with pytest.raises(SavedRangesError, match="another model or scope"):
        load_quantizers(blocks_of(adapter, ["decoder"]), tmp_path / "q.safetensors")


def test_a_file_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    """Whoever stores it makes a message of that kind; safetensors has an error of its own."""
    with pytest.raises(OSError, match="No such file"):
        save_quantizers([], tmp_path / "missing" / "quantizers.safetensors")
