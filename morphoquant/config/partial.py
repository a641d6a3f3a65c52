"""Quantizing a part: rules and checks for chosen linears, chosen tokens and mixed widths.

What can be told from fields alone is a rule, like those of :mod:`morphoquant.config.rules`. What
depends on the names of linears needs the checkpoint's ``config.json`` and is checked when a config
is loaded; where that file cannot be had, loading the model says so soon enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from morphoquant.config.messages import ConfigError
from morphoquant.config.method import FIXED_WIDTH
from morphoquant.errors import HarnessError

if TYPE_CHECKING:
    from morphoquant.config.schema import RunConfig

SHOWN = 12


def partial(cfg: RunConfig) -> Iterator[str]:
    """Broken rules of scopes, modalities and overrides, one line each."""
    yield from _modalities(cfg)
    yield from _overrides(cfg)
    if cfg.model.scope.only and cfg.bits.kv < 16:
        yield (
            f"bits.kv={cfg.bits.kv} with model.scope.only={list(cfg.model.scope.only)}: keys and "
            "values of every layer would be quantized. Set bits.kv=16, or model.scope.only=[]."
        )


def _modalities(cfg: RunConfig) -> Iterator[str]:
    activation, scope = cfg.method.activation, cfg.model.scope
    if not activation.quantizes_some:
        return
    where = f"method.activation.modalities={list(activation.modalities)}"
    if activation.format == "none" or cfg.bits.lowest.activation >= 16:
        yield (
            f"{where} with method.activation.format={activation.format!r}, bits.activation="
            f"{cfg.bits.activation}: no activation is quantized, so no modality's is. Set "
            "bits.activation=4 with method/activation=per_token, or name all four modalities."
        )
    if scope.vision or scope.audio:
        yield (
            f"{where} with model.scope.vision={scope.vision}, model.scope.audio={scope.audio}: "
            "tokens are told apart in the decoder; a tower does not know what it is given. Set "
            "model.scope.vision=false and model.scope.audio=false."
        )


def _overrides(cfg: RunConfig) -> Iterator[str]:
    weight, activation = cfg.method.weight, cfg.method.activation
    for number, override in enumerate(cfg.bits.overrides):
        where = f"bits.overrides.{number}"
        if override.weight is None and override.activation is None:
            yield (
                f"{where} ({override.linears!r}): changes nothing. Give it a weight or an "
                "activation width."
            )
        width = FIXED_WIDTH.get(weight.format)
        if width and override.weight not in (None, width, 16) and not weight.fallback_format:
            yield (
                f"{where}.weight={override.weight} with method.weight.format={weight.format!r}: it "
                f"exists at {width} bits only. Set method.weight.fallback_format=int to use "
                f"integers at other widths, or {where}.weight={width} (or 16)."
            )
        width = FIXED_WIDTH.get(activation.format)
        if width and override.activation not in (None, width, 16):
            yield (
                f"{where}.activation={override.activation} with method.activation.format="
                f"{activation.format!r}: it exists at {width} bits only. Set {where}.activation="
                f"{width} (or 16), or method.activation.format=int."
            )


def check_names(cfg: RunConfig) -> None:
    """Refuse patterns that match no linear, told from the checkpoint's ``config.json``.

    Raises:
        ConfigError: see :func:`misnamed`.
    """
    if not (cfg.model.scope.only or cfg.bits.overrides):
        return
    from morphoquant.models.outline import outline

    try:
        known = outline(cfg.model)
    except HarnessError:
        return  # there is no such checkpoint: said when it is loaded
    groups: dict[tuple[str, str, str], list[str]] = {}
    for linear in known:
        groups.setdefault((linear.tower, linear.block, linear.group), []).append(linear.name)
    broken = misnamed(cfg, groups.values())
    if broken:
        raise ConfigError("\n".join(broken))


def misnamed(cfg: RunConfig, groups: Iterable[list[str]]) -> list[str]:
    """What is wrong with the patterns of a config, given the model's input groups by name.

    A pattern has to match a linear of the towers in scope, and linears that read one activation
    have to agree on its width: they get the same tensor.
    """
    groups = list(groups)
    names = [name for group in groups for name in group]
    only, broken = cfg.model.scope.only, []
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for name in names):
            broken.append(f"model.scope.only: {_unmatched(pattern, names)}")
    inside = [name for name in names if in_scope(name, only)]
    for number, override in enumerate(cfg.bits.overrides):
        if not any(fnmatchcase(name, override.linears) for name in inside):
            field = f"bits.overrides.{number}.linears"
            broken.append(f"{field}: {_unmatched(override.linears, inside)}")
    if broken:
        return broken
    quantized = cfg.method.activation.format != "none"
    for group in groups:
        widths = {
            name: cfg.bits.at(name).activation if in_scope(name, only) and quantized else 16
            for name in group
        }
        if len(set(widths.values())) > 1:
            told = ", ".join(f"{name} {width}" for name, width in widths.items())
            broken.append(
                f"model.scope.only, bits.overrides: linears that read one activation differ in "
                f"its width ({told}). Name all of them together, or set bits.activation=16."
            )
    return broken[:SHOWN]


def in_scope(name: str, only: Iterable[str]) -> bool:
    """Whether the linear called ``name`` is in scope under the patterns of ``only``."""
    patterns = tuple(only)
    return not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)


def _unmatched(pattern: str, names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN]) + (f", ... ({len(names)})" if len(names) > SHOWN else "")
    return f"{pattern!r} matches no linear in scope. Linears are {shown}."
