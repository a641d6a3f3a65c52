"""A model over two GPUs is quantized, observed and asked exactly as on one device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from morphoquant import quantize
from morphoquant.calibration.samples import Calibration
from morphoquant.config import ConfigError, RunConfig, load
from morphoquant.config.schema import ScopeConfig
from morphoquant.config.store import register
from morphoquant.tracking.rundir import RunDirectory

CONF = Path(__file__).parents[2] / "conf"
METHODS = {
    "masks over all layers, search": [
        "method=morphoquant",
        "method.compensation.mask.rules=[global]",
        "model.scope.vision=true",
        "model.scope.audio=true",
    ],
    "rotations, second moments, cache": [
        "method=quarot",
        "method/weight=gptq",
        "bits=w4a4kv4",
        "method.transform.r3=true",
    ],
    "ranges per modality": ["method=mquant"],
    "low rank": ["method=svdquant"],
}
EVERYWHERE = ("vision", "audio", "decoder")


def configured(*overrides: str) -> RunConfig:
    register()
    fixed = ["tracker=none", "statistics.probes=1", *overrides]
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return load(compose("config", overrides=fixed))


def phase(
    adapter: Any, calibration: Calibration, config: RunConfig, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The quantization phase of a run; everything that it decided, and what was written down."""
    directory = RunDirectory.open(folder, "run", {})
    asked = quantize.probe_samples(calibration, 1)
    probe = adapter.encode([sample.messages for sample in asked])
    before = adapter.logits(probe)
    drift = quantize.transform(config, adapter, calibration, [probe], before, directory)
    towers = [tower for tower in EVERYWHERE if getattr(config.model.scope, tower)]
    quantizer = quantize.walk_blocks(config, adapter, towers, calibration)
    quantize.quantize_cache(config, adapter)
    answers = adapter.generate([sample.messages for sample in asked], max_new_tokens=3)
    tensors = {f"logits{i}": row for i, row in enumerate(adapter.logits(probe))}
    for key, choice in quantizer.choices.items():
        tensors |= {f"{key} lo": choice.final.lo, f"{key} hi": choice.final.hi}
    tensors |= {f"{key} mask": mask for key, mask in quantizer.masks.items()}
    tensors |= dict(adapter.model.named_parameters())
    facts = {
        "manifest": quantizer.manifest.to_dict(),
        "errors": quantizer.meter.errors,
        "depth": quantizer.meter.depth,
        "answers": answers,
        "drift": drift,
    }
    return {name: value.cpu() for name, value in tensors.items()}, facts


@pytest.fixture(scope="module")
def shallow(build_adapter: Callable[..., Any]) -> Any:
    """A model with one decoder block for each GPU: every operation passes through Python."""
    return build_adapter(ScopeConfig(decoder=True, vision=True, audio=True), layers=2)


@pytest.mark.parametrize("name", METHODS)
def test_two_gpus_give_what_one_device_gives(
    name: str,
    shallow: Any,
    copied: Callable[[Any], Any],
    calibration: Calibration,
    spread: Callable[[Any], dict[str, Any]],
    two_gpus: Callable[[], Any],
    tmp_path: Path,
) -> None:
    config = configured(*METHODS[name], "calibration.batch_size=4")
    few = Calibration(calibration.samples[:5], calibration.search[:2], calibration.ids)
    alone, apart = copied(shallow), copied(shallow)
    for adapter in (alone, apart):
        adapter.model.set_attn_implementation("eager")
        adapter.untie_head()  # or embedding and head would have to lie on one GPU
    expected, known = phase(alone, few, config, tmp_path / "one")
    with two_gpus():
        spread(apart)
        assert {p.device.index for p in apart.model.parameters()} == {0, 1}
        found, facts = phase(apart, few, config, tmp_path / "two")
    assert facts == known
    assert found.keys() == expected.keys()
    different = [n for n, value in expected.items() if not torch.equal(value, found[n])]
    assert not different


@pytest.mark.parametrize("method", ["spinquant", "mbq", "masquant"])
def test_what_learns_from_gradients_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.device_map='auto' with method\.transform\.name"):
        configured(f"method={method}", "model.device_map=auto")


def test_maps_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.device=auto"):
        configured("model.device_map=auto", "model.device=cpu")
    with pytest.raises(ConfigError, match=r"model\.device_map=null: without a map"):
        configured("+model.max_memory={0: 20GiB}")
    assert configured("model.device_map=auto").model.device_map == "auto"
