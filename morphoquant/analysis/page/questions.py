"""The questions on which runs of a group part: who was right, and what each one said."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from morphoquant.analysis.page.compare import Group
from morphoquant.analysis.paired import KEY

MOST = 400
"""Questions shown."""
LONGEST = 120
"""Characters of an answer shown."""


@dataclass(frozen=True)
class Answer:
    """What one run said."""

    text: str
    parsed: str
    right: bool
    unparsed: bool
    """The scoring found no choice in it: ``parsed`` is empty or was drawn at random."""


@dataclass(frozen=True)
class Question:
    """One question, answered by every run of the group, in its order."""

    id: str
    benchmark: str
    modality: str
    target: str
    answers: list[Answer]

    @property
    def right(self) -> int:
        """How many runs answered rightly."""
        return sum(answer.right for answer in self.answers)


@dataclass(frozen=True)
class Disagreements:
    """Questions that some runs answered rightly and others wrongly."""

    shown: list[Question]
    total: int
    asked: int

    @property
    def note(self) -> str:
        """Says so where not all of them are shown."""
        if len(self.shown) == self.total:
            return ""
        return (
            f"{self.total} questions are such; {len(self.shown)} are shown, the first ones of "
            f"every benchmark in equal parts. All answers are in samples.parquet of the runs."
        )


def disagreements(group: Group, most: int = MOST) -> Disagreements:
    """Where the verdicts of a group's runs differ, in the order they were asked.

    Of more than ``most`` questions, every benchmark keeps its first ones, in equal parts as far as
    it has so many.
    """
    first = group.runs[0].samples
    if first.empty:
        return Disagreements([], total=0, asked=0)
    frame = first[[*KEY, "benchmark", "modality", "target"]].set_index(KEY)
    verdicts = pd.concat([run.samples.set_index(KEY)["correct"] for run in group.runs], axis=1)
    differs = verdicts.nunique(axis=1) > 1
    frame = frame[differs.reindex(frame.index)]
    rank = frame.groupby("benchmark").cumcount()
    kept = frame.loc[rank.sort_values(kind="stable").index[:most]]
    kept = frame[frame.index.isin(kept.index)]
    answered = [run.samples.set_index(KEY) for run in group.runs]
    shown = [
        Question(
            id=str(key[-1]),
            benchmark=row["benchmark"],
            modality=row["modality"],
            target=row["target"],
            answers=[_answer(samples.loc[key]) for samples in answered],
        )
        for key, row in zip(kept.index.tolist(), kept.to_dict("records"), strict=True)
    ]
    return Disagreements(shown, total=len(frame), asked=len(first))


def _answer(row: pd.Series) -> Answer:
    text = str(row["answer"])
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} … ({len(text) - LONGEST} more characters)"
    return Answer(text, str(row["parsed"]), bool(row["correct"]), bool(row["unparsed"]))
