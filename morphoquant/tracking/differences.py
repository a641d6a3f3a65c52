"""What makes a run another run than the nearest one that is already there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

IDENTITY, RESULT = "identity.json", "result.json"
ABOUT = "about"
"""Key of ``identity.json`` for what is told of a run without being part of its fingerprint."""
SHOWN = 6  # differences, and files, that are spelled out
MISSING = "(none)"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; everything else is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One entry per differing key of two identities: ``config.seed: 0 → 1``, ``code (file, ..)``.

    Hashes are only named. Where both tell the hashes of their files, changed files are too.
    """
    before, after = (flatten({k: v for k, v in i.items() if k != ABOUT}) for i in (old, new))
    found = []
    for key in sorted(before.keys() | after.keys()):
        a, b = before.get(key, MISSING), after.get(key, MISSING)
        if a == b:
            continue
        if key == "code":
            found.append(f"code{_files(old, new)}")
        elif _is_hash(a) and _is_hash(b):
            found.append(key)
        else:
            found.append(f"{key}: {_short(a)} → {_short(b)}")
    return found


def nearest(root: Path, name: str, identity: Mapping[str, Any]) -> tuple[Path, list[str]] | None:
    """The run of the same name with the fewest differences (the newest of those), and these.

    Args:
        root: the folder of all runs.
        name: what their directories are called in front of the fingerprint.
        identity: of the new run, with what is told about it.
    """
    best: tuple[int, float] | None = None
    found: tuple[Path, list[str]] | None = None
    for path, other, changed in _others(root, name):
        different = differences(other, identity)
        rank = (len(different), -changed)
        if different and (best is None or rank < best):
            best, found = rank, (path, different)
    return found


def explain(root: Path, name: str, identity: Mapping[str, Any]) -> str | None:
    """In a line, why a new run is not one of those that are there; None where there are none."""
    other = nearest(root, name, identity)
    if other is None:
        return None
    path, different = other
    state = "finished" if (path / RESULT).is_file() else "unfinished"
    rest = len(different) - SHOWN
    more = f"; and {rest} more" if rest > 0 else ""
    return f"another run than {path.name} ({state}): {'; '.join(different[:SHOWN])}{more}"


def _others(root: Path, name: str) -> Iterator[tuple[Path, dict[str, Any], float]]:
    for path in root.glob(f"{name}-*/{IDENTITY}"):
        if path.parent.name.rpartition("-")[0] != name:
            continue
        try:
            identity = json.loads(path.read_text())
            changed = path.stat().st_mtime
        except (OSError, ValueError):
            continue
        if isinstance(identity, dict):
            yield path.parent, identity, changed


def _files(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The source files that changed, in brackets; nothing where one side does not tell."""
    a, b = (side.get(ABOUT, {}).get("files") for side in (old, new))
    if not isinstance(a, dict) or not isinstance(b, dict):
        return ""
    changed = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    if not changed:
        return ""
    rest = len(changed) - SHOWN
    more = f" and {rest} more" if rest > 0 else ""
    return f" ({', '.join(changed[:SHOWN])}{more})"


def _is_hash(value: Any) -> bool:
    return (
        isinstance(value, str)
        and len(value) in (16, 64)
        and all(letter in "0123456789abcdef" for letter in value)
    )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
