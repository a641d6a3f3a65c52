"""Runs ``run.py`` again and again at the price of one start: every command is a fork of this.

The parent imports what takes seconds (torch, transformers, lmms-eval) and nothing else happens in
it; a command is a child that becomes ``run.py`` with its own arguments, folder and fate. Requests
are lines of JSON on stdin, replies on stdout.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

Request = dict[str, Any]


def preload() -> None:
    """What a run imports, without starting anything."""
    import torch
    from hydra.core.plugins import Plugins

    import morphoquant.analysis.reports
    import morphoquant.evaluation.bridge
    import morphoquant.evaluation.scoring
    import morphoquant.models.adapter
    import morphoquant.pipeline
    import morphoquant.sweep  # noqa: F401
    from morphoquant.compat import prepare_torchvision

    prepare_torchvision()
    import transformers.models.qwen2_5_omni.modeling_qwen2_5_omni
    import transformers.models.qwen2_5_omni.processing_qwen2_5_omni  # noqa: F401

    Plugins.instance()
    torch.set_num_threads(1)
    gc.freeze()  # children need not look through all this again


def become(request: Request, said: int, told: int) -> None:
    """In the child: be the command, to its end."""
    from points import watch

    os.setpgid(0, 0)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = [str(ROOT / "run.py"), *request["arguments"]]
    watch(told, request["fate"])
    code: Any = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


class Child:
    """A command that runs, and what it said so far."""

    def __init__(self, request: Request) -> None:
        (said, speak), (told, tell) = os.pipe(), os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(said)
            os.close(told)
            become(request, speak, tell)
        os.close(speak)
        os.close(tell)
        self._heard = {said: b"", told: b""}
        self._open = [said, told]

    def wait(self) -> dict[str, Any]:
        """Until it ends (``code``) or stops itself (``code`` is None)."""
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG | os.WUNTRACED)
            self._listen(0 if pid else 0.02)
            if pid:
                code = None if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
                said, told = (data.decode(errors="replace") for data in self._heard.values())
                return {"pid": pid, "code": code, "said": said, "points": told.splitlines()}

    def _listen(self, seconds: float) -> None:
        while ready := select.select(self._open, [], [], seconds)[0]:
            for pipe in ready:
                data = os.read(pipe, 1 << 16)
                self._heard[pipe] += data
                if not data:
                    self._open.remove(pipe)
                    os.close(pipe)


def main() -> None:
    speak = os.fdopen(os.dup(1), "w")  # whatever an import prints is no reply
    os.dup2(2, 1)
    preload()
    children: dict[int, Child] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "go_on" in request:
            child = children.pop(request["go_on"])
            os.kill(child.pid, signal.SIGCONT)
        else:
            child = Child(request)
        reply = child.wait()
        if reply["code"] is None:
            children[child.pid] = child
        speak.write(json.dumps(reply) + "\n")
        speak.flush()


if __name__ == "__main__":
    main()
