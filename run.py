"""Quantize an omni-modal model, evaluate it, compare: ``python run.py -m method=rtn,quarot``.

Everything heavy is imported inside a run, so ``--help`` and a refused override answer at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import hydra

from morphoquant.config.store import register

if TYPE_CHECKING:
    from omegaconf import DictConfig

register()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float | None:
    """One job. In a sweep a failed job leaves its reason behind and the others go on."""
    from morphoquant.sweep import run_job

    return run_job(cfg)


if __name__ == "__main__":
    from morphoquant.sweep import entry

    sys.exit(entry(main))
