"""How activations are distributed over channels, and whether modalities share their outliers."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from morphoquant.analysis.figures.style import (
    COLOURS,
    GREY,
    GROUPS,
    MODALITIES,
    SMALL,
    TEXT,
    UNOBSERVED,
    TableError,
    figure,
    finite,
    ordered,
    plain,
    require,
    shared_legend,
    unique_rows,
)

STEPS = 600
"""Horizontal steps of a channel distribution; with more channels, several share one."""

LIGHT, DARK = 0.35, 0.9
"""Opacity of a channel's whole extent, and of its standard deviation."""

MIRRORED = {
    "log2_scale_median": "log2_scale_median",
    "log2_scale_p05": "log2_scale_p95",
    "log2_scale_p95": "log2_scale_p05",
}
"""Signed columns: the value of the pair (b, a) is minus this column's value of (a, b)."""

PAIR_MEANINGS = {
    "jaccard": "Shared outlier channels (Jaccard index of the sets by dispersion)",
    "jaccard_absmax": "Shared outlier channels (Jaccard index of the sets by max |x|)",
    "weighted": "Overlap of dispersion profiles (Σ min / Σ max)",
    "log2_scale_median": "Median channel's range, row over column (log2: bits apart)",
    "log2_scale_abs_mean": "Mean over channels of |log2 of the ratio of ranges| (bits apart)",
}


def channel_distribution(
    channels: pd.DataFrame,
    ranges: pd.DataFrame | None,
    layer: str,
    group: str,
    *,
    sort: Literal["absmax", "channel"] = "absmax",
) -> Figure:
    """What every channel of one input group carries, one panel per modality.

    Light: from the smallest to the largest value; dark: one standard deviation around the mean.
    Black steps are the clipping range, triangles at the bottom compensated channels. Where more
    than 600 channels share the width, a step shows the outermost values of its channels, so that
    a single outlier channel stays visible.

    Args:
        channels: layer, group, modality, channel, lo, hi, mean, std per channel.
        ranges: layer, group, channel, lo, hi, masked; None where ranges are not static. A single
            row is a range for the whole tensor.
        layer, group: the place to draw.
        sort: ``absmax``: by the largest magnitude in any modality, falling; ``channel``: as stored.

    Raises:
        TableError: no rows for this place, a column is missing, or the channels of the two tables
            differ.
    """
    require(
        channels, ("layer", "group", "modality", "channel", "lo", "hi", "mean", "std"), "channels"
    )
    here = _at(channels, layer, group, "channels")
    unique_rows(here, ("modality", "channel"), "channels")
    finite(here, "lo", "channels")
    wide = here.pivot(index="channel", columns="modality", values=["lo", "hi", "mean", "std"])
    largest = np.fmax.reduce(wide[["lo", "hi"]].abs().to_numpy(float), axis=1)
    order = np.argsort(-largest, kind="stable") if sort == "absmax" else np.arange(len(wide))
    final = None if ranges is None or ranges.empty else _final(ranges, layer, group, wide.index)

    modalities = [m for m in ordered(here["modality"], MODALITIES) if m != "all"] or ["all"]
    made = figure(
        f"Activations of {layer}, {group}: {len(wide):,} channels",
        9.0,
        1.2 + 1.75 * len(modalities),
    )
    panels = list(made.subplots(len(modalities), 1, sharex=True, sharey=True, squeeze=False)[:, 0])
    edges = np.linspace(0, len(wide), min(STEPS, len(wide)) + 1).round()
    starts = edges[:-1].astype(int)
    for panel, modality in zip(panels, modalities, strict=True):
        plain(panel, modality, y="value x")
        own = {name: wide[name, modality].to_numpy(float)[order] for name in ("lo", "hi")}
        mean, std = (wide[name, modality].to_numpy(float)[order] for name in ("mean", "std"))
        envelopes = (
            ((own["lo"], own["hi"]), LIGHT),
            ((mean - std, mean + std), DARK),
        )
        for (low, high), alpha in envelopes:
            panel.stairs(
                np.fmax.reduceat(high, starts),
                edges,
                baseline=np.fmin.reduceat(low, starts),
                fill=True,
                color=COLOURS.get(modality, GREY),
                alpha=alpha,
                linewidth=0,
                rasterized=True,
            )
        if final is not None:
            _draw_range(panel, final.iloc[order], edges, starts)
    _symlog(panels, float(here["std"].median()))
    place = "by falling max |x|" if sort == "absmax" else "as stored"
    shared = -(-len(wide) // len(starts))
    steps = f" (each step: outermost values of up to {shared} channels)" if shared > 1 else ""
    panels[-1].set_xlabel(f"channels, {place}{steps}", fontsize=TEXT)
    panels[-1].set_xlim(0, len(wide))
    for alpha, label in ((LIGHT, "smallest to largest value"), (DARK, "mean ± σ")):
        panels[0].fill_between([], [], color=GREY, alpha=alpha, linewidth=0, label=label)
    shared_legend(made, panels)
    return made


def _at(table: pd.DataFrame, layer: str, group: str, what: str) -> pd.DataFrame:
    found = table[(table["layer"] == layer) & (table["group"] == group)]
    if found.empty:
        raise TableError(f"table {what!r} has no rows for layer {layer!r}, group {group!r}")
    return found


def _final(ranges: pd.DataFrame, layer: str, group: str, channels: pd.Index) -> pd.DataFrame | None:
    """lo, hi, masked per channel; None where this group's range is not static."""
    require(ranges, ("layer", "group", "channel", "lo", "hi", "masked"), "ranges")
    found = ranges[(ranges["layer"] == layer) & (ranges["group"] == group)]
    if found.empty:
        return None
    unique_rows(found, ("channel",), "ranges")
    found = found.set_index("channel")[["lo", "hi", "masked"]]
    if len(found) == 1 and len(channels) > 1:
        whole = found.iloc[0]
        return pd.DataFrame({"lo": whole["lo"], "hi": whole["hi"], "masked": False}, index=channels)
    if not found.index.sort_values().equals(channels):
        raise TableError(
            f"tables 'ranges' ({len(found)}) and 'channels' ({len(channels)}) have other channels "
            f"for layer {layer!r}, group {group!r}"
        )
    return found.loc[channels]


def _draw_range(panel: Any, final: pd.DataFrame, edges: np.ndarray, starts: np.ndarray) -> None:
    """Clipping range as steps, compensated channels as triangles at the bottom."""
    ends = (np.fmax.reduceat(final["hi"].to_numpy(float), starts), "clipping range")
    for values, label in (ends, (np.fmin.reduceat(final["lo"].to_numpy(float), starts), None)):
        panel.stairs(
            values,
            edges,
            baseline=None,
            color="black",
            linewidth=0.9,
            label=label,
            rasterized=True,
        )
    masked = np.flatnonzero(final["masked"].to_numpy(bool))
    if masked.size:
        panel.plot(
            masked + 0.5,
            np.full(masked.size, 0.03),
            "^",
            color="black",
            markersize=3,
            markeredgewidth=0,
            alpha=0.6,
            transform=panel.get_xaxis_transform(),
            label=f"compensated ({masked.size:,} of {len(final):,})",
        )


def _symlog(panels: list[Any], spread: float) -> None:
    """Linear within the power of ten around the median σ, logarithmic beyond."""
    usable = np.isfinite(spread) and spread > 0
    threshold = 10.0 ** round(math.log10(spread)) if usable else 1.0
    for panel in panels:
        panel.set_yscale("symlog", linthresh=threshold)
        locator = SymmetricalLogLocator(base=10.0, linthresh=threshold)
        locator.set_params(numticks=7)
        panel.yaxis.set_major_locator(locator)
        panel.yaxis.set_minor_locator(SymmetricalLogLocator(base=10.0, linthresh=threshold))
        panel.yaxis.minorticks_off()
        panel.tick_params(labelsize=SMALL)
    panels[0].set_title(
        f"{panels[0].get_title(loc='left')}   (vertical axis linear within ±{threshold:g})",
        fontsize=TEXT,
        loc="left",
    )


def overlap_matrix(
    overlap: pd.DataFrame,
    value: str = "jaccard",
    *,
    layer: str | None = None,
    group: str | None = None,
) -> Figure:
    """Modality x modality, one matrix per input group; the mean over layers unless one is named.

    For Jaccard indices the title of a matrix carries what independent sets of the same size would
    give: an overlap means something where it lies far above that. The diagonal stays empty.

    Args:
        overlap: layer, group, modality_a, modality_b, the value, and for Jaccard ``expected``.
        value: the column; ``log2_scale_*`` change sign when the pair is turned round.
        layer, group: only this one.

    Raises:
        TableError: no rows (for this place), a column is missing, or no finite value.
    """
    mirror = MIRRORED.get(value, value)
    expects = value.startswith("jaccard")
    numbers = list(dict.fromkeys([value, mirror, *(["expected"] if expects else [])]))
    require(overlap, ("layer", "group", "modality_a", "modality_b", *numbers), "overlap")
    chosen = overlap
    for column, name in (("layer", layer), ("group", group)):
        if name is not None:
            chosen = chosen[chosen[column] == name]
    if chosen.empty:
        raise TableError(f"table 'overlap' has no rows for layer {layer!r}, group {group!r}")
    unique_rows(chosen, ("layer", "group", "modality_a", "modality_b"), "overlap")
    chosen = chosen.assign(**{name: finite(chosen, name, "overlap") for name in numbers})
    means = chosen.groupby(["group", "modality_a", "modality_b"])[numbers].mean().reset_index()
    modalities = ordered([*chosen["modality_a"], *chosen["modality_b"]], MODALITIES)
    groups = ordered(chosen["group"], GROUPS)

    where = f"layer {layer}" if layer else f"mean over {chosen['layer'].nunique()} layers"
    title = f"{PAIR_MEANINGS.get(value, value.replace('_', ' '))}\n{where}"
    made = figure(title, max(6.8, 1.6 + 2.0 * len(groups)), 3.3)
    panels = list(made.subplots(1, len(groups), sharey=True, squeeze=False)[0])
    signed = value in MIRRORED
    reach = float(means[[value, mirror]].abs().max().max()) or 1.0
    norm = Normalize(-reach, reach) if signed else Normalize(0, reach if reach > 1 else 1)
    cmap = colormaps["PuOr" if signed else "viridis"].with_extremes(bad=UNOBSERVED)
    for panel, name in zip(panels, groups, strict=True):
        pairs = means[means["group"] == name]
        array = np.full((len(modalities), len(modalities)), np.nan)
        i, j = (pairs[m].map(modalities.index) for m in ("modality_a", "modality_b"))
        array[i, j] = pairs[value]
        array[j, i] = -pairs[mirror] if signed else pairs[value]
        image = panel.imshow(np.ma.masked_invalid(array), norm=norm, cmap=cmap)
        panel.set_xticks(range(len(modalities)), modalities, rotation=45, ha="right")
        panel.set_yticks(range(len(modalities)), modalities)
        panel.tick_params(labelsize=SMALL, length=0)
        panel.spines[:].set_visible(False)
        expected = f"\nindependent: {pairs['expected'].mean():.3f}" if expects else ""
        panel.set_title(f"{name}{expected}", fontsize=TEXT)
        _label_cells(panel, array, norm, signed)
    bar = made.colorbar(image, ax=panels, pad=0.02, aspect=20)
    bar.set_label("log2 of the ratio" if signed else "overlap" if reach <= 1 else "bits", size=TEXT)
    bar.ax.tick_params(labelsize=SMALL)
    return made


def _label_cells(panel: Any, array: np.ndarray, norm: Normalize, signed: bool) -> None:
    for (row, column), number in np.ndenumerate(array):
        if not np.isnan(number):
            level = float(norm(number))
            dark = abs(level - 0.5) > 0.35 if signed else level < 0.6
            # Adding zero turns a rounded -0.0 into 0.0.
            text = f"{round(number, 1) + 0.0:+.1f}" if signed else f"{number:.2f}"
            panel.text(
                column,
                row,
                text,
                color="white" if dark else "black",
                ha="center",
                va="center",
                size=SMALL,
            )
