"""How compared numbers are written into cells."""

from __future__ import annotations

import math

import pandas as pd

from morphoquant.analysis.paired import CONFIDENCE


def compared(frame: pd.DataFrame, confidence: float = CONFIDENCE) -> pd.DataFrame:
    """The frame as it is shown: an interval, and gained and lost questions, in one cell each.

    Args:
        frame: columns ``low``, ``high``, ``p``, ``p adjusted``, ``gained``, ``lost``, ``verdict``
            and others, which stay.
        confidence: level of the interval, for its header.
    """
    shown = frame.drop(columns=["low", "high", "gained", "lost"])
    shown["p"] = [p_value(p) for p in frame["p"]]
    shown["p adjusted"] = [p_value(p) for p in frame["p adjusted"]]
    intervals = [interval(low, high) for low, high in zip(frame["low"], frame["high"], strict=True)]
    changed = [
        f"+{int(gained)} / -{int(lost)}" if not math.isnan(gained) else "–"
        for gained, lost in zip(frame["gained"], frame["lost"], strict=True)
    ]
    after = list(shown.columns).index("p")
    shown.insert(after, f"{100 * confidence:g} % interval", intervals)
    shown.insert(list(shown.columns).index("verdict"), "changed answers", changed)
    return shown


def interval(low: float, high: float) -> str:
    """An interval in points, as text."""
    return "–" if math.isnan(low) or math.isnan(high) else f"{low:+.1f} to {high:+.1f}"


def p_value(value: float) -> str:
    """A p value, as text."""
    if math.isnan(value):
        return "–"
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


def questions(needed: float) -> str:
    """A number of questions; of an estimate, two digits are all that it is worth."""
    return "∞" if math.isinf(needed) else f"{float(f'{needed:.2g}'):,.0f}"
