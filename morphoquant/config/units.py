"""Parts of a model that are quantized one at a time: a block, an input group, a modality.

``unit=decoder.3`` quantizes one block, ``unit=decoder.mlp_out`` one input group in all blocks,
``unit=decoder.3.mlp_out`` both, ``unit=image`` the activations of image tokens (weights stay in 16
bits), ``unit=all`` everything in scope. A unit is short for fields that exist without it
(``model.scope.only``; ``method.activation.modalities`` and ``bits.weight``), so the run it makes
says itself what was quantized. ``experiment=sensitivity`` sweeps over the units of its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import pydantic
from omegaconf import DictConfig, OmegaConf

from morphoquant.config.messages import ConfigError, did_you_mean, one_of
from morphoquant.config.method import TOKEN_KINDS
from morphoquant.config.partial import in_scope
from morphoquant.config.schema import ModelConfig, RunConfig

if TYPE_CHECKING:
    from morphoquant.models.outline import OutlinedLinear

ALL = "all"
KINDS = ("block", "group", "cell", "modality")
"""A cell is one input group of one block."""
PARTITIONS = ("block", "group", "cell")
"""Kinds in which every linear belongs to exactly one unit."""


def kind_of(unit: str) -> str:
    """``all``, ``block``, ``group``, ``cell`` or ``modality``, read from the unit's name."""
    if unit == ALL:
        return ALL
    if unit in TOKEN_KINDS:
        return "modality"
    parts = unit.split(".")
    if len(parts) == 3:
        return "cell"
    return "group" if "_" in parts[-1] else "block"


def linear_units(linears: Iterable[OutlinedLinear], kind: str) -> dict[str, list[OutlinedLinear]]:
    """Name -> linears of every unit of one kind (``block``, ``group`` or ``cell``), in order."""
    found: dict[str, list[OutlinedLinear]] = {}
    for linear in linears:
        parts = {
            "block": (linear.tower, linear.block),
            "group": (linear.tower, linear.group),
            "cell": (linear.tower, linear.block, linear.group),
        }[kind]
        found.setdefault(".".join(parts), []).append(linear)
    return found


def names(model: ModelConfig, kinds: Sequence[str]) -> list[str]:
    """The units of a model: everything first, then the kinds in their order.

    Modalities are told apart in the decoder only, so with another tower in scope there are none.

    Raises:
        ConfigError: an unknown kind.
        ModelError: the checkpoint's ``config.json`` cannot be had.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(
                f"unit_kind={kind!r}: allowed is a list of {one_of(KINDS)}."
                f"{did_you_mean(kind, KINDS)}"
            )
    linears = _linears(model)
    found = [ALL]
    for kind in (k for k in PARTITIONS if k in kinds):
        found += linear_units(linears, kind)
    if "modality" in kinds and not (model.scope.vision or model.scope.audio):
        found += TOKEN_KINDS
    return found


def listed(root: DictConfig) -> str:
    """The units of a composed config, joined by commas: the resolver ``${units:}``."""
    kinds: Any = root.get("unit_kind") or ()
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    described: Any = OmegaConf.to_container(root.model, resolve=True)
    try:
        model = ModelConfig.model_validate(described)
    except pydantic.ValidationError as error:
        raise ConfigError(f"model: {error.errors()[0]['msg']}") from None
    return ",".join(names(model, kinds))


def restricted(config: RunConfig, unit: str) -> RunConfig:
    """The same run with one unit quantized; not validated again.

    Raises:
        ConfigError: the model has no such unit.
        ModelError: the checkpoint's ``config.json`` cannot be had.
    """
    if unit == ALL:
        return config
    if unit in TOKEN_KINDS:
        activation = config.method.activation.model_copy(update={"modalities": (unit,)})
        overrides = tuple(o.model_copy(update={"weight": 16}) for o in config.bits.overrides)
        return config.model_copy(
            update={
                "method": config.method.model_copy(update={"activation": activation}),
                "bits": config.bits.model_copy(update={"weight": 16, "overrides": overrides}),
            }
        )
    linears = _linears(config.model)
    kind = kind_of(unit)
    chosen = linear_units(linears, kind).get(unit)
    if chosen is None:
        known = names(config.model, KINDS)
        shown = [name for name in known if kind_of(name) == kind] or known
        raise ConfigError(
            f"unit={unit!r}: {config.model.name} has no such unit.{did_you_mean(unit, known)} "
            f"Units of this kind: {', '.join(shown)}."
        )
    if config.model.scope.only:
        only = [linear.name for linear in chosen]
    else:
        only = _patterns(chosen, kind)
    scope = config.model.scope.model_copy(update={"only": tuple(only)})
    return config.model_copy(update={"model": config.model.model_copy(update={"scope": scope})})


def _patterns(chosen: Sequence[OutlinedLinear], kind: str) -> list[str]:
    """Patterns that match exactly the linears of a unit, as few as there are."""
    found = []
    for linear in chosen:
        block = f"{linear.stack}.{linear.block}"
        if kind == "block":
            found.append(f"{block}.*")
        elif kind == "group" and linear.block.isdigit():
            found.append(f"{linear.stack}.*{linear.name.removeprefix(block)}")
        else:
            found.append(linear.name)
    return list(dict.fromkeys(found))


def _linears(model: ModelConfig) -> list[OutlinedLinear]:
    """Linears in scope."""
    from morphoquant.models.outline import outline

    return [linear for linear in outline(model) if in_scope(linear.name, model.scope.only)]
