"""Evaluation: lmms-eval's own tasks, our model, every answer kept.

``check`` refuses bad data before a model is loaded, ``question_ids`` says what will be asked,
``evaluate`` asks and scores. Importing this package imports neither torch nor lmms-eval; the
first ``evaluate`` of a process does.
"""

from __future__ import annotations

from morphoquant.evaluation.checks import check
from morphoquant.evaluation.data import data_hash, question_ids
from morphoquant.evaluation.errors import DataError, ScoringError, StorageError
from morphoquant.evaluation.protocol import Generator, Progress
from morphoquant.evaluation.results import Evaluation, TaskResult
from morphoquant.evaluation.runner import evaluate

__all__ = [
    "DataError",
    "Evaluation",
    "Generator",
    "Progress",
    "ScoringError",
    "StorageError",
    "TaskResult",
    "check",
    "data_hash",
    "evaluate",
    "question_ids",
]
