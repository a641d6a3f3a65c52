"""What runs took: kept apart from what they found, which must not depend on the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from morphoquant.analysis.table import Report, row_labels

TITLE = "Cost (this machine, simulated quantization: no speed of low precision)"
PHASES = ("load", "quantize", "evaluate")
NOTES = [
    "Wall seconds of the process that did the run, whatever else the machine did; of a run that "
    "was taken up again, those since then.",
    "Peak memory: on a GPU the most that was allocated while evaluating, on a CPU the process's "
    "largest resident size until then, former runs of the same process included.",
]


def cost(runs: Sequence[dict[str, Any]]) -> Report:
    """Seconds and memory, one row per run.

    Returns:
        Columns ``method``, ``scheme``; ``load s``, ``quantize s``, ``evaluate s``; ``peak MiB`` of
        the evaluation. NaN where a run did not note it.
    """
    labels = row_labels(runs)
    rows = []
    for run in runs:
        row: dict[str, Any] = {"method": labels[run["fingerprint"]], "scheme": run["scheme"]}
        seconds = run.get("seconds", {})
        row |= {f"{phase} s": seconds.get(phase, math.nan) for phase in PHASES}
        row["peak MiB"] = run.get("peak_memory_mb", {}).get("evaluate", math.nan)
        rows.append(row)
    frame = pd.DataFrame(rows)
    return Report(TITLE, frame, frame, list(NOTES))
