"""Points at which a run touches the disk, and what can happen there.

A point is named by what is done to which file, relative to the working folder and without the
names of temporaries: ``rename runs/…/result.json``. The n-th answer of a task is a point of its
own (``write runs/…/answers/mmmu.jsonl 3``). What C++ and Rust write is seen when it is synced.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import resource
import signal
import sys
from typing import Any

TEMPORARY = re.compile(r"(?:^|(?<=/))\.([^/]+?)-\d+-[0-9a-f]{8}(?=/|$)")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(told: int, fate: dict[str, Any] | None) -> None:
    """Tell every point on a pipe, and let ``fate`` come true at the first of its name.

    ``fate`` is ``at`` (a point), ``kind`` and ``seed``. Kinds: ``kill`` (before it is done, or with
    a part of it done), ``full`` (from here on no file can grow), ``stop`` (until it is told to go
    on); ``powerless`` is from the start: permissions of files hold for root too.
    """
    root = os.getcwd() + os.sep
    plain_write, plain_sync = os.write, os.fsync
    left = dict(fate or {})
    chance = random.Random(left.get("seed"))

    def name(path: object) -> str | None:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        text = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
        return TEMPORARY.sub(r"\1", text.removeprefix(root)) if text.startswith(root) else None

    def reach(point: str, torn: Any = None) -> None:
        plain_write(told, f"{point}\n".encode())
        if point != left.get("at"):
            return
        left.clear()
        kind = fate["kind"]  # type: ignore[index]
        if kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            if torn is not None:
                torn()
            os.killpg(0, signal.SIGKILL)

    def write(fd: int, data: Any) -> int:
        target = name(fd)
        if target is not None:
            lines = os.pread(fd, os.fstat(fd).st_size, 0).count(b"\n")
            part = chance.randrange(len(data))
            reach(f"write {target} {lines}", lambda: plain_write(fd, data[:part]))
        return plain_write(fd, data)

    def sync(fd: int) -> None:
        target = name(fd)
        if target is not None:
            path = os.readlink(f"/proc/self/fd/{fd}")

            def tear() -> None:
                if TEMPORARY.search(path) and os.path.isfile(path):
                    os.truncate(path, chance.randrange(os.path.getsize(path) + 1))

            reach(f"sync {target}", tear)
        plain_sync(fd)

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and given[2] & WRITES and not isinstance(given[0], int):
            path, verb = given[0], "open"
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            path, verb = given[1 if event == "os.rename" else 0], event.removeprefix("os.")
        else:
            return
        target = name(path)
        if target is not None:
            reach(f"{verb} {target}")

    if left.get("kind") == "powerless":
        drop_capabilities()
    os.write, os.fsync = write, sync  # type: ignore[assignment]
    sys.addaudithook(audit)


def drop_capabilities() -> None:
    """Give up what lets root write where permissions forbid it (Linux)."""
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capset(version_3, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")
