"""What goes with scales and branches per modality, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest

from morphoquant.config import ConfigError, RunConfig, load

SMOOTH = {"name": "modality_smooth", "groups": ["attn_in", "mlp_in"]}
BRANCHES = {"name": "low_rank", "per_modality": True, "whitened": True}


def loaded(
    transform: dict[str, Any] | None = None,
    compensation: dict[str, Any] | None = None,
    weight: int = 4,
    activation: int = 4,
    **method: Any,
) -> RunConfig:
    described = {
        "name": "x",
        "weight": {"format": "int"},
        "activation": {"format": "int"},
        "transform": SMOOTH | (transform or {}),
        "compensation": BRANCHES if compensation is None else compensation,
    }
    return load(
        {
            "model": {"name": "m", "path": "embedded:tiny_omni"},
            "method": described | method,
            "bits": {"weight": weight, "activation": activation},
            "calibration": {"name": "c", "sources": [{"reader": "mmmu", "path": "mini:mmmu"}]},
            "benchmark": {"name": "b", "tasks": ["mini_mmmu"]},
        }
    )


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"activation": 16},
        {"transform": {"steps": 0}, "weight": 16, "activation": 16},
        {"weight": 16, "compensation": {"name": "none"}},
        {"transform": {"name": "none"}},
        {"transform": {"name": "smooth"}},
        {"transform": {"joint_vision": False}, "compensation": BRANCHES | {"joint_vision": False}},
        {"compensation": BRANCHES | {"joint_vision": False, "text_branch": True}},
    ],
)
def test_what_goes_together(given: dict[str, Any]) -> None:
    assert loaded(**given).method.transform.name in ("modality_smooth", "none", "smooth")


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            {"compensation": {"name": "none"}},
            ["smoothed for text", "Set method/compensation=low_rank_per_modality"],
        ),
        ({"compensation": BRANCHES | {"per_modality": False}}, ["per_modality=False", "smoothed"]),
        (
            {"weight": 16, "compensation": {"name": "mixed_precision"}},
            ["name='mixed_precision'", "Set method/compensation=none"],
        ),
        (
            {"compensation": BRANCHES | {"groups": ["mlp_in", "mlp_out"]}},
            ["method.compensation.groups", "attn_in would be smoothed"],
        ),
        (
            {"transform": {"joint_vision": False}},
            ["joint_vision=false", "Set method.compensation.joint_vision=false"],
        ),
        ({"weight": 16, "activation": 16}, ["every scale would do", "steps=0"]),
        ({"transform": {"search": True}}, ["search=True", "no exponent to share"]),
        ({"transform": {"search": True, "balance": "gradient"}}, ["balance='gradient'"]),
        ({"transform": {"groups": []}}, ["groups=[]", "[attn_in,mlp_in]"]),
        ({"compensation": BRANCHES | {"order": "before"}}, ["order='before'", "order=after"]),
        (
            {"transform": {"name": "none"}, "compensation": BRANCHES | {"groups": []}},
            ["no linear would get a branch"],
        ),
    ],
)
def test_what_does_not(given: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(**given)
    for part in parts:
        assert part in str(caught.value)
