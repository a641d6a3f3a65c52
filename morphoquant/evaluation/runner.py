"""Evaluate a model: every task through lmms-eval, one at a time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from morphoquant.evaluation import tasks as registry
from morphoquant.evaluation.answers import AnswerStore
from morphoquant.evaluation.asking import Asker
from morphoquant.evaluation.data import locate
from morphoquant.evaluation.protocol import Generator, Progress
from morphoquant.evaluation.results import SAMPLE_COLUMNS, Evaluation, TaskResult
from morphoquant.ranks import Ranks

if TYPE_CHECKING:
    from morphoquant.config.schema import BenchmarkConfig, PathsConfig

log = logging.getLogger(__name__)


def evaluate(
    generator: Generator,
    benchmark: BenchmarkConfig,
    paths: PathsConfig,
    answers_dir: Path,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Ask every question of the benchmark and score the answers with lmms-eval's own task code.

    Answers are kept in ``answers_dir/<task>.jsonl`` as they come; those that are there already and
    answer the very same prompt are not generated again. The first evaluation of a process imports
    lmms-eval (6–7 s).

    Args:
        generator: the model.
        benchmark: tasks, data, limit, batch size.
        paths: where the embedded sets are kept.
        answers_dir: this run's folder for answers; made if missing.
        progress: called as ``progress(done, total, task)`` after every batch.
        ranks: the processes that share the questions; every one of them gets all answers and the
            scores. Rank 1 keeps its answers in ``<task>.rank1.jsonl``.

    Raises:
        RankError: another process failed, or would ask other questions.
        DataError: questions that cannot be loaded or turned into a prompt.
        StorageError: answers that cannot be written; run again to go on.
        ScoringError: the stock scoring failed, or per-sample records do not add up to its score.
    """
    import pandas as pd

    if not benchmark.tasks:
        return Evaluation({}, pd.DataFrame(columns=list(SAMPLE_COLUMNS)))
    from morphoquant.evaluation import bridge, scoring

    ranks = ranks or Ranks()
    results: dict[str, TaskResult] = {}
    rows: list[dict[str, Any]] = []
    for name in benchmark.tasks:
        task = registry.find(name)
        data = locate(task, benchmark, paths)
        with AnswerStore(Path(answers_dir) / f"{name}.jsonl", ranks.rank) as store:
            asker = Asker(task, generator, store, benchmark.batch_size, progress, ranks)
            metrics, samples = bridge.run_task(task, data, benchmark.limit, asker)
        scored = scoring.records(task, asker, samples)
        results[name] = scoring.result(task, asker, metrics, scored)
        rows += scored
        lucky = results[name].unparsed
        if lucky and task.benchmark in scoring.ROUNDED:
            log.warning(
                "%s: %d of %d answers name no choice; the stock scoring gives each of them a "
                "random one (seeded), so their share of the score is luck",
                name,
                lucky,
                results[name].n,
            )
    return Evaluation(results, pd.DataFrame(rows, columns=list(SAMPLE_COLUMNS)))
