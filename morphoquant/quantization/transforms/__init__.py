"""Slot 1: how the network is rewritten first, with its function unchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from morphoquant.config.schema import BitsConfig, MethodConfig
from morphoquant.quantization.transforms.report import TransformReport
from morphoquant.quantization.transforms.rotate import RotatedInputLinear, RotationReport, rotate

if TYPE_CHECKING:
    from morphoquant.calibration.readers import Sample
    from morphoquant.models.adapter import Batch, OmniAdapter

__all__ = [
    "TRANSFORMS",
    "RotatedInputLinear",
    "RotationReport",
    "TransformInput",
    "TransformReport",
    "apply_transform",
    "rotate",
]


@dataclass(frozen=True)
class TransformInput:
    """What a transform may look at.

    Attributes:
        adapter: the unquantized model, rewritten in place.
        method, bits: what will be quantized afterwards, and how.
        batches: encoded calibration prompts.
        samples: the same with their answers.
        progress: called with 1 after every step of one that learns.
    """

    adapter: OmniAdapter
    method: MethodConfig
    bits: BitsConfig
    batches: Sequence[Batch]
    samples: Sequence[Sample]
    progress: Callable[[int], object] | None = None


def _none(given: TransformInput) -> None:
    return None


def _rotate(given: TransformInput) -> TransformReport:
    return rotate(given.adapter.residual_stream(), given.method.transform)


def _spin(given: TransformInput) -> TransformReport:
    from morphoquant.quantization.transforms.spin import SpinSettings, spin

    config = given.method.transform
    settings = SpinSettings(
        r1=config.r1,
        r2=config.r2,
        r4=config.r4,
        block_diagonal=config.block_diagonal,
        seed=config.seed,
        steps=config.steps,
        learning_rate=config.learning_rate,
        batch_size=config.batch_size,
    )
    activation, width = given.method.activation, given.bits.activation
    return spin(given.adapter, given.samples, settings, activation, width, given.progress)


def _smooth(given: TransformInput) -> TransformReport:
    from morphoquant.quantization.transforms.smooth import smooth
    from morphoquant.quantization.transforms.smooth_settings import SmoothSettings

    config, activation = given.method.transform, given.method.activation
    settings = SmoothSettings(
        formula=config.formula,
        alpha=config.alpha,
        search=config.search,
        loss=config.loss,
        balance=config.balance,
        quantize_activations=activation.format != "none" and given.bits.activation < 16,
        groups=config.groups,
        skip_grouped_attn_out=not config.grouped_attn_out,
        batch_size=config.batch_size,
    )
    return smooth(
        given.adapter, given.batches, settings, given.method.weight, given.bits, given.samples
    )


def _modality_smooth(given: TransformInput) -> TransformReport:
    from morphoquant.quantization.transforms.modality_smooth import (
        ModalitySmoothSettings,
        modality_smooth,
    )

    config, activation = given.method.transform, given.method.activation
    settings = ModalitySmoothSettings(
        formula=config.formula,
        alpha=config.alpha,
        groups=config.groups,
        skip_grouped_attn_out=not config.grouped_attn_out,
        joint_vision=config.joint_vision,
        steps=config.steps,
        learning_rate=config.learning_rate,
        tokens=config.tokens,
        quantize_activations=activation.format != "none" and given.bits.activation < 16,
    )
    return modality_smooth(
        given.adapter, given.batches, settings, given.method.weight, given.bits, given.progress
    )


TRANSFORMS: dict[str, Callable[[TransformInput], TransformReport | None]] = {
    "none": _none,
    "rotate": _rotate,
    "spin": _spin,
    "smooth": _smooth,
    "modality_smooth": _modality_smooth,
}


def apply_transform(given: TransformInput) -> TransformReport | None:
    """Rewrite a decoder in place as the method says; None where there is nothing to do."""
    return TRANSFORMS[given.method.transform.name](given)
