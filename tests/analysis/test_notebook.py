"""What notebooks stand on: jobs found wherever the runs lie, differences, figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.analysis import notebook
from morphoquant.errors import HarnessError

MODALITIES = ("text", "audio")


def run(
    root: Path, name: str, right: int, sqnr: float = 10.0, scheme: str = "w4a4", ids: str = "c"
) -> str:
    """A finished run: 20 questions of which the first ``right`` were answered rightly."""
    folder = root / f"{name}-{name.ljust(10, '0')}"
    folder.mkdir(parents=True)
    rows = [
        {"benchmark": "mmmu", "task": "mmmu", "doc_id": i, "id": str(i), "modality": "image"}
        | {"target": "A", "correct": float(i < right)}
        for i in range(20)
    ]
    pd.DataFrame(rows).to_parquet(folder / "samples.parquet")
    places = pd.DataFrame({"layer": "model.layers.0", "group": "mlp_in", "modality": MODALITIES})
    columns = ("activation_sqnr_db", "output_sqnr_db", "output_sqnr_activation_db")
    places.assign(**dict.fromkeys(columns, sqnr)).to_parquet(folder / "errors.parquet")
    depth = pd.DataFrame(
        [
            {"block": block, "tower": tower, "modality": m, "relative_error": block + 0.1 * i}
            for tower, last in (("decoder", 2), ("vision", 5))
            for block in range(last)
            for i, m in enumerate(MODALITIES)
        ]
    )
    depth.to_parquet(folder / "depth.parquet")
    plain = name == "fp16"
    accuracy = {"value": 5.0 * right, "n": 20, "empty": 0, "unparsed": 0}
    result: dict[str, Any] = {
        "fingerprint": name.ljust(64, "0"),
        "method": "fp16" if plain else "morphoquant",
        "scheme": scheme,
        "model": "qwen",
        "reference": None if plain else "fp16".ljust(64, "0"),
        "accuracy": {"mmmu": accuracy},
        "mean": 5.0 * right,
        "bits": {"weight": 4.1, "activation": 4.3},
        "calibration": {"ids_hash": ids},
        "compensation": {"masked_share": 0.5} if name == "full" else None,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder.name


def sweep(runs: Path, name: str, overrides: list[str], jobs: dict[str, str]) -> None:
    """A finished sweep whose runs lay elsewhere when it was made."""
    folder = runs / "sweeps" / name
    (folder / "jobs").mkdir(parents=True)
    about = {"report": "ablation", "overrides": overrides}
    (folder / "sweep.json").write_text(json.dumps(about))
    for i, (job, directory) in enumerate(jobs.items()):
        outcome = {"error": "no"} if directory == "" else {"run": f"/elsewhere/{directory}"}
        note = {"overrides": f"{job} {' '.join(overrides)}", **outcome}
        (folder / "jobs" / f"{i:04d}.json").write_text(json.dumps(note))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two settings at w4a4, one at w4a3, and what they are compared with."""
    run(tmp_path, "fp16", 20)
    jobs = {
        "gate=0.5": run(tmp_path, "half", 20),
        "gate=1.0": run(tmp_path, "full", 8, sqnr=4.0),
        "gate=2.0": "",
    }
    given = ["experiment=e", f"paths.runs={tmp_path}", "tracker=none"]
    sweep(tmp_path, "2026-01-01", given, jobs)
    narrow = {"gate=0.5": run(tmp_path, "narrow", 3, scheme="w4a3", ids="d")}
    sweep(tmp_path, "2026-01-02", [*given, "bits=w4a3"], narrow)
    return tmp_path


def test_sweeps_by_scheme_wherever_they_lie(runs: Path) -> None:
    found = notebook.load_schemes(runs, "experiment=e")
    assert list(found) == ["w4a4", "w4a3"]
    assert all(path.parent == runs and path.is_dir() for s in found.values() for path in s.runs)
    assert notebook.load(runs, "experiment=e", scheme="w4a3").path.name == "2026-01-02"
    assert notebook.command(found["w4a3"]) == "python run.py experiment=e bits=w4a3"
    later = {"gate=0.5": Path(found["w4a4"].notes[0]["run"]).name}
    sweep(runs, "2026-01-03", ["experiment=e"], later)
    assert notebook.load(runs, "experiment=e", scheme="w4a4").path.name == "2026-01-03"


def test_what_is_missing_names_its_command(runs: Path) -> None:
    with pytest.raises(HarnessError, match=r"python run\.py experiment=other"):
        notebook.load_schemes(runs, "experiment=other")
    with pytest.raises(HarnessError, match=r"there is w4a4, w4a3.*bits=w2a2"):
        notebook.load(runs, "experiment=e", scheme="w2a2")
    sweep(runs, "2026-01-04", ["experiment=moved"], {"gate=1.0": "away"})
    with pytest.raises(HarnessError, match=r"gone.*python run\.py experiment=moved"):
        notebook.load_schemes(runs, "experiment=moved")


def test_jobs_are_named_by_what_differs(runs: Path) -> None:
    jobs = notebook.load_jobs(notebook.load(runs, "experiment=e", scheme="w4a4"))
    assert list(jobs) == ["gate=0.5", "gate=1.0"]  # the failed one is left out
    assert [job.value for job in jobs.values()] == [0.5, 1.0]
    assert all(job.reference is not None for job in jobs.values())
    (alone,) = notebook.load_jobs(notebook.load(runs, "experiment=e", scheme="w4a3"))
    assert alone.startswith("gate=0.5 ")


def test_summary_and_differences(runs: Path) -> None:
    jobs = notebook.load_jobs(notebook.load(runs, "experiment=e", scheme="w4a4"))
    frame = notebook.summary(jobs)
    assert frame["delta"].tolist() == [0.0, -60.0]
    assert frame.loc["gate=1.0", "low"] < -60.0 < frame.loc["gate=1.0", "high"] < 0.0
    assert frame["masked_share"].tolist() == [0.0, 0.5]
    assert frame["output"].tolist() == pytest.approx([10.0, 4.0])
    assert frame["final"].tolist() == pytest.approx([1.05, 1.05])  # of the decoder's last block
    pairs = notebook.compare(jobs)
    to_first = notebook.compare(jobs, "gate=0.5")
    pd.testing.assert_frame_equal(pairs, to_first)
    assert pairs["delta"].tolist() == [-60.0]
    assert pairs["found"].tolist() == [True]
    assert notebook.compare({"one": jobs["gate=0.5"]}).empty


def test_errors_are_compared_on_the_same_tokens_only(runs: Path) -> None:
    jobs = notebook.load_jobs(notebook.load(runs, "experiment=e", scheme="w4a4"))
    change = notebook.sqnr_change(jobs["gate=1.0"], jobs["gate=0.5"])
    assert change.tolist() == [-6.0, -6.0]
    (other,) = notebook.load_jobs(notebook.load(runs, "experiment=e", scheme="w4a3")).values()
    with pytest.raises(HarnessError, match="other calibration samples"):
        notebook.sqnr_change(other, jobs["gate=0.5"])


@given(st.lists(st.floats(-10, 60), min_size=1, max_size=8), st.integers(0, 3))
def test_mean_sqnr_lies_between_its_places(decibels: list[float], silent: int) -> None:
    worst, best = min(decibels), max(decibels)
    found = notebook.mean_sqnr(pd.Series(decibels))
    assert worst - 1e-9 <= found <= best + 1e-9
    assert found <= np.mean(decibels) + 1e-9  # noise adds up, decibels do not
    quiet = notebook.mean_sqnr(pd.Series(decibels + [math.inf] * silent))
    share = len(decibels) / (len(decibels) + silent)
    assert quiet == pytest.approx(found - 10 * math.log10(share))


def test_schemes_are_read_or_refused() -> None:
    assert notebook.activation_bits("w4a16") == 16
    with pytest.raises(HarnessError, match="int4"):
        notebook.activation_bits("int4")


def test_lines_keep_a_small_change_small() -> None:
    frame = pd.DataFrame({"x": [1.0, 8.0], "delta": [0.0, -1.0], "low": -2.0, "high": 1.0})
    frame["db"] = [10.0, 10.001]
    drawn = notebook.setting_lines(
        frame, "x", {"delta": "points", "db": "dB"}, "t", "x", log=True, least={"db": 0.5}
    )
    low, high = drawn.axes[1].get_ylim()
    assert high - low == pytest.approx(0.5)
    assert low < 10.0 < high
    assert [t.get_text() for t in drawn.axes[0].get_xticklabels()] == ["1", "8"]
    assert drawn.axes[0].collections, "the interval is drawn"


def test_dots_and_points_show_every_row() -> None:
    changes = pd.DataFrame({"text": [0.1, -0.2], "audio": [0.0, 0.3]}, index=["a", "b"])
    dots = notebook.variant_dots(changes, "t", "dB").axes[0]
    assert [t.get_text() for t in dots.get_yticklabels()] == ["a", "b"]
    assert sum(len(line.get_xdata()) for line in dots.lines if line.get_linewidth() == 0) == 4
    places = pd.DataFrame(
        {"group": ["mlp_in", "mlp_out"], "modality": "text", "s": [1.0, 100.0], "y": [3.0, 4.0]}
    )
    panel = notebook.scatter_groups(places, {"s": "s"}, "y", "y", "t").axes[0]
    assert sum(len(points.get_offsets()) for points in panel.collections) == 2
    assert panel.get_xscale() == "log"
