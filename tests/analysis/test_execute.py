"""Executing a notebook: this interpreter, no times, no machine, small pictures."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from morphoquant.analysis.execute import execute


def test_execution_is_repeatable_and_uses_this_interpreter(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("nbclient")
    path = tmp_path / "n.ipynb"
    cells = [
        "import os, sys\nprint(sys.executable == os.environ['WANTED'], os.getcwd())\n"
        "open('pids', 'a').write(f'{os.getpid()}\\n')",
        "%matplotlib inline\nfrom matplotlib.figure import Figure\n"
        "f = Figure((1, 1))\naxes = f.add_subplot()\nf",
    ]
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbformat.write(made, path)
    before = path.read_bytes()
    env = dict(os.environ) | {"WANTED": sys.executable}
    first, second = (execute(path, env=env) for _ in range(2))
    assert path.read_bytes() == before
    assert nbformat.writes(first) == nbformat.writes(second)
    assert first.cells[0].outputs[0]["text"].split() == ["True", str(tmp_path)]
    assert "image/png" in first.cells[1].outputs[0]["data"]
    assert all(cell.metadata == {} for cell in first.cells)
    assert set(first.metadata) == {"kernelspec", "language_info"}
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        with pytest.raises(ProcessLookupError):  # no kernel is left behind
            os.kill(pid, 0)
