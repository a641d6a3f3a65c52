"""What every transform reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformReport:
    """A transform that was applied; each transform adds its own fields."""

    name: str
