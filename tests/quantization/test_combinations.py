"""Methods mixed across slots go through transform and walk on the random thinker.

F1, M18: one scope for all of them, and every quantizer in it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from morphoquant.calibration.samples import Calibration
from morphoquant.calibration.walk import walk
from morphoquant.config import load
from morphoquant.config.schema import RunConfig
from morphoquant.config.store import register
from morphoquant.quantization.engine import SEARCH, STATISTICS, BlockQuantizer
from morphoquant.quantization.manifest import complete, describe_scope, reset_counters
from morphoquant.quantization.survey import survey
from morphoquant.quantization.transforms import TransformInput, apply_transform
from morphoquant.quantization.transforms.check import largest_relative_change

CONF = Path(__file__).parents[2] / "conf"
MIXTURES = {
    "rotated morphoquant": ("method=morphoquant", "method/transform=rotate"),
    "smoothed morphoquant, gptq": (
        "method=morphoquant",
        "method/transform=smooth",
        "method/weight=gptq_group",
    ),
    "rotated, folded": ("method=morphoquant_folded", "method/transform=rotate_block"),
    "quarot with gptq and a branch": (
        "method=quarot",
        "method/weight=gptq_balanced",
        "method/compensation=low_rank_whitened",
    ),
    "awq with outlier channels in 8 bits": (
        "method=awq",
        "method/weight=int_group_symmetric",
        "method/compensation=mixed_precision",
    ),
    "static rtn, smoothed, a bias per modality": (
        "method=rtn_static",
        "method/transform=smooth",
        "method/compensation=static_bias_per_modality",
    ),
    "rotated nvfp4 with compensated channels": (
        "method=nvfp4",
        "method/transform=rotate",
        "method/compensation=dabc",
    ),
    "mquant with nf4": ("method=mquant", "method/weight=nf4"),
    "every rotated mean apart, mse": (
        "method=mquant",
        "method/activation/range=mse",
        "method.compensation.mask.mean_share=0",
    ),
}


@pytest.fixture(scope="module")
def configs() -> dict[str, RunConfig]:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return {
            name: load(compose("config", overrides=list(mixture)))
            for name, mixture in MIXTURES.items()
        }


@torch.no_grad()
@pytest.mark.parametrize("mixture", MIXTURES)
def test_walk(
    fresh_omni: Any,
    calibration: Calibration,
    encode: Any,
    mixed: Any,
    configs: dict[str, RunConfig],
    mixture: str,
) -> None:
    config, adapter = configs[mixture], fresh_omni
    method, bits = config.method, config.bits
    scope = describe_scope(adapter.blocks("decoder")).scope_hash
    probe = adapter.encode(mixed)
    before = adapter.logits(probe)
    adapter.untie_head()
    encoded = encode("samples")
    apply_transform(TransformInput(adapter, method, bits, encoded, calibration.samples))
    plain = adapter.logits(probe)
    assert largest_relative_change(before, plain) <= method.transform.tolerance
    quantizer = BlockQuantizer(method, bits, observe=False)
    sets = {STATISTICS: encoded} | ({SEARCH: encode("search")} if quantizer.searches else {})
    quantizer.moments = survey(adapter, ["decoder"], encoded, method, bits)
    walk(adapter, ["decoder"], sets, quantizer)
    if quantizer.needs_labels:
        adapter.follow_labels(quantizer.labels)
    blocks = adapter.blocks("decoder")
    reset_counters(blocks)
    after = adapter.logits(probe)
    assert torch.isfinite(after).all()
    assert not torch.equal(plain, after), "nothing was quantized"
    manifest = quantizer.manifest
    complete(manifest, blocks, method, bits)  # refuses what never ran
    assert manifest.scope_hash == scope
    assert len(manifest.linears) == 28
    assert all(linear.weight["bits"] == 4 for linear in manifest.linears)
    assert 4 <= manifest.activation_bits < 8
