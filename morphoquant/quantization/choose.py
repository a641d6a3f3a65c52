"""What an input group gets: its mask, its starting range, and the search that shrinks it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from morphoquant.calibration.samples import CalibrationError
from morphoquant.calibration.statistics import ModalityStatistics
from morphoquant.calibration.walk import Observer
from morphoquant.config.schema import BitsConfig, CompensationConfig, MethodConfig, RangeConfig
from morphoquant.models.structure import Block, InputGroup
from morphoquant.quantization.activation import StaticQuantizer, static_range, tensor_range
from morphoquant.quantization.compensation import build_compensation
from morphoquant.quantization.mdqfo import RangeSearch, Search
from morphoquant.quantization.mdqfo_gradient import GradientSearch
from morphoquant.quantization.mdqfo_joint import JointSearch
from morphoquant.quantization.mdqfo_tensor import TensorSearch
from morphoquant.quantization.ranges import StaticRange


@dataclass
class GroupChoice:
    """The static choices of one input group.

    Attributes:
        start: the range at ratio 1.
        mask: bool [channels] of compensated channels, or None.
        final: the range in use, once the search is over.
        ratios: float32 [channels] of ``final`` over ``start``, or None where nothing was searched.
    """

    start: StaticRange
    mask: torch.Tensor | None
    final: StaticRange
    ratios: torch.Tensor | None = None


def returned(method: MethodConfig, mask: torch.Tensor | None) -> torch.Tensor | None:
    """bool [channels], those that come back whole (or past a gate) while the model runs, or None.

    Args:
        method: its compensation.
        mask: bool [channels] of compensated channels, or None.
    """
    return mask if method.compensation.name in ("dabc", "mixed_precision") else None


def start_choice(
    method: MethodConfig, statistics: ModalityStatistics, mask: torch.Tensor | None
) -> GroupChoice:
    """The starting range from the statistics of a group's input.

    Args:
        method: the activation slot, and whether its compensation is dynamic.
        statistics: of the group's input.
        mask: bool [channels] of compensated channels, or None.
    """
    dynamic = returned(method, mask)
    if method.activation.granularity == "per_channel":
        start = static_range(method.activation, statistics.pooled(), dynamic)
    else:
        start = tensor_range(method.activation, statistics, dynamic)
    return GroupChoice(start, mask, start)


def make_search(
    choice: GroupChoice,
    method: MethodConfig,
    bits: BitsConfig,
    weights: Iterable[torch.Tensor],
    ratios: torch.Tensor | None = None,
) -> Search:
    """The grid search of a group, or with ``ratios`` the comparison of given candidates.

    Args:
        choice: mask and starting range.
        method, bits: the loss and the grid.
        weights: [out, channels] of the linears that read the group, for ``output_weighting``.
        ratios: float32 [candidates, channels].
    """
    config, weights = method.activation.range, list(weights)
    if config.name == "mse":
        config = RangeConfig(
            name="mse",
            candidates=config.candidates,
            min_ratio=config.min_ratio,
            chunk_mb=config.chunk_mb,
        )
    mask = returned(method, choice.mask)
    if method.activation.granularity != "per_channel":
        return TensorSearch(choice.start, weights[0].shape[1], bits.activation, config, mask)
    by_token = config.cosine == "token" and config.cosine_weight > 0
    if config.ratio_per == "channel" and not by_token:
        return RangeSearch(choice.start, bits.activation, config, mask, method.compensation, ratios)
    importance = None
    if config.output_weighting:
        importance = torch.stack([w.detach().double().square().sum(0) for w in weights]).sum(0)
    return JointSearch(
        choice.start, bits.activation, config, mask, method.compensation, importance, ratios
    )


def make_learner(choice: GroupChoice, method: MethodConfig, bits: BitsConfig) -> GradientSearch:
    """The gradient search of a group."""
    mask = returned(method, choice.mask)
    return GradientSearch(
        choice.start, bits.activation, method.activation.range, mask, method.compensation
    )


class SearchingQuantizer(nn.Module):
    """Quantizes with the best range so far while it searches (``upstream: quantized``).

    Every batch is searched first and then quantized, so later linears see what they would see at
    run time, and what they choose depends on the order of batches.
    """

    def __init__(
        self, search: Search, bits: int, mask: torch.Tensor | None, config: CompensationConfig
    ) -> None:
        super().__init__()
        self.search, self.bits, self.mask, self.config = search, bits, mask, config

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """[..., channels] -> quantized and compensated, at the current best range."""
        chosen = self.search.result()
        rounded: torch.Tensor = StaticQuantizer(chosen, self.bits)(x)
        if self.mask is None:
            return rounded
        found: torch.Tensor = build_compensation(self.config, self.mask, chosen.edge)(x, rounded)[0]
        return found


def unreached(block: Block, wanted: str) -> CalibrationError:
    """What to say when a tower sees no prompt."""
    return CalibrationError(
        f"no calibration prompt reaches the {block.tower} tower, {wanted}: add a source with "
        f"such media to calibration.sources, or set model.scope.{block.tower}=false"
    )


def updating(searches: Mapping[str, Search]) -> Observer:
    """Shows each group's real tokens to its search."""

    def see(group: InputGroup, x: torch.Tensor, labels: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        kinds = labels.reshape(-1)
        padded = bool((kinds < 0).any())
        real = kinds >= 0
        searches[group.name].update(
            rows[real] if padded else rows, kinds[real] if padded else kinds
        )

    return see
