"""CPU threads of jobs that share a machine: together no more than it has cores."""

from __future__ import annotations

import os

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def thread_limits(threads: int) -> dict[str, str]:
    """Environment of a job that gets so many threads; what the user has set is left alone."""
    return {name: os.environ.get(name, str(threads)) for name in VARIABLES}


def cores() -> int:
    """Cores that this process may use (not all that the machine has: containers, clusters)."""
    try:
        return max(len(os.sched_getaffinity(0)), 1)
    except AttributeError:  # macOS
        return max(os.cpu_count() or 1, 1)
