"""Runs ``run.py`` again and again in one process: what it imports takes far longer than most runs.

Reads lines of JSON, ``[folder, module, arguments]`` (no module: ``run.py``), and answers each with
``[code, stdout, stderr]``. For tests of what commands do; those of how a process starts, ends or is
killed start their own.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

RUN = Path(__file__).parents[1] / "run.py"


def run(folder: str, module: str | None, arguments: list[str]) -> tuple[int, str, str]:
    """What a process of its own would end with."""
    os.chdir(folder)
    sys.argv = [str(RUN), *arguments]
    sys.modules.pop("morphoquant.sweep", None)  # it counts the failures of its process
    out, err = StringIO(), StringIO()
    code: object = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            if module is None:
                runpy.run_path(str(RUN), run_name="__main__")
            else:
                runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = 1
    return code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever writes past sys.stdout must not answer
    for line in sys.stdin:
        answers.write(json.dumps(run(*json.loads(line))) + "\n")
        answers.flush()
