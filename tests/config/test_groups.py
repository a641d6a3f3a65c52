"""Every file of every group composes and validates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from morphoquant.config import ConfigError, RunConfig, load
from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.config.store import defaults, register

CONF = Path(__file__).parents[2] / "conf"
METHODS = sorted(p.stem for p in (CONF / "method").glob("*.yaml"))
BITS = sorted(p.stem for p in (CONF / "bits").glob("*.yaml"))
TOP_LEVEL = ("model", "calibration", "benchmark", "tracker", "experiment")
SLOTS = ("transform", "weight", "activation", "activation/range", "compensation")
CHOICES = [(g, p.stem) for g in TOP_LEVEL for p in sorted((CONF / g).glob("*.yaml"))]
SLOT_CHOICES = [(g, p.stem) for g in SLOTS for p in sorted((CONF / "method" / g).glob("*.yaml"))]


@pytest.fixture(scope="module")
def chosen() -> Iterator[Callable[..., DictConfig]]:
    """Composes a config, once each."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield cache(lambda *overrides: compose("config", overrides=list(overrides)))


@pytest.fixture(scope="module")
def composed(chosen: Callable[..., DictConfig]) -> Callable[..., RunConfig]:
    return lambda *overrides: load(chosen(*overrides))


@pytest.fixture(scope="module")
def at_width(chosen: Callable[..., DictConfig]) -> Callable[[str, str], RunConfig]:
    """``method=... bits=...``: neither group looks at the other, so each is composed by itself."""

    def make(method: str, bits: str) -> RunConfig:
        whole = chosen(f"method={method}").copy()
        whole.bits = chosen(f"bits={bits}").bits
        return load(whole)

    return make


def test_widths_may_be_put_beside_a_method(
    composed: Callable[..., RunConfig], at_width: Callable[[str, str], RunConfig]
) -> None:
    for method, bits in (("morphoquant", "w4a8"), ("quarot", "w4a4kv4"), ("fp16", "w4a4")):
        assert at_width(method, bits) == composed(f"method={method}", f"bits={bits}")


def test_the_groups_are_found() -> None:
    assert len(METHODS) >= 5
    assert len(BITS) >= 10
    assert len(CHOICES) >= 15
    assert len(SLOT_CHOICES) >= 15


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", BITS)
def test_every_method_at_every_width(
    at_width: Callable[[str, str], RunConfig], method: str, bits: str
) -> None:
    width = bits.removeprefix("w").removesuffix("kv4").split("a")
    one_width = method in ("nf4", "mxfp4", "nvfp4", "hif4", "morphoquant_hif4", "morphoquant_hif8")
    nothing_rounded = method in ("awq", "mbq", "masquant") and bits == "w16a16"
    unlearnable = method == "spinquant" and width[1] == "16"
    own = "8" if method.endswith("hif8") else "4"
    odd = any(w not in (own, "16") for w in (width[:1] if method == "nf4" else width))
    if (one_width and odd) or nothing_rounded or unlearnable:
        with pytest.raises(ConfigError, match="Set "):
            at_width(method, bits)
        return
    config = at_width(method, bits)
    assert config.method.name == method
    weight = width[0] if config.method.weight.format != "none" else "16"
    activation = width[1] if config.method.activation.format != "none" else "16"
    cache = "kv4" if bits.endswith("kv4") else ""
    assert config.bits.scheme == f"w{weight}a{activation}{cache}"


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice(composed: Callable[..., RunConfig], group: str, choice: str) -> None:
    config = composed(f"{group}={choice}", *(["row=w4a4_quarot"] if choice == "table1" else []))
    if group not in ("experiment", "ablation"):
        assert getattr(config, group).name == choice


@pytest.mark.parametrize(("slot", "choice"), SLOT_CHOICES)
def test_every_slot_choice(composed: Callable[..., RunConfig], slot: str, choice: str) -> None:
    # On a method that goes with every choice of the slot.
    static = slot in ("activation/range", "compensation") or choice == "int_folded"
    static = static and not choice.startswith(("mixed_precision", "low_rank"))
    base = [f"method={'rtn_static' if static else 'rtn'}"]
    if choice in ("hif8", "fp4", "mxfp4", "nvfp4", "hif4"):
        base.append("bits=w8a8")
        if choice != "hif8":
            base[-1] = "bits=w4a4"
    if choice == "percentile":
        base.append("method/activation=per_tensor_static")
    if choice == "modality_smooth":
        base.append("method/compensation=low_rank_per_modality")
    if choice == "rotated_mean":
        base.append("method/transform=rotate")
    composed(*base, f"method/{slot}={choice}")


def test_fp16_is_the_schema(composed: Callable[..., RunConfig]) -> None:
    assert composed("method=fp16").method == MethodConfig()
    assert composed("method=fp16", "seed=3").method == MethodConfig()


def test_equal_runs_are_spelt_equally(composed: Callable[..., RunConfig]) -> None:
    assert composed("method=fp16", "bits=w4a4") == composed("method=fp16", "bits=w16a16")
    weights_only = composed("method=rtn", "method/activation=none", "bits=w4a8")
    assert weights_only.bits == BitsConfig(weight=4, activation=16)
    assert weights_only == composed("method=rtn", "method/activation=none", "bits=w4a16")


def test_one_slot_changes_one_slot(composed: Callable[..., RunConfig]) -> None:
    whole, without = composed(), composed("method/compensation=none")
    assert whole.method.compensation.name == "dabc"
    assert without.method.compensation.name == "none"
    assert without.method.weight == whole.method.weight
    assert without.method.activation == whole.method.activation


ABLATIONS = sorted(p.stem for p in (CONF / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("choice", ABLATIONS)
@pytest.mark.parametrize("method", ["morphoquant", "morphoquant_reference"])
def test_an_ablation_changes_one_slot(
    composed: Callable[..., RunConfig], method: str, choice: str
) -> None:
    base, changed = composed(f"method={method}"), composed(f"method={method}", f"ablation={choice}")
    others = {"method": base.method}
    assert changed.model_copy(update=others) == base, "outside of the method nothing changes"
    slots = ("transform", "weight", "activation", "compensation")
    differing = [s for s in slots if getattr(base.method, s) != getattr(changed.method, s)]
    if choice == "table3_baseline":
        assert differing == ["activation", "compensation"]
    else:
        assert len(differing) <= 1
    if method == "morphoquant" and choice not in ("base", "table3_plus_dabc"):
        assert differing, "the choice says something else than the method does already"


def test_experiments_name_ablations_that_exist() -> None:
    for name in ("ablation", "table3"):
        text = (CONF / "experiment" / f"{name}.yaml").read_text()
        listed = yaml.safe_load(text)["hydra"]["sweeper"]["params"]["ablation"]
        assert set(re.split(r"[,\s]+", listed)) <= set(ABLATIONS)


def test_leaking_calibrations_say_so(composed: Callable[..., RunConfig]) -> None:
    for name in sorted(p.stem for p in (CONF / "calibration").glob("*.yaml")):
        assert composed(f"calibration={name}").calibration.allow_leakage == ("leak" in name)
    with pytest.raises(ConfigError, match="has to say so"):
        composed("calibration.allow_leakage=true")


def test_numbers_and_conveniences(composed: Callable[..., RunConfig]) -> None:
    config = composed("method.activation.range.p=3", "limit=20", "seed=5", "method=morphoquant")
    assert config.method.activation.range.p == 3.0
    assert config.benchmark.limit == 20
    assert (config.seed, config.calibration.seed) == (5, 5)
    assert composed("method=quarot", "seed=5").method.transform.seed == 5


def test_the_methods_say_what_they_are(composed: Callable[..., RunConfig]) -> None:
    quarot, naive = composed("method=quarot").method, composed("method=rtn_static").method
    assert quarot.transform.name == "rotate"
    assert quarot.activation.range.clip_ratio == 0.9
    assert (naive.activation.granularity, naive.activation.mode) == ("per_channel", "static")
    morpho = composed("method=morphoquant").method
    assert (morpho.weight.format, morpho.weight.double_quantization) == ("nf4", True)
    assert (morpho.activation.range.name, morpho.activation.range.p) == ("mdqfo", 2.0)
    assert (morpho.compensation.reading, morpho.compensation.mask.max_share) == ("channel", 0.03)


def test_schema_node_has_every_field() -> None:
    node = defaults(RunConfig)
    assert set(node) == set(RunConfig.model_fields)
    assert node["method"]["activation"]["range"]["p"] == 2.0
    assert node["model"]["name"] == "???"


ROWS = sorted(p.stem for p in (CONF / "row").glob("*.yaml"))


@pytest.mark.parametrize("row", ROWS)
def test_a_row_pairs_a_method_with_its_widths(composed: Callable[..., RunConfig], row: str) -> None:
    config = composed("experiment=table1", f"row={row}")
    scheme, method = row.split("_", 1)
    assert (config.bits.scheme, config.method.name, config.report) == (scheme, method, "table1")


def test_other_rows_are_refused_before_a_sweep(composed: Callable[..., RunConfig]) -> None:
    with pytest.raises(ConfigError, match="method=rtn at w4a4: Table 1 has no such row"):
        composed("experiment=table1", "row=w4a4_quarot", "method=rtn")
    with pytest.raises(ConfigError, match="row=<one of w16a16_fp16"):
        composed("experiment=table1", "row=w4a4_quarot", "bits=w3a16")
    with pytest.raises(ConfigError, match="no such row"):
        composed("report=table1", "method=rtn")
