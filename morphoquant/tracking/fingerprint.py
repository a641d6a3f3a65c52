"""A run is its fingerprint: config, code, package versions, model and data."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "lmms-eval",
    "datasets",
    "numpy",
    "av",
    "hydra-core",
    "wandb",
)
CODE_SUFFIXES = (".py", ".yaml")
TOLD_NEVER_ASKED = ("analysis", "launching", "tracking", "sweep.py", "report.py", "tuning.py")
"""Rooms that cannot move a number: a nicer table must not make anyone repeat a week of runs."""


def fingerprint(identity: dict[str, Any]) -> str:
    """sha256 over canonical JSON: the order of keys does not matter, every value does."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def _code_files() -> tuple[tuple[str, bytes], ...]:
    root = Path(__file__).parents[1]
    return tuple(
        (path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).digest())
        for path in sorted(p for p in root.rglob("*") if p.suffix in CODE_SUFFIXES)
        if path.relative_to(root).parts[0] not in TOLD_NEVER_ASKED
    )


def code_files() -> dict[str, str]:
    """Short hash of every source file that can move a number, by its path in the package."""
    return {name: digest.hex()[:12] for name, digest in _code_files()}


def code_hash(*parts: str) -> str:
    """sha256 over the source files that can move a number.

    Args:
        parts: rooms (or files of the package's top level) to look at; all of them by default.
    """
    digest = hashlib.sha256()
    for name, content in _code_files():
        if not parts or name.split("/")[0] in parts:
            digest.update(name.encode() + b"\0")
            digest.update(content)
    return digest.hexdigest()


def git_state() -> dict[str, Any] | None:
    """Commit that the code was checked out from, and whether it was changed since.

    None where the package does not lie in a repository of its own, or git does not answer.
    """
    root = Path(__file__).parents[2]

    def ask(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()

    try:
        top, commit = ask("rev-parse", "--show-toplevel", "HEAD").splitlines()
        if Path(top).resolve() != root.resolve():  # installed below somebody else's repository
            return None
        changed = ask("status", "--porcelain", "--untracked-files=no", "--", "morphoquant", "conf")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changed)}


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    found = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "missing"))
    return tuple(found)


def package_versions() -> dict[str, str]:
    """Version of Python and of every package that can move a number."""
    return dict(_versions())
