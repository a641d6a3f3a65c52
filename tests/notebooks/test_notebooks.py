"""The notebooks run top to bottom on small sweeps, and are committed with what they showed."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from morphoquant.analysis.execute import execute

nbformat = pytest.importorskip("nbformat")
errors = pytest.importorskip("nbclient.exceptions")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 1_500_000  # bytes
SIZE = ["calibration.samples=20"]
SWEEPS = [
    ["experiment=ablation", "ablation=base,compensation_none,loss_p05", *SIZE],
    ["experiment=table3", "method=morphoquant", *SIZE],  # two of its three rows are new
    ["experiment=sensitivity_gamma", "method.compensation.gate=0.8,1.5", *SIZE],
    ["experiment=sensitivity_lambda", "method.activation.range.cosine_weight=0.0,0.75", *SIZE],
    ["experiment=cross_modal_calibration", "calibration=mini,mini_no_audio", *SIZE],
    ["experiment=calibration_size", "calibration.samples=10,20"],
    ["experiment=three_methods", *SIZE],
]
"""One after the other: base, lambda=0, mini and 20 prompts are the same run."""


@pytest.fixture(scope="session")
def small_runs(command_line: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories of all sweeps that the notebooks load, with a few questions each."""
    folder = tmp_path_factory.mktemp("notebooks")
    shared = [
        "limit=4",
        "calibration.search_samples=5",
        "statistics.figures=false",
        "tracker=none",
        f"paths.runs={folder / 'runs'}",
        f"paths.cache={folder / 'cache'}",
    ]
    for overrides in SWEEPS:
        done = command_line(folder, *overrides, *shared)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs"


def kernel(runs: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "MORPHOQUANT_RUNS": str(runs), "PYTHONPATH": path}


def code(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def text(outputs: list[Any]) -> str:
    """What outputs say: printed text, markdown, tables."""
    said = [out.get("text", "") for out in outputs]
    for out in outputs:
        data = out.get("data", {})
        said += [data.get("text/markdown", ""), data.get("text/plain", "")]
    return "\n".join(said)


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == {"ablation_sweeps", "outlier_atlas"}


@pytest.mark.slow
@pytest.mark.timeout(900)  # the sweeps are made first
def test_they_run_on_small_sweeps(small_runs: Path) -> None:
    # One test for both: parallel test processes would each make the sweeps.
    cells = {}
    for path in NOTEBOOKS:
        executed = execute(path, env=kernel(small_runs))
        own = {c.id: text(c.outputs) for c in executed.cells if c.cell_type == "code"}
        conclusions = [said for name, said in own.items() if "conclude" in name]
        assert len(conclusions) >= 3
        for said in conclusions:
            assert said.strip()
            assert "nan" not in said.split()
        cells[path.stem] = own
    assert "loss_p05" in cells["ablation_sweeps"]["errors-table"]
    assert "2 comparisons" in cells["ablation_sweeps"]["conclude-accuracy"]
    assert "mini_no_audio" in cells["ablation_sweeps"]["conclude-calibration"]
    assert "presets are left out" in cells["outlier_atlas"]["runs"]
    assert "morphoquant_paper" not in cells["outlier_atlas"]["depth-table"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_missing_sweep_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.CellExecutionError, match=r"python run\.py experiment=") as failed:
        execute(path, env=kernel(tmp_path))
    assert failed.value.ename == "HarnessError"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestAsCommitted:
    def test_every_cell_ran_in_order(self, path: Path) -> None:
        cells = code(path)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
        # A cell that only imports or assigns has nothing to show.
        silent = [cell.id for cell in cells if not cell.outputs and _shows(cell.source)]
        assert not silent

    def test_pictures_and_conclusions_are_there(self, path: Path) -> None:
        cells = code(path)
        pictures = [o for c in cells for o in c.outputs if "image/png" in o.get("data", {})]
        assert len(pictures) >= 5
        assert any(cell.id.startswith("conclude") for cell in cells)

    def test_it_holds_no_place_of_this_machine(self, path: Path) -> None:
        whole = path.read_text(encoding="utf-8")
        for place in ("/tmp", "/work/", "/home/", "/root/", "/Users/", str(Path.home())):
            assert place not in _without_pictures(whole), place
        assert path.stat().st_size < LARGEST
        metadata = nbformat.read(path, 4).metadata
        assert set(metadata) == {"kernelspec", "language_info"}

    def test_it_names_its_commands(self, path: Path) -> None:
        notebook = nbformat.read(path, 4)
        first = notebook.cells[0]
        assert first.cell_type == "markdown"
        assert "python run.py experiment=" in first.source
        shown = "\n".join(text(cell.outputs) for cell in code(path))
        assert "`python run.py experiment=" in shown
        assert "paths.runs" not in shown


def _without_pictures(notebook: str) -> str:
    """Base64 may hold any short word by chance."""
    return "\n".join(line for line in notebook.splitlines() if '"image/png"' not in line)


def _shows(source: str) -> bool:
    """Whether a cell displays, prints or ends in a value."""
    lines = [line for line in source.splitlines() if not line.startswith("%")]
    tree = ast.parse("\n".join(lines))
    calls = {getattr(n.func, "id", "") for n in ast.walk(tree) if isinstance(n, ast.Call)}
    ends = isinstance(tree.body[-1], ast.Expr)
    return ends or bool(calls & {"display"})
