"""Sweeps whose jobs run in other processes or on other hosts.

Hydra's launcher plugins (joblib, submitit, Ray) start the jobs; here is what a sweep needs around
them: a note of every job whatever became of it, one job's death that costs the others nothing, and
paths that mean the same everywhere. ``prepare`` and ``claim`` are called once, in the process that
the user started; ``settle_in`` by every job that runs elsewhere.
"""

from __future__ import annotations

from morphoquant.launching.folder import claim, pin
from morphoquant.launching.prepare import is_parallel, prepare
from morphoquant.launching.worker import settle_in

__all__ = ["claim", "is_parallel", "pin", "prepare", "settle_in"]
