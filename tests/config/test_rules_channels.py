"""What goes with masks and with columns at a higher width, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from morphoquant.config import ConfigError, RunConfig, load

RMS = {"name": "mixed_precision", "outlier_bits": 16, "mask": {"rules": ["rotated_mean"]}}
ATOM = {"name": "mixed_precision", "outlier_bits": 16}
TENSOR = {"format": "int", "granularity": "per_tensor", "mode": "static"}
CHANNEL = TENSOR | {"granularity": "per_channel"}


def loaded(**method: Any) -> RunConfig:
    described = {
        "name": "x",
        "transform": {"name": "rotate"},
        "weight": {"format": "int"},
        "activation": {"format": "int"},
        "compensation": RMS,
    }
    return load(
        {
            "model": {"name": "m", "path": "embedded:tiny_omni"},
            "method": described | method,
            "bits": {"weight": 4, "activation": 4},
            "calibration": {"name": "c", "sources": [{"reader": "mmmu", "path": "mini:mmmu"}]},
            "benchmark": {"name": "b", "tasks": ["mini_mmmu"]},
        }
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"activation": TENSOR | {"granularity": "per_modality"}},
        {"activation": TENSOR | {"range": {"name": "mse"}}},
        {"activation": CHANNEL},
        {"activation": {"format": "none"}},
        {"transform": {"name": "spin"}},
        {"compensation": RMS | {"mask": {"rules": ["rotated_mean", "local"]}}},
        {"compensation": {"name": "dabc", "mask": {"rules": ["rotated_mean"]}}},
        {"compensation": RMS | {"outlier_bits": 8}},
        {"compensation": ATOM, "activation": TENSOR},
        {"compensation": {"name": "none", "mask": {"rules": ["rotated_mean"]}}, "transform": {}},
    ],
)
def test_what_goes_together(given: dict[str, Any]) -> None:
    assert loaded(**given).method.quantizes


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"transform": {"name": "none"}}, ["no channel gathers", "Set method/transform=rotate"]),
        ({"transform": {"name": "rotate", "r4": False}}, ["r4=False", "method/compensation=none"]),
        (
            {"compensation": RMS | {"outlier_bits": 8}, "activation": TENSOR},
            ["one dynamic range per token", "outlier_bits=16"],
        ),
        (
            {"activation": TENSOR | {"range": {"name": "percentile"}}},
            ["range.name='percentile'", "range.name=mse"],
        ),
        (
            {"compensation": ATOM, "activation": {"format": "none"}},
            ["seen in activations", "Set method/activation=per_token"],
        ),
        ({"compensation": RMS | {"reading": "element"}}, ["reading='element'", "reading=channel"]),
        (
            {"weight": {"format": "int", "fold": True}, "activation": CHANNEL},
            ["fold=true", "Set method/compensation=dabc"],
        ),
    ],
)
def test_what_is_refused(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(**given)
    for part in parts:
        assert part in str(caught.value)
