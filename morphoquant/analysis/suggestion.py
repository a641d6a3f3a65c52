"""Mixed precision from a sensitivity sweep: a choice of ``bits`` that can be run and copied.

Units that partition the scope (blocks, input groups, or cells) are given widths under a budget of
effective bits (:mod:`morphoquant.analysis.allocation`). The loss of a unit at a width is its KL
divergence there, measured with nothing else quantized. Where a width was not measured, the loss is
scaled from the nearest that was, a factor of 4 per bit: rounding noise has a quarter of the power
with every bit, and a KL divergence is quadratic in a small change of the logits.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from morphoquant.analysis.allocation import Allocation, Candidate, Option, allocate
from morphoquant.analysis.sensitivity import UnitRun, config_of, manifest_of, read_units
from morphoquant.config.method import FIXED_WIDTH, MethodConfig
from morphoquant.config.schema import SensitivityConfig
from morphoquant.config.units import ALL, PARTITIONS
from morphoquant.errors import HarnessError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NAME = "suggestion"
"""Of the file ``bits/suggestion.yaml`` in a sweep's folder, and of the choice it makes."""
FOLDER = "bits"
OWN = ("experiment", "unit", "unit_kind", "bits", "report", "sensitivity", "hydra")
"""Overrides of the sweep that its suggestion does not repeat."""


@dataclass(frozen=True)
class Suggestion:
    """Widths for every unit of one kind.

    Attributes:
        kind: ``block``, ``group`` or ``cell``.
        scheme: nominal widths where nothing else is said.
        allocation: the choice and what it is predicted to cost.
        patterns: unit -> patterns of its linears.
        uniform: for comparison: width -> predicted loss with every unit at that width.
    """

    kind: str
    scheme: tuple[int, int]
    allocation: Allocation
    patterns: dict[str, tuple[str, ...]]
    uniform: dict[str, float]

    def bits(self) -> dict[str, Any]:
        """The fields of ``bits``: base widths, and an override for every unit that differs."""
        weight, activation = self.scheme
        overrides = [
            {"linears": pattern, "weight": option.weight, "activation": option.activation}
            for unit, option in self.allocation.chosen.items()
            if (option.weight, option.activation) != self.scheme
            for pattern in self.patterns[unit]
        ]
        return {"weight": weight, "activation": activation, "overrides": overrides}


def suggest(
    notes: Sequence[Mapping[str, Any]], root: Path | None, settings: SensitivityConfig
) -> tuple[list[Suggestion], list[str]]:
    """A suggestion for every kind of unit whose sweep is complete, the cheapest first.

    Args:
        notes: what the jobs of the sweep left.
        root: folder of the run directories.
        settings: budget and widths.

    Returns:
        The suggestions by predicted loss, and for every kind without one the reason.
    """
    units, _ = read_units(notes, root)
    whole = next((u for u in units if u.unit == ALL and u.result), None)
    if whole is None or whole.result is None:
        return [], ["No suggestion: it needs the run of unit=all, to know what is in scope."]
    tokens = {r["name"]: r["tokens"] for r in manifest_of(whole.result)}
    found, missing = [], []
    for kind in PARTITIONS:
        runs = [u for u in units if u.kind == kind]
        covered = {r["name"] for u in runs if u.result for r in manifest_of(u.result)}
        if not runs:
            continue
        if covered != set(tokens) or any(u.result is None for u in runs):
            missing.append(f"No suggestion for {kind}s: not every {kind} was measured.")
            continue
        try:
            found.append(_of_kind(kind, runs, tokens, settings))
        except HarnessError as error:
            missing.append(f"No suggestion for {kind}s: {error}")
    return sorted(found, key=lambda s: s.allocation.loss), missing


def _of_kind(
    kind: str, runs: Sequence[UnitRun], tokens: Mapping[str, int], settings: SensitivityConfig
) -> Suggestion:
    by_unit: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        assert run.result is not None
        by_unit.setdefault(run.unit, []).append(run.result)
    candidates, patterns = [], {}
    for unit, results in by_unit.items():
        candidates.append(_candidate(unit, results, tokens, settings))
        only = config_of(results[0])["model"]["scope"]["only"]
        patterns[unit] = tuple(only)
    allocation = allocate(candidates, settings.budget)
    used = [(o.weight, o.activation) for o in allocation.chosen.values()]
    base = min(sorted(set(used)), key=lambda pair: -used.count(pair))  # fewest overrides
    uniform: dict[str, float] = {}
    shared = set.intersection(*({(o.weight, o.activation) for o in c.options} for c in candidates))
    for weight, activation in sorted(shared):
        losses = [
            o.loss
            for c in candidates
            for o in c.options
            if (o.weight, o.activation) == (weight, activation)
        ]
        uniform[f"w{weight}a{activation}"] = sum(losses)
    return Suggestion(kind, base, allocation, patterns, uniform)


def _candidate(
    unit: str,
    results: Sequence[dict[str, Any]],
    tokens: Mapping[str, int],
    settings: SensitivityConfig,
) -> Candidate:
    """A unit with its options: what was measured, other widths, and 16 bits.

    ``tokens`` that a linear read are of one run for all units: answers differ in length.
    """
    linears = [{**r, "tokens": tokens[r["name"]]} for r in manifest_of(results[0])]
    method = MethodConfig.model_validate_json(json.dumps(config_of(results[0])["method"]))
    measured = {}
    for result in results:
        width = config_of(result)["bits"]
        pair = (width["weight"], width["activation"])
        loss = float(result["logits"]["kl"])
        measured[pair] = Option(*pair, *_spent(result), loss)
    options = dict(measured)
    for pair in _further(method, list(measured), settings):
        options.setdefault(pair, _modelled(pair, measured, method, linears))
    options[16, 16] = Option(16, 16, 16.0, 16.0, 0.0)
    weights = float(sum(r["in_features"] * r["out_features"] for r in linears))
    return Candidate(unit, weights, _elements(linears), tuple(options[p] for p in sorted(options)))


def _spent(result: Mapping[str, Any]) -> tuple[float, float]:
    """Effective bits of weights and activations of a unit's run."""
    return float(result["bits"]["weight"]), float(result["bits"]["activation"])


def _inputs(linears: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One record for every activation that was quantized (linears share an input group's)."""
    return list({(r["name"].rsplit(".", 1)[0], r["group"]): r for r in linears}.values())


def _elements(linears: Sequence[Mapping[str, Any]]) -> float:
    """Activation elements that went through, counted as the manifest counts them."""
    return float(sum(r["in_features"] * max(r["tokens"], 1) for r in _inputs(linears)))


def _further(
    method: MethodConfig, measured: Sequence[tuple[int, int]], settings: SensitivityConfig
) -> Iterator[tuple[int, int]]:
    """Pairs of widths besides the measured ones that the method can be given."""
    low = min(measured)
    if low[0] != low[1] and 16 not in low:
        return  # how much of the loss is the weights' and how much the activations' is not known
    for width in settings.widths:
        weight, activation = (side if side >= 16 else width for side in low)
        own = FIXED_WIDTH.get(method.weight.format)
        allowed = own is None or weight in (own, 16) or method.weight.fallback_format is not None
        own = FIXED_WIDTH.get(method.activation.format)
        if width < 16 and allowed and (own is None or activation in (own, 16)):
            yield weight, activation


def _modelled(
    pair: tuple[int, int],
    measured: Mapping[tuple[int, int], Option],
    method: MethodConfig,
    linears: Sequence[Mapping[str, Any]],
) -> Option:
    """An option that was not measured, from the nearest that was (the narrower of two)."""
    from morphoquant.quantization.install import describe_activation
    from morphoquant.quantization.weights import storage_bits

    near = min(measured, key=lambda p: (abs(min(p) - min(pair)), min(p)))
    option = measured[near]

    def weight_at(width: int) -> float:
        shapes = [(r["out_features"], r["in_features"]) for r in linears]
        sizes = [out * into for out, into in shapes]
        bits = [storage_bits(shape, method.weight, width) for shape in shapes]
        return sum(s * b for s, b in zip(sizes, bits, strict=True)) / sum(sizes)

    def activation_at(width: int) -> float:
        if width >= 16:
            return 16.0
        rows = _inputs(linears)
        sizes = [r["in_features"] * max(r["tokens"], 1) for r in rows]
        bits = [
            describe_activation(method.activation, width, r["in_features"], None)["base_bits"]
            for r in rows
        ]
        return float(sum(s * b for s, b in zip(sizes, bits, strict=True)) / sum(sizes))

    # What a compensation keeps in high precision comes on top, at most as much as at fewer bits.
    weight = weight_at(pair[0]) + max(option.weight_bits - weight_at(near[0]), 0.0)
    activation = activation_at(pair[1]) + max(option.activation_bits - activation_at(near[1]), 0.0)
    loss = option.loss * 4.0 ** (min(near) - min(pair))
    return Option(*pair, min(weight, 16.0), min(activation, 16.0), loss, measured=False)


# ------------------------------------------------------------------------------- words and files


def leave(
    frame: pd.DataFrame,
    notes: Sequence[Mapping[str, Any]],
    root: Path,
    settings: SensitivityConfig,
    sweep: Path,
) -> list[Path]:
    """What a sensitivity sweep leaves beside its table: suggestions and figures.

    Prints the suggestions with the command that runs the best of them, or why there are none.

    Returns:
        The figures' paths.
    """
    suggestions, missing = suggest(notes, root, settings)
    write(suggestions, notes, sweep)
    for suggestion in suggestions:
        print(summary(suggestion))
    if suggestions:
        print(f"Run the first: {command_of(notes, sweep, NAME)}")
    for reason in missing:
        print(reason)
    return list(_figures(frame, sweep))


def _figures(frame: pd.DataFrame, sweep: Path) -> Iterator[Path]:
    from morphoquant.analysis.figures import cell_heatmap, sensitivity_plot
    from morphoquant.tracking.rundir import write_atomic

    measured = frame[frame["KL"].notna()]
    draw: dict[str, Callable[[pd.DataFrame], Figure]] = {}
    if measured["kind"].isin(("block", "group", "modality")).any():
        draw["sensitivity"] = sensitivity_plot
    if (measured["kind"] == "cell").any():
        draw["sensitivity_cells"] = cell_heatmap
    for name, make in draw.items():
        path = sweep / f"{name}.png"
        write_atomic(path, partial(make(frame).savefig, format="png", dpi=110))
        yield path


def write(
    suggestions: Sequence[Suggestion], notes: Sequence[Mapping[str, Any]], sweep: Path
) -> None:
    """Leave ``bits/suggestion.yaml`` (the best) and one file per kind in the sweep's folder."""
    from morphoquant.tracking.rundir import write_atomic

    for number, suggestion in enumerate(suggestions):
        command = command_of(notes, sweep, f"{NAME}_{suggestion.kind}")
        names = [f"{NAME}_{suggestion.kind}"] + ([NAME] if number == 0 else [])
        for name in names:
            text = to_yaml(suggestion, command.replace(f"{NAME}_{suggestion.kind}", name))
            path = sweep / FOLDER / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, partial(_write, text=text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def to_yaml(suggestion: Suggestion, command: str) -> str:
    """The suggestion as a choice of the group ``bits``, with what it was made of on top."""
    found = suggestion.allocation
    modelled = sum(not option.measured for option in found.chosen.values())
    uniform = ", ".join(f"{name} {loss:.3g}" for name, loss in suggestion.uniform.items())
    lines = [
        f"# Widths by {suggestion.kind}, from a sensitivity sweep. Run with",
        f"#   {command}",
        f"# Predicted: KL {found.loss:.3g} (all at {uniform}), {found.weight_bits:.2f} weight and "
        f"{found.activation_bits:.2f} activation bits.",
        "# Losses are taken as additive"
        + (f"; {modelled} of them are modelled, not measured." if modelled else "."),
    ]
    return "\n".join(lines) + "\n" + OmegaConf.to_yaml(OmegaConf.create(suggestion.bits()))


def command_of(notes: Sequence[Mapping[str, Any]], sweep: Path, name: str) -> str:
    """The command that runs a suggestion on the ground of its sweep."""
    note = next(note for note in notes if "run" in note)
    overrides = note.get("arguments") or note["overrides"].split()
    kept = [o for o in overrides if re.split(r"[.=/@]", o.lstrip("+~"))[0] not in OWN]
    if not any(o.startswith("method=") for o in kept):
        method = config_of({"path": note["run"]})["method"]["name"]
        kept.insert(0, f"method={method}")
    parts = [f"--config-dir={sweep}", *kept, f"{FOLDER}={name}"]
    return " ".join(["python run.py", *(shlex.quote(part) for part in parts)])


def summary(suggestion: Suggestion) -> str:
    """One suggestion in the terminal."""
    found = suggestion.allocation
    widths: dict[str, list[str]] = {}
    for unit, option in found.chosen.items():
        widths.setdefault(f"w{option.weight}a{option.activation}", []).append(unit)
    told = "; ".join(f"{width}: {', '.join(units)}" for width, units in sorted(widths.items()))
    return (
        f"Suggestion by {suggestion.kind}: predicted KL {found.loss:.3g} at "
        f"{found.weight_bits:.2f} weight and {found.activation_bits:.2f} activation bits. {told}"
    )
