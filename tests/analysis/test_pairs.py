"""All pairs of a table: symmetric, consistent with one pair, and the same bytes in any order."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from morphoquant.analysis import pairs, table
from morphoquant.analysis.paired import paired_difference
from morphoquant.analysis.reports import make_report

Finish = Callable[..., dict[str, str]]
SIZES = {"mmmu": 60, "videomme": 60}
FLIPPED = {"a": 4, "b": 12, "c": 25}


def verdicts(seed: int, wrong: int) -> dict[str, list[int]]:
    """Nearly all right; some wrong ones of their own."""
    found = {}
    for name, size in SIZES.items():
        correct = np.ones(size, int)
        correct[np.random.default_rng([seed, size]).choice(size, wrong, replace=False)] = 0
        found[name] = correct.tolist()
    return found


@pytest.fixture
def notes(finish: Finish) -> list[dict[str, str]]:
    finish("fp16", "w16a16", verdicts(0, 1))
    return [finish(m, "w4a4", verdicts(i, n)) for i, (m, n) in enumerate(FLIPPED.items(), 1)]


def loaded(notes: list[dict[str, str]]) -> list[dict[str, Any]]:
    return table.load_runs([Path(note["run"]) for note in notes])


def frame_of(runs: list[dict[str, Any]]) -> pd.DataFrame:
    return pairs.pairwise(runs, pairs.compare_runs(runs)).set_index(["a", "b"])


def test_every_pair_once_and_references_last(notes: list[dict[str, str]]) -> None:
    assert [" ".join(pair) for pair in frame_of(loaded(notes)).index] == [
        "a w4a4 fp16 w16a16",
        "b w4a4 fp16 w16a16",
        "c w4a4 fp16 w16a16",
        "a w4a4 b w4a4",
        "a w4a4 c w4a4",
        "b w4a4 c w4a4",
    ]


def test_all_at_once_is_each_by_itself(notes: list[dict[str, str]]) -> None:
    runs = loaded(notes)
    by_name = {run["fingerprint"]: run for run in runs}
    for (a, b), found in pairs.compare_runs(runs).items():
        alone = paired_difference(by_name[a], by_name[b])
        assert found.mean == alone.mean
        assert found.benchmarks == alone.benchmarks


def test_exchanging_a_pair_mirrors_it(notes: list[dict[str, str]]) -> None:
    runs = loaded(notes)
    there, back = frame_of(runs), frame_of(runs[::-1])
    for a, b in (("a w4a4", "b w4a4"), ("b w4a4", "c w4a4")):
        one, other = there.loc[(a, b)], back.loc[(b, a)]
        assert other["Δ mean"] == -one["Δ mean"]
        assert (other["low"], other["high"]) == (-one["high"], -one["low"])
        assert (other["gained"], other["lost"]) == (one["lost"], one["gained"])
        for same in ("p", "p adjusted", "questions needed", "p adjusted mmmu"):
            assert other[same] == one[same]
    assert there.loc[("a w4a4", "c w4a4"), "verdict"] == "higher"
    assert back.loc[("c w4a4", "a w4a4"), "verdict"] == "lower"


def test_the_order_of_rows_changes_their_order_only(notes: list[dict[str, str]]) -> None:
    straight, turned = loaded(notes), loaded(notes[::-1])
    one, other = (
        table.comparison(runs, pairs.compare_runs(runs)).set_index("method")
        for runs in (straight, turned)
    )
    assert list(other.index) == ["fp16", "c", "b", "a"]
    pd.testing.assert_frame_equal(other.loc[one.index], one)


def test_a_row_against_its_copy(finish: Finish) -> None:
    same = verdicts(1, 9)
    runs = loaded([finish("a", "w4a4", same), finish("b", "w4a4", same)])
    row = frame_of(runs).iloc[0]
    assert (row["Δ mean"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)
    assert (row["gained"], row["lost"], row["verdict"]) == (0, 0, "no difference found")
    assert row["questions needed"] == math.inf
    assert "| ∞ |" in pairs.report(runs, pairs.compare_runs(runs)).markdown()


def test_correction_is_over_the_whole_table(notes: list[dict[str, str]]) -> None:
    frame = frame_of(loaded(notes))
    raw = frame["p"].to_numpy()
    assert (frame["p adjusted"] >= frame["p"]).all()
    assert frame["p adjusted"].min() == pytest.approx(min(1, 6 * raw.min()))
    single = frame[["p mmmu", "p videomme"]].to_numpy()
    adjusted = frame[["p adjusted mmmu", "p adjusted videomme"]].to_numpy()
    assert adjusted.min() == pytest.approx(min(1, 12 * single.min()))


def test_marks_are_where_nothing_is_resolved(notes: list[dict[str, str]]) -> None:
    report = make_report("comparison", notes)
    rows = report.frame.set_index("method")
    for name in (*SIZES, "mean"):
        assert (rows[f"p adjusted {name}"].dropna() >= rows[f"p {name}"].dropna()).all()
    lines = {line.split("|")[1].strip(): line for line in report.markdown().splitlines()[2:6]}
    assert lines["a"].count("≈)") == 3  # three more wrong of 60
    assert lines["c"].count("≈") == 0  # 24 more
    assert lines["fp16"].count("(") == 0
    assert rows.loc["c", "verdict mean"] == "lower"
    assert rows.loc["a", "verdict mean"] != "lower"
    (note,) = [n for n in report.notes if n.startswith("≈")]
    assert "for the 9 comparisons of this table" in note


def test_other_questions_are_not_compared(finish: Finish) -> None:
    short = {name: correct[:-3] for name, correct in verdicts(1, 9).items()}
    runs = loaded(
        [
            finish("a", "w4a4", verdicts(1, 9)),
            finish("b", "w4a4", short),
            finish("c", "w4a4", verdicts(3, 9)),
        ]
    )
    assert list(frame_of(runs).index) == [("a w4a4", "c w4a4")]
    assert pairs.compare_runs(runs[:1]) == {}
    nothing = pairs.report(runs[:2], pairs.compare_runs(runs[:2]))
    assert "nothing can be compared" in nothing.markdown()
    assert not nothing.printed


def test_a_large_table_prints_what_tells_most(
    finish: Finish, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = loaded([finish(f"m{i:02d}", "w4a4", verdicts(i, 1 + i)) for i in range(14)])
    report = pairs.report(runs, pairs.compare_runs(runs))
    assert len(report.frame) == 14 * 13 / 2
    assert report.first == 13 + 12  # with the best, and of neighbours
    assert set(report.frame["a"][:1]) == {"m00 w4a4"}
    report.show()
    printed = capsys.readouterr().out
    assert "m12 w4a4" in printed
    assert printed.count("w4a4") == 2 * report.first
    assert report.markdown().count("w4a4") == 14 * 13


# ----------------------------------------------------------------------------- the same bytes


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_do_not_depend_on_how_the_runs_came_about(
    notes: list[dict[str, str]], tmp_path: Path
) -> None:
    """Other seconds, answers in another order, another row group: the same tables."""
    report = make_report("comparison", notes)
    written = report.write(tmp_path / "once")
    assert list(written) == ["table", "pairs", "cost"]
    for folder in (tmp_path / "runs").iterdir():
        result = json.loads((folder / "result.json").read_text())
        result["seconds"] = {"load": 9.0, "quantize": 9.0, "evaluate": 99.0}
        result["peak_memory_mb"] = {"evaluate": 1234.5}
        (folder / "result.json").write_text(json.dumps(result))
        samples = pd.read_parquet(folder / "samples.parquet")
        samples.sample(frac=1, random_state=5).to_parquet(folder / "samples.parquet")
    make_report("comparison", notes).write(tmp_path / "again")
    once, again = files(tmp_path / "once"), files(tmp_path / "again")
    assert set(once) == {f"{n}.{e}" for n in ("table", "pairs", "cost") for e in ("md", "csv")}
    assert {name for name in once if once[name] != again[name]} == {"cost.md", "cost.csv"}
    assert b"99.0" in again["cost.csv"]


def test_the_terminal_shows_the_cost_apart(
    notes: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    make_report("comparison", notes).show()
    shown = capsys.readouterr().out
    main, _, cost = shown.partition("Cost (this machine, simulated quantization: no speed")
    assert "Pairwise" in main
    assert "evaluate s" not in main
    assert "evaluate s" in cost
    make_report("comparison", notes[:1]).show()
    assert "Pairwise" not in capsys.readouterr().out, "one pair is in the table already"
