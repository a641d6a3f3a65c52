"""A finished table: to look at, to read on, to compute with.

A difference stands in the cell of what it is a difference of; one that no test resolves is marked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from morphoquant.analysis.paired import HIGHER, LOWER
from morphoquant.tracking.rundir import write_atomic

TEXT = (
    *("method", "scheme", "factor", "choice", "setting", "variant", "verdict", "a", "b", "bits"),
    *("kind", "unit"),
)
"""Columns of words, shown left-aligned; all others are numbers."""

UNRESOLVED = "≈"
DETAILS = ("Δ", "low", "high", "p", "p adjusted", "verdict")
"""What a frame may hold of a column besides, as ``<detail> <column>``. The cell of the column shows
the difference, and ``UNRESOLVED`` unless its verdict is a plain ``higher`` or ``lower``."""


@dataclass(frozen=True)
class Report:
    """A finished table: its numbers for whoever computes on, its cells for whoever reads."""

    title: str
    frame: pd.DataFrame
    """Numbers as numbers, for CSV and figures."""
    cells: pd.DataFrame
    """The same rows as they are shown: rounded, an interval in one cell."""
    notes: list[str]
    parts: Mapping[str, Report] = field(default_factory=dict)
    """Further tables of the same runs by name, which is that of their files."""
    printed: bool = True
    """Whether it is worth its place in the terminal; its files are written in any case."""
    first: int | None = None
    """Rows that the terminal shows; all others are in the files only."""

    def markdown(self) -> str:
        """The table in GitHub's markdown, with its footnotes."""
        return to_markdown(self.cells, self.notes)

    def write(self, folder: Path, name: str = "table") -> dict[str, Path]:
        """``<name>.csv`` (all numbers) and ``<name>.md``, and the same of every part.

        The bytes follow from the runs alone: neither from the order in which they were finished
        nor from how often one was interrupted. What a machine took is in the part ``cost``.

        Returns:
            Name -> the markdown file.

        Raises:
            StorageError: the folder cannot be written.
        """
        text, csv = self.markdown(), self.frame.to_csv(index=False, lineterminator="\n")
        write_atomic(folder / f"{name}.csv", lambda p: _fill(p, csv))
        write_atomic(folder / f"{name}.md", lambda p: _fill(p, text))
        written = {name: folder / f"{name}.md"}
        for inner, part in self.parts.items():
            written |= part.write(folder, inner)
        return written

    def show(self) -> None:
        """The table in the terminal, and its parts below it."""
        print_rich(self.cells[: self.first], self.notes, self.title)
        for part in self.parts.values():
            if part.printed:
                part.show()


def _fill(path: Path, text: str) -> None:
    path.write_bytes(text.encode())


def formatted(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Headers and formatted cells; a difference stands in its accuracy's cell."""
    details = {f"{detail} {column}" for column in frame for detail in DETAILS}
    shown = [str(c) for c in frame.columns if c not in details]
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
                    text += f" ({difference:+.1f}{mark(row.get(f'verdict {column}'))})"
            cells.append(text)
        rows.append(cells)
    return shown, rows


def mark(said: Any) -> str:
    """What follows a difference with this verdict; nothing where it is resolved, or has none."""
    return f" {UNRESOLVED}" if isinstance(said, str) and said not in (HIGHER, LOWER) else ""


def to_markdown(frame: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """The table in GitHub's markdown, with its footnotes."""
    headers, rows = formatted(frame)
    lines = ["| " + " | ".join(headers) + " |"]
    lines.append("|" + "|".join("---" if h in TEXT else "---:" for h in headers) + "|")
    lines += ["| " + " | ".join(c.replace("|", r"\|") for c in cells) + " |" for cells in rows]
    lines += [""] + [f"{i}. {note}" for i, note in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def print_rich(frame: pd.DataFrame, notes: Sequence[str] = (), title: str = "") -> None:
    """The table in the terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.measure import Measurement
    from rich.table import Table

    console = Console()
    headers, rows = formatted(frame)
    shown = Table(title=title, title_justify="left")
    for header in headers:
        side: Literal["left", "right"] = "left" if header in TEXT else "right"
        shown.add_column(header, justify=side, overflow="fold")  # never cut a name
    for cells in rows:
        shown.add_row(*map(escape, cells))
    if not console.is_terminal:  # a file has all the room that a table takes
        natural = Measurement.get(console, console.options.update(max_width=10_000), shown).maximum
        console = Console(width=max(console.width, 190, natural))
    console.print(shown)
    for i, note in enumerate(notes, 1):
        console.print(f"{i}. {note}", highlight=False, markup=False)
