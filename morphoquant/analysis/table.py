"""The comparison table: accuracy beside the unquantized model's, in the same harness.

Whatever differs between the rows, beyond what the methods are, becomes a footnote by itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import IDENTITY, read_result

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
TEXT = ("method", "scheme", "factor", "choice", "setting", "variant", "verdict")
"""Columns of words, shown left-aligned; all others are numbers."""


@dataclass(frozen=True)
class Report:
    """A finished table: its numbers for whoever computes on, its cells for whoever reads."""

    title: str
    frame: pd.DataFrame
    """Numbers as numbers, for CSV and figures."""
    cells: pd.DataFrame
    """The same rows as they are shown: rounded, an interval in one cell."""
    notes: list[str]

    def markdown(self) -> str:
        """The table in GitHub's markdown, with its footnotes."""
        return to_markdown(self.cells, self.notes)

    def show(self) -> None:
        """The table in the terminal."""
        print_rich(self.cells, self.notes, self.title)


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
            for candidate in beside.glob(f"*-{wanted[:10]}"):
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


def comparison(runs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per run.

    Columns: ``method``, ``scheme``; per benchmark its accuracy (percent) and ``Δ <benchmark>``,
    the difference to the run's own reference in points; ``mean`` and ``Δ mean`` over benchmarks;
    effective ``W bits`` and ``A bits``; ``empty`` and ``unparsed`` answers; seconds.
    """
    by_fingerprint = {run["fingerprint"]: run for run in runs}
    labels = row_labels(runs)
    rows = []
    for run in runs:
        reference = by_fingerprint.get(run.get("reference") or "")
        row: dict[str, Any] = {"method": labels[run["fingerprint"]], "scheme": run["scheme"]}
        for name in _benchmarks(runs):
            found = run["accuracy"].get(name)
            row[name] = found["value"] if found else math.nan
            base = reference["accuracy"].get(name) if reference else None
            row[f"Δ {name}"] = found["value"] - base["value"] if found and base else math.nan
        row["mean"] = math.nan if run["mean"] is None else run["mean"]
        asked = reference is not None and reference["mean"] is not None
        row["Δ mean"] = run["mean"] - reference["mean"] if reference and asked else math.nan
        if any(r.get("held_out") for r in runs):
            row["held-out KL"] = (run.get("held_out") or {}).get("kl", math.nan)
        row["W bits"] = run["bits"]["weight"]
        row["A bits"] = run["bits"]["activation"]
        row["empty"] = sum(found["empty"] for found in run["accuracy"].values())
        row["unparsed"] = sum(found["unparsed"] for found in run["accuracy"].values())
        row["quantize s"] = run["seconds"]["quantize"]
        row["evaluate s"] = run["seconds"]["evaluate"]
        rows.append(row)
    return pd.DataFrame(rows)


def footnotes(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader has to know: what differs between the rows, and how large the noise is."""
    notes = unequal(runs)
    sizes = {name: run["accuracy"][name]["n"] for run in runs for name in run["accuracy"]}
    smallest = min(sizes.values(), default=0)
    if smallest:
        worst = 100 * math.sqrt(0.25 / smallest)
        counted = ", ".join(f"{name} {n}" for name, n in sizes.items())
        notes.append(
            f"Questions: {counted}. One binomial standard error is up to {worst:.1f} points at "
            f"n = {smallest}: smaller differences mean nothing without a paired test."
        )
    notes += caveats(runs)
    if any(run["method"] != "fp16" for run in runs):
        notes.append("Simulated (fake) quantization: the seconds are not a speed of low precision.")
    return notes


def unequal(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One footnote for everything in ``SHARED`` that the rows do not share."""
    notes, labels = [], row_labels(runs)
    for what, read in SHARED.items():
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


def _cells(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headers and formatted cells; a difference stands in its accuracy's cell."""
    shown = [c for c in frame.columns if not c.startswith("Δ ")]
    rows = []
    for _, row in frame.iterrows():
        cells = []
        for column in shown:
            value = row[column]
            difference = row.get(f"Δ {column}")
            if isinstance(value, str):
                text = value
            elif pd.isna(value):
                text = "–"
            elif column in ("empty", "unparsed"):
                text = f"{int(value)}"
            elif column.endswith("KL"):
                text = f"{value:.3g}"
            elif column.endswith("bits"):
                text = f"{value:.2f}"
            else:
                text = f"{value:.1f}"
                if difference is not None and not pd.isna(difference):
                    text += f" ({difference:+.1f})"
            cells.append(text)
        rows.append(cells)
    return shown, rows


def to_markdown(frame: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """The table in GitHub's markdown, with its footnotes."""
    headers, rows = _cells(frame)
    lines = ["| " + " | ".join(headers) + " |"]
    lines.append("|" + "|".join("---" if h in TEXT else "---:" for h in headers) + "|")
    lines += ["| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |" for cells in rows]
    lines += [""] + [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def print_rich(frame: pd.DataFrame, notes: Sequence[str] = (), title: str = TITLE) -> None:
    """The table in the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=max(console.width, 190))
    headers, rows = _cells(frame)
    shown = Table(title=title, title_justify="left")
    for header in headers:
        side: Literal["left", "right"] = "left" if header in TEXT else "right"
        shown.add_column(header, justify=side, overflow="fold")  # never cut a name
    for cells in rows:
        shown.add_row(*map(escape, cells))
    console.print(shown)
    for i, note in enumerate(notes, 1):
        console.print(f"{i}. {note}", highlight=False, markup=False)
