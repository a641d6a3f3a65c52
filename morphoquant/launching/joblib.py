"""Jobs in processes of this machine (``hydra/launcher=joblib``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher
from joblib import cpu_count, effective_n_jobs
from joblib.externals.loky import get_reusable_executor

from morphoquant.launching import gather, notes
from morphoquant.launching.threads import thread_limits


class Joblib(JoblibLauncher):
    """The plugin's launcher over joblib's process pool (loky), job by job.

    ``joblib.Parallel`` loses every result when one worker is killed. Here the jobs that ran at
    that moment are tried again, one at a time (each may have been the one that was too large, and
    each goes on where it stopped), and whoever dies alone has failed; the rest go on together.
    """

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        assert self.config is not None
        wanted = int(self.joblib.get("n_jobs", -1))
        workers = min(effective_n_jobs(wanted), len(job_overrides))
        threads = int(self.joblib.get("threads") or max(cpu_count() // workers, 1))
        how = f"joblib, {workers} at a time with {threads} threads each"

        def start(jobs: gather.Jobs) -> Mapping[int, str]:
            return self._run_all(jobs, workers, threads)

        return gather.launch(self.config, job_overrides, initial_job_idx, how, start)

    def _run_all(self, jobs: gather.Jobs, workers: int, threads: int) -> dict[int, str]:
        assert self.config is not None
        sweep = Path(str(self.config.hydra.sweep.dir))
        reasons: dict[int, str] = {}
        left = dict(jobs)
        while left:
            died = self._run(left, workers, threads)
            left = {n: left[n] for n in died if not notes.is_settled(notes.read(sweep, n))}
            suspects = [n for n in left if notes.read(sweep, n) is not None]
            if not suspects:  # no worker could even begin: the next would not either
                return reasons | {n: died[n] for n in left}
            for number in suspects:
                reasons |= self._run({number: left.pop(number)}, 1, threads)
        return reasons

    def _run(self, jobs: gather.Jobs, workers: int, threads: int) -> dict[int, str]:
        """Number -> reason of the jobs that a dying worker took with it."""
        pool = get_reusable_executor(max_workers=workers, env=thread_limits(threads))
        futures = dict(self._submitted(pool, jobs))
        died = {}
        for future in as_completed(futures):
            error = future.exception()
            if error is not None:
                died[futures[future]] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return died

    def _submitted(self, pool: Any, jobs: gather.Jobs) -> Iterator[tuple[Future[Any], int]]:
        from hydra_plugins.hydra_joblib_launcher._core import execute_job

        state = Singleton.get_state()
        for number, overrides in jobs.items():
            given = (number, list(overrides), self.hydra_context, self.config, self.task_function)
            try:
                yield pool.submit(execute_job, *given, state), number
            except RuntimeError as error:  # the pool broke before everything was handed over
                failed: Future[Any] = Future()
                failed.set_exception(error)
                yield failed, number
