"""One value of a table per layer, input group and modality, as colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from morphoquant.analysis.figures.style import (
    GROUPS,
    MODALITIES,
    SMALL,
    TEXT,
    UNOBSERVED,
    figure,
    finite,
    layer_order,
    ordered,
    require,
    short_names,
    sparse_ticks,
    unique_rows,
)

SINGLE_PANEL_ROWS = 32
"""With more rows than this, each input group gets a panel of its own, side by side."""

MEANINGS = {
    "absmax": ("Largest magnitude", "|x|"),
    "absmax_median": ("Median over channels of the largest magnitude", "|x|"),
    "max_over_median": ("Largest channel over the median channel", "ratio of max |x|"),
    "max_over_median_layer": ("Largest magnitude over the median magnitude", "ratio of |x|"),
    "tail_max_q999": ("Largest magnitude over its 99.9 % quantile", "ratio of |x|"),
    "kurtosis_median": ("Kurtosis of the median channel", "excess kurtosis"),
    "kurtosis_p99": ("Kurtosis, 99th percentile over channels", "excess kurtosis"),
    "kurtosis_layer": ("Kurtosis over all values", "excess kurtosis"),
    "crest_median": ("Crest factor of the median channel", "max |x| / RMS"),
    "crest_max": ("Largest crest factor of a channel", "max |x| / RMS"),
    "dispersion_log1p_max": ("Largest dispersion score of a channel", "score (log1p)"),
    "share_above_2_sigma": ("Channels flagged as outliers (mean + 2 σ)", "share of channels"),
    "massive_share": ("Energy in the 0.1 % most energetic tokens", "share of energy"),
    "first_token_share": ("Energy in the first tokens of prompts", "share of energy"),
    "activation_sqnr_db": ("Activation SQNR", "dB"),
    "output_sqnr_db": ("Output SQNR", "dB"),
    "output_sqnr_activation_db": ("Output SQNR, activation error only", "dB"),
    "output_sqnr_weight_db": ("Output SQNR, weight error only", "dB"),
    "clip_energy_share": ("Error energy that is clipping", "share of energy"),
    "bypass_rate": ("Elements kept in 16 bits", "share of elements"),
    "residual_bias_share": ("Residual energy that is bias", "share of energy"),
}
"""Column -> (what a title calls it, unit); other columns go by their own name."""


def layer_modality_heatmap(
    table: pd.DataFrame,
    value: str,
    *,
    what: str = "table",
    title: str | None = None,
    unit: str | None = None,
    log: bool | None = None,
) -> Figure:
    """Rows are layer x input group, columns modalities.

    Up to 32 rows stand in one panel with the numbers written in; more are split into one panel
    per input group, with the layers as rows and one colour scale.

    Args:
        table: ``outliers`` or ``errors``: layer, group, modality and the value, one row each.
        value: the column to draw.
        what: the table's name, for messages.
        title: default: what the column means.
        unit: of the colour bar; default: the column's own.
        log: colours by the logarithm; default: where all values are positive, span more than a
            factor of 30 and are not decibels.

    Raises:
        TableError: no rows, a column is missing, no finite value, or two rows for one place.
    """
    require(table, ("layer", "group", "modality", value), what)
    unique_rows(table, ("layer", "group", "modality"), what)
    values = finite(table, value, what)
    meaning, own_unit = MEANINGS.get(value, (value.replace("_", " "), value.replace("_", " ")))
    unit = own_unit if unit is None else unit
    layers, groups = layer_order(table["layer"]), ordered(table["group"], GROUPS)
    modalities = ordered(table["modality"], MODALITIES)
    names = short_names(layers)
    cells = table.assign(value=values).set_index(["layer", "group", "modality"])["value"]
    norm = _norm(values, log, unit)

    places = set(zip(table["layer"], table["group"], strict=True))
    rows = [(layer, group) for layer in layers for group in groups if (layer, group) in places]
    heading = f"{meaning if title is None else title}, by layer and modality"
    if len(rows) <= SINGLE_PANEL_ROWS:
        made = figure(heading, 2.6 + 0.85 * len(modalities), 1.3 + 0.24 * len(rows))
        axes = [made.subplots()]
        labels = [f"{names[layer]} {group}" for layer, group in rows]
        image = _panel(axes[0], cells, rows, modalities, norm)
        axes[0].set_yticks(range(len(rows)), labels, fontsize=SMALL)
        _annotate(axes[0], image)
    else:
        height = 1.7 + 0.15 * min(len(layers), 110)
        made = figure(heading, 1.8 + 0.4 * len(groups) * len(modalities), height)
        axes = list(made.subplots(1, len(groups), sharey=True, squeeze=False)[0])
        for panel, group in zip(axes, groups, strict=True):
            image = _panel(panel, cells, [(layer, group) for layer in layers], modalities, norm)
            panel.set_title(group, fontsize=TEXT)
            sparse_ticks(panel.yaxis, [names[layer] for layer in layers], 60)
        axes[0].set_ylabel("layer", fontsize=TEXT)
    for panel in axes:
        panel.tick_params(length=0, labelsize=SMALL)
    bar = made.colorbar(image, ax=axes, pad=0.02, aspect=4 * made.get_figheight())
    grey = " (grey: no value)" if np.ma.getmaskarray(_all_cells(axes)).any() else ""
    bar.set_label(f"{unit}{', log scale' if isinstance(norm, LogNorm) else ''}{grey}", size=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return made


def _norm(values: pd.Series, log: bool | None, unit: str) -> Normalize:
    low, high = float(values.min()), float(values.max())
    if log is None:
        log = low > 0 and high / low > 30 and unit != "dB"
    if log:
        positive = values[values > 0]
        low = float(positive.min()) if len(positive) else 1.0
        return LogNorm(low, max(high, low * 1.001))
    return Normalize(low, high if high > low else low + 1e-9)


def _panel(
    axes: Any,
    cells: pd.Series,
    rows: list[tuple[str, str]],
    modalities: list[str],
    norm: Normalize,
) -> Any:
    """Draw [rows, modalities]; places without a finite value stay grey."""
    array = np.array([[cells.get((*row, m), np.nan) for m in modalities] for row in rows])
    image = axes.imshow(
        np.ma.masked_invalid(array),
        norm=norm,
        cmap=colormaps["viridis"].with_extremes(bad=UNOBSERVED),
        aspect="auto",
        interpolation="nearest",
    )
    turned = {"rotation": 45, "ha": "right"} if len(rows) > SINGLE_PANEL_ROWS else {}
    axes.set_xticks(range(len(modalities)), modalities, **turned)
    axes.spines[:].set_visible(False)
    return image


def _annotate(axes: Any, image: Any) -> None:
    for (row, column), number in np.ndenumerate(np.ma.filled(image.get_array(), np.nan)):
        if np.isnan(number):
            continue
        red, green, blue, _ = image.cmap(image.norm(number))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        colour = "white" if dark else "black"
        axes.text(column, row, spelt(number), color=colour, ha="center", va="center", size=SMALL)


def _all_cells(axes: list[Any]) -> Any:
    return np.ma.concatenate([panel.images[0].get_array().ravel() for panel in axes])


def spelt(number: float) -> str:
    """A number in few characters: three digits, two below one."""
    size = abs(number)
    if size >= 1e6 or 0 < size < 1e-3:
        return f"{number:.1e}"
    if size >= 100:
        return f"{number:.0f}"
    return f"{number:.3g}" if size >= 1 else f"{number:.2g}"
