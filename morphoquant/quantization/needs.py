"""What a method asks of the walk: which passes, which statistics, which labels."""

from __future__ import annotations

from dataclasses import dataclass

from morphoquant.config.method import TokenKind
from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.quantization.rounding import needs_moments_by_kind, splits


@dataclass
class Needs:
    """Questions to a method and its widths; with widths per linear, what any of them needs.

    Attributes:
        method, bits: what will be done.
        histograms: whether quantiles of activations are wanted, whatever the method.
    """

    method: MethodConfig
    bits: BitsConfig
    observe: bool = True
    histograms: bool = False

    @property
    def quantizes_activations(self) -> bool:
        return self.method.activation.format != "none" and self.bits.lowest.activation < 16

    @property
    def is_static(self) -> bool:
        return self.quantizes_activations and self.method.activation.mode == "static"

    @property
    def searches(self) -> bool:
        """Whether the method looks at activations a second time, for the range search."""
        chosen = self.method.activation.range
        return self.is_static and chosen.name in ("mdqfo", "mse") and chosen.search

    @property
    def learns(self) -> bool:
        return self.searches and self.method.activation.range.optimizer == "gradient"

    @property
    def masks_channels(self) -> bool:
        """Whether some channels are treated apart from the others."""
        kinds = ("dabc", "static_bias", "mixed_precision")
        returns = self.quantizes_activations and self.method.compensation.name in kinds
        return returns or splits(self.method, self.bits.lowest)

    @property
    def masks_by_statistics(self) -> bool:
        """Whether which channels those are depends on activations."""
        return self.masks_channels and not self.method.compensation.mask.by_weights

    @property
    def scales_tensors(self) -> bool:
        """Whether the activation's format has a scale for the whole tensor."""
        return self.quantizes_activations and self.method.activation.format == "nvfp4"

    @property
    def folds(self) -> bool:
        return self.is_static and self.method.weight.fold and self.bits.lowest.weight < 16

    @property
    def biases(self) -> bool:
        return self.is_static and self.method.compensation.name == "static_bias"

    @property
    def needs_labels(self) -> bool:
        """Whether the quantized model must know the modality of the tokens it is given."""
        by_range = self.is_static and self.method.activation.granularity == "per_modality"
        if self.method.transform.name == "modality_smooth":
            return True
        by_branch = self.biases or needs_moments_by_kind(self.method, self.bits.lowest)
        by_branch = by_branch and self.method.compensation.per_modality
        return by_range or by_branch or self.only is not None

    @property
    def only(self) -> tuple[TokenKind, ...] | None:
        """The modalities whose tokens are quantized, where others pass as they are."""
        spares = self.quantizes_activations and self.method.activation.quantizes_some
        return self.method.activation.modalities if spares else None

    @property
    def chooses(self) -> bool:
        """Whether masks, ranges or scales are chosen from statistics."""
        return self.is_static or self.masks_by_statistics or self.scales_tensors

    @property
    def keeps_histograms(self) -> bool:
        percentile = self.method.activation.range.name == "percentile"
        return self.histograms or (self.is_static and percentile)
