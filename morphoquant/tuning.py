"""Sweepers that optimise: what they may optimise, and the evaluation that their winner deserves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from morphoquant.config import ConfigError, RunConfig, load

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"

OF_TUNING = {
    "benchmark",
    "calibration.held_out_samples",
    "experiment",
    "limit",
    "objective",
    "reference",
    "report",
}
"""Overrides of a trial that an evaluation leaves out."""

COMPARED = ("model", "method", "bits", "calibration", "seed")
"""Parts of the config that an evaluation has in common with the trial that it evaluates."""


def check_sweeper(config: DictConfig, job: RunConfig) -> None:
    """A sweeper that optimises needs an objective, in the right direction.

    Raises:
        ConfigError: it has none, or would make it worse.
    """
    from morphoquant.objective import DIRECTION

    sweeper = config.hydra.sweeper
    if sweeper._target_ == BASIC:
        return
    chosen = config.hydra.runtime.choices.get("hydra/sweeper", sweeper._target_)
    if job.objective is None:
        raise ConfigError(
            f"hydra/sweeper={chosen} optimises, and objective=null: a benchmark's accuracy is "
            "never tuned on. Set objective=kl (with calibration.held_out_samples=64 and "
            "benchmark=none), or objective=held_out_accuracy (with benchmark=mini_held_out); "
            "experiment=tune does the first. For a grid: hydra/sweeper=basic"
        )
    direction = sweeper.get("direction")
    named = str(getattr(direction, "name", direction))
    wanted = DIRECTION[job.objective]
    if direction is not None and named != wanted:
        raise ConfigError(
            f"hydra.sweeper.direction={named} with objective={job.objective!r}: allowed is "
            f"{wanted}. Set hydra.sweeper.direction={wanted}"
        )


def best(notes: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The note of the best trial; None where no trial has an objective."""
    from morphoquant.objective import DIRECTION

    tried = [note for note in notes if note.get("objective") is not None]
    if not tried:
        return None
    sign = 1 if DIRECTION[tried[0]["objective_name"]] == "minimize" else -1
    return min(tried, key=lambda note: sign * note["objective"])


def best_command(config: DictConfig, notes: Sequence[Mapping[str, Any]]) -> str | None:
    """The command that evaluates the best trial on the benchmark.

    It is composed and compared with the trial; whatever an experiment's file had set beyond the
    trial's own overrides is spelt out, so that the command means the same without that file.
    """
    found = best(notes)
    if found is None:
        return None
    loader = GlobalHydra.instance().config_loader()

    def compared(cfg: DictConfig) -> dict[str, Any]:
        whole = load(cfg).model_dump(mode="json")
        return dict(_leaves("", {name: whole[name] for name in COMPARED}))

    kept = [a for a in found["arguments"] if _key(a) not in OF_TUNING]
    if not any(_key(argument) == "method" for argument in kept):
        kept.insert(0, f"method={config.hydra.runtime.choices.method}")
    tried = compared(loader.load_sweep_config(config, list(found["arguments"])))
    # Afresh: what was said of the sweeper means nothing to a single run.
    plain = compared(loader.load_configuration(config.hydra.job.config_name, kept, RunMode.RUN))
    missing = [
        f"{path}={_literal(value)}"
        for path, value in tried.items()
        if plain.get(path) != value and path not in OF_TUNING
    ]
    return " ".join(["python run.py", *(shlex.quote(a) for a in [*kept, *missing])])


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for name, inner in value.items():
        yield from _leaves(f"{path}.{name}" if path else name, inner)


def _literal(value: Any) -> str:
    """A value in Hydra's override grammar (JSON but for unquoted keys, which none of ours has)."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = (
            "{" + ",".join(f"{k}:{_literal(v)}" for k, v in item.items()) + "}" for item in value
        )
        return "[" + ",".join(items) + "]"
    return json.dumps(value)
