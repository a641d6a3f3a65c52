"""Published numbers: transcribed without a slip, and never taken for measured ones."""

from __future__ import annotations

import importlib.resources
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from morphoquant.analysis import published
from morphoquant.analysis.published import beside, published_table, table3
from morphoquant.errors import HarnessError

TABLES = list(published.FILES)
QUESTIONS = {"scienceqa": 4241, "mmmu": 900, "videomme": 2700}
UNEVEN = {"scienceqa": set(), "mmmu": {24.41, 36.70, 42.19, 47.80}, "videomme": {33.38, 58.10}}
"""Printed accuracies that no number of right answers gives (SPEC 3.4)."""


@pytest.mark.parametrize("name", TABLES)
def test_every_row_is_typed_named_and_sourced(name: str) -> None:
    frame, file = published_table(name), published.FILES[name]
    assert set(frame["source"]) <= set(published.sources().index)
    assert not frame.duplicated([*file.words, "source"]).any()
    assert frame[list(file.words)].notna().all(axis=None)
    for column in set(frame) - {*file.words, *file.flags, "source"}:
        assert frame[column].dtype == np.float64
        assert (frame[column].dropna() >= 0).all()
    for column in file.flags:
        assert frame[column].dtype == bool


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [
        *(("table1", benchmark) for benchmark in QUESTIONS),
        ("table3", "scienceqa"),
        ("table3", "mmmu"),
    ],
)
def test_accuracies_are_whole_numbers_of_right_answers(name: str, benchmark: str) -> None:
    frame, n = published_table(name), QUESTIONS[benchmark]
    values = frame[benchmark].dropna()
    assert len(values)
    assert values.between(0, 100).all()
    nearest = (values * n / 100).round() * 100 / n
    uneven = set(values[(nearest - values).abs() > 0.00501])
    assert uneven <= UNEVEN[benchmark]
    if name == "table1":
        assert uneven == UNEVEN[benchmark]


def test_speedups_are_ratios_of_the_latencies() -> None:
    frame = published_table("table2").set_index(["gpu", "execution"])
    for gpu in frame.index.unique("gpu"):
        rows = frame.loc[gpu]
        ratio = rows.loc["fp16", "layer_latency_ms"] / rows["layer_latency_ms"]
        assert list(ratio) == pytest.approx(list(rows["speedup_over_fp16"]), abs=0.0051)


def test_tables_agree_with_each_other() -> None:
    main = published_table("table1").query("method == 'morphoquant' and bits == 'w4a4'")
    main = main[main["model"] == published.MODEL].set_index("source")
    full = published_table("table3").query("variant == 'full'").set_index("source")
    for source in ("draft_2026_07", "v2_second_hand"):
        for benchmark in ("scienceqa", "mmmu"):
            assert full.loc[source, benchmark] == main.loc[source, benchmark]


def test_an_unknown_table_is_refused() -> None:
    with pytest.raises(HarnessError, match="table1, table2, table3, masquant"):
        published_table("table9")


def test_the_data_belong_to_the_package() -> None:
    folder = importlib.resources.files("morphoquant") / "analysis" / "published"
    names = {entry.name for entry in folder.iterdir()}
    assert {file.name for file in published.FILES.values()} | {"sources.csv"} <= names


# ------------------------------------------------------------------------------ side by side


def test_sources_stay_in_their_own_columns() -> None:
    ours = pd.DataFrame({"k": ["b", "c"], "source": "ours", "acc": [1.0, 2.0], "word": "x"})
    theirs = pd.DataFrame({"k": ["a", "b"], "source": "theirs", "acc": [3.0, math.nan]})
    found = beside(ours, theirs, ["k"])
    assert list(found) == ["k", "acc (ours)", "acc (theirs)"]
    assert list(found["k"]) == ["a", "b", "c"]
    assert found["acc (ours)"].tolist()[1:] == [1.0, 2.0]
    assert found["acc (theirs)"].tolist()[0] == 3.0
    assert found["acc (theirs)"].isna().tolist() == [False, True, True]
    assert math.isnan(found["acc (ours)"][0])


def test_a_quantity_nobody_gives_has_no_column() -> None:
    ours = pd.DataFrame({"k": ["a"], "source": "ours", "mean": [1.0]})
    theirs = pd.DataFrame({"k": ["a"], "source": "theirs", "mean": [math.nan]})
    assert list(beside(ours, theirs, ["k"])) == ["k", "mean (ours)"]


def test_mixing_is_refused() -> None:
    row = pd.DataFrame({"k": ["a"], "source": "one", "acc": [1.0]})
    with pytest.raises(HarnessError, match="at once: one"):
        beside(row, row, ["k"])
    with pytest.raises(HarnessError, match="two rows of a, one"):
        beside(pd.concat([row, row]), row.assign(source="other"), ["k"])


# ------------------------------------------------------------------------------ table 3


def save(root: Path, method: str, variant: str, right: int, **changes: Any) -> dict[str, str]:
    """A finished run with ``right`` of 40 answers right; returns its job's note."""
    folder = root / f"{method}-{variant}"
    folder.mkdir()
    rows = [
        {"benchmark": "mmmu", "task": "mmmu", "doc_id": i, "id": f"mmmu/{i}", "modality": "image"}
        | {"target": "A", "correct": float(i < right)}
        for i in range(40)
    ]
    pd.DataFrame(rows).to_parquet(folder / "samples.parquet")
    value = 100 * right / 40
    result = {
        "fingerprint": f"{method}{variant}".ljust(64, "0"),
        "method": method,
        "scheme": "w4a4",
        "model": "tiny_omni",
        "slots": {"weight": "nf4"},
        "scope": {"hash": "s", "towers": ["decoder"]},
        "calibration": {"ids_hash": "c", "samples": 128, "leaked": 0},
        "question_ids": "q",
        "accuracy": {"mmmu": {"value": value, "n": 40, "empty": 0, "unparsed": 0}},
        "mean": value,
        "bits": {"weight": 4.1, "activation": 4.25},
        "versions": {},
    }
    (folder / "result.json").write_text(json.dumps(result | changes))
    overrides = f"+experiment=table3 method={method} ablation=table3_{variant}"
    return {"overrides": overrides, "run": str(folder)}


@pytest.fixture
def jobs(tmp_path: Path) -> list[dict[str, str]]:
    measured = {"morphoquant": (10, 30, 32), "morphoquant_reference": (10, 12, 14)}
    return [
        save(tmp_path, method, variant, right)
        for method, counts in measured.items()
        for variant, right in zip(published.VARIANTS, counts, strict=True)
    ]


def test_measured_and_published_stand_beside_each_other(jobs: list[dict[str, str]]) -> None:
    frame = table3(jobs).frame.set_index("variant")
    assert list(frame.index) == list(published.VARIANTS)
    assert list(frame["mmmu (measured, morphoquant)"]) == [25.0, 75.0, 80.0]
    assert list(frame["mmmu (measured, morphoquant_reference)"]) == [25.0, 30.0, 35.0]
    assert list(frame["mmmu (arXiv v2)"]) == [40.33, 44.22, 45.11]
    assert frame["mmmu (draft)"].isna().tolist() == [True, True, False]
    assert not [c for c in frame if c.startswith("scienceqa (measured")]


def test_steps_are_within_one_column(jobs: list[dict[str, str]]) -> None:
    frame = table3(jobs).frame.set_index("variant")
    assert frame.loc["full", "Δ mmmu (measured, morphoquant)"] == pytest.approx(55.0)
    assert frame.loc["full", "Δ scienceqa (arXiv v2)"] == pytest.approx(76.63 - 73.85)
    assert math.isnan(frame.loc["full", "Δ mmmu (draft)"])
    assert math.isnan(frame.loc["baseline", "Δ mmmu (arXiv v2)"])


def test_measured_steps_come_with_their_noise(jobs: list[dict[str, str]]) -> None:
    steps = [note for note in table3(jobs).notes if note.startswith("Measured steps")]
    assert len(steps) == 2
    assert steps[0].startswith("Measured steps of method=morphoquant,")
    assert "baseline to plus_dabc +50.0 (" in steps[0]
    assert "+20 / -0 answers" in steps[0]
    assert "plus_dabc to full +5.0 (" in steps[1]


def test_measured_steps_are_marked_published_ones_are_not(jobs: list[dict[str, str]]) -> None:
    report = table3(jobs)
    rows = report.frame.set_index("variant")
    assert rows.loc["full", "verdict mmmu (measured, morphoquant)"] == "higher"
    reference = "mmmu (measured, morphoquant_reference)"
    assert rows.loc["plus_dabc", f"verdict {reference}"] == "no difference found"
    cells = report.cells.set_index("variant")
    assert cells.loc["plus_dabc", reference] == "30.0 (+5.0 ≈)"
    assert cells.loc["plus_dabc", "mmmu (arXiv v2)"] == "44.22 (+3.89)"
    assert not [c for c in rows if c.startswith("verdict") and "arXiv" in c]
    assert len(report.parts["pairs"].frame) == 15
    (note,) = [n for n in report.notes if n.startswith("≈")]
    assert "8 comparisons" in note  # two steps of two methods, one benchmark and its mean


def test_what_differs_is_said(jobs: list[dict[str, str]]) -> None:
    notes = table3(jobs).notes
    text = " ".join(notes)
    assert set(published.PROTOCOL) <= set(notes)
    assert "tiny_omni is not the published model" in text
    assert "tiny_omni w4a4, decoder quantized, questions mmmu 40" in text
    assert "none of them evaluated" in text


def test_the_published_model_is_not_called_another(tmp_path: Path) -> None:
    leaking = {"ids_hash": "c", "samples": 16, "leaked": 16}
    note = save(tmp_path, "m", "full", 20, model=published.MODEL, calibration=leaking)
    text = " ".join(table3([note]).notes)
    assert "is not the published model" not in text
    assert "16 of them evaluated too" in text


def test_failed_jobs_are_gaps_with_a_reason(jobs: list[dict[str, str]]) -> None:
    failed = {"overrides": jobs[0]["overrides"], "error": "disk full"}
    report = table3([failed, *jobs[1:]])
    frame = report.frame.set_index("variant")
    column = "mmmu (measured, morphoquant)"
    assert frame[column].isna().tolist() == [True, False, False]
    assert frame[f"Δ {column}"].isna().all()
    assert any(note.endswith("disk full") for note in report.notes)
    assert "plus_dabc to full" in " ".join(report.notes)
    everything = [{"overrides": job["overrides"], "error": "disk full"} for job in jobs]
    assert "45.11" in table3(everything).markdown()


def test_markdown(jobs: list[dict[str, str]]) -> None:
    lines = table3(jobs).markdown().splitlines()
    assert lines[2].startswith("| baseline |")
    assert " 25.0 |" in lines[2]
    assert " – |" in lines[2]
    assert " 76.63 (+2.78) |" in lines[4]
    assert " 80.0 (+55.0) |" in lines[4]
    assert " 4.25 |" in lines[4]


def test_jobs_of_another_sweep_are_refused(jobs: list[dict[str, str]]) -> None:
    with pytest.raises(HarnessError, match="ablation=base is no row"):
        table3([{**jobs[0], "overrides": "method=m ablation=base"}])
