"""Slot 1: how the network is rewritten first, with its function unchanged."""

from __future__ import annotations

from collections.abc import Callable

from morphoquant.config.schema import TransformConfig
from morphoquant.models.structure import ResidualStream
from morphoquant.quantization.transforms.report import TransformReport
from morphoquant.quantization.transforms.rotate import RotatedInputLinear, RotationReport, rotate

__all__ = [
    "TRANSFORMS",
    "RotatedInputLinear",
    "RotationReport",
    "TransformReport",
    "apply_transform",
    "rotate",
]


def _none(stream: ResidualStream, config: TransformConfig) -> None:
    return None


TRANSFORMS: dict[str, Callable[[ResidualStream, TransformConfig], TransformReport | None]] = {
    "none": _none,
    "rotate": rotate,
}


def apply_transform(stream: ResidualStream, config: TransformConfig) -> TransformReport | None:
    """Rewrite a decoder in place as ``config.name`` says; None where there is nothing to do."""
    return TRANSFORMS[config.name](stream, config)
