"""Errors that a user is meant to see: one clear message, no traceback."""

from __future__ import annotations


class HarnessError(Exception):
    """Base of every expected failure: bad input, missing data, a storage or invariant problem."""


class ActivationError(HarnessError, ValueError):
    """Activations that no statistic or range can be taken from: NaN, infinite, overflowing."""
