"""docs/PRESETS.md is true: its overrides turn one preset into the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from morphoquant.config import ConfigError, RunConfig, load
from morphoquant.config.schema import MethodConfig
from morphoquant.config.store import register

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "PRESETS.md").read_text()


@pytest.fixture(scope="module")
def composed() -> Iterator[Callable[..., RunConfig]]:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: load(compose("config", overrides=list(overrides)))


def rows(preset: str) -> list[tuple[str, str]]:
    """(override, clean value) of the table of a preset."""
    section = TEXT.split(f"## From `morphoquant` to `{preset}`")[1].split("\n## ")[0]
    return re.findall(r"^\| `(method\.[^`]+)` \| `([^`]+)` \|", section, re.MULTILINE)


def same_apart_from_names(a: MethodConfig, b: MethodConfig) -> bool:
    return a.model_copy(update={"name": b.name, "reference": b.reference}) == b


@pytest.mark.parametrize("preset", ["morphoquant_reference", "morphoquant_paper"])
def test_overrides_give_the_preset(composed: Callable[..., RunConfig], preset: str) -> None:
    listed = rows(preset)
    assert len(listed) >= 9
    target = composed(f"method={preset}").method
    overrides = [override for override, _ in listed]
    assert same_apart_from_names(composed("method=morphoquant", *overrides).method, target)
    for left_out in range(len(listed)):
        others = overrides[:left_out] + overrides[left_out + 1 :]
        try:
            found = composed("method=morphoquant", *others).method
        except ConfigError:
            continue  # it is needed: without it the rest does not go together
        assert not same_apart_from_names(found, target), f"{overrides[left_out]} changes nothing"


@pytest.mark.parametrize("preset", ["morphoquant_reference", "morphoquant_paper"])
def test_the_clean_values_are_the_clean_preset_s(
    composed: Callable[..., RunConfig], preset: str
) -> None:
    listed = rows(preset)
    back = [f"{override.split('=')[0]}={clean}" for override, clean in listed]
    clean = composed("method=morphoquant").method
    assert same_apart_from_names(composed(f"method={preset}", *back).method, clean)


def test_named_choices_exist() -> None:
    """Every ``group=choice`` that the text names is a file."""
    for group, choice in re.findall(r"`(method(?:/\w+)*|calibration)=(\w+)`", TEXT):
        assert (ROOT / "conf" / group / f"{choice}.yaml").is_file(), f"{group}={choice}"
