"""Real runs that start at once: one reference, one observation, and nobody's numbers change."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
from hydra import compose, initialize_config_dir

from morphoquant import pipeline
from morphoquant.config import load
from morphoquant.config.store import register

ROOT = Path(__file__).parents[2]
NUMBERS = ("fingerprint", "accuracy", "modality", "mean", "bits", "logits", "statistics")
TABLES = ("samples", "outliers", "overlap", "channels", "ranges", "errors", "depth")


def overrides(sets: Path, folder: Path) -> list[str]:
    """A small run that reads the sets of the tests and writes below ``folder``."""
    sources = (
        f"[{{reader:scienceqa,path:'{sets}/scienceqa'}},"
        f"{{reader:mmmu,path:'{sets}/mmmu'}},"
        f"{{reader:air_bench,path:'{sets}/air_bench_sound'}}]"
    )
    return [
        "benchmark=mini_scienceqa",
        f"benchmark.data_root={sets}",
        f"calibration.sources={sources}",
        "calibration.samples=9",
        "calibration.search_samples=3",
        "limit=2",
        "tracker=none",
        "statistics.figures=false",
        "statistics.probes=1",
        f"paths.runs={folder / 'runs'}",
        f"paths.cache={folder / 'cache'}",
    ]


def test_runs_that_start_at_once_share_and_change_nothing(mini_root: Path, tmp_path: Path) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    together.mkdir()
    variants = ("dabc", "none")
    started = [
        subprocess.Popen(
            [
                sys.executable,
                str(ROOT / "run.py"),
                f"method/compensation={variant}",
                *overrides(mini_root, together),
            ],
            cwd=together,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for variant in variants
    ]
    said = "\n".join(process.communicate(timeout=280)[1] for process in started)
    assert [process.returncode for process in started] == [0, 0], said
    assert said.count("reference: reused") == 1, said
    assert said.count("statistics: read from cache (made by tiny_omni-morphoquant-w4a4") == 1, said
    (reference,) = (together / "runs").glob("*-fp16-*")
    (answers,) = reference.glob("answers/*.jsonl")
    assert len(answers.read_text().splitlines()) == 2, "no question was asked twice"

    register()
    for variant in variants:
        words = [f"method/compensation={variant}", *overrides(mini_root, alone)]
        words += ["paths.share_artifacts=false", "reference=false"]
        with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
            config = load(compose("config", overrides=words))
        result = pipeline.run(config)
        here = pipeline.run_path(config, result)
        there = together / "runs" / here.name
        shared = json.loads((there / "result.json").read_text())
        assert {k: shared[k] for k in NUMBERS} == json.loads(
            json.dumps({k: result[k] for k in NUMBERS})
        )
        assert shared["reference"].startswith(reference.name.rpartition("-")[2])
        for table in TABLES:
            a, b = (pd.read_parquet(run / f"{table}.parquet") for run in (here, there))
            pd.testing.assert_frame_equal(a, b, check_exact=True, obj=table)
        kept = [(run / "quantizers.safetensors").read_bytes() for run in (here, there)]
        assert kept[0] == kept[1]
        assert result["reused"]["statistics_from"] is None
    assert not list(alone.glob("cache/artifacts"))
