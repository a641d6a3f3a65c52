"""What an evaluation hands back: scores per task and a table of every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

SAMPLE_COLUMNS = (
    "benchmark",
    "task",
    "doc_id",
    "id",
    "modality",
    "target",
    "answer",
    "parsed",
    "correct",
    "empty",
    "unparsed",
    "output_tokens",
)


@dataclass(frozen=True)
class TaskResult:
    """One task's score. ``value`` and ``stderr`` are on the scale 0–100."""

    benchmark: str
    metric: str
    """Name of the metric in lmms-eval."""
    value: float
    """As lmms-eval scored it (MMMU and AIR-Bench round to five digits of the share)."""
    n: int
    stderr: float | None
    """Standard error of the mean, clustered by video for Video-MME; None for fewer than two."""
    empty: int
    """Answers without any text."""
    unparsed: int
    """Answers in which the stock code found no choice, the empty ones among them.

    MMMU and AIR-Bench score these by a random choice, so a part of their score is luck.
    """
    seconds: float
    """Time spent generating, an earlier interrupted run's share included."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of all tasks, and one row per question (columns: ``SAMPLE_COLUMNS``)."""

    tasks: dict[str, TaskResult]
    samples: pd.DataFrame

    def by_benchmark(self) -> dict[str, dict[str, Any]]:
        """Benchmark -> value (accuracy, 0–100), n, stderr, empty, unparsed; its tasks pooled.

        Pooled by question, so a benchmark of several tasks (AIR-Bench: sound, music, speech) is
        the mean over questions and not over tasks.
        """
        return self._pooled("benchmark")

    def by_modality(self) -> dict[str, dict[str, Any]]:
        """Modality of the question (text, image, video, audio) -> the same."""
        return self._pooled("modality")

    def _pooled(self, column: str) -> dict[str, dict[str, Any]]:
        pooled = {}
        for name, rows in self.samples.groupby(column, sort=False):
            verdicts = 100.0 * rows["correct"].to_numpy(dtype=float)
            n = len(verdicts)
            pooled[str(name)] = {
                "value": float(verdicts.mean()),
                "n": n,
                "stderr": float(verdicts.std(ddof=1) / n**0.5) if n > 1 else None,
                "empty": int(rows["empty"].sum()),
                "unparsed": int(rows["unparsed"].sum()),
            }
        return pooled
