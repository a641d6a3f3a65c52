"""A run is its fingerprint: config, code, package versions, model and data."""

from __future__ import annotations

import hashlib
import json
import platform
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
TOLD_NEVER_ASKED = ("analysis", "launching", "tracking", "sweep.py")
"""Rooms that cannot move a number: a nicer table must not make anyone repeat a week of runs."""


def fingerprint(identity: dict[str, Any]) -> str:
    """sha256 over canonical JSON: the order of keys does not matter, every value does."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=1)
def code_hash() -> str:
    """sha256 over the source files that can move a number."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in CODE_SUFFIXES):
        if path.relative_to(root).parts[0] in TOLD_NEVER_ASKED:
            continue
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


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
