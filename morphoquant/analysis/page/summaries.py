"""Statistics of the runs in numbers: SQNR and outliers by modality, errors place by place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from morphoquant.analysis.figures.style import GROUPS, MODALITIES, layer_order, ordered
from morphoquant.analysis.notebook import mean_sqnr


@dataclass(frozen=True)
class Summary:
    """One row of the SQNR or outlier table: a number per modality, and the extreme place."""

    label: str
    values: dict[str, float]
    extreme: str


def sqnr_row(label: str, errors: pd.DataFrame) -> Summary | None:
    """Output SQNR by modality, dB of the mean ratio over places; and the worst place."""
    column = "output_sqnr_db"
    known = errors.dropna(subset=[column]) if column in errors else errors.iloc[:0]
    if known.empty:
        return None
    values = {str(m): mean_sqnr(rows[column]) for m, rows in known.groupby("modality")}
    worst = known.iloc[int(known[column].to_numpy().argmin())]
    place = f"{worst[column]:.1f} dB at {worst['layer']} {worst['group']}, {worst['modality']}"
    return Summary(label, values, place)


def outlier_row(label: str, outliers: pd.DataFrame) -> Summary | None:
    """Largest over median channel by modality, the median over places; and the largest place."""
    column = "max_over_median"
    if column not in outliers:
        return None
    known = outliers.replace([np.inf, -np.inf], np.nan).dropna(subset=[column])
    known = known[known["modality"] != "all"]
    if known.empty:
        return None
    values = {str(m): float(v) for m, v in known.groupby("modality")[column].median().items()}
    top = known.iloc[int(known[column].to_numpy().argmax())]
    place = f"{top[column]:.1f} at {top['layer']} {top['group']}, {top['modality']}"
    return Summary(label, values, place)


def error_rows(errors: pd.DataFrame) -> list[dict[str, str]]:
    """The table of errors as it is shown: by tower, layer, group and modality."""
    places = {layer: i for i, layer in enumerate(layer_order(errors["layer"]))}
    by = errors.assign(place=errors["layer"].map(places))
    groups = {name: i for i, name in enumerate(ordered(errors["group"], GROUPS))}
    modalities = {name: i for i, name in enumerate(ordered(errors["modality"], MODALITIES))}
    by = by.assign(g=errors["group"].map(groups), m=errors["modality"].map(modalities))
    return [
        {
            "layer": row["layer"],
            "group": row["group"],
            "modality": row["modality"],
            **{name: _number(row.get(c, math.nan), factor) for name, c, factor in ERRORS},
        }
        for row in by.sort_values(["place", "g", "m"]).to_dict("records")
    ]


ERRORS = (
    ("activation (dB)", "activation_sqnr_db", 1.0),
    ("output, activation error (dB)", "output_sqnr_activation_db", 1.0),
    ("output, weight error (dB)", "output_sqnr_weight_db", 1.0),
    ("output (dB)", "output_sqnr_db", 1.0),
    ("clipping, share of error (%)", "clip_energy_share", 100.0),
    ("kept in 16 bits (%)", "bypass_rate", 100.0),
)
"""Heading, column and factor."""


def _number(value: float, factor: float) -> str:
    if math.isinf(value):
        return "no error" if value > 0 else "no signal"
    return "–" if math.isnan(value) else f"{factor * value:.2f}"
