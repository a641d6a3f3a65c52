"""The neutral form of a conversation, and of what a model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Conversation: TypeAlias = Sequence[dict[str, Any]]
"""Turns ``{"role", "content"}``; a content part is one of
``{"type": "image", "image": PIL image}``, ``{"type": "video", "video": path}``,
``{"type": "audio", "audio": float32 array, 16 kHz, mono}``, ``{"type": "text", "text": str}``,
in reading order."""


@dataclass(frozen=True)
class Generation:
    """One answer, with the number of tokens read and written (padding not counted)."""

    text: str
    input_tokens: int
    output_tokens: int
