"""From a composed Hydra config to a validated :class:`~morphoquant.config.schema.RunConfig`.

``load`` is the only way in. It drops what only the command line needs, spells equal runs equally
(an unquantized side is 16 bits wide, whatever ``bits`` said), and turns every complaint into lines
that name the field, what was found, what is allowed and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from morphoquant.config import units
from morphoquant.config.messages import ConfigError, explain
from morphoquant.config.method import TOKEN_KINDS
from morphoquant.config.partial import check_names
from morphoquant.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "load", "normalise", "to_yaml"]

COMPOSITION_ONLY = (*("limit", "experiment", "ablation", "row", "unit", "unit_kind", "hydra"),)
"""Top-level keys that exist for the command line: other fields have taken their values."""


def load(cfg: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Validate a composed config.

    Raises:
        ConfigError: a field is unknown, missing, of the wrong type or out of range, or two
            choices do not go together. All problems are reported at once.
    """
    raw = _plain(cfg)
    unit = cfg.get("unit")
    try:
        config = RunConfig.model_validate(raw)
        if unit is not None:
            config = RunConfig.model_validate(units.restricted(config, str(unit)).model_dump())
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, raw)) from None
    config = normalise(config)
    check_names(config)
    return config


def normalise(config: RunConfig) -> RunConfig:
    """The same run in its one spelling.

    A side that is not quantized has 16 bits everywhere; where nothing is quantized, it does not
    matter which linears are not; modalities are named in one order.
    """
    method, bits, model = config.method, config.bits, config.model
    widths: dict[str, Any] = {}
    overrides = list(bits.overrides)
    for side in ("weight", "activation"):
        if getattr(method, side).format == "none":
            widths[side] = 16
            overrides = [o.model_copy(update={side: None}) for o in overrides]
    overrides = [o for o in overrides if o.weight is not None or o.activation is not None]
    widths["overrides"] = tuple(overrides)
    if not method.quantizes:
        scope = model.scope.model_copy(update={"only": ()})
        model = model.model_copy(update={"scope": scope})
    named = tuple(kind for kind in TOKEN_KINDS if kind in method.activation.modalities)
    activation = method.activation.model_copy(update={"modalities": named})
    method = method.model_copy(update={"activation": activation})
    return config.model_copy(
        update={"bits": bits.model_copy(update=widths), "method": method, "model": model}
    )


def _plain(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    tree = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    kept = [str(key) for key in tree if key not in COMPOSITION_ONLY]
    try:
        found = OmegaConf.to_container(tree, resolve=False)
        assert isinstance(found, dict)
        # One by one: the command line's own keys need not be resolvable (hydra's are not).
        for key in kept:
            if OmegaConf.is_config(tree[key]):
                found[key] = OmegaConf.to_container(tree[key], resolve=True, throw_on_missing=True)
            else:
                found[key] = tree[key]
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key}: missing. Give it a value.") from None
    except OmegaConfBaseException as error:
        field = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{field}{str(error).splitlines()[0]}") from None
    return {key: found[key] for key in kept}


def to_yaml(config: RunConfig) -> str:
    """The validated config as YAML, as kept in the run directory."""
    return OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json")))
