"""The figures that every run leaves in its directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from morphoquant.analysis.figures.activations import channel_distribution, overlap_matrix
from morphoquant.analysis.figures.heatmap import layer_modality_heatmap
from morphoquant.analysis.figures.losses import (
    clip_and_rounding,
    error_over_depth,
    ratio_histogram,
    sqnr_by_group,
)
from morphoquant.analysis.figures.style import TableError, require
from morphoquant.tracking.rundir import write_atomic

log = logging.getLogger(__name__)

DPI = 110
LARGE = 100_000
"""Bytes. Smaller files keep their full colours: colour bars are smooth."""

DISTRIBUTIONS = 3
"""How many channel distributions are drawn: of the places with the largest outliers."""


def save_figures(run_dir: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Draw the standard set into ``run_dir/figures`` as PNG files.

    A figure whose table is missing, empty or lacks a column is left out; the log says why. The
    same figure has the same file name in every run. A file is replaced as a whole or not at all.

    Args:
        run_dir: the run's directory.
        tables: by name: ``outliers``, ``overlap``, ``channels``, ``ranges``, ``errors``,
            ``depth``; any of them may be missing.

    Returns:
        The files written, in reading order.

    Raises:
        StorageError: the folder cannot be written.
    """
    written = []
    for name, drawn in draw_standard(tables):
        path = run_dir / "figures" / f"{name}.png"
        write_atomic(path, partial(_save, drawn))
        written.append(path)
    return written


def draw_standard(tables: Mapping[str, pd.DataFrame]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of the standard set, in reading order, one drawn at a time.

    A figure whose table is missing, empty or lacks a column is left out; the log says why.

    Args:
        tables: as ``save_figures`` takes them.
    """
    for name, (needs, draw) in _standard(tables).items():
        if any(table not in tables or tables[table].empty for table in needs):
            continue
        try:
            drawn = draw(*(tables[table] for table in needs))
        except TableError as reason:
            log.info("figure %s is left out: %s", name, reason)
            continue
        yield name, drawn


Recipe = tuple[tuple[str, ...], Callable[..., Figure]]
"""Names of tables, and what draws them."""


def _standard(tables: Mapping[str, pd.DataFrame]) -> dict[str, Recipe]:
    heat = layer_modality_heatmap
    recipes: dict[str, Recipe] = {
        f"outliers_{value}": (("outliers",), partial(heat, value=value, what="outliers"))
        for value in ("max_over_median", "kurtosis_p99", "massive_share")
    }
    for rank, (layer, group) in enumerate(_most_extreme(tables), 1):
        recipes[f"channels_{rank}"] = (
            ("channels",),
            partial(channel_distribution, ranges=tables.get("ranges"), layer=layer, group=group),
        )
    return recipes | {
        "overlap_jaccard": (("overlap",), overlap_matrix),
        "overlap_scale": (("overlap",), partial(overlap_matrix, value="log2_scale_median")),
        "ratios": (("ranges",), _chosen_ratios),
        "output_sqnr": (("errors",), partial(heat, value="output_sqnr_db", what="errors")),
        "sqnr": (("errors",), sqnr_by_group),
        "clipping": (("errors",), clip_and_rounding),
        "depth": (("depth",), error_over_depth),
    }


def largest_outliers(outliers: pd.DataFrame, channels: pd.DataFrame) -> list[tuple[str, str]]:
    """(layer, group) by falling ``max_over_median`` of any modality, each layer once.

    Args:
        outliers: layer, group, max_over_median.
        channels: layer, group; only places that have rows here are named.

    Raises:
        TableError: a column is missing, or a table is empty.
    """
    require(outliers, ("layer", "group", "max_over_median"), "outliers")
    require(channels, ("layer", "group"), "channels")
    places = channels[["layer", "group"]].drop_duplicates()
    stored = set(zip(places["layer"], places["group"], strict=True))
    ratio = outliers.set_index(["layer", "group"])["max_over_median"]
    ratio = ratio.replace([np.inf, -np.inf], np.nan).dropna()
    found: dict[str, str] = {}
    for layer, group in ratio.sort_values(ascending=False, kind="stable").index:
        if (layer, group) in stored:
            found.setdefault(layer, group)
    return list(found.items())


def _most_extreme(tables: Mapping[str, pd.DataFrame]) -> list[tuple[str, str]]:
    if any(name not in tables or tables[name].empty for name in ("outliers", "channels")):
        return []
    try:
        return largest_outliers(tables["outliers"], tables["channels"])[:DISTRIBUTIONS]
    except TableError as reason:
        log.info("no channel distribution is drawn: %s", reason)
        return []


def _chosen_ratios(ranges: pd.DataFrame) -> Figure:
    require(ranges, ("ratio",), "ranges")
    if (ranges["ratio"] == 1).all():
        raise TableError("no range was shrunk: every ratio is one")
    return ratio_histogram(ranges)


def _save(drawn: Figure, path: Path) -> None:
    """A PNG; a large one with a palette of 256 colours, which takes a third of the bytes."""
    full = BytesIO()
    drawn.savefig(full, format="png", dpi=DPI)
    if full.tell() <= LARGE:
        path.write_bytes(full.getvalue())
    else:
        Image.open(full).convert("RGB").quantize(256).save(path, format="PNG", optimize=True)
