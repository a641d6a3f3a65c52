"""Table 1: every published row is there, beside what was measured of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml

from morphoquant.analysis import published, table1
from morphoquant.analysis.published import published_table
from morphoquant.config.rows import TABLE1
from morphoquant.errors import HarnessError

Finish = Callable[..., dict[str, str]]
CONF = Path(__file__).parents[2] / "conf"


def verdicts(right: int) -> dict[str, list[int]]:
    return {"mmmu": [1] * right + [0] * (40 - right), "scienceqa": [1] * 20}


@pytest.fixture
def notes(finish: Finish) -> list[dict[str, str]]:
    """All rows but the last, which failed."""
    done = [finish(method, scheme, verdicts(40 - i)) for i, (scheme, method) in enumerate(TABLE1)]
    return [*done[:-1], {"overrides": "row=w4a4_morphoquant_hif4", "error": "disk full"}]


def test_rows_are_the_files_of_the_group() -> None:
    names = {path.stem for path in (CONF / "row").glob("*.yaml")}
    assert names == {f"{scheme}_{method}" for scheme, method in TABLE1}
    swept = yaml.safe_load((CONF / "experiment" / "table1.yaml").read_text())
    rows = swept["hydra"]["sweeper"]["params"]["row"].split(",")
    assert [row.strip() for row in rows] == [f"{scheme}_{method}" for scheme, method in TABLE1]


def test_measured_and_published_stand_in_one_row(notes: list[dict[str, str]]) -> None:
    frame = table1.table1(notes).frame.set_index(["bits", "method"])
    ours = frame.loc[("w4a4", "morphoquant")]
    assert ours["mmmu (measured)"] == pytest.approx(100 * 27 / 40)
    assert ours["Δ mmmu (measured)"] == pytest.approx(-100 * 13 / 40)
    assert ours["verdict mmmu (measured)"] == "lower"
    assert (ours["mmmu (draft)"], ours["mmmu (arXiv v2)"]) == (42.44, 45.11)
    assert frame.loc[("w4a16", "nf4"), "scienceqa (draft)"] == 75.88
    assert frame.loc[("w4a4", "rtn_static"), "mmmu (arXiv v2)"] == 40.0
    for method in ("awq", "mbq"):
        assert frame.loc[("w4a16", method), "mmmu (draft)"] == 36.7
    assert frame.loc[("w4a16", "awq"), "mmmu (MASQuant)"] == 36.7
    assert frame.loc[("w16a16", "fp16"), "mmmu (arXiv v2)"] == 44.78
    assert pd.isna(frame.loc[("w4a4", "quarot"), "mmmu (draft)"])


def test_no_published_row_of_the_model_is_lost(notes: list[dict[str, str]]) -> None:
    frame = table1.table1(notes).frame
    rows = published_table("table1")
    rows = rows[rows["model"] == published.MODEL]
    for benchmark in ("scienceqa", "videomme"):
        for label, source in (("draft", "draft_2026_07"), ("arXiv v2", "v2_second_hand")):
            wanted = set(rows.loc[rows["source"] == source, benchmark].dropna())
            assert wanted <= set(frame[f"{benchmark} ({label})"].dropna())


def test_rows_come_in_the_order_of_the_published_table(notes: list[dict[str, str]]) -> None:
    frame = table1.table1(notes[::-1]).frame
    assert list(dict.fromkeys(frame["bits"])) == ["w16a16", "w4a16", "w8a8", "w4a4"]
    measured = frame[frame["mean (measured)"].notna()]
    assert list(zip(measured["bits"], measured["method"], strict=True)) == list(TABLE1[:-1])
    alone = frame[frame["bits"] == "w4a4"]["method"].tolist()
    assert alone[-3:] == ["morphoquant_hif4", "qvlm", "pomq_vit"]


def test_notes_say_what_cannot_be_compared(notes: list[dict[str, str]]) -> None:
    found = table1.table1(notes).notes
    text = " ".join(found)
    for part in (
        "tiny_omni is not the published model",
        "for the 39 comparisons of this table",  # 13 rows, two benchmarks and the mean
        "equals the AWQ rows of MASQuant",
        "42.44 on MMMU",
        "masquant (w4a16, w8a8)",
        "qvlm (w4a4)",
        "internvl2_5_8b",
        "Failed: row=w4a4_morphoquant_hif4: disk full",
    ):
        assert part in text, part
    assert "nf4 (" not in text
    assert set(published.PROTOCOL) <= set(found)


def test_published_models_get_their_own_rows(finish: Finish) -> None:
    note = finish("morphoquant", "w4a4", verdicts(30), model="qwen2_5_omni_7b")
    report = table1.table1([note])
    frame = report.frame.set_index(["bits", "method"])
    assert frame.loc[("w4a4", "morphoquant"), "mmmu (draft)"] == 51.11
    assert "is not the published model" not in " ".join(report.notes)
    other = finish("quarot", "w4a4", verdicts(30))
    with pytest.raises(HarnessError, match="qwen2_5_omni_7b, tiny_omni"):
        table1.table1([note, other])


def test_markdown_has_parts_and_every_gap_its_reason(notes: list[dict[str, str]]) -> None:
    report = table1.table1(notes)
    missing = report.frame[report.frame["mean (measured)"].isna()]
    rows = set(zip(missing["bits"], missing["method"], strict=True)) - set(TABLE1)
    assert {method for _, method in rows} <= set(table1.UNMEASURED)
    text = report.markdown()
    assert "| w4a4 | morphoquant | 67.5 (-32.5) | 42.44 | 45.11 |" in text
    assert "| 100.0 (+0.0 ≈) |" in text
    assert set(report.parts) == {"pairs", "cost"}
    assert len(report.parts["pairs"].frame) == 14 * 13 / 2
