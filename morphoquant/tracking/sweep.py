"""Jobs and sweeps: what happens around ``pipeline.run`` when Hydra calls it.

A sweep is validated whole before its first job starts; a job that fails leaves its reason in the
sweep's directory and the others go on; the end of a sweep is one table, in the terminal, as CSV
and markdown beside it, and in wandb.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from morphoquant.config import ConfigError, load
from morphoquant.config.schema import RunConfig
from morphoquant.errors import HarnessError

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_CONFIG = 1, 2
_failures: list[int] = []


def exit_code() -> int:
    """Of the process: 0 where every job came through."""
    return max(_failures, default=0)


def complain(error: BaseException, title: str) -> None:
    """Say what went wrong in plain lines; the traceback only where Hydra's is asked for."""
    colour = sys.stderr.isatty()
    head = f"\033[31m{title}\033[0m" if colour else title
    print(f"{head}\n{error}", file=sys.stderr, flush=True)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error


def run_job(cfg: DictConfig) -> float | None:
    """Run one composed config; returns the mean accuracy, for sweepers that optimise."""
    hydra = HydraConfig.get()
    sweep = None
    if hydra.mode.name == "MULTIRUN":
        sweep = Path(hydra.sweep.dir)
    try:
        config = load(cfg)
        if sweep is not None and config.tracker.group is None:
            tracker = config.tracker.model_copy(update={"group": sweep.name})
            config = config.model_copy(update={"tracker": tracker})
        from morphoquant import pipeline

        result = pipeline.run(config)
    except HarnessError as error:
        is_config = isinstance(error, ConfigError)
        _failures.append(EXIT_CONFIG if is_config else EXIT_FAILED)
        overrides = " ".join(hydra.overrides.task)
        if sweep is not None:
            _leave(sweep, int(hydra.job.num), {"overrides": overrides, "error": str(error)})
        complain(error, "This configuration cannot run:" if is_config else f"Failed: {overrides}")
        return None
    directory = str(pipeline.run_path(config, result))
    if sweep is not None:
        _leave(sweep, int(hydra.job.num), {"run": directory})
    else:
        _show([directory], config, None)
    return float(result["mean"])


def _leave(sweep: Path, number: int, note: dict[str, str]) -> None:
    """A pointer from the sweep to the run of one job."""
    from morphoquant.tracking.rundir import write_atomic

    path = sweep / "jobs" / f"{number:04d}.json"
    write_atomic(path, lambda target: _write(target, json.dumps(note)))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _show(directories: list[str], config: RunConfig, sweep: Path | None) -> None:
    """Print the comparison of some runs (with their references), and keep it in the sweep."""
    from morphoquant.analysis import table

    runs = table.load_runs([Path(d) for d in directories], Path(config.paths.runs))
    frame = table.comparison(runs)
    notes = table.footnotes(runs)
    table.print_rich(frame, notes)
    if sweep is None:
        return
    from morphoquant.tracking.rundir import write_atomic

    write_atomic(sweep / "table.csv", lambda p: frame.to_csv(p, index=False))
    write_atomic(sweep / "table.md", lambda p: _write(p, table.to_markdown(frame, notes)))
    print(f"Table: {sweep / 'table.md'} and table.csv")
    from morphoquant.tracking.wandb_mirror import open_tracker

    tracker = open_tracker(config.tracker, {}, f"sweep-{sweep.name}", sweep.name, sweep)
    tracker.table("comparison", frame)
    tracker.finish()


class SweepCallback(Callback):
    """Hydra calls this around a sweep (``hydra.callbacks`` in ``conf/config.yaml``)."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse the whole sweep where one of its jobs is not valid."""
        try:
            for job in _jobs(config):
                load(job)
        except ConfigError as error:
            complain(error, "This sweep cannot run:")
            sys.exit(EXIT_CONFIG)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The table of everything that came through, and what did not."""
        sweep = Path(config.hydra.sweep.dir)
        notes = [json.loads(p.read_text()) for p in sorted((sweep / "jobs").glob("*.json"))]
        found = list(dict.fromkeys(note["run"] for note in notes if "run" in note))
        failed = [note for note in notes if "error" in note]
        if found:
            _show(found, load(config), sweep)
        for note in failed:
            print(f"failed: {note['overrides']}: {note['error']}", file=sys.stderr)


def _jobs(config: DictConfig) -> list[DictConfig]:
    """Every job of a sweep, composed: the product of its overrides, as Hydra's sweeper makes it."""
    from itertools import product

    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    sweeper = config.hydra.sweeper
    given = list(config.hydra.overrides.task)
    params = sweeper.get("params") or {}
    given = [f"{key}={value}" for key, value in params.items()] + given
    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    choices: list[list[str]] = []
    for override in parser.parse_overrides(given):
        if override.is_sweep_override() and override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={v}" for v in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    jobs = []
    for combination in product(*choices):
        jobs.append(
            loader.load_configuration(
                config_name=config.hydra.job.config_name,
                overrides=list(combination),
                run_mode=RunMode.RUN,
            )
        )
    return jobs
