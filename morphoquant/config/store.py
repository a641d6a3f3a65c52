"""The schema's defaults as a Hydra config, so that the YAML files only say what they choose.

``conf/config.yaml`` starts from the node ``schema`` made here: every field exists in the composed
config (and can be overridden by name) without being repeated in any file.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from pydantic import BaseModel

from morphoquant.config.schema import RunConfig


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Field -> default, nested; ``???`` (missing) where the schema has none."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[name] = defaults(field.annotation)
        else:
            found[name] = MISSING if field.is_required() else field.get_default()
    return found


def register() -> None:
    """Make ``schema``, launchers and resolvers known to Hydra. Safe to call twice."""
    from morphoquant.launching import presets

    presets.register()
    ConfigStore.instance().store(name="schema", node=defaults(RunConfig), provider="morphoquant")
    OmegaConf.register_new_resolver("units", _units, replace=True)


def _units(*, _root_: DictConfig) -> str:
    """``${units:}``: the units of the configured model, as a sweep takes them (``a,b,c``)."""
    from morphoquant.config.units import listed

    return listed(_root_)
