"""A small build of the embedded benchmarks, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from morphoquant.embedded import benchmarks

EVALUATION, CALIBRATION = 24, 12


@pytest.fixture(scope="session")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 evaluation and 12 calibration questions per benchmark."""
    root = tmp_path_factory.mktemp("embedded") / "benchmarks"
    return benchmarks.build(root, EVALUATION, CALIBRATION)
