"""What accuracy costs: effective bits against the difference to the unquantized model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from morphoquant.analysis.figures.style import GREY, SMALL, TEXT, TableError, figure, plain, require

WIDTHS = {"A bits": "effective activation bits", "W bits": "effective weight bits"}
NUMBERS = ["difference", "low", "high"]
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, without yellow, which white swallows."""
SHAPES = "osD^vPX"
APART = 0.02
"""Of the axis: by how much rows with the same bits are drawn beside each other."""
SAME = 0.02
"""Bits. Nearer ones are drawn beside each other."""


def accuracy_over_bits(table: pd.DataFrame, base: float | None = None) -> Figure:
    """Difference to the unquantized model against effective bits, with intervals; zero is marked.

    A hollow point's interval covers zero. Rows with the same bits are drawn side by side, a
    fiftieth of the axis apart.

    Args:
        table: ``label``, ``A bits``, ``W bits`` (effective, scales and compensation included),
            ``difference`` and the interval's ends ``low`` and ``high`` (points); one row per run.
        base: accuracy of the unquantized model in percent, which the second vertical axis starts
            from; without one there is no such axis.

    Raises:
        TableError: no rows, a missing column, or no finite difference.
    """
    require(table, ("label", *WIDTHS, *NUMBERS), "bits")
    rows = table[np.isfinite(table["difference"].astype("float64"))]
    if rows.empty:
        raise TableError("column 'difference' of table 'bits' has no finite value")
    styles = {
        label: {"color": colour, "marker": shape}
        for label, (shape, colour) in zip(
            dict.fromkeys(rows["label"]),
            ((shape, colour) for shape in SHAPES for colour in PALETTE),
            strict=False,
        )
    }
    zero = "unquantized" if base is None else f"unquantized ({base:.1f} %)"
    made = figure("Mean accuracy over effective bits, beside the unquantized model", 9.0, 3.6)
    panels = made.subplots(1, len(WIDTHS), sharey=True)
    for panel, (column, unit) in zip(panels, WIDTHS.items(), strict=True):
        plain(panel, x=unit, y="difference (points)" if panel is panels[0] else "")
        panel.axhline(0.0, color="black", linewidth=1.0, label=zero)
        low, high = rows[column].min(), rows[column].max()
        room = max(0.15 * (high - low), 0.25)
        panel.set_xlim(low - room, high + room)
        _points(panel, rows, column, styles, APART * (high - low + 2 * room))
    if base is not None:
        second = panels[-1].secondary_yaxis(
            "right", functions=(lambda d: d + base, lambda accuracy: accuracy - base)
        )
        second.set_ylabel("mean accuracy (%)", fontsize=TEXT)
        second.tick_params(labelsize=SMALL)
        second.spines["right"].set_color(GREY)
    handles, labels = panels[0].get_legend_handles_labels()
    made.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 4 if max(map(len, labels)) < 24 else 2),
        fontsize=TEXT,
        frameon=False,
    )
    return made


def _points(
    panel: Any, rows: pd.DataFrame, column: str, styles: Mapping[str, dict[str, Any]], apart: float
) -> None:
    for row, shift in zip(rows.to_dict("records"), _beside(rows[column].tolist()), strict=True):
        style = styles[row["label"]]
        covers = not (row["low"] > 0 or row["high"] < 0)
        down, up = row["difference"] - row["low"], row["high"] - row["difference"]
        panel.errorbar(
            row[column] + shift * apart,
            row["difference"],
            yerr=np.nan_to_num([[down], [up]]),
            fmt=style["marker"],
            color=style["color"],
            markerfacecolor="white" if covers else style["color"],
            markersize=6,
            capsize=3,
            linewidth=1.4,
            label=row["label"],
        )


def _beside(values: Sequence[float]) -> list[float]:
    """Steps to the side for every value, so that equal ones do not lie on each other."""
    order = np.argsort(values, kind="stable")
    shifts = [0.0] * len(values)
    together = itertools.groupby(order, key=lambda i: round(values[i] / SAME))
    for _, members in together:
        alike = list(members)
        for place, i in enumerate(alike):
            shifts[i] = place - (len(alike) - 1) / 2
    return shifts
