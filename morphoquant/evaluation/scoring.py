"""From lmms-eval's metrics and logged samples to our records, and the proof that they agree."""

from __future__ import annotations

import math
import re
from typing import Any

from morphoquant.evaluation.asking import Asker
from morphoquant.evaluation.errors import ScoringError
from morphoquant.evaluation.results import TaskResult
from morphoquant.evaluation.tasks import Benchmark, Task

METRICS: dict[Benchmark, str] = {
    "mmmu": "mmmu_acc",
    "scienceqa": "exact_match",
    "videomme": "videomme_perception_score",
    "air_bench": "accuracy",
}
SCALE: dict[Benchmark, float] = {
    "mmmu": 100.0,
    "scienceqa": 100.0,
    "videomme": 1.0,
    "air_bench": 100.0,
}
"""What takes lmms-eval's own score to 0–100."""

ROUNDED: tuple[Benchmark, ...] = ("mmmu", "air_bench")
"""Their aggregations round the share to five digits; the mean of our records is not rounded."""

_SQA_CHOICE = re.compile(r"^([A-Za-z])$|^([A-Z])\.")


def _parsed(task: Task, sample: dict[str, Any]) -> tuple[str, bool]:
    """(the choice that the stock code took from an answer, whether it had to do without one)."""
    text = sample["filtered_resps"][0].strip()
    if task.benchmark == "mmmu":
        found = sample["mmmu_acc"]["parsed_pred"][0]
        if isinstance(found, list):  # an open question: candidates, in no fixed order
            return "; ".join(sorted(str(candidate).strip() for candidate in found)), not text
        return str(found), sample["drew"]
    if task.benchmark == "air_bench":
        return str(next(iter(sample["submission"].values()))), sample["drew"]
    if task.benchmark == "videomme":
        found = sample["videomme_perception_score"]["pred_answer"]
        return found, not found
    # ScienceQA's scoring takes a lone letter or 'A. ...' and nothing else.
    match = _SQA_CHOICE.match(text)
    return ((match.group(1) or match.group(2)).upper(), False) if match else ("", True)


def _correct(task: Task, sample: dict[str, Any]) -> float:
    """1.0 or 0.0, as the stock code judged it."""
    if task.benchmark == "mmmu":
        return float(sample["judged"])
    if task.benchmark == "scienceqa":
        return float(sample["exact_match"])
    return float(sample[METRICS[task.benchmark]]["score"])


def records(task: Task, asker: Asker, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per question, with the columns of ``results.SAMPLE_COLUMNS``."""
    rows = []
    for sample in samples:
        question = asker.questions[sample["doc_id"]]
        parsed, unparsed = _parsed(task, sample)
        text = sample["filtered_resps"][0]
        rows.append(
            {
                "benchmark": task.benchmark,
                "task": task.name,
                "doc_id": sample["doc_id"],
                "id": f"{task.set}/{question.id}",
                "modality": question.modality,
                "target": str(sample["target"]),
                "answer": text,
                "parsed": parsed,
                "correct": _correct(task, sample),
                "empty": not text.strip(),
                "unparsed": unparsed,
                "output_tokens": asker.answers[sample["doc_id"]].output_tokens,
            }
        )
    return rows


def _stderr(task: Task, metrics: dict[str, Any], correct: list[float]) -> float | None:
    """lmms-eval's own standard error, the clustered one first; MMMU has none, so it is ours."""
    name = METRICS[task.benchmark]
    for kind in ("stderr_clustered", "stderr_clt"):
        value = metrics.get(f"{name}_{kind},none")
        if isinstance(value, (int, float)) and math.isfinite(value):
            return 100.0 * float(value)  # from verdicts 0 or 1 in every benchmark
    n = len(correct)
    if n < 2:
        return None
    mean = sum(correct) / n
    return 100.0 * math.sqrt(sum((c - mean) ** 2 for c in correct) / (n - 1) / n)


def result(
    task: Task, asker: Asker, metrics: dict[str, Any], rows: list[dict[str, Any]]
) -> TaskResult:
    """The task's score, after its per-sample records were found to add up to it.

    Raises:
        ScoringError: they do not.
    """
    name = METRICS[task.benchmark]
    correct = [row["correct"] for row in rows]
    value = float(metrics[f"{name},none"]) * SCALE[task.benchmark]
    mean = 100.0 * sum(correct) / len(correct)
    # The records may differ from lmms-eval's score by its rounding, and by nothing else: every
    # question is asked once (repeats = 1), counts once (MMMU weighs subjects by their size), and
    # Video-MME's two comparisons (with and without case) agree because check() wants answers A-D.
    tolerance = 1e-4 + (5e-4 if task.benchmark in ROUNDED else 0.0)
    if abs(mean - value) > tolerance:
        raise ScoringError(
            f"task {task.name}: lmms-eval scores {value:.6f}, the mean of the {len(rows)} "
            f"per-sample verdicts is {mean:.6f}; is this another version of lmms-eval than the one "
            f"this package requires?"
        )
    return TaskResult(
        benchmark=task.benchmark,
        metric=name,
        value=round(value, 9),  # 25.391, not 25.391000000000002
        n=len(rows),
        stderr=_stderr(task, metrics, correct),
        empty=sum(row["empty"] for row in rows),
        unparsed=sum(row["unparsed"] for row in rows),
        seconds=sum(answer.seconds for answer in asker.answers.values()),
    )
