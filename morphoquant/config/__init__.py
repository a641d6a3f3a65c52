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

from morphoquant.config.messages import ConfigError, explain
from morphoquant.config.schema import RunConfig

__all__ = ["ConfigError", "RunConfig", "load", "normalise", "to_yaml"]

COMPOSITION_ONLY = ("limit", "experiment", "ablation", "row", "hydra")
"""Top-level keys that exist for the command line: other fields have taken their values."""


def load(cfg: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Validate a composed config.

    Raises:
        ConfigError: a field is unknown, missing, of the wrong type or out of range, or two
            choices do not go together. All problems are reported at once.
    """
    raw = _plain(cfg)
    try:
        return normalise(RunConfig.model_validate(raw))
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, raw)) from None


def normalise(config: RunConfig) -> RunConfig:
    """The same run in its one spelling: a side that is not quantized has 16 bits."""
    method, bits = config.method, config.bits
    weight = 16 if method.weight.format == "none" else bits.weight
    activation = 16 if method.activation.format == "none" else bits.activation
    return config.model_copy(
        update={"bits": bits.model_copy(update={"weight": weight, "activation": activation})}
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
