"""Only what answered the same questions is compared, and a verdict is what its interval says."""

from __future__ import annotations

from typing import Any

import pytest

from morphoquant.analysis.page import compare
from morphoquant.analysis.page.gather import gather
from morphoquant.analysis.page.questions import LONGEST, disagreements
from morphoquant.analysis.paired import LOWER, NOTHING, paired_difference
from morphoquant.analysis.pairs import LIMIT


def group_of(runs: Any) -> compare.Group:
    (group,) = compare.groups(gather([runs.root]).runs)
    return group


def wrong(*places: int) -> Any:
    """Answers that are wrong at these questions."""

    def says(i: int) -> str:
        target = "ABCD"[i % 4] if i < 12 else "A"
        return "Z. wrong" if i in places else f"{target}. right"

    return says


def test_cells_carry_the_paired_difference_to_the_reference(compared: Any) -> None:
    group = group_of(compared)
    fp16, quarot, rtn = group.rows
    assert [row.label for row in group.rows] == ["fp16 w16a16", "quarot w4a4", "rtn w4a4"]
    assert all(cell.difference is None and cell.verdict == "" for cell in fp16.cells.values())
    assert {cell.verdict for cell in quarot.cells.values()} == {NOTHING}
    assert (rtn.cells["mmmu"].verdict, rtn.cells["videomme"].verdict) == (NOTHING, LOWER)
    found = {run.result["method"]: run.result for run in group.runs}
    oracle = paired_difference(found["rtn"], found["fp16"])
    assert rtn.cells["mean"].difference == oracle.mean
    assert rtn.cells["videomme"].difference == oracle.benchmarks["videomme"]
    assert group.modality_rows[2].cells["video"].difference == oracle.modalities["video"]
    assert [pair.verdict for pair in group.pairs] == [NOTHING, LOWER, LOWER]
    assert [(p.label, p.base) for p in group.pairs][-1] == ("rtn w4a4", "quarot w4a4")
    assert group.reach >= 50


def test_other_questions_are_another_group(runs: Any) -> None:
    for limit in (12, 24):
        base = runs.add("fp16", limit=limit)
        runs.add("rtn", reference=base, limit=limit)
    runs.add("quarot", limit=24)
    found = compare.groups(gather([runs.root]).runs)
    assert [len(group.runs) for group in found] == [3, 2], "the largest first"
    assert "24 questions" in found[0].title
    assert [n for n in found[0].notes if "No unquantized reference" in n and "quarot" in n]
    assert not [n for n in found[1].notes if "No unquantized reference" in n]


def test_of_many_runs_the_telling_pairs_are_shown(runs: Any) -> None:
    for i in range(LIMIT + 1):
        runs.add(f"method{i:02}", wrong(*range(i)))
    group = group_of(runs)
    count = len(group.runs)
    assert len(group.differences) == count * (count - 1) // 2
    assert len(group.pairs) == 2 * (count - 1) - 1, "neighbours, and the first with all others"


def test_disagreements_are_those_where_verdicts_part(compared: Any) -> None:
    group = group_of(compared)
    found = disagreements(group)
    assert (found.total, found.asked, found.note) == (12, 24, "")
    for question in found.shown:
        assert question.benchmark == "videomme"
        assert [answer.right for answer in question.answers] == [True, True, False]
        assert question.right == 2


def test_a_cap_keeps_every_benchmark_and_says_so(runs: Any) -> None:
    runs.add("rtn", wrong())
    runs.add("quarot", lambda i: "x" * 1000)
    found = disagreements(group_of(runs), most=6)
    assert (found.total, len(found.shown)) == (24, 6)
    assert [q.benchmark for q in found.shown] == ["mmmu"] * 3 + ["videomme"] * 3
    assert [q.id for q in found.shown[:3]] == ["mmmu/q0", "mmmu/q1", "mmmu/q2"]
    assert "24 questions are such; 6 are shown" in found.note
    long = found.shown[0].answers[0].text
    assert long.startswith("x" * LONGEST + " …")
    assert f"{1000 - LONGEST} more" in long


@pytest.mark.parametrize("count", [1, 2])
def test_few_runs_are_no_trouble(runs: Any, count: int) -> None:
    for method in ("rtn", "quarot")[:count]:
        runs.add(method)
    group = group_of(runs)
    assert len(group.pairs) == count - 1
    assert disagreements(group).shown == []
