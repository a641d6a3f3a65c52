"""Quantized copies of the random thinker, for the engine's tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from morphoquant.calibration.samples import Calibration, batches
from morphoquant.calibration.walk import walk
from morphoquant.config.schema import (
    ActivationConfig,
    BitsConfig,
    CompensationConfig,
    MaskConfig,
    MethodConfig,
    RangeConfig,
    WeightConfig,
)
from morphoquant.quantization.engine import SEARCH, STATISTICS, BlockQuantizer

TOWERS = ("vision", "audio", "decoder")
W4A4 = BitsConfig(weight=4, activation=4)
STATIC = {"format": "int", "granularity": "per_channel", "mode": "static"}
DABC = CompensationConfig(name="dabc", mask=MaskConfig(max_share=0.05))
W4A4 = BitsConfig(weight=4, activation=4)


class ExactNorm(nn.Module):
    """RMSNorm in the dtype of its input. The library's own always computes in float32, which
    would hide errors below 1e-6."""

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.weight, self.epsilon = original.weight, original.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


@pytest.fixture(scope="session")
def in_float64() -> Callable[[Any], Any]:
    """Turns a model into float64 from end to end, in place, and returns it."""

    def make(model: Any) -> Any:
        model.double()
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RMSNorm"):
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, ExactNorm(module))
        return model

    return make


@pytest.fixture(scope="session")
def biased(in_float64: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Turns an adapter into float64, with biases on ``up`` too (this family has none there)."""

    def make(adapter: Any) -> Any:
        in_float64(adapter.model)
        generator = torch.Generator().manual_seed(5)
        for layer in adapter.residual_stream().layers:
            noise = torch.randn(layer.up.out_features, dtype=torch.float64, generator=generator)
            layer.up.bias = nn.Parameter(0.3 * noise, requires_grad=False)
        return adapter

    return make


def activation(**changes: Any) -> ActivationConfig:
    return ActivationConfig(**({"format": "int"} | changes))


METHODS = {
    "rtn": MethodConfig(name="rtn", weight=WeightConfig(format="int"), activation=activation()),
    "static": MethodConfig(
        name="static", weight=WeightConfig(format="int"), activation=activation(**STATIC)
    ),
    "tensor": MethodConfig(
        name="tensor",
        weight=WeightConfig(format="nf4"),
        activation=activation(format="int", granularity="per_tensor", mode="static"),
    ),
    "morphoquant": MethodConfig(
        name="morphoquant",
        weight=WeightConfig(format="nf4", fallback_format="int"),
        activation=activation(**STATIC, range=RangeConfig(name="mdqfo", cosine_weight=0.5)),
        compensation=DABC,
    ),
    "element": MethodConfig(
        name="element",
        weight=WeightConfig(format="nf4"),
        activation=activation(**STATIC, range=RangeConfig(name="mdqfo")),
        compensation=DABC.model_copy(update={"reading": "element", "gate": 0.8}),
    ),
}


@pytest.fixture(scope="session")
def methods() -> dict[str, MethodConfig]:
    """Methods by the name that the tests are parametrized with."""
    return METHODS


@pytest.fixture(scope="session")
def encode(omni: Any, calibration: Calibration) -> Callable[..., list[Any]]:
    """Encoded calibration batches: ``encode("samples", size)`` or ``encode("search", size)``."""

    def make(which: str, size: int = 4) -> list[Any]:
        groups = batches(getattr(calibration, which), size)
        return [omni.encode([s.messages for s in group]) for group in groups]

    return make


@pytest.fixture(scope="session")
def quantize(omni: Any, copied: Any, encode: Any) -> Callable[..., tuple[Any, BlockQuantizer]]:
    """A quantized copy of the random thinker and what the engine recorded."""

    def make(
        method: MethodConfig | str,
        bits: BitsConfig = W4A4,
        towers: Any = TOWERS,
        sets: dict[str, Any] | None = None,
        observe: bool = True,
    ) -> tuple[Any, BlockQuantizer]:
        if isinstance(method, str):
            method = METHODS[method]
        adapter, quantizer = copied(omni), BlockQuantizer(method, bits, observe)
        if sets is None:
            sets = {STATISTICS: encode("samples")}
            if quantizer.searches:
                sets[SEARCH] = encode("search")
        walk(adapter, towers, sets, quantizer)
        return adapter, quantizer

    return make


@pytest.fixture(scope="session")
def probe(omni: Any, mixed: Any) -> Any:
    return omni.encode(mixed)
