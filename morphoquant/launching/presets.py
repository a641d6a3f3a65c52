"""The launchers ``joblib``, ``submitit_local`` and ``ray`` with defaults that suit these jobs.

They take the place of the plugins' own choices of the same names (a YAML file of that name would be
checked against the plugin's fields). ``conf/hydra/launcher/slurm.yaml`` is the fourth.
"""

from __future__ import annotations

from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

PRESETS: dict[str, dict[str, Any]] = {
    "joblib": {
        "_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        # Jobs at a time, each with a model of its own; -1 takes the cores. One GPU: 1 or 2.
        "n_jobs": -1,
        # CPU threads of each job; null shares the cores among them.
        "threads": None,
    },
    "submitit_local": {
        "_target_": "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "submitit_folder": "${hydra.sweep.dir}/.submitit/%j",
        "n_jobs": -1,
        "threads": None,
        # Of one job.
        "timeout_min": 1440,
        # Of this machine, that jobs see; all jobs see the same ones.
        "gpus_per_node": 0,
        "max_num_timeout": 0,
    },
    "ray": {
        "_target_": "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
        "ray": {
            "init": {
                # null starts Ray on this machine; auto joins the cluster that runs here.
                "address": None,
                # That jobs may use together; null takes what there is.
                "num_cpus": None,
                "num_gpus": None,
                "include_dashboard": False,
                "log_to_driver": True,
            },
            # What one job takes. num_gpus=1 gives every job a GPU of its own.
            "remote": {
                "num_cpus": 1,
                "num_gpus": 0,
                # Or Ray tries a job that is too large for its host for ever.
                "max_retries": 0,
            },
        },
    },
}


def register() -> None:
    """Make the presets known to Hydra. Safe to call twice."""
    Plugins.instance()  # the plugins store theirs while they are found: ours come after
    for name, node in PRESETS.items():
        ConfigStore.instance().store(
            group="hydra/launcher", name=name, node=node, provider="morphoquant"
        )
