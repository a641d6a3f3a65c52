"""Jobs and sweeps: what happens around ``pipeline.run`` when Hydra calls it.

A sweep is validated whole before its first job starts; a job that fails leaves its reason in the
sweep's directory and the others go on; the end of a sweep is one table, in the terminal, as CSV
and markdown beside it, and in wandb.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from morphoquant.config import ConfigError, load
from morphoquant.config.messages import explain_hydra
from morphoquant.config.schema import RunConfig
from morphoquant.errors import HarnessError
from morphoquant.launching import claim, is_parallel, notes, pin, prepare, settle_in
from morphoquant.ranks import Ranks
from morphoquant.tracking.rundir import StorageError, as_storage_error
from morphoquant.tuning import best_command, check_sweeper

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

EXIT_FAILED, EXIT_CONFIG = 1, 2
FULL_ERROR = "HYDRA_FULL_ERROR"
WISH = "MORPHOQUANT_FULL_ERROR"  # what the user set it to, for jobs in other processes

_failures: list[int] = []
_open: list[Callable[[BaseException], None]] = []  # what ends a sweep whose launcher gave up
_held = ExitStack()  # the folder of the sweep that runs
_full_error = os.environ.get(WISH, os.environ.get(FULL_ERROR)) == "1"


def entry(main: Callable[[], Any]) -> int:
    """Call the Hydra main function; returns the exit code of the process.

    0: every job came through; 1: a run failed; 2: the configuration was refused.
    """
    before = os.environ.get(FULL_ERROR)
    os.environ[WISH] = before or "0"
    os.environ[FULL_ERROR] = "1"  # Hydra then raises its errors instead of printing them
    try:
        with _speaking_once():
            main()
    except (HydraException, OmegaConfBaseException) as error:
        complain(error, "This configuration cannot run:")
        return EXIT_CONFIG
    except Exception as error:
        if not _open:
            raise
        _open.pop()(error)  # a launcher or sweeper gave up: what came through still makes a table
    finally:
        _held.close()
        os.environ.pop(WISH, None)
        if before is None:
            os.environ.pop(FULL_ERROR, None)
    return max(_failures, default=0)


@contextmanager
def _speaking_once() -> Iterator[None]:
    """Of several ranks only the first one speaks and leaves notes; all end together.

    The others give their sweeps a folder that nobody sees: the clock in the name of the shared one
    may have gone on by a second between two processes.
    """
    ranks = Ranks.of_process()
    try:
        if ranks.leads:
            yield
            return
        with (
            tempfile.TemporaryDirectory(prefix="morphoquant-") as folder,
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere),
        ):
            sys.argv.append(f"hydra.sweep.dir={folder}")
            yield
    finally:
        ranks.leave()


def complain(error: BaseException, title: str) -> None:
    """Say what went wrong in plain lines; with HYDRA_FULL_ERROR=1 the traceback too."""
    error = as_storage_error(error)
    expected = isinstance(error, HarnessError | HydraException | OmegaConfBaseException)
    if expected and not Ranks.of_process().leads:
        return  # the first rank is told by the others, and says it
    if _full_error or not expected:
        traceback.print_exception(error)
    text = str(error) if isinstance(error, HarnessError) else explain_hydra(error)
    head = f"\033[31m{title}\033[0m" if sys.stderr.isatty() else title
    print(f"{head}\n{text}", file=sys.stderr, flush=True)


def run_job(cfg: DictConfig) -> float | None:
    """Run one composed config; returns its ``objective``, for sweepers that optimise.

    None where there is none: nothing is ever optimised on a benchmark's accuracy.
    """
    if not Ranks.of_process().leads:
        logging.getLogger("morphoquant").setLevel(logging.ERROR)
    hydra = HydraConfig.get()
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    # Unresolved: an override may hold an interpolation that does not exist.
    task: Any = OmegaConf.to_container(hydra.overrides.task)
    overrides = " ".join(task)
    config = None
    try:
        if sweep is not None:
            if Ranks.of_process().leads:
                notes.begin(sweep, int(hydra.job.num), overrides)
            if is_parallel(hydra):
                settle_in(hydra.callbacks["sweep"].folder, int(hydra.job.num))
        config = load(cfg)
        if sweep is not None and config.tracker.group is None:
            tracker = config.tracker.model_copy(update={"group": sweep.name})
            config = config.model_copy(update={"tracker": tracker})
        from morphoquant import objective, pipeline

        result = pipeline.run(config)
    except Exception as raised:
        error = as_storage_error(raised)
        # An unexpected error ends a single run with its traceback. In a sweep the other jobs go
        # on (and may well come through: this one may simply have been too large).
        if sweep is None and not isinstance(error, HarnessError):
            raise
        refused = isinstance(error, ConfigError)
        _failures.append(EXIT_CONFIG if refused else EXIT_FAILED)
        complain(error, "This configuration cannot run:" if refused else f"Failed: {overrides}")
        if sweep is not None and Ranks.of_process().leads:
            reason = str(error) if isinstance(error, HarnessError) else repr(error)
            note: notes.Note = {"overrides": overrides, "error": reason}
            if config is not None:
                note |= {"method": config.method.name, "scheme": config.bits.scheme}
            with suppress(StorageError):  # a full disk: it was said, and the sweep will end badly
                notes.leave(sweep, int(hydra.job.num), note)
        return None
    directory = str(pipeline.run_path(config, result))
    value = objective.value(config, result)
    if not Ranks.of_process().leads:
        return value
    if sweep is None:
        _show([directory], config)
    else:
        done: notes.Note = {"overrides": overrides, "arguments": task, "run": directory}
        if value is not None:
            done |= {"objective": value, "objective_name": config.objective}
        try:
            notes.leave(sweep, int(hydra.job.num), done)
        except StorageError as error:
            _failures.append(EXIT_FAILED)
            complain(error, f"Done, but not noted: {overrides}")
    return value


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _show(directories: list[str], config: RunConfig) -> None:
    """Print the comparison of some runs with their references."""
    from morphoquant.analysis.reports import comparison

    found = [{"overrides": "", "run": d} for d in directories]
    comparison(found, Path(config.paths.runs)).show()
    print(f"Run: {directories[0]}")


def _finish(found: list[notes.Note], config: RunConfig, composed: DictConfig, sweep: Path) -> None:
    """The table that the sweep was made for: in the terminal, beside its notes, in the tracker."""
    from morphoquant.analysis.reports import make_report
    from morphoquant.tracking.wandb_mirror import open_tracker

    report = make_report(config.report, found, Path(config.paths.runs))
    report.show()
    for name, path in report.write(sweep).items():
        print(f"{name.capitalize()}: {_shown(path)} and {path.stem}.csv")
    if config.report == "trials":
        print(f"Best: {best_command(composed, found)}")
    tracker = open_tracker(
        config.tracker, {}, f"sweep-{sweep.name}", config.tracker.group or sweep.name, sweep
    )
    for name, part in {config.report: report, **report.parts}.items():
        tracker.table(name, part.frame)
    figures: list[Path] = []
    if config.report == "ablation":
        figures = _ablation_figure(report.frame, sweep)
    elif config.report == "sensitivity":
        from morphoquant.analysis.suggestion import leave

        figures = leave(report.frame, found, Path(config.paths.runs), config.sensitivity, sweep)
    for path in figures:
        tracker.figure(path.stem, path)
        print(f"Figure: {_shown(path)}")
    tracker.finish()


def _shown(path: Path) -> Path:
    """A path as short as the user's own."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _ablation_figure(frame: pd.DataFrame, sweep: Path) -> list[Path]:
    """The forest plot of an ablation; none where no row has an interval."""
    from morphoquant.analysis.figures import ablation_plot
    from morphoquant.tracking.rundir import write_atomic

    rows = frame.dropna(subset=["Δ mean", "low", "high"])
    rows = rows[rows["choice"] != "base"].rename(columns={"Δ mean": "difference"})
    if rows.empty:
        return []
    if "setting" in rows:
        rows = rows.assign(choice=rows["setting"] + " " + rows["choice"])
    drawn = ablation_plot(rows, title="Difference of each choice to the base row")
    path = sweep / "ablation.png"
    write_atomic(path, lambda target: drawn.savefig(target, format="png", dpi=110))
    return [path]


class SweepCallback(Callback):
    """Hydra calls this around a sweep (``hydra.callbacks`` in ``conf/config.yaml``).

    Hydra turns an exception of a callback into a warning; ``SystemExit`` it lets through.
    """

    def __init__(self, folder: str | None = None) -> None:
        """``folder``: see ``conf/config.yaml``; a sweep's jobs read it there."""
        self._config: RunConfig | None = None
        self._jobs: list[list[str]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse the whole sweep where one of its jobs is not valid."""
        _check_launcher(config)
        try:
            prepare(config)
            self._jobs = _jobs(config)
            for overrides in self._jobs:
                try:
                    loaded = load(_compose(config, overrides))
                except ConfigError as error:
                    raise ConfigError(f"{error}\n(in the job {' '.join(overrides)})") from None
                self._config = self._config or loaded
            _check_base(self._config, self._jobs)
            check_sweeper(config, load(config) if self._config is None else self._config)
            _begin(config)
        except (HarnessError, HydraException, OmegaConfBaseException) as error:
            complain(error, "This sweep cannot run; no job was started:")
            sys.exit(EXIT_CONFIG)
        _open[:] = [lambda error: self._give_up(config, error)]

    def _give_up(self, config: DictConfig, error: BaseException) -> None:
        """End a sweep that an exception ended; jobs that nobody heard of have failed with it."""
        complain(error, "The sweep ended early:")
        _failures.append(EXIT_FAILED)
        sweep, reason = Path(config.hydra.sweep.dir), f"{type(error).__name__}: {error}"
        lost = notes.unsettled(sweep) | {n: " ".join(o) for n, o in enumerate(self._jobs)}
        for number, overrides in lost.items():
            with suppress(StorageError):
                notes.bury(sweep, number, overrides, reason.splitlines()[0])
        self.on_multirun_end(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """The table of everything that came through, and of what did not and why."""
        from morphoquant.analysis.sweeps import ABOUT, read_notes
        from morphoquant.tracking.rundir import write_atomic

        if not Ranks.of_process().leads:
            return
        _open.clear()
        sweep = Path(config.hydra.sweep.dir)
        found = [
            note if notes.is_settled(note) else note | {"error": "its last note is missing"}
            for note in read_notes(sweep)
        ]
        failed = [note for note in found if "error" in note]
        if failed:  # known here even where the jobs ran in other processes
            _failures.append(EXIT_FAILED)
        try:
            if len(failed) < len(found):
                known = self._config or load(config)
                given = OmegaConf.to_container(config.hydra.overrides.task)
                about = {"report": known.report, "overrides": given, "sweep": sweep.name}
                write_atomic(sweep / ABOUT, lambda p: _write(p, json.dumps(about)))
                _finish(found, known, config, sweep)
        except Exception as error:  # Hydra would make a warning of it
            _failures.append(EXIT_FAILED)
            complain(error, "The table could not be made:")
        for note in failed:
            print(f"failed: {note['overrides']}: {note['error']}", file=sys.stderr)


def _begin(config: DictConfig) -> None:
    """Take the sweep's folder; only then do notes of an earlier sweep go."""
    if not Ranks.of_process().leads:
        pin(config, Path(os.path.abspath(str(config.hydra.sweep.dir))))
        return
    folder = _held.enter_context(claim(config))
    shutil.rmtree(folder / notes.JOBS, ignore_errors=True)


def _check_launcher(config: DictConfig) -> None:
    """Ranks do the jobs of a sweep together and in order: no launcher may hand them out."""
    launcher = str(config.hydra.launcher.get("_target_", ""))
    if Ranks.of_process().size > 1 and not launcher.endswith(".BasicLauncher"):
        error = ConfigError(
            f"hydra/launcher {launcher!r} under torchrun: every job is done by all processes "
            "together. Drop the launcher, or torchrun"
        )
        complain(error, "This sweep cannot run; no job was started:")
        sys.exit(EXIT_CONFIG)


def _check_base(config: RunConfig | None, jobs: list[list[str]]) -> None:
    """An ablation without its base row has nothing to compare with."""
    if config is None or config.report != "ablation" or not jobs:
        return
    if not any("ablation=base" in overrides for overrides in jobs):
        raise ConfigError(
            "report='ablation' without a job ablation=base: every row is compared with it. Add "
            "base to the list of ablations, or set report=comparison"
        )


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of every job, as Hydra's basic sweeper makes them.

    Empty for a sweeper that chooses values as it goes: those are validated job by job.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return []
    params = config.hydra.sweeper.get("params") or {}
    given = [f"{key}={value}" for key, value in params.items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*given, *config.hydra.overrides.task])
    return [list(job) for job in BasicSweeper.split_arguments(overrides, None)[0]]


def _compose(config: DictConfig, overrides: list[str]) -> DictConfig:
    from hydra.core.global_hydra import GlobalHydra

    return GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
