"""What a job has to put right when it finds itself in another process or on another host."""

from __future__ import annotations

import logging
import os

from morphoquant.errors import HarnessError


def settle_in(folder: str, number: int) -> None:
    """Make relative paths mean what they mean to the user, and lines say whose they are.

    Args:
        folder: the working folder of the process that the user started.
        number: of the job, as the sweep counts; lines in the log begin with it.

    Raises:
        HarnessError: this host has no such folder.
    """
    from morphoquant.tracking.progress import as_lines

    if os.getcwd() != folder:  # Ray's and some clusters' workers start elsewhere
        try:
            os.chdir(folder)
        except OSError as error:
            raise HarnessError(
                f"{folder}: cannot be entered here ({error.strerror}). Jobs on other hosts need "
                "the folder in which the sweep was started: start it on a file system that all "
                "hosts share"
            ) from error
    prefix = f"#{number} "
    as_lines(prefix)
    escaped = prefix.replace("%", "%%")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"{escaped}%(message)s"))
