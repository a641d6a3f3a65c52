"""Which parts of a model are sensitive: bars and heat maps of a sweep over units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from morphoquant.analysis.figures.heatmap import spelt
from morphoquant.analysis.figures.style import (
    COLOURS,
    GREY,
    GROUPS,
    MODALITIES,
    SMALL,
    TEXT,
    TOWERS,
    UNOBSERVED,
    TableError,
    figure,
    ordered,
    plain,
    require,
)

KINDS = ("block", "group", "modality")
FLOOR = 1e-12  # nats; a KL divergence below is float noise, and a logarithm needs a bound


@dataclass(frozen=True)
class _Scale:
    """Both ends of a logarithmic scale, in nats."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """0 at the low end (and below), 1 at the high end."""
        span = np.log(self.high / self.low) or 1.0
        return float(np.log(max(value, self.low) / self.low) / span)


def sensitivity_plot(
    table: pd.DataFrame, *, title: str = "Sensitivity: one part quantized at a time"
) -> Figure:
    """A row of panels per kind of unit: KL divergence, where it shows, and lost accuracy.

    Blocks stand in running order, groups and modalities likewise, so that depth can be read off.
    Left the KL divergence over all prompts (logarithmic); in the middle the same for the prompts of
    each modality; right, where questions were asked, the difference in accuracy with its interval
    (hollow and grey where it covers zero). Cells have :func:`cell_heatmap`.

    Args:
        table: ``kind``, ``unit``, ``scheme``, ``KL`` and ``KL <modality>`` in nats; ``Δ mean``,
            ``low`` and ``high`` in points where there are questions. The first scheme of each
            kind is drawn.
        title: of the figure.

    Raises:
        TableError: a missing column, no row of a kind that is drawn, or two rows for one unit.
    """
    require(table, ("kind", "unit", "scheme", "KL"), "sensitivity")
    rows = _rows(table, KINDS)
    kinds = [kind for kind in KINDS if (rows["kind"] == kind).any()]
    if not kinds:
        raise TableError("table 'sensitivity' has no block, group or modality with a KL divergence")
    asked = "low" in rows.columns and rows["low"].notna().any()
    heights = [max(2, int((rows["kind"] == kind).sum())) for kind in kinds]
    made = figure(title, 10.5 if asked else 7.5, 1.2 + 0.55 * len(kinds) + 0.22 * sum(heights))
    grid = made.subplots(
        len(kinds),
        3 if asked else 2,
        squeeze=False,
        gridspec_kw={"height_ratios": heights, "width_ratios": [3, 2, 3][: 3 if asked else 2]},
    )
    modalities = [m for m in MODALITIES if f"KL {m}" in rows and rows[f"KL {m}"].notna().any()]
    values = rows[["KL", *(f"KL {m}" for m in modalities)]].to_numpy(dtype=float)
    top = max(float(np.nanmax(values)), 10 * FLOOR)
    seen = values[values > FLOOR]
    norm = _Scale(float(seen.min()) if seen.size else FLOOR, top)
    for panels, kind in zip(grid, kinds, strict=True):
        part = rows[rows["kind"] == kind]
        _bars(panels[0], part, kind, norm)
        _prompts(panels[1], part, modalities, norm)
        if asked:
            _differences(panels[2], part)
    return made


def cell_heatmap(table: pd.DataFrame, *, title: str = "Sensitivity by layer and group") -> Figure:
    """KL divergence (nats) of every cell: rows are blocks, columns input groups.

    Args:
        table: as for :func:`sensitivity_plot`, with rows of kind ``cell``.
        title: of the figure.

    Raises:
        TableError: a missing column, or no cell with a KL divergence.
    """
    require(table, ("kind", "unit", "scheme", "KL"), "sensitivity")
    rows = _rows(table, ("cell",))
    if rows.empty:
        raise TableError("table 'sensitivity' has no cell with a KL divergence")
    place = rows["unit"].str.rsplit(".", n=1, expand=True)
    blocks = sorted(set(place[0]), key=_place)
    groups = ordered(place[1], (*GROUPS, "merger_in", "merger_out"))
    array = np.full((len(blocks), len(groups)), np.nan)
    for block, group, value in zip(place[0], place[1], rows["KL"], strict=True):
        array[blocks.index(block), groups.index(group)] = value
    made = figure(title, 2.4 + 0.95 * len(groups), 1.3 + 0.26 * len(blocks))
    axes = made.subplots()
    seen = array[array > FLOOR]
    top = max(float(np.nanmax(array)), 10 * FLOOR)
    norm = _Scale(float(seen.min()) if seen.size else FLOOR, top)
    image = _image(axes, array, norm)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_yticks(range(len(blocks)), blocks)
    axes.tick_params(length=0, labelsize=SMALL)
    bar = made.colorbar(image, ax=axes, pad=0.02)
    bar.set_label("KL divergence (nats, log scale)", size=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return made


def _rows(table: pd.DataFrame, kinds: tuple[str, ...]) -> pd.DataFrame:
    """Rows of some kinds that have a KL divergence, each kind at its first scheme, in order."""
    rows = table[table["kind"].isin(kinds) & table["KL"].notna()]
    first = rows.groupby("kind")["scheme"].transform("min")
    rows = rows[rows["scheme"] == first]
    if rows["unit"].duplicated().any():
        raise TableError("table 'sensitivity' has two rows for one unit: give the table of a sweep")
    return rows.sort_values("unit", key=lambda units: units.map(_place), kind="stable")


def _place(unit: str) -> tuple[int, float, int, str]:
    """Towers, then block numbers, then groups, then modalities, in their order."""
    parts = unit.split(".")
    # "audio" by itself is a modality, in front of a dot it is a tower.
    tower = TOWERS.index(parts[0]) if len(parts) > 1 else len(TOWERS)
    number = next((float(p) for p in parts[1:] if p.isdigit()), np.inf)
    known = (*GROUPS, *MODALITIES)
    return tower, number, known.index(parts[-1]) if parts[-1] in known else len(known), unit


def _bars(axes: Any, part: pd.DataFrame, kind: str, norm: _Scale) -> None:
    plain(axes, kind, x="KL divergence (nats)")
    axes.set_xscale("log")
    units = list(part["unit"])
    colours = [COLOURS.get(unit, COLOURS["text"]) for unit in units]
    low = norm.low / 3
    lengths = part["KL"].clip(lower=low)
    axes.barh(range(len(units)), lengths - low, left=low, color=colours, height=0.7)
    axes.set_xlim(low, norm.high * 3)
    axes.set_ylim(len(units) - 0.5, -0.5)
    axes.set_yticks(range(len(units)), units)
    axes.grid(visible=False, axis="y")


def _prompts(axes: Any, part: pd.DataFrame, modalities: list[str], norm: _Scale) -> None:
    array = part[[f"KL {m}" for m in modalities]].to_numpy(dtype=float)
    axes.set_title("KL by the prompts' modality", fontsize=TEXT, loc="left")
    _image(axes, array, norm)
    axes.set_xticks(range(len(modalities)), modalities)
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=SMALL)


def _image(axes: Any, array: np.ndarray, norm: _Scale) -> Any:
    """Draw [rows, columns] with the numbers written in; zero takes the lowest colour."""
    shown = np.where(array > norm.low, array, norm.low)
    image = axes.imshow(
        np.ma.masked_where(np.isnan(array), shown),
        norm=LogNorm(norm.low, norm.high),
        cmap=colormaps["viridis"].with_extremes(bad=UNOBSERVED),
        aspect="auto",
        interpolation="nearest",
    )
    axes.spines[:].set_visible(False)
    for (row, column), number in np.ndenumerate(array):
        if not np.isnan(number):
            bright = norm.place(float(number)) > 0.6
            text = spelt(float(number)) if number > FLOOR else "0"
            colour = "black" if bright else "white"
            axes.text(column, row, text, color=colour, ha="center", va="center", size=SMALL)
    return image


def _differences(axes: Any, part: pd.DataFrame) -> None:
    plain(axes, x="accuracy, difference to fp16 (points)")
    axes.axvline(0.0, color="black", linewidth=1.0)
    for place, row in enumerate(part.to_dict("records")):
        value, low, high = (float(row[key]) for key in ("Δ mean", "low", "high"))
        if np.isnan(low) or np.isnan(high):
            continue
        covers = low <= 0.0 <= high
        colour = GREY if covers else COLOURS["text"]
        # A percentile interval need not hold the mean where few answers changed.
        around = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
        axes.errorbar(
            value,
            place,
            xerr=around,
            fmt="o",
            color=colour,
            markerfacecolor="white" if covers else colour,
            markersize=5,
            capsize=2.5,
        )
    axes.set_ylim(len(part) - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
