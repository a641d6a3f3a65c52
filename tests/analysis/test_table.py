"""The table's arithmetic, and footnotes exactly where something differs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.analysis import table
from morphoquant.errors import HarnessError


def result(method: str = "rtn", scheme: str = "w4a4", **changes: Any) -> dict[str, Any]:
    """A synthetic result; ``a__b=1`` sets ``["a"]["b"]``."""
    found: dict[str, Any] = {
        "fingerprint": f"{method}-{scheme}".ljust(64, "0"),
        "method": method,
        "scheme": scheme,
        "model": "qwen",
        "reference": None if method == "fp16" else "fp16-w16a16".ljust(64, "0"),
        "slots": {"weight": "none" if method == "fp16" else "int"},
        "scope": {"hash": "s"},
        "calibration": {"ids_hash": "c"},
        "question_ids": "q",
        "accuracy": {
            "mmmu": {"value": 40.0, "n": 400, "empty": 1, "unparsed": 0},
            "videomme": {"value": 60.0, "n": 100, "empty": 0, "unparsed": 0},
        },
        "mean": 50.0,
        "bits": {"weight": 4.13, "activation": 4.3},
        "seconds": {"quantize": 10.0, "evaluate": 20.0},
        "versions": {"torch": "2"},
    }
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        node = found
        for parent in parents:
            node = node[parent]
        node[leaf] = value
    return found


FP16 = result("fp16", "w16a16", accuracy__mmmu__value=45.5, mean=52.75)


def test_differences_are_to_the_reference() -> None:
    frame = table.comparison([FP16, result(), result("quarot", reference="unknown")])
    fp16, rtn, lonely = (frame.loc[i] for i in range(3))
    assert rtn["mmmu"] == 40.0
    assert rtn["Δ mmmu"] == pytest.approx(-5.5)
    assert rtn["Δ videomme"] == 0.0
    assert rtn["Δ mean"] == pytest.approx(-2.75)
    assert math.isnan(fp16["Δ mmmu"])
    assert math.isnan(lonely["Δ mean"])
    assert (rtn["W bits"], rtn["A bits"], rtn["empty"], rtn["unparsed"]) == (4.13, 4.3, 1, 0)
    assert not [column for column in frame if column.endswith(" s")], "seconds are elsewhere"


@given(st.floats(0, 100), st.floats(0, 100))
def test_value_is_reference_plus_difference(value: float, base: float) -> None:
    runs = [
        result("fp16", "w16a16", accuracy__mmmu__value=base),
        result(accuracy__mmmu__value=value),
    ]
    row = table.comparison(runs).loc[1]
    assert base + row["Δ mmmu"] == pytest.approx(value)


def test_a_missing_benchmark_is_a_gap() -> None:
    other = result("quarot")
    del other["accuracy"]["videomme"]
    frame = table.comparison([FP16, result(), other])
    assert math.isnan(frame.loc[2]["videomme"])
    assert "–" in table.to_markdown(frame)


DIFFERENCES = {
    "scope": {"scope__hash": "t"},
    "calibration samples": {"calibration__ids_hash": "d"},
    "evaluation questions": {"question_ids": "r"},
    "weight quantizer": {"slots__weight": "nf4"},
    "package versions": {"versions__torch": "3"},
    "model": {"model": "other"},
}


def differing(notes: list[str]) -> list[str]:
    return [note for note in notes if note.startswith("Not the same")]


def test_nothing_differs_no_footnote() -> None:
    assert differing(table.footnotes([FP16, result(), result("quarot")])) == []


def test_every_shared_thing_is_tried() -> None:
    assert set(DIFFERENCES) == set(table.SHARED)


@pytest.mark.parametrize("what", DIFFERENCES)
def test_one_footnote_names_what_differs(what: str) -> None:
    notes = table.footnotes([FP16, result(), result("quarot", **DIFFERENCES[what])])
    (note,) = differing(notes)
    assert what in note
    assert "quarot w4a4" in note
    assert "rtn w4a4" in note


def test_noise_is_that_of_the_smallest_set() -> None:
    (note,) = [n for n in table.footnotes([FP16, result()]) if "binomial" in n]
    assert "5.0 points at n = 100" in note
    assert "mmmu 400" in note


def test_the_embedded_model_is_called_what_it_is() -> None:
    def notes(model: str) -> str:
        return " ".join(table.footnotes([result("fp16", "w16a16", model=model)]))

    assert "cannot rank" not in notes("qwen")
    assert "engineered" in notes("tiny_omni")
    assert "cannot rank" in notes("tiny_omni_as_trained")
    assert "engineered" not in notes("tiny_omni_as_trained")


def test_unparsed_answers_are_explained() -> None:
    assert not [n for n in table.footnotes([FP16, result()]) if "Unparsed" in n]
    assert [n for n in table.footnotes([result(accuracy__mmmu__unparsed=3)]) if "Unparsed" in n]


def save(root: Path, found: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    folder = root / f"{found['method']}-{found['fingerprint'][:10]}"
    folder.mkdir()
    (folder / "result.json").write_text(json.dumps(found))
    (folder / "identity.json").write_text(json.dumps({"config": config or {}}))
    return folder


def test_the_reference_is_found_and_comes_first(tmp_path: Path) -> None:
    save(tmp_path, FP16)
    folders = [save(tmp_path, result(m)) for m in ("rtn", "quarot")]
    runs = table.load_runs(folders)
    assert [run["method"] for run in runs] == ["fp16", "rtn", "quarot"]
    assert table.load_runs([*folders, *folders]) == runs


def test_an_unfinished_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match=r"result\.json"):
        table.load_runs([tmp_path])


def test_rows_of_one_method_are_told_apart(tmp_path: Path) -> None:
    def variant(name: str, p: float, compensation: str) -> Path:
        found = result("morphoquant", fingerprint=name.ljust(64, "0"))
        method = {
            "activation": {"range": {"name": "mdqfo", "p": p}},
            "compensation": {"name": compensation, "gate": p},
        }
        return save(tmp_path, found, {"method": method})

    runs = table.load_runs([variant("a" * 10, 2, "dabc"), variant("b" * 10, 2, "none")])
    labels = list(table.row_labels(runs).values())
    assert labels == ["morphoquant compensation=dabc", "morphoquant compensation=none"]
    runs = table.load_runs([variant("c" * 10, 2, "x"), variant("d" * 10, 3, "y")])
    (first, _) = table.row_labels(runs).values()
    assert first == "morphoquant range.p=2 compensation=x"
    assert table.row_labels([result()])[result()["fingerprint"]] == "rtn"


def test_leaking_calibration_is_said_once_and_loudly() -> None:
    leaking = {"ids_hash": "c", "name": "mini_leaking", "leaked": 12}
    runs = [FP16, result(calibration=leaking), result("quarot", calibration=leaking)]
    (note,) = [n for n in table.footnotes(runs) if "LEAKS" in n]
    assert "12 prompts" in note
    assert "mini_leaking" in note
    assert not [n for n in table.footnotes([FP16, result()]) if "LEAKS" in n]


def test_failed_jobs_have_a_row_and_a_reason() -> None:
    failed = [{"overrides": "method=rtn", "error": "disk", "method": "rtn", "scheme": "w4a4"}]
    frame = table.with_failures(table.comparison([FP16]), failed)
    text = table.to_markdown(frame, table.failure_notes(failed))
    assert "| rtn | w4a4 | – |" in text
    assert "1. Failed: method=rtn: disk" in text
    assert table.with_failures(frame, []) is frame


def test_markdown_and_terminal_show_the_same_cells(capsys: pytest.CaptureFixture[str]) -> None:
    frame = table.comparison([FP16, result()])
    table.print_rich(frame, ["a note"])
    printed, markdown = capsys.readouterr().out, table.to_markdown(frame, ["a note"])
    for cell in ("40.0 (-5.5)", "45.5", "4.13", "a note"):
        assert cell in printed
        assert cell in markdown
    assert "Δ" not in markdown


def test_brackets_and_bars_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    failed = [{"overrides": "a=[x] b={c|d}", "error": "allowed: [red]"}]
    frame, notes = table.with_failures(table.comparison([FP16]), failed), ["allowed: [red]"]
    table.print_rich(frame, notes)
    printed = capsys.readouterr().out
    assert "a=[x] b={c|d}" in printed
    assert "allowed: [red]" in printed
    assert r"b={c\|d}" in table.to_markdown(frame)
