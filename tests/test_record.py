"""What a run says of its slots."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from morphoquant.config import load
from morphoquant.config.store import register
from morphoquant.record import describe_slots

CONF = Path(__file__).parents[1] / "conf"
NF4 = "nf4 + double quantization"


def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize(
    ("method", "bits", "weight", "rounds_activations"),
    [
        ("morphoquant", "w4a4", NF4, True),
        ("morphoquant", "w8a8", "int per-channel rtn, minmax", True),  # NF4 has no 8-bit grid
        ("morphoquant", "w4a16", NF4, False),
        ("quarot", "w16a16", "none", False),
    ],
)
def test_slots_are_described_as_they_are_at_the_widths(
    method: str, bits: str, weight: str, rounds_activations: bool
) -> None:
    config = load(composed(f"method={method}", f"bits={bits}"))
    found = describe_slots(config.method, config.bits)
    assert found["weight"] == weight
    assert (found["activation"] != "none") == rounds_activations
