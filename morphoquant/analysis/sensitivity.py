"""The table of a sensitivity sweep: what each part of the model costs when it alone is quantized.

A job names its part as ``unit=<name>`` (``morphoquant.config.units``). Every row is compared with
the unquantized model, question by question (``paired``), and by the KL divergence of the next token
on calibration prompts, which moves long before an answer does. ``unit=all`` is everything at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from morphoquant.analysis import ablation, table
from morphoquant.analysis.cells import compared
from morphoquant.analysis.paired import (
    CONFIDENCE,
    RESAMPLES,
    PairedDifference,
    paired_difference,
)
from morphoquant.config.method import TOKEN_KINDS
from morphoquant.config.units import ALL, KINDS, kind_of
from morphoquant.errors import HarnessError

PREFIX = "unit="
TITLE = "Sensitivity: one part quantized at a time (difference to fp16 in points)"
SAME_PARTS = "scope"  # differs by intent
UNASKED = "no questions asked"


@dataclass(frozen=True)
class UnitRun:
    """One job of a sweep over units."""

    unit: str
    scheme: str
    """Nominal widths of what is quantized."""
    result: dict[str, Any] | None
    """Of the finished run, with its ``path``; None where it failed."""
    error: str = ""

    @property
    def kind(self) -> str:
        return kind_of(self.unit)

    @property
    def loss(self) -> float:
        """KL divergence to the unquantized model, mean over calibration prompts, in nats."""
        return float(((self.result or {}).get("logits") or {}).get("kl", math.nan))


def read_units(
    notes: Sequence[Mapping[str, Any]], root: Path | None = None
) -> tuple[list[UnitRun], list[dict[str, Any]]]:
    """The jobs of a sweep over units, and the unquantized references of those that came through.

    Raises:
        HarnessError: a job names no unit, two jobs are the same, or the rows are of several
            methods; a directory holds no finished run.
    """
    directories = list(dict.fromkeys(Path(note["run"]) for note in notes if "run" in note))
    loaded = table.load_runs(directories, root) if directories else []
    by_path = {Path(run["path"]): run for run in loaded}
    found: list[UnitRun] = []
    seen: dict[tuple[str, str], dict[str, Any] | None] = {}
    for note in notes:
        named = [o for o in note["overrides"].split() if o.lstrip("+").startswith(PREFIX)]
        if len(named) != 1:
            raise HarnessError(f"no {PREFIX}<name> in the job {note['overrides']!r}")
        unit = named[0].lstrip("+").removeprefix(PREFIX)
        run = by_path[Path(note["run"])] if "run" in note else None
        scheme = run["scheme"] if run else note.get("scheme", "failed")
        earlier = seen.get((unit, scheme))
        if run is not None and earlier is run:
            continue  # a modality keeps 16-bit weights, whatever the others' width
        seen[unit, scheme] = run
        found.append(UnitRun(unit, scheme, run, note.get("error", "")))
        if earlier is not None:
            raise HarnessError(
                f"two jobs of {PREFIX}{unit} at {scheme}: a report of sensitivity is of one "
                "method on one model. Sweep over unit and bits only, or set report=comparison"
            )
    wanted = set(directories)
    return found, [run for run in loaded if Path(run["path"]) not in wanted]


def config_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """The config in a run's directory.

    Raises:
        HarnessError: it cannot be read.
    """
    path = Path(run["path"]) / table.IDENTITY
    try:
        found: dict[str, Any] = json.loads(path.read_text())["config"]
    except (OSError, ValueError, KeyError) as error:
        raise HarnessError(f"{path}: no readable config of the run ({error})") from error
    return found


def sensitivity(
    notes: Sequence[Mapping[str, Any]],
    root: Path | None = None,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> table.Report:
    """What every unit costs, the dearest of each kind first.

    Args:
        notes: what the jobs left: ``{"overrides", "run"}`` or ``{"overrides", "error"}``.
        root: folder of the run directories, where the unquantized references are.
        confidence: level of the intervals.
        resamples: of the bootstrap.

    Returns:
        The report. Its frame has one row per job: ``kind``, ``unit``, ``scheme``;
        ``KL`` and ``KL <modality>`` of the prompts (nats); ``KL share`` (percent of the sum over
        units of its kind and scheme); ``weights`` (percent of the weights in ``all``); per
        benchmark the accuracy and ``Δ <benchmark>``; ``mean``, ``Δ mean``, ``low``, ``high``,
        ``p``, ``p adjusted``, ``gained``, ``lost``, ``verdict``; effective ``W bits``, ``A bits``.

    Raises:
        HarnessError: see :func:`read_units`.
    """
    units, references = read_units(notes, root)
    by_fingerprint = {run["fingerprint"]: run for run in references}
    runs = [u.result for u in units if u.result]
    benchmarks = list(dict.fromkeys(name for run in runs for name in run.get("accuracy") or {}))
    total = max((_weights(u.result) for u in units if u.unit == ALL and u.result), default=math.nan)
    rows: list[dict[str, Any]] = []
    tested: dict[int, PairedDifference] = {}
    for unit in units:
        base = by_fingerprint.get((unit.result or {}).get("reference") or "")
        difference = None
        if unit.result and base and benchmarks:
            difference = paired_difference(
                unit.result, base, confidence=confidence, resamples=resamples
            )
            tested[len(rows)] = difference
        rows.append(_row(unit, total, difference, benchmarks))
    frame = pd.DataFrame(rows)
    # Benjamini and Hochberg, as in an ablation.
    ablation.correct(frame, {(i, ""): difference.mean for i, difference in tested.items()})
    frame = _ordered(frame)
    if not benchmarks:
        told = ["mean", "Δ mean", "low", "high", "p", "p adjusted", "gained", "lost"]
        frame = frame.drop(columns=told)
    footnotes = [
        *_how(units, confidence, resamples, bool(benchmarks)),
        *additivity(units),
        *table.unequal(runs, apart=(SAME_PARTS, "weight quantizer")),
        *table.caveats(runs),
        *(ablation.unquantized(references) if benchmarks else ()),
        *table.failure_notes([dict(note) for note in notes if "error" in note]),
    ]
    return table.Report(TITLE, frame, _cells(frame, confidence), footnotes)


def _weights(run: Mapping[str, Any]) -> float:
    """Number of weights in scope, from the run's manifest."""
    return float(sum(r["in_features"] * r["out_features"] for r in manifest_of(run)))


def manifest_of(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The linears of a run's manifest.

    Raises:
        HarnessError: it cannot be read.
    """
    path = Path(run["path"]) / "manifest.json"
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text())["linears"]
    except (OSError, ValueError, KeyError) as error:
        raise HarnessError(f"{path}: no readable manifest ({error})") from error
    return found


def _row(
    unit: UnitRun,
    total: float,
    difference: PairedDifference | None,
    benchmarks: Sequence[str],
) -> dict[str, Any]:
    """One row of the frame; whatever is unknown is NaN."""
    run = unit.result
    logits = (run or {}).get("logits") or {}
    row: dict[str, Any] = {"kind": unit.kind, "unit": unit.unit, "scheme": unit.scheme}
    row["KL"], row["KL share"] = unit.loss, math.nan
    for kind in TOKEN_KINDS:
        row[f"KL {kind}"] = logits.get(f"kl/{kind}", math.nan)
    known = run is not None and unit.kind != "modality"
    row["weights"] = 100 * _weights(run) / total if run and known else math.nan
    row |= ablation.compared_columns(run, difference, benchmarks)
    if run is None:
        row["verdict"] = ablation.failed(unit.error)
    elif difference is None:
        row["verdict"] = UNASKED if not benchmarks else ablation.UNCOMPARED
    else:
        row["verdict"] = None
    row["W bits"] = run["bits"]["weight"] if run else math.nan
    row["A bits"] = run["bits"]["activation"] if run else math.nan
    return row


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Everything first, then kind by kind, the dearest unit on top; shares of each kind's sum."""
    order = {kind: i for i, kind in enumerate((ALL, *KINDS))}
    parts = frame["kind"] != ALL
    sums = frame[parts].groupby(["kind", "scheme"])["KL"].transform("sum")
    frame.loc[parts, "KL share"] = 100 * frame.loc[parts, "KL"] / sums.where(sums > 0)
    frame = frame.assign(place=frame["kind"].map(order), missing=frame["KL"].isna())
    frame = frame.sort_values(
        ["place", "missing", "scheme", "KL", "unit"], ascending=[True, True, True, False, True]
    )
    return frame.drop(columns=["place", "missing"]).reset_index(drop=True)


def additivity(units: Sequence[UnitRun]) -> list[str]:
    """How far single losses add up to the loss of everything at once, per kind and scheme."""
    notes = []
    whole = {u.scheme: u.loss for u in units if u.unit == ALL and u.result}
    for scheme, joint in whole.items():
        told = []
        for kind in KINDS:
            parts = [u.loss for u in units if u.kind == kind and u.scheme == scheme]
            if parts and not any(math.isnan(p) for p in parts):
                told.append(f"{kind}s {sum(parts):.3g}")
        if told:
            notes.append(
                f"Additivity at {scheme}: everything at once has KL {joint:.3g}; the sum over "
                f"{', over '.join(told)}. The suggestion takes losses as additive."
            )
    return notes


def _how(units: Sequence[UnitRun], confidence: float, resamples: int, asked: bool) -> list[str]:
    """How to read the columns."""
    notes = [
        "One unit is quantized, everything else in 16 bits: a block, an input group in all "
        "blocks, a cell (one group of one block), or the activations of one modality's tokens "
        "with 16-bit weights. The rows differ in scope by intent.",
        "KL: divergence (nats) of the next token's distribution from the unquantized model's, "
        "mean over calibration prompts, and over those of one modality. KL share: of the sum over "
        "its kind; weights: percent of all in scope.",
    ]
    if asked:
        notes.append(
            f"Differences are paired with the unquantized model, question by question; interval: "
            f"{100 * confidence:g} %, bootstrap percentile ({resamples} resamples); p: exact "
            f"McNemar, adjusted after Benjamini-Hochberg over {len(units)} rows."
        )
        sizes = {n: a["n"] for u in units if u.result for n, a in u.result["accuracy"].items()}
        notes.append(f"Questions: {', '.join(f'{n} {count}' for n, count in sizes.items())}.")
    return notes


def _cells(frame: pd.DataFrame, confidence: float) -> pd.DataFrame:
    """The frame as it is shown, which has to fit a terminal."""
    shown = compared(frame, confidence) if "p" in frame else frame.copy()
    shown = shown.drop(columns=["p", "changed answers"], errors="ignore")
    if "mean" in shown:
        shown["verdict mean"] = shown["verdict"]
    if frame.loc[frame["kind"] != "modality", "scheme"].nunique() == 1:
        shown = shown.drop(columns="scheme")  # of modalities it follows: 16-bit weights
    for column in (c for c in shown.columns if c == "KL" or c.startswith("KL ")):
        if column != "KL share":
            shown[column] = [_small(value) for value in frame[column]]
    return shown


def _small(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "0" if value == 0 else f"{value:.2g}"
