"""Activation quantizers: grids, granularity, and what must not leak between tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.config.schema import ActivationConfig, RangeConfig
from morphoquant.quantization.activation import (
    DynamicQuantizer,
    StaticQuantizer,
    dynamic_quantizer,
    static_range,
    tensor_range,
)


def activations(*shape: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., 3] *= 30
    x[..., 5] = x[..., 5].abs() + 2
    return x


def dynamic(bits: int = 4, **changes: object) -> DynamicQuantizer:
    config = ActivationConfig(format="int", **changes)  # type: ignore[arg-type]
    return dynamic_quantizer(config, bits)


def static(x: torch.Tensor, bits: int = 4, **changes: object) -> StaticQuantizer:
    base = {"format": "int", "granularity": "per_channel", "mode": "static"}
    config = ActivationConfig(**(base | changes))  # type: ignore[arg-type]
    statistics = ChannelStatistics(x.shape[-1])
    statistics.update(x.reshape(-1, x.shape[-1]))
    if config.granularity == "per_tensor":
        whole = ModalityStatistics(x.shape[-1])
        whole.update(x, torch.zeros(x.shape[:-1], dtype=torch.int8))
        return StaticQuantizer(tensor_range(config, whole), bits)
    return StaticQuantizer(static_range(config, statistics, None), bits)


KINDS = [
    {},
    {"symmetric": False},
    {"granularity": "per_group", "group_size": 8},
    {"granularity": "per_group", "group_size": 8, "symmetric": False},
]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_per_token_reference(bits: int) -> None:
    x = activations(7, 16)
    top = 2 ** (bits - 1) - 1
    rows = []
    for row in x.tolist():
        step = max(abs(v) for v in row) / top
        rows.append([max(-top, min(top, round(v / step))) * step for v in row])
    torch.testing.assert_close(dynamic(bits)(x), torch.tensor(rows))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_error_is_at_most_half_a_step(kind: dict, bits: int) -> None:
    """Q2, per token or per group of a token."""
    x = activations(5, 32)
    error = (dynamic(bits, **kind)(x) - x).abs()
    grouped = x.unflatten(-1, (-1, kind.get("group_size", 32)))
    if kind.get("symmetric", True):
        step = grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
        slack = 1.0
    else:
        lo, hi = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        step = (hi.clamp_min(0) - lo.clamp_max(0)) / (2**bits - 1)
        slack = 2.0  # the zero point is rounded too: the end values may be half a step outside
    assert (error.unflatten(-1, grouped.shape[-2:]) <= slack * step / 2 * 1.0001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zero_stays_zero(kind: dict) -> None:
    """Q6, Q7: exact zeros of any token, and an all-zero token, stay exactly zero."""
    x = activations(6, 16)
    x[2] = 0
    x[:, 4] = 0
    out = dynamic(**kind)(x)
    assert out[2].abs().max() == 0
    assert out[:, 4].abs().max() == 0
    assert torch.isfinite(out).all()
    assert static(activations(6, 16))(torch.zeros(3, 16)).abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_idempotent_on_its_own_grid(kind: dict) -> None:
    """Q1: the largest value is a level, so a second pass finds the same grid."""
    once = dynamic(**kind)(activations(6, 16))
    torch.testing.assert_close(dynamic(**kind)(once), once, rtol=1e-5, atol=1e-6)
    fixed = static(activations(50, 16))
    once = fixed(activations(6, 16, seed=1))
    torch.testing.assert_close(fixed(once), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@given(power=st.integers(-8, 8))
def test_powers_of_two_go_through(kind: dict, power: int) -> None:
    """Q5."""
    x, factor = activations(4, 16), 2.0**power
    assert torch.equal(dynamic(**kind)(x * factor), dynamic(**kind)(x) * factor)


@pytest.mark.parametrize("kind", KINDS)
@given(tokens=st.integers(1, 6), padding=st.sampled_from([0.0, 1e6, -3.0]))
def test_a_token_is_alone(kind: dict, tokens: int, padding: float) -> None:
    """Neither the batch, its shape nor its padding changes how a token is rounded (M7, M15)."""
    x = activations(tokens, 16)
    quantizer = dynamic(**kind)
    together = quantizer(torch.cat([torch.full((3, 16), padding), x])[None])[0, 3:]
    alone = torch.cat([quantizer(row[None, None]).reshape(1, -1) for row in x])
    assert torch.equal(together, alone)
    fixed = static(x)
    assert torch.equal(fixed(x[None])[0], torch.cat([fixed(row[None]) for row in x]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_group_that_does_not_divide_the_channels(symmetric: bool) -> None:
    """Q10: the last, shorter group has the range of its own values, and no other."""
    x = activations(5, 21).abs() + 1.0
    quantizer = dynamic(granularity="per_group", group_size=8, symmetric=symmetric)
    out = quantizer(x)
    assert out.shape == x.shape
    whole = dynamic(symmetric=symmetric)
    for a, b in ((0, 8), (8, 16), (16, 21)):
        torch.testing.assert_close(out[:, a:b], whole(x[:, a:b]))


def test_group_larger_than_the_token() -> None:
    x = activations(5, 16)
    assert torch.equal(dynamic(granularity="per_group", group_size=64)(x), dynamic()(x))


def test_clip_ratio_clips() -> None:
    x = activations(5, 16)
    out = dynamic(range=RangeConfig(clip_ratio=0.5))(x)
    edge = 0.5 * x.abs().amax(-1)
    torch.testing.assert_close(out.abs().amax(-1), edge)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_shape_are_kept(dtype: torch.dtype) -> None:
    x = activations(2, 3, 16).to(dtype)
    for quantizer in (*(dynamic(**kind) for kind in KINDS), static(x)):
        out = quantizer(x)
        assert out.dtype == dtype
        assert out.shape == x.shape
        assert out is not x
    assert torch.equal(x, activations(2, 3, 16).to(dtype)), "the input is left alone"


def test_static_per_channel_has_one_range_per_channel() -> None:
    x = activations(200, 16)
    quantizer = static(x)
    torch.testing.assert_close(quantizer.step * 7, x.abs().amax(0))
    far = torch.full((1, 16), 1e9)
    torch.testing.assert_close(quantizer(far)[0], x.abs().amax(0))
    torch.testing.assert_close(quantizer(-far)[0], -x.abs().amax(0))


def test_static_levels_per_channel() -> None:
    x = torch.linspace(-1, 1, 4001)[:, None] * torch.tensor([1.0, 10.0, 0.1])
    out = static(x, bits=4)(x)
    assert [len(out[:, i].unique()) for i in range(3)] == [15] * 3
    assert [len(static(x, bits=b)(x)[:, 0].unique()) for b in (2, 3, 8)] == [3, 7, 255]


def test_static_survives_saving() -> None:
    """M16: serialised and reloaded, bitwise the same."""
    x = activations(20, 16)
    first, second = static(x, affine_when_sign_constant=True), static(x * 3)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    assert set(first.state_dict()) == {"step", "offset", "low", "high"}
