"""Jobs on a Ray cluster, or on the one that Ray starts on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals
from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher
from omegaconf import OmegaConf, open_dict

from morphoquant.errors import HarnessError
from morphoquant.launching import gather


class Ray(RayLauncher):
    """The plugin's launcher, waiting for every job whatever became of the others."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        assert self.config is not None
        remote = OmegaConf.to_container(self.ray_cfg.remote, resolve=True)
        how = f"Ray, {self.ray_cfg.init.get('address') or 'on this machine'}; each job: {remote}"
        return gather.launch(self.config, job_overrides, initial_job_idx, how, self._run_all)

    def _run_all(self, jobs: gather.Jobs) -> Mapping[int, str]:
        import ray

        self._connect()
        references = {number: self._remote(number, given) for number, given in jobs.items()}
        reasons = {}
        for number, reference in references.items():
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                lines = str(error).strip().splitlines() or [""]
                reasons[number] = f"{type(error).__name__}: {lines[0]}"
        return reasons

    def _connect(self) -> None:
        """Start Ray, or join it; once more where a busy machine was too slow for Ray's patience.

        Raises:
            HarnessError: there is no Ray to run jobs.
        """
        import ray
        from hydra_plugins.hydra_ray_launcher._launcher_util import start_ray

        for is_last in (False, True):
            try:
                start_ray(self.ray_cfg.init)
                return
            except Exception as error:  # of several kinds, from gRPC to ValueError
                ray.shutdown()
                if is_last:
                    said = (str(error).strip().splitlines() or [""])[0]
                    raise HarnessError(
                        f"Ray could not be reached: {type(error).__name__}: {said}. Look at "
                        "hydra.launcher.ray.init (address=null starts it on this machine, "
                        "address=auto joins the one that runs here)"
                    ) from error

    def _remote(self, number: int, overrides: Sequence[str]) -> Any:
        from hydra_plugins.hydra_ray_launcher._launcher_util import launch_job_on_ray

        assert self.config is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        composed = loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            composed.hydra.job.id = f"job_{number}"
            composed.hydra.job.num = number
        assert self.task_function is not None
        return launch_job_on_ray(
            self.hydra_context,
            self.ray_cfg.remote,
            composed,
            self.task_function,
            Singleton.get_state(),
        )
