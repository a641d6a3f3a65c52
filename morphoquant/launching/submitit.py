"""Jobs on a SLURM cluster or, through the same executor, as processes of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import (
    BaseSubmititLauncher,
    LocalLauncher,
    SlurmLauncher,
)
from omegaconf import OmegaConf

from morphoquant.launching import gather
from morphoquant.launching.threads import cores, thread_limits

OURS = ("n_jobs", "threads")  # fields of conf/hydra/launcher/submitit_local.yaml
OF_EXECUTOR = ("submitit_folder", "max_num_timeout")


class _Submitit(BaseSubmititLauncher):
    """The plugin's launcher, waiting for every job whatever became of the others.

    A job that SLURM preempts, or stops at its time limit, is queued again (submitit's checkpoint)
    and goes on with the next unanswered question: that is what ``max_num_timeout`` counts.
    """

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        assert self.config is not None
        how = f"{self._words()}; their output: {self._logs()}"
        return gather.launch(self.config, job_overrides, initial_job_idx, how, self._run_all)

    def _logs(self) -> Path:
        return Path(str(self.params["submitit_folder"])).parent

    def _words(self) -> str:
        return f"submitit, {self._EXECUTOR}"

    def _executor(self) -> Any:
        import submitit

        given = {k: v for k, v in self.params.items() if k not in OURS}
        shared = set(OmegaConf.structured(BaseQueueConf).keys())
        folder = {"folder": str(Path(str(given["submitit_folder"])).absolute())}
        retries = {f"{self._EXECUTOR}_{k}": given[k] for k in ("max_num_timeout",) if k in given}
        executor = submitit.AutoExecutor(cluster=self._EXECUTOR, **folder, **retries)
        settings = {k: v for k, v in given.items() if k not in OF_EXECUTOR}
        executor.update_parameters(
            **{k if k in shared else f"{self._EXECUTOR}_{k}": v for k, v in settings.items()}
        )
        return executor

    def _arguments(self, jobs: gather.Jobs) -> list[tuple[Any, ...]]:
        state = Singleton.get_state()
        return [
            (list(given), "hydra.sweep.dir", number, f"job_{number}", state)
            for number, given in jobs.items()
        ]

    def _run_all(self, jobs: gather.Jobs) -> Mapping[int, str]:
        with _environment(_import_path()):
            submitted = self._submit(jobs)
        return {n: reason for n, job in submitted.items() if (reason := _why(job)) is not None}

    def _submit(self, jobs: gather.Jobs) -> dict[int, Any]:
        columns = zip(*self._arguments(jobs), strict=True)
        return dict(zip(jobs, self._executor().map_array(self, *columns), strict=True))


class Slurm(_Submitit, SlurmLauncher):
    """One SLURM array; ``array_parallelism`` of its jobs run at a time."""

    def _words(self) -> str:
        at_once = self.params.get("array_parallelism")
        return f"SLURM, partition {self.params.get('partition')}, at most {at_once} at a time"


class Local(_Submitit, LocalLauncher):
    """As on a cluster, but here: ``n_jobs`` processes at a time (the plugin starts all at once)."""

    def _limit(self, count: int) -> int:
        wanted = int(self.params.get("n_jobs") or -1)
        return min(cores() if wanted < 1 else wanted, count)

    def _words(self) -> str:
        return "submitit, processes of this machine"

    def _submit(self, jobs: gather.Jobs) -> dict[int, Any]:
        at_once = self._limit(len(jobs))
        threads = int(self.params.get("threads") or max(cores() // at_once, 1))
        executor = self._executor()
        submitted: dict[int, Any] = {}
        for number, arguments in zip(jobs, self._arguments(jobs), strict=True):
            while sum(not job.done() for job in submitted.values()) >= at_once:
                time.sleep(0.2)
            with _environment(thread_limits(threads)):
                submitted[number] = executor.submit(self, *arguments)
        return submitted


def _why(job: Any) -> str | None:
    """Waits for a job; the reason why it did not end by itself, or None."""
    try:
        job.results()
    except Exception as error:  # submitit raises several kinds, with whole logs as their text
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = lines[-1] if "trace" in lines[0] else f"submitit job {job.job_id} is {job.state}"
        return f"{said}; its output: {job.paths.stderr}"
    return None


def _import_path() -> dict[str, str]:
    """Lets a job import the package that launched it, installed or not, from any folder."""
    import morphoquant

    ours = str(Path(morphoquant.__file__).parents[1])
    return {"PYTHONPATH": os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))}


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that jobs inherit while they are submitted."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
