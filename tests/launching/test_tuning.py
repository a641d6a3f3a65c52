"""Sweepers that optimise: never on a benchmark, repeatable, with a command at the end."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hydra import compose, initialize_config_dir

from morphoquant.analysis.sweeps import read_notes
from morphoquant.analysis.trials import trials
from morphoquant.config import ConfigError, load
from morphoquant.config.store import register
from morphoquant.errors import HarnessError
from morphoquant.tuning import best

Done = Callable[..., subprocess.CompletedProcess[str]]
CONF = Path(__file__).parents[2] / "conf"
TUNE = ("experiment=tune", "hydra.sweeper.n_trials=4")


def said_best(out: str) -> list[str]:
    (line,) = (line for line in out.splitlines() if line.startswith("Best: "))
    words = shlex.split(line.removeprefix("Best: "))
    assert words[:2] == ["python", "run.py"]
    return words[2:]


def test_trials_are_sorted_repeatable_and_end_in_a_command(
    tmp_path: Path, here: Done, done: Done
) -> None:
    found = here(tmp_path, *TUNE, "bits=w4a8", "calibration.samples=16")
    assert found.returncode == 0, found.stderr
    (sweep,) = (tmp_path / "runs" / "sweeps").iterdir()
    notes = read_notes(sweep)
    assert len(notes) == 4
    assert all("held_out" not in note["overrides"] for note in notes)
    frame = pd.read_csv(sweep / "table.csv")
    column = frame["held-out KL"]
    assert column.is_monotonic_increasing
    assert column.nunique() == 4
    winner = notes[int(frame["trial"][0])]
    assert winner["objective"] == pytest.approx(column[0])

    # The command says all of the winner, and nothing of the tuning.
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        evaluation = load(compose("config", overrides=said_best(found.stdout)))
        tried = load(compose("config", overrides=winner["arguments"]))
    assert evaluation.method == tried.method
    assert evaluation.bits == tried.bits
    assert evaluation.calibration == tried.calibration.model_copy(update={"held_out_samples": 0})
    assert evaluation.objective is None
    assert evaluation.benchmark.name == "mini"

    # The sampler is seeded: the same command finds its runs again, whoever launches it.
    before = {path.name for path in (tmp_path / "runs").glob("morphoquant-*")}
    parallel = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    again = done(*TUNE, "bits=w4a8", "calibration.samples=16", *parallel)
    assert again.returncode == 0, again.stderr
    assert {path.name for path in (tmp_path / "runs").glob("morphoquant-*")} == before
    assert said_best(again.stdout) == said_best(found.stdout)


def test_a_grid_that_asks_nothing_ends_in_a_comparison(tmp_path: Path, here: Done) -> None:
    asked_nothing = ("benchmark=none", "calibration.held_out_samples=8")
    found = here(tmp_path, "-m", "method=rtn,morphoquant", *asked_nothing)
    assert found.returncode == 0, found.stderr
    (table,) = tmp_path.glob("runs/sweeps/*/table.csv")
    frame = pd.read_csv(table)
    assert list(frame["method"]) == ["fp16", "rtn", "morphoquant"]
    assert frame["held-out KL"].notna().all()
    assert frame["mean"].isna().all()
    assert not table.with_name("pairs.csv").exists(), "nobody answered anything"


def test_a_study_without_any_good_trial_says_why(tmp_path: Path, here: Done) -> None:
    found = here(tmp_path, "experiment=tune", "method=rtn_static", "hydra.sweeper.n_trials=2")
    assert found.returncode == 1
    assert "no room for rtn_static" in found.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-m", "hydra/sweeper=optuna"), ["objective=null", "experiment=tune"]),
        ((*TUNE, "hydra.sweeper.direction=maximize"), ["direction=maximize", "minimize"]),
    ],
)
def test_refused_before_the_first_job(
    tmp_path: Path, here: Done, arguments: tuple[str, ...], words: list[str]
) -> None:
    found = here(tmp_path, *arguments)
    assert found.returncode == 2, found.stderr
    for word in words:
        assert word in found.stderr
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["experiment=tune", "calibration.held_out_samples=0"], "calibration.held_out_samples=64"),
        (["objective=held_out_accuracy"], "benchmark=mini_held_out"),
        (["report=trials"], "objective=null"),
        (["experiment=ablation", "benchmark=none"], "benchmark=none"),
        (["benchmark.tasks=[]"], "benchmark=none"),
    ],
)
def test_what_does_not_go_together(overrides: list[str], words: str) -> None:
    register()
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises(ConfigError, match=re.escape(words)),
    ):
        load(compose("config", overrides=overrides))


def note(**values: object) -> dict[str, object]:
    return {"overrides": "", "arguments": [], "run": "nowhere", **values}


def test_the_best_trial_follows_the_objectives_direction() -> None:
    kl = [note(objective=v, objective_name="kl") for v in (0.3, 0.1, 0.2)]
    accuracy = [note(objective=v, objective_name="held_out_accuracy") for v in (50.0, 70.0, 60.0)]
    assert best([*kl, {"overrides": "", "error": "no"}]) is kl[1]
    assert best(accuracy) is accuracy[1]
    assert best([{"overrides": "", "error": "no"}]) is None
    with pytest.raises(HarnessError, match="objective"):
        trials([note()])


def test_every_launcher_and_experiment_of_this_kind_composes() -> None:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for choice in ("basic", "joblib", "submitit_local", "slurm", "ray"):
            chosen = compose(
                "config", overrides=[f"hydra/launcher={choice}"], return_hydra_config=True
            )
            assert chosen.hydra.launcher._target_.endswith("Launcher")
            assert load(chosen).objective is None
        cluster = compose(
            "config",
            overrides=[
                "hydra/launcher=slurm",
                "hydra.launcher.partition=gpu",
                "hydra.launcher.timeout_min=60",
                "hydra.launcher.mem_gb=32",
            ],
            return_hydra_config=True,
        ).hydra.launcher
        assert (cluster.partition, cluster.timeout_min, cluster.mem_gb) == ("gpu", 60, 32)
        for name, direction in (("tune", "minimize"), ("tune_accuracy", "maximize")):
            whole = compose(
                "config", overrides=[f"experiment={name}", "seed=7"], return_hydra_config=True
            )
            assert whole.hydra.sweeper.sampler.seed == 7
            assert whole.hydra.sweeper.direction == direction
            config = load(whole)
            assert config.objective is not None
            assert config.benchmark.held_out or not config.benchmark.tasks


def test_the_wandb_sweep_optimises_what_its_command_logs() -> None:
    sweep = yaml.safe_load((CONF.parent / "experiments" / "wandb_sweep.yaml").read_text())
    register()
    fixed = [part for part in sweep["command"] if "=" in part]
    sampled = [f"{name}={spec['min']}" for name, spec in sweep["parameters"].items()]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = load(compose("config", overrides=[*fixed, *sampled]))
    assert sweep["metric"] == {"name": f"held_out/{config.objective}", "goal": "minimize"}
    assert not config.benchmark.tasks
    assert config.tracker.mode == "online"
