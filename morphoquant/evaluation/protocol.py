"""The one thing evaluation needs of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from morphoquant.models.messages import Conversation, Generation

Progress: TypeAlias = Callable[[int, int, str], None]
"""``progress(done, total, description)``: questions of one task, counted within the task."""


class Generator(Protocol):
    """Answers conversations, greedily; batching inside one call must not change an answer."""

    def generate(
        self, conversations: Sequence[Conversation], max_new_tokens: int
    ) -> list[Generation]:
        """One answer per conversation, in order."""
        ...
