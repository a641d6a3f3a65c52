"""Which choices matter: differences to a reference, with their intervals."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from morphoquant.analysis.figures.style import (
    COLOURS,
    GREY,
    SMALL,
    TEXT,
    TableError,
    figure,
    plain,
    require,
)

NUMBERS = ["difference", "low", "high"]


def ablation_plot(
    table: pd.DataFrame,
    *,
    title: str = "Difference of each choice to the reference",
    unit: str = "difference in accuracy (points)",
) -> Figure:
    """A forest plot. An interval that covers zero is hollow and grey: it shows no effect.

    Args:
        table: ``factor``, ``choice``, ``difference`` and the interval's ends ``low`` and
            ``high``, all three in points; one row per choice. Factors are sorted by name,
            choices within a factor by their difference, the best on top.
        title: what is compared with what.
        unit: label of the axis.

    Raises:
        TableError: no rows, a missing column, a number that is not finite, or a difference
            outside its interval.
    """
    require(table, ("factor", "choice", *NUMBERS), "ablation")
    _check(table)
    rows = table.sort_values(["factor", "difference"], ascending=[True, False])
    factors = list(dict.fromkeys(rows["factor"]))
    made = figure(title, 7.0, 1.5 + 0.24 * (len(rows) + len(factors)))
    axes = made.subplots()
    plain(axes, x=unit)
    axes.grid(visible=False, axis="y")
    axes.axvline(0.0, color="black", linewidth=1.0)

    labels: list[tuple[str, bool]] = []
    for factor in factors:
        labels.append((str(factor), True))
        axes.axhspan(len(labels) - 1.5, len(labels) - 0.5, color="#F3F3F3", zorder=0)
        for row in rows[rows["factor"] == factor].itertuples():
            covers = row.low <= 0.0 <= row.high
            colour = GREY if covers else COLOURS["text"]
            axes.errorbar(
                row.difference,
                len(labels),
                xerr=[[row.difference - row.low], [row.high - row.difference]],
                fmt="o",
                color=colour,
                markerfacecolor="white" if covers else colour,
                markersize=5.5,
                capsize=2.5,
                linewidth=1.0 if covers else 1.8,
                label="interval covers zero: no effect shown" if covers else "interval off zero",
            )
            labels.append((str(row.choice), False))
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), [label for label, _ in labels])
    axes.tick_params(axis="y", length=0, labelsize=SMALL)
    for tick, (_, heads) in zip(axes.get_yticklabels(), labels, strict=True):
        tick.set_fontweight("bold" if heads else "normal")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    made.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=2,
        fontsize=TEXT,
        frameon=False,
    )
    return made


def _check(table: pd.DataFrame) -> None:
    numbers = table[NUMBERS].astype("float64")
    for name in NUMBERS:
        if numbers[name].isna().any() or numbers[name].abs().max() == float("inf"):
            choice = table.loc[numbers[name].abs().isin([float("inf")]) | numbers[name].isna()]
            where = choice.iloc[0]
            raise TableError(
                f"table 'ablation': column {name!r} is not a number for "
                f"{where['factor']}={where['choice']}"
            )
    outside = (numbers["difference"] < numbers["low"]) | (numbers["difference"] > numbers["high"])
    if outside.any():
        where = table.loc[outside].iloc[0]
        raise TableError(
            f"table 'ablation': the difference of {where['factor']}={where['choice']} lies outside "
            f"its interval"
        )
