"""A sweep with a job that fails: the others run, the table says so, the exit code too.

The pipeline is replaced by one that only writes results; everything around it is real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from morphoquant.analysis.sweeps import find_sweep

ROOT = Path(__file__).parents[1]

DRIVER = """
import sys, types
from pathlib import Path

from morphoquant.errors import HarnessError
from morphoquant.tracking.rundir import RunDirectory

def result(config, directory, reference):
    return {
        "fingerprint": directory.fingerprint, "method": config.method.name,
        "scheme": config.bits.scheme, "model": config.model.name, "reference": reference,
        "slots": {"transform": "none", "weight": config.method.weight.format,
                  "activation": "none", "compensation": "none"},
        "scope": {"hash": "s", "towers": ["decoder"]}, "question_ids": "q",
        "calibration": {"ids_hash": "c", "name": "mini", "samples": 8, "leaked": 0},
        "accuracy": {"mmmu": {"value": right(config), "n": 100, "empty": 0, "unparsed": 0}},
        "mean": right(config), "bits": {"weight": 4.0, "activation": 4.0}, "versions": {},
        "seconds": {"quantize": 1.0, "evaluate": 2.0},
    }

def right(config):
    # Sharper errors, fewer right answers: something for a paired test to find.
    return 50.0 - 20 * (config.method.activation.range.p > 2)

def answers(config):
    import pandas as pd
    count = int(right(config))
    return pd.DataFrame({
        "benchmark": "mmmu", "task": "mini_mmmu", "doc_id": range(100),
        "id": [str(i) for i in range(100)], "modality": "image", "target": "A", "answer": "A",
        "parsed": "A", "correct": [1.0] * count + [0.0] * (100 - count),
        "empty": False, "unparsed": False, "output_tokens": 1,
    })

def path(config, found):
    return Path(config.paths.runs) / f"{config.method.name}-{found['fingerprint'][:10]}"

def run(config):
    if config.method.name == "rtn":
        raise HarnessError("no room for rtn")
    if config.method.name == "quarot":
        raise RuntimeError("CUDA out of memory")
    reference = None
    if config.method.name != "fp16":
        from morphoquant.config.schema import BitsConfig, MethodConfig
        plain = {"method": MethodConfig(), "bits": BitsConfig()}
        reference = run(config.model_copy(update=plain))["fingerprint"]
    assert config.tracker.group is None or "_" in config.tracker.group
    identity = {"config": config.model_dump(mode="json", exclude={"tracker", "paths"})}
    directory = RunDirectory.open(Path(config.paths.runs), config.method.name, identity)
    found = result(config, directory, reference)
    directory.write_table("samples", answers(config))
    directory.finish(found)
    return found

fake = types.ModuleType("morphoquant.pipeline")
fake.run, fake.run_path = run, path
import morphoquant
morphoquant.pipeline = sys.modules["morphoquant.pipeline"] = fake
import runpy
if ENTRY.endswith(".py"):
    runpy.run_path(ENTRY, run_name="__main__")
else:
    runpy.run_module(ENTRY, run_name="__main__")
"""


def drive(
    folder: Path, *arguments: str, entry: str = str(ROOT / "run.py")
) -> subprocess.CompletedProcess[str]:
    driver = folder / "driver.py"
    driver.write_text(f"ENTRY = {entry!r}\n{DRIVER}")
    runs = folder / "runs"
    return subprocess.run(
        [sys.executable, str(driver), *arguments, f"paths.runs={runs}", "tracker=none"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_a_sweep_goes_on_after_failures(tmp_path: Path) -> None:
    found = drive(tmp_path, "-m", "method=rtn,quarot,morphoquant,rtn_static")
    assert found.returncode == 1, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.md")
    lines = table.read_text().splitlines()
    assert lines[2].startswith("| fp16 |")
    assert [row.split("|")[1].strip() for row in lines[3:7]] == [
        "morphoquant",
        "rtn_static",
        "rtn",
        "quarot",
    ]
    text = table.read_text()
    assert "no room for rtn" in text
    assert "CUDA out of memory" in text
    assert "+0.0" in text
    for name in ("table.csv", "pairs.md", "pairs.csv", "cost.md", "cost.csv"):
        assert table.with_name(name).is_file()
    assert "no room for rtn" in found.stderr
    assert found.stderr.count("Traceback") == 1  # of the unexpected one


def test_a_sweep_that_comes_through(tmp_path: Path) -> None:
    found = drive(
        tmp_path, "-m", "method=morphoquant", "method.activation.range.p=2,3", "bits=w4a4,w8a8"
    )
    assert found.returncode == 0, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.md")
    assert "morphoquant range.p=2.0" in table.read_text()
    assert "morphoquant range.p=3.0" in table.read_text()
    assert "Accuracy" in found.stdout


@pytest.mark.parametrize(("method", "code"), [("morphoquant", 0), ("rtn", 1)])
def test_a_single_run(tmp_path: Path, method: str, code: int) -> None:
    found = drive(tmp_path, f"method={method}")
    assert found.returncode == code
    assert "Traceback" not in found.stderr
    assert ("fp16" in found.stdout) == (code == 0)
    assert ("no room for rtn" in found.stderr) == (code == 1)


def test_an_unexpected_error_of_a_single_run_keeps_its_traceback(tmp_path: Path) -> None:
    found = drive(tmp_path, "method=quarot")
    assert found.returncode == 1
    assert "Traceback" in found.stderr


def test_an_ablation_ends_in_paired_differences(tmp_path: Path) -> None:
    found = drive(tmp_path, "-m", "experiment=ablation", "ablation=base,loss_p1,loss_p3")
    assert found.returncode == 0, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.md")
    lines = table.read_text().splitlines()
    base, gentle, sharp = lines[2:5]
    assert base.startswith("| base")
    assert "no difference found" in gentle
    assert "lower" in sharp
    assert "-20.0" in sharp
    assert (table.parent / "ablation.png").stat().st_size > 1000
    sweep = find_sweep(tmp_path / "runs", "experiment=ablation")
    assert sweep.path == table.parent
    assert sweep.report == "ablation"
    assert sweep.command.startswith("python run.py experiment=ablation ablation=base,")
    assert len(sweep.runs) == 3
    assert "Figure:" in found.stdout


def test_an_ablation_without_its_base_is_refused(tmp_path: Path) -> None:
    found = drive(tmp_path, "-m", "experiment=ablation", "ablation=loss_p1,loss_p3")
    assert found.returncode == 2
    assert "ablation=base" in found.stderr
    assert not list(tmp_path.rglob("result.json"))


def test_table3_shows_published_beside_measured(tmp_path: Path) -> None:
    found = drive(tmp_path, "-m", "experiment=table3")
    assert found.returncode == 0, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.md")
    text = table.read_text()
    for published in ("76.63", "45.11", "72.93", "42.44"):
        assert published in text
    for row in ("baseline", "plus_dabc", "full"):
        assert row in text
    assert "morphoquant_reference" in text


def test_a_published_table_is_a_command_of_its_own(tmp_path: Path) -> None:
    """``python -m experiments.table1`` is ``run.py experiment=table1``."""
    rows = "row=w4a4_rtn_static,w8a8_morphoquant,w4a4_morphoquant"
    found = drive(tmp_path, rows, entry="experiments.table1")
    assert found.returncode == 0, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.md")
    text = table.read_text()
    rows_of = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in text.splitlines()}
    assert ("w4a4", "morphoquant", "50.0 (+0.0 ≈)") in rows_of
    assert ("w8a8", "morphoquant", "50.0 (+0.0 ≈)") in rows_of
    for published in ("76.63", "45.11", "72.93", "42.44"):
        assert published in text
    assert table.with_name("pairs.csv").read_text().count("\n") == 1 + 6
    refused = drive(tmp_path, "method=rtn", entry="experiments.table1")
    assert refused.returncode == 2
    assert "Table 1 has no such row" in refused.stderr
