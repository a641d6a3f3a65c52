"""What all figures share: colours, names of layers and groups, checks of tables, plain panels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from morphoquant.errors import HarnessError

MODALITIES = ("text", "image", "video", "audio", "all")
GROUPS = ("attn_in", "attn_out", "mlp_in", "mlp_out")
TOWERS = ("decoder", "vision", "audio")

COLOURS = {
    "text": "#0072B2",
    "image": "#D55E00",
    "video": "#009E73",
    "audio": "#CC79A7",
    "all": "#555555",
}
"""Of Okabe and Ito's palette, which people with any form of colour blindness can tell apart."""

MARKERS = {"text": "o", "image": "s", "video": "^", "audio": "D", "all": "x"}
GREY = "#999999"
UNOBSERVED = "#E4E4E4"
TITLE, TEXT, SMALL = 11, 8.5, 7.5
"""Font sizes in points."""


class TableError(HarnessError, ValueError):
    """A table that a figure cannot be drawn from: empty, or without a column or its values."""


def require(table: pd.DataFrame, columns: Iterable[str], what: str) -> pd.DataFrame:
    """The table, if it has rows and ``columns``.

    Args:
        table: as read from a run directory.
        columns: names that the figure needs.
        what: the table's name in the message, e.g. ``outliers``.

    Raises:
        TableError: the table is empty, or columns are missing (all of them are named).
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise TableError(f"table {what!r} has no column {', '.join(map(repr, missing))}")
    if table.empty:
        raise TableError(f"table {what!r} is empty")
    return table


def finite(table: pd.DataFrame, column: str, what: str) -> pd.Series:
    """A column as float64 in which everything that is not finite is NaN.

    Raises:
        TableError: no value is finite.
    """
    values = table[column].astype("float64")
    values = values.where(np.isfinite(values))
    if values.isna().all():
        raise TableError(f"column {column!r} of table {what!r} has no finite value")
    return values


def unique_rows(table: pd.DataFrame, keys: Sequence[str], what: str) -> None:
    """Refuse a table with two rows for one place: usually two runs that were concatenated.

    Raises:
        TableError: naming the first such place.
    """
    doubled = table.duplicated(list(keys))
    if doubled.any():
        place = ", ".join(str(value) for value in table.loc[doubled, list(keys)].iloc[0])
        raise TableError(f"table {what!r} has two rows for {place}: give the table of one run")


def ordered(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Distinct names: the known ones in their order, then the others by alphabet."""
    distinct = set(names)
    return [n for n in known if n in distinct] + sorted(distinct - set(known))


def tower_of(layer: str) -> str:
    """``decoder``, ``vision`` or ``audio``, read from a block's dotted name."""
    if "visual" in layer or "vision" in layer:
        return "vision"
    return "audio" if "audio" in layer else "decoder"


def _place(layer: str) -> tuple[int, float, str]:
    numbers = re.findall(r"\.(\d+)(?=\.|$)", layer)
    number = float(numbers[-1]) if numbers else np.inf
    return TOWERS.index(tower_of(layer)), number, layer


def layer_order(layers: Iterable[str]) -> list[str]:
    """Distinct block names by tower, then block number (10 after 9)."""
    return sorted(set(layers), key=_place)


def short_names(layers: Iterable[str]) -> dict[str, str]:
    """Block name -> ``L3`` (decoder), ``V3`` (vision), ``A3`` (audio), or ``V merger``.

    A name stays whole where shortening would make two blocks look alike.
    """
    letters = dict(zip(TOWERS, "LVA", strict=True))
    short = {}
    for layer in layer_order(layers):
        tower, number, _ = _place(layer)
        letter = letters[TOWERS[tower]]
        own = f"{number:.0f}" if np.isfinite(number) else f" {layer.rpartition('.')[2]}"
        short[layer] = letter + own
    taken = list(short.values())
    return {layer: name if taken.count(name) == 1 else layer for layer, name in short.items()}


def figure(title: str, width: float, height: float) -> Figure:
    """An empty figure in inches, with its title on the left."""
    made = Figure(figsize=(width, height), layout="constrained")
    made.suptitle(title, fontsize=TITLE, x=0.01, ha="left")
    return made


def plain(axes: Any, title: str = "", x: str = "", y: str = "") -> None:
    """The common look of a panel: small print, a light grid, no box."""
    axes.set_title(title, fontsize=TEXT, loc="left")
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(which="both", labelsize=SMALL)
    axes.grid(color="#E8E8E8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def modality_line(modality: str) -> dict[str, Any]:
    """Keywords of a line that stands for a modality."""
    return {
        "color": COLOURS.get(modality, GREY),
        "marker": MARKERS.get(modality, "."),
        "markersize": 3,
        "linewidth": 1.2,
        "label": modality,
    }


def shared_legend(made: Figure, axes: Iterable[Any]) -> None:
    """One legend under all panels, each label once."""
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    known = ordered(handles, MODALITIES)
    made.legend(
        [handles[label] for label in known],
        known,
        loc="outside lower center",
        ncols=min(len(known), 6),
        fontsize=TEXT,
        frameon=False,
    )


def sparse_ticks(axis: Any, names: Sequence[str], room: int) -> None:
    """Label positions 0, 1, ... of an axis, every n-th one where more than ``room`` stand there."""
    step = -(-len(names) // room)
    axis.set_ticks(range(0, len(names), step), list(names[::step]))
