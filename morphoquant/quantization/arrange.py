"""Tokens in an order in which every modality is one run (AIFS of MQuant, SPEC 4.8).

With one static scale per modality (arXiv 2502.00425, section 3.1) the tokens of an interleaved
prompt change scales from row to row, while an integer product wants one scale for all of its rows.
So the prompt is reordered once, before the first block: ``x'_i = x_{order(i)}``. Every part of a
block but attention works token by token, and attention keeps its result when positions and mask
move along: ``mask'_ij = mask_{order(i), order(j)}``. A token goes on seeing what came before it in
the prompt, wherever it now lies. The output is put back with the inverse.

The simulation needs none of this: it looks up every token's scale where the token is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from morphoquant.models.structure import MODALITIES, Modality

RUNS = (Modality.PADDING, *MODALITIES)
"""Runs lie in this order: padding, which is on the left as it was, then modality by modality."""


@dataclass(frozen=True)
class Arrangement:
    """A permutation of the tokens of every prompt of a batch.

    Attributes:
        order: int64 [batch, tokens]; place i holds the token that was at ``order[:, i]``.
        bounds: int64 [batch, 1 + runs]; run r of a prompt lies at ``bounds[r]:bounds[r + 1]``.
    """

    order: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, labels: torch.Tensor) -> Arrangement:
        """Sort by modality; tokens of one modality keep their order.

        Args:
            labels: [batch, tokens] of :class:`Modality`.

        Raises:
            ValueError: the labels are no matrix.
        """
        if labels.ndim != 2:
            raise ValueError(f"expected labels [batch, tokens], got shape {tuple(labels.shape)}")
        order = torch.argsort(labels.long(), dim=1, stable=True)
        counts = torch.stack([(labels == int(kind)).sum(1) for kind in RUNS], dim=1)
        start = counts.new_zeros(len(counts), 1)
        return cls(order, torch.cat([start, counts.cumsum(1)], dim=1))

    @property
    def inverse(self) -> torch.Tensor:
        """int64 [batch, tokens]; the place at which every token lies now."""
        return torch.argsort(self.order, dim=1)

    def runs(self) -> list[dict[Modality, slice]]:
        """Where the tokens of every modality lie, prompt by prompt; absent ones are left out."""
        return [
            {kind: slice(a, b) for kind, a, b in zip(RUNS, row, row[1:], strict=False) if b > a}
            for row in self.bounds.tolist()
        ]

    def apply(self, x: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """Reorder the tokens of ``x`` along ``axis``; the batch is the axis before it.

        Hidden states are [batch, tokens, channels]; position ids [3, batch, tokens] and rotary
        cosines and sines [3, batch, tokens, head_dim] have their tokens at axis 2. A batch axis of
        length 1, which stood for all prompts, becomes as long as the batch.
        """
        return _moved(x, self.order, axis, axis - 1)

    def undo(self, x: torch.Tensor, axis: int = 1) -> torch.Tensor:
        """The inverse of :meth:`apply`."""
        return _moved(x, self.inverse, axis, axis - 1)

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor:
        """The attention mask of the reordered tokens.

        Args:
            mask: [batch or 1, heads or 1, tokens, tokens], boolean or added to the scores; or
                None, as attention kernels take it for plainly causal. That would now mean another
                order, so it comes back written out: boolean, True where a token is seen.

        Raises:
            ValueError: the mask is not over all pairs of tokens.
        """
        if mask is None:
            return (self.order[:, None, :, None] >= self.order[:, None, None, :]).contiguous()
        tokens = self.order.shape[1]
        if mask.ndim != 4 or mask.shape[2:] != (tokens, tokens):
            raise ValueError(
                f"expected a mask [batch, heads, {tokens}, {tokens}], got {tuple(mask.shape)}"
            )
        return _moved(_moved(mask, self.order, 2, 0), self.order, 3, 0)


def _moved(x: torch.Tensor, order: torch.Tensor, axis: int, batch: int) -> torch.Tensor:
    """``x`` with the entries along ``axis`` in the order of each prompt of axis ``batch``."""
    order = order.to(x.device)
    shape = [1] * x.ndim
    shape[batch], shape[axis] = order.shape
    wanted = list(x.shape)
    wanted[batch] = len(order)
    x = x.expand(wanted)
    return torch.gather(x, axis, order.view(shape).expand(wanted))
