"""Before the first job of a sweep: the launcher is there, and survives its jobs."""

from __future__ import annotations

import importlib
from typing import Any

from hydra.core.plugins import Plugins
from omegaconf import DictConfig

from morphoquant.config import ConfigError

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
"""One job after the other, in this process: nothing to prepare."""

_SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"

GUARDED = {
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher": ("joblib", "Joblib"),
    f"{_SUBMITIT}.LocalLauncher": ("submitit", "Local"),
    f"{_SUBMITIT}.SlurmLauncher": ("submitit", "Slurm"),
    "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher": ("ray", "Ray"),
}
"""Plugin class -> module and class here that let one job's death cost the others nothing."""

EXTRAS = {"hydra_ray_launcher": ".[ray]", "hydra_optuna_sweeper": ".[tune]"}
"""Plugin -> what to give pip; the others come with the package."""


def is_parallel(hydra: Any) -> bool:
    """Whether jobs of this sweep run in other processes than the one that the user started."""
    return bool(hydra.launcher._target_ != BASIC)


def prepare(config: DictConfig) -> None:
    """Let the chosen launcher survive its jobs.

    Raises:
        ConfigError: the launcher's plugin is not installed.
    """
    target = str(config.hydra.launcher._target_)
    plugins = Plugins.instance()
    if target not in plugins.class_name_to_class:
        choice = config.hydra.runtime.choices["hydra/launcher"]
        raise ConfigError(
            f"hydra/launcher={choice}: its plugin is not installed. {how_to_install(target)}"
        )
    if target in GUARDED:
        module, name = GUARDED[target]
        ours = getattr(importlib.import_module(f"morphoquant.launching.{module}"), name)
        # Hydra takes launchers from the package hydra_plugins only; its table says which class.
        plugins.class_name_to_class[target] = ours


def how_to_install(target: str) -> str:
    """What to type where a plugin is missing."""
    for package, extra in EXTRAS.items():
        if package in target:
            return f"Install it: pip install -e '{extra}' (in the project's folder)."
    return "Install it: pip install -e . (it is among the package's requirements)."
