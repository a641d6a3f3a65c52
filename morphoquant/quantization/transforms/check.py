"""The check that follows every transform: the unquantized outputs did not move."""

from __future__ import annotations

import torch


def largest_relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    """``max |after - before| / max |before|``, in float64.

    The largest output is the yardstick, not each output its own: logits near zero have no
    relative error worth the name.

    Args:
        before, after: same shape, e.g. logits [batch, tokens, vocabulary].

    Returns:
        0.0 if nothing moved; infinity if something moved away from all zeros; NaN if either has
        a NaN (so ``change <= tolerance`` is False).

    Raises:
        ValueError: shapes differ or are empty.
    """
    if before.shape != after.shape or before.numel() == 0:
        raise ValueError(f"cannot compare {tuple(before.shape)} with {tuple(after.shape)}")
    old, new = before.detach().double(), after.detach().to(before.device).double()
    moved = (new - old).abs().max()
    if bool(moved == 0):
        return 0.0
    return float(moved / old.abs().max())
