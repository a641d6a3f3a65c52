"""Every pair of choices of two slots, in three methods: accepted, or refused with a reason."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import ValidationError

from morphoquant.config import load
from morphoquant.config.messages import explain
from morphoquant.config.schema import RunConfig
from morphoquant.config.store import register

CONF = Path(__file__).parents[2] / "conf"
SLOTS = ("transform", "weight", "activation", "activation/range", "compensation")
BASES = ("rtn", "rtn_static", "morphoquant")
PAIRS = tuple(itertools.combinations(SLOTS, 2))


def node(path: str, tree: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Parent and key of a slot in a run's plain config."""
    parent = tree["method"]
    *outer, key = path.split("/")
    for name in outer:
        parent = parent[name]
    return parent, key


@pytest.fixture(scope="module")
def trees() -> dict[str, dict[str, Any]]:
    """The composed configs of the bases, command line keys aside."""
    register()
    found = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for method in BASES:
            config = load(compose("config", overrides=[f"method={method}"]))
            found[method] = config.model_dump(mode="json")
    return found


@pytest.fixture(scope="module")
def choices() -> dict[str, dict[str, Any]]:
    """What every file of a slot says, by slot and choice.

    Slots do not look at each other, so one composition shows a choice of every slot at once. A
    range is composed by itself: activations come with one.
    """
    register()
    files = {s: sorted(p.stem for p in (CONF / "method" / s).glob("*.yaml")) for s in SLOTS}
    found: dict[str, dict[str, Any]] = {slot: {} for slot in SLOTS}
    rounds = []
    for i in range(max(map(len, files.values()))):
        rounds.append({slot: files[slot][i] for slot in SLOTS if i < len(files[slot])})
        if "activation/range" in rounds[-1]:
            rounds.append({"activation/range": rounds[-1].pop("activation/range")})
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for chosen in rounds:
            overrides = [f"method/{slot}={choice}" for slot, choice in chosen.items()]
            composed = compose("config", overrides=["method=rtn_static", *overrides])
            tree = {"method": OmegaConf.to_container(composed["method"], resolve=False)}
            for slot, choice in chosen.items():
                parent, key = node(slot, tree)
                found[slot][choice] = seeded(parent[key])  # seeds are interpolated from the run's
    return found


def seeded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: seeded(v) for k, v in value.items()}
    return 0 if isinstance(value, str) and value.startswith("${") else value


def fields(model: Any, prefix: str = "") -> set[str]:
    """Dotted names of all fields, and of the groups that hold them."""
    found = set()
    for name, field in model.model_fields.items():
        found.add(prefix + name)
        kind = field.annotation
        if isinstance(kind, type) and hasattr(kind, "model_fields"):
            found |= fields(kind, f"{prefix}{name}.")
    return found


FIELDS = fields(RunConfig)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_pair(
    trees: dict[str, Any], choices: dict[str, Any], base: str, first: str, second: str
) -> None:
    """A refusal names fields that exist, says what was found, and what to set instead."""
    accepted = 0
    for one, other in itertools.product(choices[first], choices[second]):
        tree = copy.deepcopy(trees[base])
        tree["method"]["name"] = "pair"
        for slot, choice in ((first, one), (second, other)):
            parent, key = node(slot, tree)
            parent[key] = copy.deepcopy(choices[slot][choice])
        try:
            config = RunConfig.model_validate(tree)
        except ValidationError as error:
            for line in explain(error, tree).splitlines():
                named = re.match(r"([a-z_.]+\w)(?==| with |:)", line)
                assert named, f"{one}, {other}: {line}"
                assert named[1] in FIELDS, f"{one}, {other}: {line}"
                assert "Set " in line, f"{one}, {other}: {line}"
            continue
        accepted += 1
        for slot, choice in ((first, one), (second, other)):
            parent, key = node(slot, config.model_dump(mode="json"))
            kept = choices[slot][choice]
            if slot == "activation" and second == "activation/range":
                kept = kept | {"range": choices[second][other]}
            assert parent[key] == parent[key] | kept, f"{slot}: {choice} is not what was asked for"
    assert accepted > 0


def test_what_is_said_to_go_together(trees: dict[str, Any], choices: dict[str, Any]) -> None:
    """Mixtures of methods that docs and experiments name."""
    for slots in (
        {"transform": "rotate"},
        {"transform": "smooth"},
        {"transform": "rotate", "weight": "int_folded"},
        {"transform": "rotate", "weight": "gptq_group"},
        {"transform": "rotate_block", "compensation": "static_bias_per_modality"},
        {"transform": "smooth_searched", "compensation": "low_rank_whitened"},
    ):
        tree = copy.deepcopy(trees["morphoquant"])
        for slot, choice in slots.items():
            parent, key = node(slot, tree)
            parent[key] = copy.deepcopy(choices[slot][choice])
        assert RunConfig.model_validate(tree).method.quantizes
