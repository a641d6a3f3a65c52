"""The paper's Table 1: methods at three widths, measured beside published.

A row is a scheme and a method (``config.rows``). One published row may stand beside two measured
ones, and published rows that nothing here measures are shown all the same, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from morphoquant.analysis import pairs, table
from morphoquant.analysis.cost import cost
from morphoquant.analysis.published import (
    MEASURED,
    MODEL,
    PROTOCOL,
    SOURCE,
    beside,
    published_table,
    shown,
    sources,
    what_was_measured,
)
from morphoquant.analysis.report import DETAILS, Report
from morphoquant.config.rows import TABLE1
from morphoquant.errors import HarnessError

TITLE = "Table 1: accuracy in percent, measured beside published (difference to fp16 in points)"
KEYS = ["bits", "method"]
CALLED = {
    "nf4": ("qlora_nf4",),
    "awq": ("awq_mbq", "awq"),
    "mbq": ("awq_mbq", "mbq"),
    "rtn_static": ("naive",),
}
"""Method -> what published rows call it, where that is another name."""
BENCHMARKS = ("mmmu", "scienceqa", "videomme", "air_bench")
SCHEMES = tuple(dict.fromkeys(scheme for scheme, _ in TABLE1))

DOUBTS = (
    "The published row AWQ / MBQ is one row and stands beside both. Its MMMU (36.70 on 3B, 47.80 "
    "on 7B) fits no number of 900 questions and equals the AWQ rows of MASQuant (36.7, 47.8): it "
    "was probably taken from there.",
    "Published 0.00 on questions of four choices means that no answer could be read: those "
    "baselines also quantize the audio tower and the speech generator, with defects of their own "
    "(MQuant at w8a8 has 78.52 and 0.00 in one row). They are no level that a method reaches.",
    "Published W8A8 of MorphoQuant loads NF4 weights in the public implementation, so it is W4A8; "
    "the measured row has 8-bit integers.",
    "Published Ours + HiF4 and HiF8 put weights and activations on that grid, where the searched "
    "ranges only set what bypasses it; measured is the grid with whole channels bypassing (DABC). "
    "The grid alone: method=hif4.",
    "42.44 on MMMU (382 of 900) stands in the draft's table four times, for two models and three "
    "methods. At W4A4 on 3B its ScienceQA, 72.93, is below the arXiv version's naive row (73.17); "
    "there it is 76.63, which the abstract confirms without the model's size.",
    "SmoothQuant makes activations easier to round, and at w4a16 none are rounded.",
    "MASQuant's numbers are of the same models under another protocol; of its benchmarks only MMMU "
    "is asked here (its others are word error rates and OmniBench).",
)
"""What is doubtful in the published Table 1, and what its rows are (SPEC 2.9, 3.4, 4)."""
UNMEASURED = {
    "qvlm": "Q-VLM searches ranges in blocks chosen by entropy, which no slot here does",
    "pomq_vit": "PoMQ-ViT is known from a row of numbers only",
    "masquant": "MASQuant stands in its own table alone (python run.py -m method=masquant)",
    "freeact": "FreeAct was published for InternVL",
    "rtn": "RTN at these widths stands in MASQuant's table alone (python run.py -m method=rtn)",
    "smoothquant": "SmoothQuant at this width stands in MASQuant's table alone",
}
"""Published method -> why no row here measures it."""


def table1(notes: Sequence[Mapping[str, str]], root: Path | None = None) -> Report:
    """The paper's Table 1 of one model, measured beside published.

    Args:
        notes: what the jobs of the sweep left.
        root: folder of the run directories, where the unquantized references are.

    Returns:
        The report. Its frame has one row per method and scheme, in the order of the published
        table: ``bits``, ``method``; for every quantity one column per source, the measured one
        with its ``DETAILS`` (differences to fp16); effective ``W bits`` and ``A bits``. Published
        rows are those of the measured model; of a model that was not published, of
        ``published.MODEL``. Its parts are ``pairs`` and ``cost``.

    Raises:
        HarnessError: runs of several models; a run that is not finished.
    """
    failed = [dict(note) for note in notes if "error" in note]
    directories = list(dict.fromkeys(Path(note["run"]) for note in notes if "run" in note))
    runs = table.load_runs(directories, root)
    models = sorted({str(run["model"]) for run in runs})
    if len(models) > 1:
        raise HarnessError(
            f"Table 1 is of one model, these runs are of {', '.join(models)}: make one sweep each"
        )
    published = _published(models)
    compared = pairs.compare_runs(runs)
    measured = table.comparison(runs, compared).rename(columns={"scheme": "bits"})
    frame = _frame(measured, runs, published)
    model = str(published["model"].iloc[0])
    footnotes = [
        *what_was_measured([run for run in runs if run["method"] != "fp16"], model=model),
        *table.resolution(frame, "of a measured accuracy, to fp16"),
        *DOUBTS,
        *_unmeasured(frame),
        *PROTOCOL,
        *table.unequal(runs),
        *table.caveats(runs),
        *table.failure_notes(failed),
    ]
    parts = {"pairs": pairs.report(runs, compared), "cost": cost(runs)}
    return Report(TITLE, frame, shown(frame, KEYS), footnotes, parts)


def _published(models: Sequence[str]) -> pd.DataFrame:
    """Published rows of the model, or of the one that stands for it; ``bits`` as schemes."""
    main, other = published_table("table1"), published_table("masquant")
    known = set(main["model"]) & set(models)
    model = known.pop() if known else MODEL
    rows = pd.concat([main, other[[*KEYS, "model", "mmmu", SOURCE]]], ignore_index=True)
    rows = rows[rows["model"] == model].replace({"bits": {"fp16": "w16a16"}})
    rows = rows[rows["bits"].isin(SCHEMES)]
    # The paper's own sources first, in the order of their list.
    rows = rows.sort_values(SOURCE, key=lambda s: s.map(list(sources().index).index), kind="stable")
    return rows.assign(**{SOURCE: rows[SOURCE].map(sources()["label"])}).drop(columns="memory_gb")


def _frame(
    measured: pd.DataFrame, runs: Sequence[Mapping[str, Any]], published: pd.DataFrame
) -> pd.DataFrame:
    """Measured rows with their published counterparts, then what is published alone."""
    methods = [run["method"] for run in runs]
    matched, used = [], set()
    for bits, label, method in zip(measured["bits"], measured["method"], methods, strict=True):
        names = CALLED.get(method, (method,))
        rows = published[(published["bits"] == bits) & published["method"].isin(names)]
        matched.append(rows.assign(method=label))
        used |= set(rows.index)
    together = pd.concat([*matched, published.drop(index=list(used))])
    rank = list(dict.fromkeys(published[SOURCE])).index
    together = together.sort_values(SOURCE, key=lambda s: s.map(rank), kind="stable")
    asked = [name for name in BENCHMARKS if name in measured]
    asked += [
        c for c in map(str, measured) if f"Δ {c}" in measured and c not in asked and c != "mean"
    ]
    numbers = [*asked, "mean", "W bits", "A bits"]
    frame = beside(
        measured[[*KEYS, *numbers]].assign(**{SOURCE: MEASURED}),
        together.reindex(columns=[*KEYS, SOURCE, *BENCHMARKS]),
        KEYS,
    )
    frame = frame.rename(columns={f"{c} ({MEASURED})": c for c in ("W bits", "A bits")})
    details = {
        f"{detail} {name}": f"{detail} {name} ({MEASURED})"
        for name in numbers
        for detail in DETAILS
    }
    kept = [column for column in details if column in measured]
    frame = frame.merge(measured[[*KEYS, *kept]].rename(columns=details), on=KEYS, how="left")
    method = dict(zip(measured["method"], methods, strict=True))  # of a label
    place = [
        (SCHEMES.index(bits), _place(bits, method.get(name, name)))
        for bits, name in zip(frame["bits"], frame["method"], strict=True)
    ]
    return frame.iloc[sorted(frame.index, key=lambda i: place[i])].reset_index(drop=True)


def _place(bits: str, method: str) -> float:
    """Of a measured or published row in the order of the table; behind all where it has none."""
    for i, (scheme, own) in enumerate(TABLE1):
        if scheme == bits and method in (own, *CALLED.get(own, ())):
            return i
    return math.inf


def _unmeasured(frame: pd.DataFrame) -> list[str]:
    """Which published rows have no measured counterpart, and why."""
    column = f"mean ({MEASURED})"
    missing = frame[frame[column].isna()] if column in frame else frame
    told = []
    for method in dict.fromkeys(missing["method"]):
        widths = list(missing.loc[missing["method"] == method, "bits"])
        widths = [bits for bits in widths if (bits, method) not in TABLE1]
        if widths and method in UNMEASURED:
            told.append(f"{method} ({', '.join(widths)}): {UNMEASURED[method]}")
    others = sorted(set(published_table("table1")["model"]) - {MODEL, "qwen2_5_omni_7b"})
    notes = [f"Published rows without a measured one: {'; '.join(told)}."] if told else []
    return [
        *notes,
        f"Published for {' and '.join(others)} too: InternVL2.5 is another family, for which there "
        f"is no adapter here, and one source does not say the size of Qwen2.5-Omni.",
    ]
