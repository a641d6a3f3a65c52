"""The ablation table: the base first, every other row paired with it, failures as rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from morphoquant.analysis import ablation as module
from morphoquant.analysis.ablation import ablation, read_jobs
from morphoquant.errors import HarnessError

SIZES = {"mmmu": 60, "videomme": 60}
RIGHT = {name: [1] * (size // 2) + [0] * (size // 2) for name, size in SIZES.items()}


def save(
    root: Path, name: str, correct: dict[str, list[int]], method: str = "morphoquant"
) -> dict[str, str]:
    """A finished run directory, with its answers; returns its path as a job notes it."""
    folder = root / f"{name}-{name.ljust(10, '0')[:10]}"
    folder.mkdir()
    rows = [
        {"benchmark": b, "task": b, "doc_id": i, "id": f"{b}/{i}", "modality": "image"}
        | {"target": "A", "correct": float(verdict)}
        for b, verdicts in correct.items()
        for i, verdict in enumerate(verdicts)
    ]
    pd.DataFrame(rows).to_parquet(folder / "samples.parquet")
    accuracy = {
        b: {"value": 100 * float(np.mean(v)), "n": len(v), "empty": 0, "unparsed": 0}
        for b, v in correct.items()
    }
    result: dict[str, Any] = {
        "fingerprint": name.ljust(64, "0"),
        "method": method,
        "scheme": "w16a16" if method == "fp16" else "w4a4",
        "model": "qwen",
        "reference": None if method == "fp16" else "fp16".ljust(64, "0"),
        "slots": {"weight": "none" if method == "fp16" else "int"},
        "scope": {"hash": "s", "towers": ["decoder"]},
        "calibration": {"ids_hash": "c", "samples": 8, "leaked": 0},
        "question_ids": "q",
        "accuracy": accuracy,
        "mean": float(np.mean([a["value"] for a in accuracy.values()])),
        "bits": {"weight": 4.1, "activation": 4.3},
        "versions": {"torch": "2"},
    }
    (folder / "result.json").write_text(json.dumps(result))
    return {"run": str(folder)}


def job(choice: str, outcome: dict[str, str], *others: str) -> dict[str, str]:
    overrides = ["+experiment=ablation", *others, f"ablation={choice}"]
    return {"overrides": " ".join(overrides), **outcome}


def flipped(name: str, count: int, to: int) -> dict[str, list[int]]:
    """The base's verdicts with some of one benchmark turned."""
    changed = {key: list(verdicts) for key, verdicts in RIGHT.items()}
    where = [i for i, verdict in enumerate(changed[name]) if verdict != to][:count]
    for i in where:
        changed[name][i] = to
    return changed


@pytest.fixture
def sweep(tmp_path: Path) -> list[dict[str, str]]:
    save(tmp_path, "fp16", {name: [1] * size for name, size in SIZES.items()}, "fp16")
    same = save(tmp_path, "base", RIGHT)
    return [
        job("compensation_none", save(tmp_path, "none", flipped("mmmu", 20, 0))),
        job("base", same),
        job("cosine_075", same),
        job("loss_p1", save(tmp_path, "p1", flipped("videomme", 1, 1))),
        job("mask_top_share", {"error": "disk | full\nmore", "method": "m", "scheme": "w4a4"}),
        job("search_off", save(tmp_path, "off", flipped("mmmu", 4, 1))),
    ]


def by_choice(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index(frame["factor"] + "_" + frame["choice"])


def test_rows_are_the_jobs_base_first(sweep: list[dict[str, str]]) -> None:
    frame = ablation(sweep).frame
    assert list(frame["factor"]) == ["base", "compensation", "cosine", "loss", "mask", "search"]
    assert list(frame["choice"]) == ["–", "none", "075", "p1", "top_share", "off"]
    assert "setting" not in frame


def test_differences_are_to_the_base(sweep: list[dict[str, str]]) -> None:
    rows = by_choice(ablation(sweep).frame)
    none, base = rows.loc["compensation_none"], rows.loc["base_–"]
    assert (base["mmmu"], base["mean"]) == (50.0, 50.0)
    assert math.isnan(base["Δ mean"])
    assert none["Δ mmmu"] == pytest.approx(-100 / 3)
    assert none["Δ videomme"] == 0.0
    assert none["Δ mean"] == pytest.approx(none["mean"] - base["mean"])
    assert none["low"] < none["Δ mean"] < none["high"] < 0
    assert (none["gained"], none["lost"]) == (0, 20)
    assert none["p"] == pytest.approx(2 * 0.5**20)
    assert (none["A bits"], none["W bits"]) == (4.3, 4.1)


def test_verdicts(sweep: list[dict[str, str]]) -> None:
    verdicts = by_choice(ablation(sweep).frame)["verdict"].to_dict()
    assert verdicts == {
        "base_–": module.IS_BASE,
        "compensation_none": module.LOWER,
        "cosine_075": module.SAME_RUN,
        "loss_p1": module.NOTHING,
        "mask_top_share": "failed: disk | full",
        # Four gained and none lost: the interval leaves out zero, the test has p = 1/8.
        "search_off": module.HIGHER + module.UNCORRECTED,
    }


def test_correction_counts_only_what_was_compared(sweep: list[dict[str, str]]) -> None:
    report = ablation(sweep)
    tested = report.frame[report.frame["p"].notna()].sort_values("p")
    assert list(tested["factor"]) == ["compensation", "search", "loss"]
    expected = [tested["p"].iloc[0] * 3, tested["p"].iloc[1] * 3 / 2, 1.0]
    assert list(tested["p adjusted"]) == pytest.approx(expected)
    assert any("over 3 comparisons" in note for note in report.notes)


def test_footnotes_say_what_is_needed_to_read_it(sweep: list[dict[str, str]]) -> None:
    notes = " ".join(ablation(sweep).notes)
    for part in (
        "mmmu 60, videomme 60",
        "ablation=base",
        "95 % of the difference",
        "Benjamini-Hochberg",
        "The unquantized model: 100.0",
        "Failed: +experiment=ablation ablation=mask_top_share: disk | full more",
    ):
        assert part in notes


def test_markdown_and_terminal(
    sweep: list[dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    report = ablation(sweep)
    report.show()
    printed, markdown = capsys.readouterr().out, report.markdown()
    for cell in (
        "16.7 (-33.3)",
        "51.7 (+1.7 ≈)",
        "+0 / -20",
        "<0.001",
        "no difference found",
        "95 % interval",
    ):
        assert cell in markdown
        assert cell in printed
    lines = markdown.splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in lines[:8]}) == 1
    assert lines[2].startswith("| base | – | 50.0 | 50.0 | 50.0 | – |")


def test_single_benchmarks_are_tested_too(sweep: list[dict[str, str]]) -> None:
    report = ablation(sweep)
    rows = by_choice(report.frame)
    assert rows.loc["compensation_none", "verdict mmmu"] == module.LOWER
    assert rows.loc["search_off", "verdict mmmu"] == module.HIGHER + module.UNCORRECTED
    assert rows.loc["search_off", "verdict videomme"] == module.NOTHING
    assert rows.loc["base_–", "verdict mmmu"] is None or pd.isna(rows.loc["base_–", "verdict mmmu"])
    tested = rows[["p mmmu", "p videomme"]].notna().to_numpy().sum()
    assert tested == 6
    assert any("over their 6 differences" in note for note in report.notes)
    for name in ("mmmu", "videomme"):
        assert (rows[f"p adjusted {name}"].dropna() >= rows[f"p {name}"].dropna()).all()


def test_all_pairs_and_the_cost_stand_beside(sweep: list[dict[str, str]]) -> None:
    parts = ablation(sweep).parts
    assert len(parts["pairs"].frame) == 6  # of four runs: one job looked up the base's
    assert len(parts["cost"].frame) == 5  # the unquantized model too
    assert not any(part.printed for part in parts.values())


def test_the_same_jobs_give_the_same_table(sweep: list[dict[str, str]]) -> None:
    pd.testing.assert_frame_equal(ablation(sweep).frame, ablation(sweep).frame)


def test_every_setting_has_its_own_base(tmp_path: Path) -> None:
    other = flipped("mmmu", 30, 1)
    notes = [
        job("base", save(tmp_path, "a", RIGHT), "method=a"),
        job("loss_p1", save(tmp_path, "a1", RIGHT), "method=a"),
        job("base", save(tmp_path, "b", other), "method=b"),
        job("loss_p1", save(tmp_path, "b1", other), "method=b"),
    ]
    frame = ablation(notes).frame
    assert list(frame["setting"]) == ["method=a", "method=a", "method=b", "method=b"]
    assert frame["Δ mean"].dropna().tolist() == [0.0, 0.0]


def test_a_failed_base_leaves_numbers_without_differences(tmp_path: Path) -> None:
    notes = [job("base", {"error": ""}), job("loss_p1", save(tmp_path, "p1", RIGHT))]
    frame = ablation(notes).frame
    assert list(frame["verdict"]) == ["failed: no reason given", module.UNCOMPARED]
    assert frame["mean"].tolist()[1] == 50.0
    assert frame["Δ mean"].isna().all()
    assert len(ablation(notes[:1]).frame) == 1


def test_jobs_are_refused_that_cannot_be_told_apart(tmp_path: Path) -> None:
    run = save(tmp_path, "p1", RIGHT)
    with pytest.raises(HarnessError, match="no job ablation=base"):
        ablation([job("loss_p1", run)])
    with pytest.raises(HarnessError, match="no ablation=<choice>"):
        read_jobs([{"overrides": "method=rtn", **run}])
    with pytest.raises(HarnessError, match="two jobs of ablation=base"):
        read_jobs([job("base", run), job("base", run)])


def test_other_questions_are_refused(tmp_path: Path) -> None:
    shorter = {name: verdicts[:-3] for name, verdicts in RIGHT.items()}
    notes = [
        job("base", save(tmp_path, "a", RIGHT)),
        job("loss_p1", save(tmp_path, "p1", shorter)),
    ]
    with pytest.raises(HarnessError, match="6 only in the base"):
        ablation(notes)


def test_a_choice_keeps_everything_behind_its_factor() -> None:
    jobs = read_jobs([job("mask_local_or_global", {"error": "x"}), job("base", {"error": "x"})])
    assert [(j.factor, j.choice, j.setting) for j in jobs] == [
        ("mask", "mask_local_or_global", ""),
        ("base", "base", ""),
    ]
