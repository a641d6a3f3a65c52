"""Complaints a user can act on: the field, what was found, what is allowed, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError

from morphoquant.errors import HarnessError


class ConfigError(HarnessError, ValueError):
    """A configuration that cannot be run. The text is complete: no traceback is needed."""


def did_you_mean(value: object, options: Sequence[object]) -> str:
    """``' Did you mean 'x'?'``, or nothing where no option is near."""
    words = {str(option): option for option in options}
    near = difflib.get_close_matches(str(value), list(words), n=1, cutoff=0.6)
    return f" Did you mean {words[near[0]]!r}?" if near else ""


def one_of(options: Sequence[object]) -> str:
    return ", ".join(repr(option) if isinstance(option, str) else str(option) for option in options)


def explain(error: ValidationError, raw: Mapping[str, Any]) -> str:
    """All problems of a pydantic error as text, a line or two each.

    Args:
        error: what ``RunConfig.model_validate`` raised.
        raw: the dictionary it was given.
    """
    from morphoquant.config.schema import RunConfig

    return "\n".join(_line(dict(problem), RunConfig) for problem in error.errors())


def explain_hydra(error: BaseException) -> str:
    """Hydra's complaint about an override, with what is allowed in its place.

    Hydra's own texts go on about search paths and structs; what a user needs is the list.
    """
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        reason = str(error).splitlines()[0]
        return f"{error.override}: cannot be read as field=value or group=choice ({reason})."
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = list(error.options or ())
        if (group, choice) == ("hydra/sweeper", "optuna"):
            return (
                "hydra/sweeper=optuna: its plugin is not installed. Install it: "
                "pip install -e '.[tune]' (in the project's folder)."
            )
        if not group or not options:
            return str(error).splitlines()[0]
        hint = did_you_mean(choice, options)
        return f"{group}={choice}: no such choice.{hint} Allowed for {group}: {', '.join(options)}."
    if isinstance(error.__cause__, HarnessError):  # of a resolver of ours
        return str(error.__cause__)
    text = str(error)
    found = re.match(r"Could not override '([^']+)'", text)
    if found:
        return _unknown(found.group(1))
    if found := re.match(r"Key '[^']+' is not in struct\s+full_key: (\S+)", text):
        return _unknown(found.group(1))
    lines = [line for line in text.splitlines() if line and not line.startswith("See https")]
    return "\n".join(lines)


def _unknown(path: str) -> str:
    """A field, or a group, that does not exist."""
    from morphoquant.config.schema import RunConfig

    parts = path.split("@")[0].replace("/", ".").split(".")
    if parts[0] == "hydra":
        return (
            f"{path}: no such field. `python run.py --cfg hydra` prints those there are (with your "
            "hydra/launcher=... or hydra/sweeper=...); one more entry of a dictionary needs a +."
        )
    for depth, part in enumerate(parts):
        known = _fields(parts[:depth], RunConfig)
        if depth == 0:
            known = [*known, "limit", "experiment", "unit", "unit_kind"]
        if known and part not in known:
            below = ".".join(parts[:depth])
            where = f"Known in {below}" if below else "Known"
            return f"{path}: no such field.{did_you_mean(part, known)} {where}: {', '.join(known)}."
    return f"{path}: cannot be overridden like this; see `python run.py --help`."


def _line(problem: dict[str, Any], root: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    found, kind = problem["input"], problem["type"]
    context = problem.get("ctx", {})
    if kind == "value_error":  # a rule across fields, or a validator of ours: says it all
        text = str(context["error"])
        return f"{path}: {text}" if path else text
    if kind == "extra_forbidden":
        known = _fields(problem["loc"][:-1], root)
        hint = did_you_mean(problem["loc"][-1], known)
        return f"{path}: no such field.{hint} Known here: {', '.join(known)}."
    if kind == "missing":
        return f"{path}: missing. Give it a value: {path}=..."
    allowed = _allowed(kind, context, problem)
    options = _literals(problem["loc"], root)
    hint = ""
    if options:
        allowed = f"one of {one_of(options)}"
        hint = did_you_mean(found, options) if isinstance(found, str) else ""
    return f"{path}={_shown(found)}: allowed is {allowed}.{hint} Change it with {path}=<value>."


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _allowed(kind: str, context: Mapping[str, Any], problem: Mapping[str, Any]) -> str:
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("more than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if kind in bounds:
        words, key = bounds[kind]
        return f"a number, {words} {context[key]}"
    if kind == "too_short":
        return f"a list of at least {context['min_length']}"
    names = {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "tuple_type": "a list",
        "model_type": "a group of fields",
        "model_attributes_type": "a group of fields",
    }
    return names.get(kind, str(problem["msg"]))


def _annotations(annotation: Any) -> list[Any]:
    """An annotation and everything it is made of."""
    found = [annotation]
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            found += _annotations(part)
    return found


def _models(location: Sequence[Any], root: type[BaseModel]) -> tuple[type[BaseModel] | None, Any]:
    """The model and the annotation that a location ends in."""
    model: type[BaseModel] | None = root
    annotation: Any = root
    for part in location:
        if isinstance(part, int):  # an item of a list: its model is already found
            continue
        if model is None or part not in model.model_fields:
            break
        annotation = model.model_fields[part].annotation
        nested = [a for a in _annotations(annotation) if isinstance(a, type)]
        model = next((a for a in nested if issubclass(a, BaseModel)), None)
    return model, annotation


def _fields(location: Sequence[Any], root: type[BaseModel]) -> list[str]:
    model, _ = _models(location, root)
    return list(model.model_fields) if model is not None else []


def _literals(location: Sequence[Any], root: type[BaseModel]) -> list[Any]:
    _, annotation = _models(location, root)
    parts = _annotations(annotation)
    options = [v for a in parts if get_origin(a) is Literal for v in get_args(a)]
    return [*options, "null"] if options and type(None) in parts else options
