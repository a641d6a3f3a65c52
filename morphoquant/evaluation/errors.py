"""What can go wrong in an evaluation and is the user's to mend."""

from __future__ import annotations

from morphoquant.errors import HarnessError


class DataError(HarnessError, ValueError):
    """Question data that is missing, unreadable, or would not survive the stock task code."""


class StorageError(HarnessError, OSError):
    """A file that could not be written; answers that were already written stay valid."""


class ScoringError(HarnessError, RuntimeError):
    """Per-sample records that do not add up to the score lmms-eval reports."""
