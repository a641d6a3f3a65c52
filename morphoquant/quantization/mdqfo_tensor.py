"""The search for ranges that all channels share: one for the tensor, or one per modality."""

from __future__ import annotations

from dataclasses import replace

import torch

from morphoquant.config.schema import CompensationConfig, RangeConfig
from morphoquant.models.structure import MODALITIES
from morphoquant.quantization.mdqfo_joint import JointSearch
from morphoquant.quantization.ranges import StaticRange


class TensorSearch:
    """Least squared error over all elements, for every range by itself.

    Args:
        initial: ranges at ratio 1, [1] or [1 + modalities, 1]: all tokens, then each modality.
        channels: width of the activations.
        bits: width of the grid.
        config: ratios, p, memory bound.
        apart: bool [channels] that stay in high precision and have no say, or None.
    """

    def __init__(
        self,
        initial: StaticRange,
        channels: int,
        bits: int,
        config: RangeConfig,
        apart: torch.Tensor | None = None,
    ) -> None:
        self.initial = initial
        self.inside: torch.Tensor | None = None
        if apart is not None and 0 < int(apart.sum()) < channels:
            self.inside = (~apart).nonzero().flatten()
            channels = self.inside.numel()
        settings = config.model_copy(update={"cosine_weight": 0.0, "ratio_per": "mask_group"})
        self.by_modality = initial.lo.ndim == 2
        self.searches = [
            JointSearch(_expanded(initial, row, channels), bits, settings, None, NOTHING)
            for row in range(initial.lo.numel())
        ]

    def update(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> None:
        """Add one batch: activations [rows, channels] without padding, their modalities [rows]."""
        if self.inside is not None:
            x = x[:, self.inside]
        self.searches[0].update(x)
        if not self.by_modality or labels is None:
            return
        for search, modality in zip(self.searches[1:], MODALITIES, strict=True):
            chosen = labels == int(modality)
            if bool(chosen.any()):
                search.update(x[chosen])

    def best_ratios(self) -> torch.Tensor:
        """float32, the shape of the initial range; 1 for a modality that was never shown."""
        found = [s.best_ratios()[0] if s.tokens else torch.tensor(1.0) for s in self.searches]
        device = self.initial.lo.device
        return torch.stack([f.to(device) for f in found]).reshape(self.initial.lo.shape)

    def result(self) -> StaticRange:
        """The chosen ranges."""
        return self.initial.shrunk(self.best_ratios())


NOTHING = CompensationConfig()


def _expanded(initial: StaticRange, row: int, channels: int) -> StaticRange:
    """One of the ranges, for every channel."""

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.reshape(-1)[row].expand(channels).clone()

    return replace(
        initial, lo=spread(initial.lo), hi=spread(initial.hi), affine=spread(initial.affine)
    )
