"""A refused value is named, with what was found, what is allowed and what to do."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.config import ConfigError, load


def config(**changes: Any) -> dict[str, Any]:
    """A small valid config; ``a__b=1`` sets ``a.b``."""
    found: dict[str, Any] = {
        "model": {"name": "m", "path": "embedded:tiny_omni"},
        "method": {
            "name": "x",
            "weight": {"format": "int"},
            "activation": {"format": "int"},
        },
        "bits": {"weight": 4, "activation": 4},
        "calibration": {"name": "c", "sources": [{"reader": "mmmu", "path": "mini:mmmu"}]},
        "benchmark": {"name": "b", "tasks": ["mini_mmmu"]},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = found
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return found


STATIC: dict[str, Any] = {
    "method__activation__granularity": "per_channel",
    "method__activation__mode": "static",
}


def searched(range_: dict[str, Any]) -> dict[str, Any]:
    """A searched method with some fields of its range."""
    return STATIC | {"method__activation__range": {"name": "mdqfo", **range_}}


def refused(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(config(**changes))
    return str(caught.value)


def test_the_base_is_valid() -> None:
    assert load(config()).bits.scheme == "w4a4"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"bits__weight": 99}, ["bits.weight=99", "2, 3, 4", "bits.weight=<value>"]),
        (
            {"method__activation__granularity": "per_tokne"},
            ["method.activation.granularity='per_tokne'", "'per_channel'", "mean 'per_token'?"],
        ),
        ({"benchmark__limit": -1}, ["benchmark.limit=-1", "at least 1"]),
        ({"benchmark__limit": "20"}, ["benchmark.limit='20'", "whole number"]),
        ({"benchmark__tasks": []}, ["benchmark.tasks=[]", "at least 1"]),
        ({"method__wieght": {}}, ["method.wieght", "Did you mean 'weight'?", "compensation"]),
        ({"calibration": {"name": "c"}}, ["calibration.sources: missing"]),
        ({"method__activation__range": {"p": -1.0}}, ["method.activation.range.p=-1.0", "0.0"]),
        ({"method__activation__range": {"min_ratio": 2.0}}, ["min_ratio=2.0", "at most 1.0"]),
        ({"statistics": {"enabled": "yes"}}, ["statistics.enabled='yes'", "true or false"]),
        (
            {"calibration__sources": [{"reader": "mmu", "path": "p"}]},
            ["calibration.sources.0.reader='mmu'", "Did you mean 'mmmu'?"],
        ),
        ({"model__scope": 3}, ["model.scope=3", "a group of fields"]),
        ({"method__weight__fallback_format": "fp4"}, ["'int', 'null'"]),
    ],
)
def test_a_wrong_value(changes: dict[str, Any], expected: list[str]) -> None:
    text = refused(**changes)
    for part in expected:
        assert part in text
    assert "pydantic" not in text


def test_all_problems_at_once() -> None:
    text = refused(bits__weight=1, seed="x")
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        (
            {"method__activation__granularity": "per_tensor"},
            ["method.activation.granularity='per_tensor'", "mode='dynamic'", "batch"],
        ),
        (
            {"method__activation__granularity": "per_channel"},
            ["mode='dynamic'", "Set method.activation.mode=static"],
        ),
        ({"method__activation__mode": "static"}, ["per_token", "method.activation.mode=dynamic"]),
        (
            {"method__activation__range": {"name": "mdqfo"}},
            ["method.activation.range.name='mdqfo'", "per_channel_mdqfo"],
        ),
        (
            {"method__compensation": {"name": "dabc", "reading": "element"}},
            ["method.compensation.name='dabc'", "element", "method/compensation=none"],
        ),
        (
            {"method__compensation": {"name": "static_bias"}},
            ["method.compensation.name='static_bias'", "per_channel_static"],
        ),
        (
            STATIC | {"method__compensation": {"name": "mixed_precision"}},
            ["method.compensation.name='mixed_precision'", "per_token"],
        ),
        (
            STATIC
            | {"method__compensation": {"name": "low_rank"}}
            | {"method__weight": {"format": "int", "fold": True}},
            ["method.compensation.name='low_rank'", "fold=True"],
        ),
        (
            STATIC | {"method__compensation": {"name": "dabc", "per_modality": True}},
            ["method.compensation.per_modality=true", "static_bias_per_modality"],
        ),
        (
            STATIC | {"method__compensation": {"name": "dabc", "mask": {"rules": []}}},
            ["mask.rules=[]", "mask.rules=[local]"],
        ),
        (
            STATIC
            | {
                "method__compensation": {
                    "name": "dabc",
                    "mask": {"score": "log_l1", "modalities": "union"},
                }
            },
            ["mask.score='log_l1'", "mask.modalities=pooled"],
        ),
        ({"method__weight__fold": True}, ["method.weight.fold=true", "per_channel_static"]),
        (
            STATIC | {"method__weight": {"format": "nf4", "fold": True}},
            ["method.weight.fold=true", "method/weight=int_folded"],
        ),
        (searched({"cosine": "token", "cosine_weight": 1.0}), ["cosine='token'", "mask_group"]),
        (searched({"output_weighting": True}), ["output_weighting=true", "ratio_per=mask_group"]),
        (
            searched({"optimizer": "gradient", "ratio_per": "mask_group"}),
            ["optimizer='gradient'", "ratio_per=channel"],
        ),
        (
            searched({"optimizer": "gradient", "accumulate": "ema"}),
            ["optimizer='gradient'", "accumulate=sum"],
        ),
        (
            searched({"upstream": "quantized"}) | {"calibration__search_samples": 0},
            ["upstream='quantized'", "calibration.search_samples=32"],
        ),
        (
            STATIC | {"method__activation__range": {"name": "percentile"}},
            ["range.name='percentile'", "per_modality_static"],
        ),
        ({"method__activation__range": {"name": "mse"}}, ["range.name='mse'", "mode=static"]),
        ({"method__activation__granularity": "per_modality"}, ["fixed in calibration"]),
        (
            {"method__activation": {"format": "int", "symmetric": False, "grid": "sym15"}},
            ["method.activation.grid='sym15'", "grid=restricted"],
        ),
        ({"calibration__allow_leakage": True}, ["calibration.allow_leakage=true", "'leak'"]),
        (
            {"method__weight__format": "nf4", "bits__weight": 3},
            ["bits.weight=3", "method.weight.fallback_format=int"],
        ),
        (
            {"model__attention": "flash_attention_2", "model__device": "cpu"},
            ["model.attention='flash_attention_2'", "model.attention=sdpa"],
        ),
        ({"model__scope": {"decoder": False}}, ["nothing is in scope"]),
        (
            {"model__media": {"image_min_pixels": 9, "image_max_pixels": 3}},
            ["model.media.image_min_pixels=9", "image_max_pixels=3"],
        ),
        ({"benchmark__tasks": ["a", "a"]}, ["benchmark.tasks", "twice: a"]),
        ({"calibration__sources": []}, ["calibration.sources: empty"]),
    ],
)
def test_choices_that_do_not_go_together(changes: dict[str, Any], fields: list[str]) -> None:
    text = refused(**changes)
    for part in fields:
        assert part in text


def test_nf4_rule_leaves_four_sixteen_and_fallback_alone() -> None:
    for width, fallback in ((4, None), (16, None), (3, "int")):
        weight = {"format": "nf4", "fallback_format": fallback}
        assert load(config(bits__weight=width, method__weight=weight))


def test_command_line_keys_are_dropped_and_others_are_not() -> None:
    load(config(limit=3, experiment=None, hydra={"job": "${nowhere}"}))
    assert "extra: no such field" in refused(extra=1)


def test_interpolations_are_resolved_or_refused_by_name() -> None:
    assert load(config(limit=7, benchmark__limit="${limit}")).benchmark.limit == 7
    assert "benchmark.limit" in refused(benchmark__limit="${nowhere}")


@given(st.text(alphabet="abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_no_word_crashes_the_messages(word: str) -> None:
    assert f"'{word}x'" in refused(method__activation__granularity=f"{word}x")
