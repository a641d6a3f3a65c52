"""Statistics of the inputs of a block's groups, and those that another run has taken already."""

from __future__ import annotations

from collections.abc import Callable

import torch

from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.models.structure import Block, InputGroup

Recall = Callable[[Block], dict[str, ModalityStatistics]]
"""Block -> statistics of its groups' inputs, on the block's device."""


class Observation:
    """An observer that keeps statistics of every group that it is shown.

    Attributes:
        found: statistics by group, on the activations' device.
    """

    def __init__(self, histograms: bool) -> None:
        self.histograms = histograms
        self.found: dict[str, ModalityStatistics] = {}

    def __call__(self, group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
        """Add activations [..., channels] with modality labels [...]; padding is skipped."""
        if group.name not in self.found:
            self.found[group.name] = ModalityStatistics(x.shape[-1], x.device, self.histograms)
        self.found[group.name].update(x, labels)
