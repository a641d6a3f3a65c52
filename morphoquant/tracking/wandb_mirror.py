"""wandb mirrors the run directory. It is told and never asked, and never costs a run."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

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

    Offline, the files lie under ``directory/wandb`` until ``wandb sync`` sends them. Where online
    was asked for and the server cannot be reached, or refuses, the run is kept offline.
    """
    if settings.name == "none":
        return NoTracker()
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # crash reports to its makers
    if settings.mode == "online":
        try:
            _reach()
            return WandbTracker(_start(settings, described, name, group, directory, "online"))
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            log.warning(
                "tracker.mode=online: wandb cannot be used (%s). The run is kept offline; `wandb "
                "sync` sends it later",
                reason[:200],
            )
    try:
        return WandbTracker(_start(settings, described, name, group, directory, "offline"))
    except Exception as error:
        log.warning("wandb could not start, the run goes on without it: %s", error)
    return NoTracker()


def _start(
    settings: TrackerConfig,
    described: dict[str, Any],
    name: str,
    group: str | None,
    directory: Path,
    mode: Literal["online", "offline"],
) -> Any:
    import wandb

    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=group,
        name=name,
        id=name[-120:],
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=str(directory),
        config=described,
        settings=wandb.Settings(console="off", init_timeout=60, **BOUNDED),
    )


BOUNDED: dict[str, Any] = {
    "x_graphql_retry_max": 5,
    "x_graphql_retry_wait_max_seconds": 5.0,
    "x_file_stream_retry_max": 5,
    "x_file_stream_retry_wait_max_seconds": 5.0,
    "x_file_transfer_retry_max": 5,
    "x_file_transfer_retry_wait_max_seconds": 5.0,
}
"""wandb retries for days by default, and holds the process at its end while it does."""

REACH_SECONDS = 10.0


def _reach() -> None:
    """Raise where wandb's server does not answer: ``wandb.init`` itself would wait and retry."""
    import requests
    import wandb

    address = wandb.setup().settings.base_url
    requests.head(address, timeout=REACH_SECONDS)  # any answer will do
