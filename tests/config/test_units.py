"""Units are short for fields, and every linear is in exactly one unit of a partition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from morphoquant.config import ConfigError, RunConfig, load
from morphoquant.config.method import TOKEN_KINDS
from morphoquant.config.schema import BitsConfig, ModelConfig, ScopeConfig
from morphoquant.config.store import register
from morphoquant.config.units import (
    ALL,
    KINDS,
    PARTITIONS,
    kind_of,
    linear_units,
    listed,
    names,
    restricted,
)
from morphoquant.models.outline import outline

CONF = Path(__file__).parents[2] / "conf"
EVERYTHING = ScopeConfig(decoder=True, vision=True, audio=True)


@pytest.fixture(scope="module")
def composed() -> Iterator[Callable[..., RunConfig]]:
    """Group choices are composed (once each), fields set in what was composed."""
    register()

    @cache
    def chosen(*choices: str) -> DictConfig:
        return compose("config", overrides=["method=rtn", *choices])

    def make(*overrides: str) -> RunConfig:
        choices = [o for o in overrides if o.startswith(("method=", "method/", "bits="))]
        fields = [o for o in overrides if o not in choices]
        return load(OmegaConf.merge(chosen(*choices), OmegaConf.from_dotlist(fields)))  # type: ignore[arg-type]

    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield make


def model(scope: ScopeConfig = EVERYTHING) -> ModelConfig:
    return ModelConfig(name="tiny", path="embedded:tiny_omni", scope=scope)


TOWERS = ["model.scope.vision=true", "model.scope.audio=true"]


@pytest.mark.parametrize("kind", PARTITIONS)
@pytest.mark.parametrize("towers", [[], TOWERS])
def test_units_partition_the_scope(
    composed: Callable[..., RunConfig], kind: str, towers: list[str]
) -> None:
    """Through the patterns that a run really gets: every linear in exactly one unit."""
    scope, whole = EVERYTHING if towers else ScopeConfig(), composed(*towers)
    every = [linear.name for linear in outline(model(scope))]
    found: list[str] = []
    for unit in linear_units(outline(model(scope)), kind):
        assert kind_of(unit) == kind
        only = restricted(whole, unit).model.scope.only
        found += [n for n in every if any(fnmatchcase(n, pattern) for pattern in only)]
    assert sorted(found) == sorted(every)
    assert len(found) == (28 if not towers else 28 + 3 * 7 + 2 + 2 * 6)


def test_names_of_units() -> None:
    found = names(model(ScopeConfig()), ["modality", "group", "block"])
    blocks = [f"decoder.{i}" for i in range(4)]
    groups = [f"decoder.{g}" for g in ("attn_in", "attn_out", "mlp_in", "mlp_out")]
    assert found == [ALL, *blocks, *groups, *TOKEN_KINDS]
    assert len(names(model(ScopeConfig()), ["cell"])) == 1 + 16
    assert not set(TOKEN_KINDS) & set(names(model(), KINDS)), "towers do not tell tokens apart"
    assert "vision.merger" in names(model(), ["block"])


def test_a_scope_narrows_its_units(composed: Callable[..., RunConfig]) -> None:
    only = ("model.layers.1.*", "*.2.mlp.*")
    narrow = model(ScopeConfig(only=only))
    assert names(narrow, ["block"]) == [ALL, "decoder.1", "decoder.2"]
    found = composed(f"model.scope.only={list(only)}", "unit=decoder.2")
    assert found.model.scope.only == tuple(
        f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up", "down")
    )
    with pytest.raises(ConfigError, match="no such unit"):
        composed(f"model.scope.only={list(only)}", "unit=decoder.0")


def test_a_unit_is_short_for_fields(composed: Callable[..., RunConfig]) -> None:
    assert composed("unit=all") == composed()
    block = composed("unit=decoder.3")
    assert block == composed("model.scope.only=[model.layers.3.*]")
    image = composed("unit=image")
    assert image == composed("method.activation.modalities=[image]", "bits.weight=16")
    assert image.bits.scheme == "w16a4"


def test_modalities_have_one_spelling(composed: Callable[..., RunConfig]) -> None:
    assert composed("method.activation.modalities=[audio,text,video,image]") == composed()
    assert composed("method.activation.modalities=[audio,text]") == composed(
        "method.activation.modalities=[text,audio]"
    )


def test_the_unquantized_model_has_no_partial_scope(composed: Callable[..., RunConfig]) -> None:
    """One reference serves every unit."""
    assert composed("method=fp16", "model.scope.only=[model.layers.0.*]") == composed("method=fp16")
    mixed = "bits.overrides=[{linears: '*', weight: 8, activation: 8}]"
    assert composed("method=fp16", mixed) == composed("method=fp16")
    weights = composed("method/activation=none", mixed)
    assert weights.bits.overrides[0].activation is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["unit=decoder.9"], ["no such unit", "decoder.0, decoder.1, decoder.2, decoder.3"]),
        (["unit=imgae"], ["no such unit", "mean 'image'?"]),
        (["model.scope.only=['*.layer.3.*']"], ["'*.layer.3.*' matches no linear", "q_proj"]),
        (["model.scope.only=['*.q_proj']"], ["read one activation", "k_proj 16"]),
        (["model.scope.only=[visual.*]"], ["matches no linear in scope"]),
        (
            ["bits.overrides=[{linears: '*.gate_proj', activation: 8}]"],
            ["read one activation", "gate_proj 8", "up_proj 4"],
        ),
        (["bits.overrides=[{linears: nope, weight: 8}]"], ["bits.overrides.0.linears", "'nope'"]),
        (["bits.overrides=[{linears: '*'}]"], ["changes nothing"]),
        (["bits.overrides=[{linears: '*', weight: 9}]"], ["bits.overrides.0.weight=9", "2, 3"]),
        (
            ["method=nf4", "bits.overrides=[{linears: '*', weight: 8}]"],
            ["bits.overrides.0.weight=8", "4 bits only"],
        ),
        (
            ["method=mxfp4", "bits.overrides=[{linears: '*', activation: 8}]"],
            ["bits.overrides.0.activation=8", "4 bits only"],
        ),
        (["bits=w4a16", "unit=image"], ["no activation is quantized"]),
        (["method.activation.modalities=[]"], ["modalities=[]", "'image'"]),
        ([*TOWERS, "unit=image"], ["a tower does not know"]),
        (["bits=w4a4kv4", "unit=decoder.0"], ["bits.kv=4", "every layer"]),
    ],
)
def test_refusals(
    composed: Callable[..., RunConfig], overrides: list[str], expected: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    for words in expected:
        assert words in str(caught.value)


def test_weights_alone_may_cut_a_group(composed: Callable[..., RunConfig]) -> None:
    """Only a shared activation ties linears together."""
    assert composed("bits=w4a16", "model.scope.only=['*.v_proj']").model.scope.only == ("*.v_proj",)
    composed("bits.overrides=[{linears: '*.v_proj', weight: 8}]")


def test_formats_that_fall_back_take_other_widths(composed: Callable[..., RunConfig]) -> None:
    found = composed("method=morphoquant", "bits.overrides=[{linears: '*.0.*', weight: 8}]")
    assert found.bits.at("model.layers.0.mlp.down_proj").weight == 8
    assert found.bits.at("model.layers.1.mlp.down_proj").weight == 4


def test_later_overrides_hold_and_mixtures_have_names() -> None:
    def bits(*overrides: dict[str, object]) -> BitsConfig:
        return BitsConfig.model_validate({"weight": 4, "activation": 4, "overrides": overrides})

    a: dict[str, object] = {"linears": "*", "weight": 8}
    b: dict[str, object] = {"linears": "*.down", "weight": 3, "activation": 16}
    found = bits(a, b)
    assert (found.at("x.down").weight, found.at("x.down").activation) == (3, 16)
    assert (found.at("x.up").weight, found.at("x.up").activation) == (8, 4)
    assert (found.lowest.weight, found.lowest.activation) == (3, 4)
    assert found.lowest.scheme == "w3a4"
    assert bits(b, a).at("x.down").weight == 8
    schemes = {bits().scheme, bits(a).scheme, bits(a, b).scheme, bits(b, a).scheme}
    assert len(schemes) == 4
    assert bits().scheme == "w4a4"


@pytest.mark.usefixtures("composed")
def test_the_experiment_lists_its_model_s_units() -> None:
    cfg = compose("config", overrides=["experiment=sensitivity", "unit_kind=block"])
    assert listed(cfg) == "all,decoder.0,decoder.1,decoder.2,decoder.3"
    with pytest.raises(ConfigError, match="mean 'block'"):
        listed(compose("config", overrides=["unit_kind=[blok]"]))
