"""Phases add up, and memory is a high-water mark."""

from __future__ import annotations

import pytest
import torch

from morphoquant.tracking.clock import Clock


def test_phases_add_up_and_survive_errors() -> None:
    clock = Clock()
    with clock.phase("a"):
        pass
    first = clock.seconds["a"]
    with pytest.raises(KeyError), clock.phase("a"):
        raise KeyError
    assert clock.seconds["a"] > first
    with clock.phase("b"):
        pass
    assert set(clock.seconds) == set(clock.peak_memory_mb) == {"a", "b"}


def test_memory_is_seen() -> None:
    clock = Clock()
    with clock.phase("small"):
        pass
    with clock.phase("large"):
        held = torch.ones(40 << 20)
    assert clock.peak_memory_mb["large"] >= clock.peak_memory_mb["small"]
    assert clock.peak_memory_mb["large"] >= held.nbytes / 2**20 > 100
