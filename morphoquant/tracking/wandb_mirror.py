"""wandb mirrors the run directory. It is told and never asked, and never costs a run."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from morphoquant.config.schema import TrackerConfig

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run tells its tracker."""

    def log(self, values: dict[str, Any]) -> None: ...

    def table(self, name: str, frame: pd.DataFrame) -> None: ...

    def figure(self, name: str, path: Path) -> None: ...

    def summary(self, values: dict[str, Any]) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    """``tracker=none``."""

    def log(self, values: dict[str, Any]) -> None:
        return

    def table(self, name: str, frame: pd.DataFrame) -> None:
        return

    def figure(self, name: str, path: Path) -> None:
        return

    def summary(self, values: dict[str, Any]) -> None:
        return

    def finish(self) -> None:
        return


class WandbTracker:
    """Every call is fenced: the first failure is one warning, and the tracker goes quiet."""

    def __init__(self, run: Any) -> None:
        self._run: Any = run

    def log(self, values: dict[str, Any]) -> None:
        self._do(lambda run: run.log(values))

    def table(self, name: str, frame: pd.DataFrame) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({name: wandb.Table(dataframe=frame)})

        self._do(send)

    def figure(self, name: str, path: Path) -> None:
        def send(run: Any) -> None:
            import wandb

            run.log({f"figures/{name}": wandb.Image(str(path))})

        self._do(send)

    def summary(self, values: dict[str, Any]) -> None:
        self._do(lambda run: run.summary.update(values))

    def finish(self) -> None:
        self._do(lambda run: run.finish())
        self._run = None

    def _do(self, act: Any) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:
            log.warning("wandb failed, the run goes on without it: %s", error)
            self._run = None


def waits_for_result() -> bool:
    """Whether a wandb sweep's agent started this process: it waits for the run's summary."""
    return "WANDB_SWEEP_ID" in os.environ


def open_tracker(
    settings: TrackerConfig,
    described: dict[str, Any],
    name: str,
    group: str | None,
    directory: Path,
) -> Tracker:
    """The tracker of one run; a resumed run continues the same wandb run (its id is ``name``).

    Offline, the files lie under ``directory/wandb`` until ``wandb sync`` sends them.
    """
    if settings.name == "none":
        return NoTracker()
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=group,
            name=name,
            id=name[-120:],
            resume="allow" if settings.mode == "online" else None,
            mode=settings.mode,
            dir=str(directory),
            config=described,
            settings=wandb.Settings(console="off", init_timeout=60),
        )
    except Exception as error:
        log.warning("wandb could not start, the run goes on without it: %s", error)
        return NoTracker()
    return WandbTracker(run)
