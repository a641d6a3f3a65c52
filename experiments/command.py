"""What the files of published tables share: the command line's own entry, with one choice made."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

RUN = Path(__file__).parents[1] / "run.py"


def run(experiment: str, overrides: Sequence[str] | None = None) -> None:
    """``python run.py experiment=<experiment> <overrides>``, in this process.

    Finished runs are reused; what is missing is run; the sweep ends in its table.

    Args:
        experiment: a file of ``conf/experiment``.
        overrides: default: this command's own arguments.

    Raises:
        SystemExit: always, with the exit code of ``run.py``.
    """
    given = sys.argv[1:] if overrides is None else list(overrides)
    sys.argv = [str(RUN), f"experiment={experiment}", *given]
    runpy.run_path(str(RUN), run_name="__main__")
