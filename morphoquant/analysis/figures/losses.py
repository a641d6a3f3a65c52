"""What quantization lost: by layer, input group and modality, over depth, and where it clipped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from morphoquant.analysis.figures.style import (
    GREY,
    GROUPS,
    MODALITIES,
    SMALL,
    TEXT,
    TOWERS,
    TableError,
    figure,
    finite,
    layer_order,
    modality_line,
    ordered,
    plain,
    require,
    shared_legend,
    short_names,
    sparse_ticks,
    tower_of,
    unique_rows,
)

DEPTH_LABELS = {
    "relative_error": "‖quantized - original‖ / ‖original‖",
    "sqnr_db": "SQNR (dB)",
    "cosine": "cosine similarity",
}
COLUMNS = 4
"""Panels side by side."""

SQNR_ROWS = (
    ("activation_sqnr_db", "activation"),
    ("output_sqnr_activation_db", "output:\nactivation error"),
    ("output_sqnr_weight_db", "output:\nweight error"),
    ("output_sqnr_db", "output:\nboth"),
)
CLIP_ROWS = (
    ("clip_energy_share", "error energy:\nclipping"),
    ("rounding_energy_share", "error energy:\nrounding"),
    ("bypass_rate", "elements kept\nin 16 bits"),
)


def error_over_depth(
    depth: pd.DataFrame | Mapping[str, pd.DataFrame], value: str = "relative_error"
) -> Figure:
    """How the error of a block's output grows from block to block, one line per modality.

    One panel per tower and run, all on the same vertical axis. An error of zero has no place on
    the logarithmic axis of ``relative_error`` and is left out.

    Args:
        depth: block, tower, modality and the value; or several runs' tables by label.
        value: ``relative_error``, ``sqnr_db`` or ``cosine``.

    Raises:
        TableError: no rows, a column is missing, two rows for one place, or nothing to draw.
    """
    runs = {"": depth} if isinstance(depth, pd.DataFrame) else dict(depth)
    if not runs:
        raise TableError("no 'depth' table was given")
    drawn = {}
    for label, table in runs.items():
        what = f"depth of {label}" if label else "depth"
        require(table, ("block", "tower", "modality", value), what)
        unique_rows(table, ("tower", "modality", "block"), what)
        values = finite(table, value, what)
        if value == "relative_error":
            values = values.where(values > 0)
            if values.isna().all():
                raise TableError(f"table {what!r}: every relative error is zero")
        drawn[label] = table.assign(value=values).sort_values("block")
    towers = ordered((t for table in drawn.values() for t in table["tower"]), TOWERS)
    places = [(tower, label) for tower, label in product(towers, drawn)]
    across = min(COLUMNS, len(drawn) if len(drawn) > 1 else len(towers))
    made = figure("Error of block outputs over depth", 1.2 + 3.0 * max(across, 1.6), 1.2)
    down = -(-len(places) // across)
    made.set_size_inches(made.get_figwidth(), 1.0 + 2.4 * down)
    grid = made.subplots(down, across, sharey=True, squeeze=False)
    for panel, (tower, label) in zip(grid.flat, places, strict=False):
        title = f"{label}, {tower}" if label and len(towers) > 1 else label or tower
        plain(panel, title, x="block", y=DEPTH_LABELS.get(value, value) if _leftmost(panel) else "")
        here = drawn[label][drawn[label]["tower"] == tower]
        for modality in ordered(here["modality"], MODALITIES):
            line = here[here["modality"] == modality]
            panel.plot(line["block"], line["value"], **modality_line(modality))
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel in grid.flat[len(places) :]:
        panel.remove()
    if value == "relative_error":
        _log_axis(grid[0, 0])
    shared_legend(made, grid.flat[: len(places)])
    return made


def _log_axis(panel: Any) -> None:
    """A logarithmic vertical axis with plain numbers, enough of them on a short axis."""
    panel.set_yscale("log")
    low, high = panel.get_ylim()
    decades = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1.5 else (1, 2, 5) if decades < 3 else (1,)
    panel.yaxis.set_major_locator(LogLocator(subs=steps))
    panel.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    panel.yaxis.set_minor_locator(NullLocator())


def sqnr_by_group(errors: pd.DataFrame) -> Figure:
    """Signal-to-quantization-noise ratio per layer: activations, and outputs of the linears.

    The outputs' error is shown whole and in its two parts: of the activations alone (against the
    quantized weights) and of the weights alone. Higher is better; 6 dB are one bit.

    Args:
        errors: layer, group, modality and the four SQNR columns in dB.

    Raises:
        TableError: no rows, a column is missing, or no value is finite.
    """
    title = "SQNR by layer, input group and modality (higher is better)"
    return _layer_grid(errors, SQNR_ROWS, title, "dB", 1.0)[0]


def clip_and_rounding(errors: pd.DataFrame) -> Figure:
    """How the activations' error splits into clipping and rounding, and how much bypasses both.

    Args:
        errors: layer, group, modality, ``clip_energy_share``, ``rounding_energy_share`` and
            ``bypass_rate`` (all shares between 0 and 1).

    Raises:
        TableError: no rows, a column is missing, or no value is finite.
    """
    title = "Clipping, rounding and bypass by layer, input group and modality"
    made, grid = _layer_grid(errors, CLIP_ROWS, title, "%", 100.0)
    for row, (column, _) in zip(grid, CLIP_ROWS, strict=True):
        largest = 100 * np.nanmax(errors[column].to_numpy(float), initial=0.0)
        whole = column.endswith("energy_share")
        row[0].set_ylim(*((-3, max(103, largest)) if whole else (0, 1.08 * largest or 1)))
    return made


def _layer_grid(
    errors: pd.DataFrame,
    rows: Sequence[tuple[str, str]],
    title: str,
    unit: str,
    factor: float,
) -> tuple[Figure, Any]:
    """Panels of rows (columns of the table) x input groups; x: layers, one line per modality.

    Rows in decibels share their vertical axis, so that the parts of an error can be compared.
    """
    columns = [column for column, _ in rows]
    require(errors, ("layer", "group", "modality", *columns), "errors")
    unique_rows(errors, ("layer", "group", "modality"), "errors")
    numbers = errors[columns].astype("float64").replace([np.inf, -np.inf], np.nan) * factor
    if numbers.isna().all(axis=None):
        raise TableError(f"table 'errors' has no finite value in {', '.join(columns)}")
    table = errors[["layer", "group", "modality"]].join(numbers)
    layers, groups = layer_order(table["layer"]), ordered(table["group"], GROUPS)
    names = short_names(layers)
    table["position"] = table["layer"].map({layer: i for i, layer in enumerate(layers)})
    table["tower"] = table["layer"].map(tower_of)

    made = figure(title, max(5.5, 1.4 + 2.3 * len(groups)), 1.1 + 1.6 * len(rows))
    share: Literal["all", "row"] = "all" if unit == "dB" else "row"
    grid = made.subplots(len(rows), len(groups), sharex=True, sharey=share, squeeze=False)
    borders = [i for i in range(1, len(layers)) if tower_of(layers[i]) != tower_of(layers[i - 1])]
    for (i, (column, label)), (j, group) in product(enumerate(rows), enumerate(groups)):
        panel = grid[i, j]
        plain(panel, group if i == 0 else "", y=f"{label} ({unit})" if j == 0 else "")
        here = table[table["group"] == group].sort_values("position")
        for modality in ordered(here["modality"], MODALITIES):
            for _, line in here[here["modality"] == modality].groupby("tower"):
                panel.plot(line["position"], line[column], **modality_line(modality))
        if here[column].isna().all():
            panel.text(
                0.5,
                0.5,
                "no error to show",
                transform=panel.transAxes,
                ha="center",
                va="center",
                color=GREY,
                size=TEXT,
            )
        for border in borders:
            panel.axvline(border - 0.5, color=GREY, linewidth=0.6, linestyle=":")
        sparse_ticks(panel.xaxis, [names[layer] for layer in layers], 8)
        panel.set_xlim(-0.5, len(layers) - 0.5)
        if i == len(rows) - 1:
            panel.set_xlabel("layer", fontsize=TEXT)
    shared_legend(made, grid.flat)
    return made, grid


def ratio_histogram(ranges: pd.DataFrame, floor: float | None = None) -> Figure:
    """The shrink ratios that the range search chose, per input group over all layers.

    Args:
        ranges: group, ratio, masked per channel.
        floor: the smallest ratio that the search may choose; default: the smallest chosen one.
            Many channels at the floor say that the search wanted to go lower.

    Raises:
        TableError: no rows, a column is missing, or no ratio is finite.
    """
    require(ranges, ("group", "ratio", "masked"), "ranges")
    ratio = finite(ranges, "ratio", "ranges")
    floor = float(ratio.min()) if floor is None else floor
    groups = ordered(ranges["group"], GROUPS)
    bins = _bins(ratio.dropna().to_numpy(), floor)
    made = figure("Shrink ratio of clipping ranges, over all layers", 1.2 + 2.5 * len(groups), 3.1)
    panels = made.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for panel, group in zip(panels, groups, strict=True):
        here = ranges["group"] == group
        own, masked = ratio[here].dropna(), ranges.loc[here, "masked"].astype(bool)
        masked = masked[own.index]
        share = 100.0 / max(len(own), 1)
        kept = np.histogram(own[~masked], bins)[0] * share
        compensated = np.histogram(own[masked], bins)[0] * share
        at_floor, at_one = (100 * np.isclose(own, end, atol=1e-6).mean() for end in (floor, 1.0))
        heading = f"{group}\n{at_floor:.1f} % at {floor:.3g}, {at_one:.1f} % at 1"
        plain(panel, heading, x="ratio", y="channels (%)" if _leftmost(panel) else "")
        panel.stairs(kept, bins, fill=True, color="#0072B2", label="plain channels")
        if masked.any():
            panel.stairs(
                kept + compensated,
                bins,
                baseline=kept,
                fill=True,
                color="#E69F00",
                label="compensated channels",
            )
        panel.tick_params(labelsize=SMALL)
    shared_legend(made, panels)
    return made


def _bins(ratio: np.ndarray, floor: float) -> np.ndarray:
    """Edges around every candidate where they are few, else 32 bins; both ends lie in their own."""
    # Rounded: 0.6 in float32 and in float64 are one candidate.
    found = np.unique(np.append(ratio, [floor, 1.0]).round(6))
    if len(found) == 1:
        return np.array([found[0] - 0.01, found[0] + 0.01])
    if len(found) > 64:
        found = np.linspace(found[0], found[-1], 32)
    middle = (found[1:] + found[:-1]) / 2
    return np.concatenate([[2 * found[0] - middle[0]], middle, [2 * found[-1] - middle[-1]]])


def _leftmost(panel: Any) -> bool:
    return bool(panel.get_subplotspec().is_first_col())
