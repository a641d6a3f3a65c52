"""A sweep with a job that fails: the others run, the table says so, the exit code too.

The pipeline is replaced by one that only writes results; everything around it is real.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from morphoquant.analysis.sweeps import find_sweep

Completed = subprocess.CompletedProcess[str]
Drive = Callable[..., Completed]

PIPELINE = """
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

def run_path(config, found):
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
"""


@pytest.fixture(scope="module")
def drive(
    replaced: Callable[..., dict[str, str]],
    command_lines: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Completed]]:
    """``drive(folder, *arguments)``, with runs below the folder."""
    with command_lines(replaced(tmp_path_factory.mktemp("driven") / "site", PIPELINE)) as command:
        yield lambda folder, *arguments, **options: command(
            folder, *arguments, f"paths.runs={folder / 'runs'}", "tracker=none", **options
        )


def test_a_sweep_goes_on_after_failures(drive: Drive, tmp_path: Path) -> None:
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


def test_a_sweep_that_comes_through(drive: Drive, tmp_path: Path) -> None:
    found = drive(
        tmp_path, "-m", "method=morphoquant", "method.activation.range.p=2,3", "bits=w4a4,w8a8"
    )
    assert found.returncode == 0, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.md")
    assert "morphoquant range.p=2.0" in table.read_text()
    assert "morphoquant range.p=3.0" in table.read_text()
    assert "Accuracy" in found.stdout


@pytest.mark.parametrize(("method", "code"), [("morphoquant", 0), ("rtn", 1)])
def test_a_single_run(drive: Drive, tmp_path: Path, method: str, code: int) -> None:
    found = drive(tmp_path, f"method={method}")
    assert found.returncode == code
    assert "Traceback" not in found.stderr
    assert ("fp16" in found.stdout) == (code == 0)
    assert ("no room for rtn" in found.stderr) == (code == 1)


def test_an_unexpected_error_of_a_single_run_keeps_its_traceback(
    drive: Drive, tmp_path: Path
) -> None:
    found = drive(tmp_path, "method=quarot")
    assert found.returncode == 1
    assert "Traceback" in found.stderr


def test_an_ablation_ends_in_paired_differences(drive: Drive, tmp_path: Path) -> None:
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


def test_an_ablation_without_its_base_is_refused(drive: Drive, tmp_path: Path) -> None:
    found = drive(tmp_path, "-m", "experiment=ablation", "ablation=loss_p1,loss_p3")
    assert found.returncode == 2
    assert "ablation=base" in found.stderr
    assert not list(tmp_path.rglob("result.json"))


def test_table3_shows_published_beside_measured(drive: Drive, tmp_path: Path) -> None:
    found = drive(tmp_path, "-m", "experiment=table3")
    assert found.returncode == 0, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.md")
    text = table.read_text()
    for published in ("76.63", "45.11", "72.93", "42.44"):
        assert published in text
    for row in ("baseline", "plus_dabc", "full"):
        assert row in text
    assert "morphoquant_reference" in text


def test_a_published_table_is_a_command_of_its_own(drive: Drive, tmp_path: Path) -> None:
    """``python -m experiments.table1`` is ``run.py experiment=table1``."""
    rows = "row=w4a4_rtn_static,w8a8_morphoquant,w4a4_morphoquant"
    found = drive(tmp_path, rows, module="experiments.table1")
    assert found.returncode == 0, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.md")
    text = table.read_text()
    rows_of = {tuple(cell.strip() for cell in line.split("|")[1:4]) for line in text.splitlines()}
    assert ("w4a4", "morphoquant", "50.0 (+0.0 ≈)") in rows_of
    assert ("w8a8", "morphoquant", "50.0 (+0.0 ≈)") in rows_of
    for published in ("76.63", "45.11", "72.93", "42.44"):
        assert published in text
    assert table.with_name("pairs.csv").read_text().count("\n") == 1 + 6
    refused = drive(tmp_path, "method=rtn", module="experiments.table1")
    assert refused.returncode == 2
    assert "Table 1 has no such row" in refused.stderr
