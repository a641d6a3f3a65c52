"""Seconds and peak memory of the phases of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """What every phase took.

    Attributes:
        seconds: wall time by phase.
        peak_memory_mb: MiB by phase. On GPUs the most that torch held allocated during the phase,
            added up over those that this process sees; on a CPU the process's largest resident
            size up to the end of the phase, which never falls.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure what happens inside; the same name twice adds up."""
        _reset_peak()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.peak_memory_mb[name] = max(self.peak_memory_mb.get(name, 0.0), _peak())


def _on_gpu() -> bool:
    torch = sys.modules.get("torch")  # not imported here: asking must cost nothing
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


def _reset_peak() -> None:
    if _on_gpu():
        cuda = sys.modules["torch"].cuda
        for device in range(cuda.device_count()):
            cuda.reset_peak_memory_stats(device)


def _peak() -> float:
    if _on_gpu():
        cuda = sys.modules["torch"].cuda
        return round(sum(map(cuda.max_memory_allocated, range(cuda.device_count()))) / 2**20, 1)
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(kilobytes / (2**20 if sys.platform == "darwin" else 2**10), 1)
