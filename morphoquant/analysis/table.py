"""The comparison table: accuracy beside the unquantized model's, in the same harness.

Whatever differs between the rows, beyond what the methods are, becomes a footnote by itself. Every
difference is tested on the same questions, and one that is not resolved is marked as such. Nothing
here depends on how long a run took or which came first: seconds have their own table (``cost``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from morphoquant.analysis.paired import (
    CONFIDENCE,
    Difference,
    PairedDifference,
    holm,
    verdict,
)
from morphoquant.analysis.report import DETAILS, UNRESOLVED, Report, print_rich, to_markdown
from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import IDENTITY, read_result

__all__ = ["DETAILS", "Report", "comparison", "load_runs", "print_rich", "to_markdown"]

SHARED = {
    "scope": lambda run: run["scope"]["hash"],
    "calibration samples": lambda run: run["calibration"]["ids_hash"],
    "evaluation questions": lambda run: run["question_ids"],
    "weight quantizer": lambda run: run["slots"]["weight"],
    "package versions": lambda run: json.dumps(run["versions"], sort_keys=True),
    "model": lambda run: run["model"],
}
"""What rows of one table must have in common, or be told apart by a footnote."""

TITLE = "Accuracy in percent (difference to fp16 in points)"

Found = Mapping[tuple[str, str], PairedDifference]
"""Fingerprints of a run and of what it is compared with -> their difference."""


def load_runs(directories: Sequence[Path], root: Path | None = None) -> list[dict[str, Any]]:
    """Results of finished runs, each preceded by its unquantized reference.

    Args:
        directories: run directories.
        root: where to look for references; default: beside each run.

    Raises:
        HarnessError: one of the directories holds no finished run.
    """
    runs: dict[str, dict[str, Any]] = {}
    for directory in directories:
        result = read_result(Path(directory))
        if result is None:
            raise HarnessError(f"{directory}: no finished run here (result.json is missing)")
        wanted = result.get("reference")
        if wanted and wanted not in runs:
            beside = root if root is not None else Path(directory).parent
            for candidate in sorted(beside.glob(f"*-{wanted[:10]}")):
                reference = read_result(candidate)
                if reference is not None:
                    runs[wanted] = {**reference, "path": str(candidate)}
        runs[result["fingerprint"]] = {**result, "path": str(directory)}
    return sorted(runs.values(), key=lambda run: run["method"] != "fp16")


def _benchmarks(runs: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run["accuracy"]))


def row_labels(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Fingerprint -> the method's name, and where one method has several rows, what differs.

    A sweep over ``method.activation.range.p`` is several rows called morphoquant otherwise. The
    difference is read from the run directories' configs.
    """
    labels = {}
    for run in runs:
        alike = [r for r in runs if (r["method"], r["scheme"]) == (run["method"], run["scheme"])]
        configs = [_flat_config(r) for r in alike]
        own = _flat_config(run)
        differing = [
            key
            for key in dict.fromkeys(k for config in configs for k in config)
            if any(config.get(key) != own.get(key) for config in configs)
        ]
        # A choice's name says it, where the choice differs: its other fields follow from it.
        named = [key for key in differing if key.endswith(".name")]
        told = [
            key
            for key in differing
            if key in named or not any(key.startswith(n.removesuffix("name")) for n in named)
        ]
        parts = [f"{_short(key)}={own.get(key)}" for key in told]
        labels[run["fingerprint"]] = " ".join([run["method"], *parts])
    return labels


def _short(key: str) -> str:
    return key.removeprefix("method.").removesuffix(".name").removeprefix("activation.")


def _flat_config(run: dict[str, Any]) -> dict[str, Any]:
    """``a.b.c`` -> value, of the config in the run's directory; empty without one."""
    try:
        identity = json.loads((Path(run["path"]) / IDENTITY).read_text())
    except (KeyError, OSError, ValueError):
        return {}
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)
        else:
            flat[prefix] = value

    walk("", identity.get("config", {}))
    return flat


def comparison(runs: Sequence[dict[str, Any]], found: Found | None = None) -> pd.DataFrame:
    """One row per run.

    Args:
        runs: as ``load_runs`` returns them.
        found: differences of runs to their references (``pairs.compare_runs``); what it does not
            hold has neither interval nor test.

    Returns:
        Columns ``method``, ``scheme``; per benchmark and for their ``mean`` the accuracy (percent)
        and its ``DETAILS``: ``Δ``, the difference to the run's own reference in points, its 95 %
        interval ``low``, ``high``, ``p`` of the exact McNemar test, ``p adjusted`` (Holm, over all
        differences of this table), ``verdict``; effective ``W bits`` and ``A bits``; ``empty`` and
        ``unparsed`` answers.
    """
    by_fingerprint = {run["fingerprint"]: run for run in runs}
    labels = row_labels(runs)
    names = [*_benchmarks(runs), "mean"]
    rows: list[dict[str, Any]] = []
    tested: dict[tuple[int, str], Difference] = {}
    for i, run in enumerate(runs):
        reference = by_fingerprint.get(run.get("reference") or "")
        pair = (found or {}).get((run["fingerprint"], run.get("reference") or ""))
        row: dict[str, Any] = {"method": labels[run["fingerprint"]], "scheme": run["scheme"]}
        for name in names:
            value, base = (_accuracy(side, name) for side in (run, reference))
            row |= {name: value, f"Δ {name}": value - base}
            part = (pair.mean if name == "mean" else pair.benchmarks.get(name)) if pair else None
            for detail in ("low", "high", "p"):
                row[f"{detail} {name}"] = getattr(part, detail, math.nan)
            row |= {f"p adjusted {name}": math.nan, f"verdict {name}": None}
            if part:
                tested[i, name] = part
        if any(r.get("held_out") for r in runs):
            row["held-out KL"] = (run.get("held_out") or {}).get("kl", math.nan)
        row["W bits"] = run["bits"]["weight"]
        row["A bits"] = run["bits"]["activation"]
        row["empty"] = sum(answers["empty"] for answers in run["accuracy"].values())
        row["unparsed"] = sum(answers["unparsed"] for answers in run["accuracy"].values())
        rows.append(row)
    adjusted = holm(pd.Series([part.p for part in tested.values()], dtype=float))
    for ((i, name), part), p in zip(tested.items(), adjusted, strict=True):
        rows[i] |= {f"p adjusted {name}": p, f"verdict {name}": verdict(part, p)}
    return pd.DataFrame(rows)


def _accuracy(run: Mapping[str, Any] | None, name: str) -> float:
    if run is None:
        return math.nan
    value = run["mean"] if name == "mean" else run["accuracy"].get(name, {}).get("value")
    return math.nan if value is None else float(value)


def footnotes(runs: Sequence[dict[str, Any]], frame: pd.DataFrame | None = None) -> list[str]:
    """What a reader has to know: what differs between the rows, and how differences were tested.

    Args:
        runs: of the table.
        frame: the table, where it holds tested differences.
    """
    notes = unequal(runs)
    sizes = {name: run["accuracy"][name]["n"] for run in runs for name in run["accuracy"]}
    smallest = min(sizes.values(), default=0)
    if smallest:
        worst = 100 * math.sqrt(0.25 / smallest)
        counted = ", ".join(f"{name} {n}" for name, n in sizes.items())
        notes.append(
            f"Questions: {counted}. One binomial standard error of an accuracy by itself is up to "
            f"{worst:.1f} points at n = {smallest}; differences are those of the same questions, "
            f"which have less noise."
        )
    if frame is not None:
        notes += resolution(frame, "the number in parentheses, to fp16")
    return notes + caveats(runs)


def resolution(frame: pd.DataFrame, what: str, correction: str = "Holm's") -> list[str]:
    """What the mark says; nothing where nothing was tested.

    Args:
        frame: its ``p adjusted <column>`` say how many tests there were.
        what: the difference that is meant.
        correction: the name of the correction, in the genitive.
    """
    columns = [c for c in frame if str(c).startswith("p adjusted")]
    tests = int(frame[columns].notna().sum().sum())
    if not tests:
        return []
    return [
        f"{UNRESOLVED}: the difference ({what}) is not resolved: its {100 * CONFIDENCE:g} % "
        f"bootstrap interval covers zero, or its exact McNemar test does not stand after "
        f"{correction} correction for the {tests} comparisons of this table. That is not to say "
        f"that there is none. Intervals and p values: the CSV file."
    ]


def unequal(runs: Sequence[dict[str, Any]], apart: Sequence[str] = ()) -> list[str]:
    """One footnote for everything in ``SHARED`` (but ``apart``) that the rows do not share."""
    notes, labels = [], row_labels(runs)
    for what, read in SHARED.items():
        if what in apart:
            continue
        groups: dict[str, list[str]] = {}
        for run in runs:
            if what == "weight quantizer" and run["slots"]["weight"] == "none":
                continue
            if what == "calibration samples" and run["calibration"]["ids_hash"] is None:
                continue  # the unquantized model reads none
            row = f"{labels[run['fingerprint']]} {run['scheme']}"
            groups.setdefault(read(run), []).append(row)
        if len(groups) > 1:
            spelt = what in ("weight quantizer", "model")
            shown = "; ".join(
                f"{value if spelt else f'set {i}'}: {', '.join(dict.fromkeys(names))}"
                for i, (value, names) in enumerate(groups.items(), 1)
            )
            notes.append(f"Not the same {what} in every row: {shown}.")
    return notes


def caveats(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What the accuracies themselves hold that is not the methods' doing."""
    notes = []
    unparsed = [run for run in runs if any(a["unparsed"] for a in run["accuracy"].values())]
    if unparsed:
        notes.append(
            "Unparsed answers name no choice; the stock scoring of MMMU and AIR-Bench gives each "
            "a random one (seeded), so a part of those scores is luck."
        )
    leaking = {}
    for run in runs:
        if run["method"] != "fp16" and run["calibration"].get("leaked"):
            leaking[run["calibration"].get("name", "")] = run["calibration"]["leaked"]
    for name, count in leaking.items():
        notes.append(
            f"LEAKS: calibration {name!r} holds {count} prompts that are also evaluated. Compare "
            "such rows with nothing but each other."
        )
    if any(run["model"].startswith("tiny_omni") for run in runs):
        engineered = any(run["model"] == "tiny_omni" for run in runs)
        notes.append(
            "The embedded model is for plumbing, regressions and the direction of effects: it "
            "cannot rank good methods." + (" Its outliers are engineered." if engineered else "")
        )
    return notes


def with_failures(frame: pd.DataFrame, failed: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table with a row for every job of a sweep that failed (no numbers)."""
    rows = [
        {"method": note.get("method", note["overrides"]), "scheme": note.get("scheme", "failed")}
        for note in failed
    ]
    return pd.concat([frame, pd.DataFrame(rows)], ignore_index=True) if rows else frame


def failure_notes(failed: Sequence[dict[str, Any]]) -> list[str]:
    """Why each failed job failed, on one line each."""
    return [f"Failed: {note['overrides']}: {' '.join(note['error'].split())}" for note in failed]
