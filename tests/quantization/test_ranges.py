"""Static ranges and grids: initialisation, shrinking, levels, and adversarial channels (M17)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.calibration.statistics import ChannelStatistics, ModalityStatistics
from morphoquant.config.schema import ActivationConfig, RangeConfig
from morphoquant.quantization.activation import StaticQuantizer, static_range, tensor_range
from morphoquant.quantization.mdqfo_tensor import TensorSearch
from morphoquant.quantization.ranges import StaticRange, initial_range

values = st.floats(-1e3, 1e3, width=32)


def seen(x: torch.Tensor) -> ChannelStatistics:
    found = ChannelStatistics(x.shape[1])
    found.update(x)
    return found


def a_range(lo: list[float], hi: list[float], affine: list[bool]) -> StaticRange:
    return StaticRange(torch.tensor(lo), torch.tensor(hi), torch.tensor(affine))


# columns: sign-changing, positive, negative, zero, one spike, constant
ADVERSARIAL = torch.tensor(
    [
        [-2.0, 3.0, -5.0, 0.0, 0.01, 7.0],
        [1.0, 4.0, -4.5, 0.0, -0.01, 7.0],
        [0.5, 5.0, -4.0, 0.0, 99.0, 7.0],
    ]
)
MASK = torch.tensor([True] * 6)


def test_initial_range_is_symmetric_minmax() -> None:
    found = initial_range(seen(ADVERSARIAL))
    assert found.hi.tolist() == [2.0, 5.0, 5.0, 0.0, 99.0, 7.0]
    assert torch.equal(found.lo, -found.hi)
    assert not found.affine.any()


def test_sign_constant_channels_may_get_their_own_grid() -> None:
    found = initial_range(seen(ADVERSARIAL), affine_when_sign_constant=True)
    assert found.affine.tolist() == [False, True, True, False, False, True]
    assert found.lo.tolist() == [-2.0, 3.0, -5.0, 0.0, -99.0, 7.0]
    assert found.hi.tolist() == [2.0, 5.0, -4.0, 0.0, 99.0, 7.0]


def test_masked_channels_take_the_near_edge() -> None:
    """What lies beyond is compensated; sign-constant channels keep the far edge."""
    found = initial_range(seen(ADVERSARIAL), MASK)
    assert found.hi.tolist() == pytest.approx([1.0, 5.0, 5.0, 0.0, 0.01, 7.0])
    half = initial_range(seen(ADVERSARIAL), torch.tensor([False] * 4 + [True] * 2))
    assert half.hi.tolist() == pytest.approx([2.0, 5.0, 5.0, 0.0, 0.01, 7.0])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_adversarial_channels_stay_finite(bits: int, affine: bool, masked: bool) -> None:
    """M17, and everything inside the range is at most half a step away (Q2)."""
    chosen = initial_range(seen(ADVERSARIAL), MASK if masked else None, affine)
    grid = chosen.grid(bits)
    rounded = grid(ADVERSARIAL)
    assert torch.isfinite(rounded).all()
    assert (grid.step > 0).all()
    inside = torch.maximum(chosen.lo - ADVERSARIAL, ADVERSARIAL - chosen.hi) <= 0
    error = (rounded - ADVERSARIAL).abs()
    allowed = 0.5 * grid.step + 1e-6 * chosen.edge
    if not affine:
        assert (error <= allowed)[inside].all()
    else:  # the offset is rounded too, which moves the grid by up to half a step more
        assert (error <= allowed + 0.5 * grid.step)[inside].all()
    assert rounded[:, 3].abs().max() == 0, "an all-zero channel stays zero"


def test_all_zero_channel_clips_later_values() -> None:
    """Silence in calibration, a value in evaluation: clipped, neither NaN nor let through."""
    grid = initial_range(seen(torch.zeros(4, 1))).grid(4)
    out = grid(torch.tensor([[3.0], [-5.0], [0.0]]))
    assert out.abs().max() <= 1e-8
    assert torch.isfinite(out).all()


@given(
    lo=values,
    span=st.floats(0.0625, 1e4, width=32),
    affine=st.booleans(),
    bits=st.sampled_from([2, 4, 8]),
)
def test_levels_and_idempotence(lo: float, span: float, affine: bool, bits: int) -> None:
    """Q1, Q3: the published number of levels, equally spaced; rounding twice changes nothing."""
    chosen = a_range([lo if affine else -span], [lo + span if affine else span], [affine])
    grid = chosen.grid(bits)
    step = float(grid.step)
    reach = float(chosen.edge) + 3 * step
    x = torch.linspace(-reach, reach, 20_001).reshape(-1, 1)
    if affine:
        x = torch.linspace(lo - 3 * step, lo + span + 3 * step, 20_001).reshape(-1, 1)
    once = grid(x)
    levels = once.unique()
    assert len(levels) == (2**bits if affine else 2**bits - 1)
    slack = 4e-7 * float(chosen.edge)
    assert ((levels.diff() - step).abs() <= 1e-5 * step + slack).all()
    assert ((grid(once) - once).abs() <= slack).all()
    if not affine:
        assert torch.equal(levels, -levels.flip(0)), "odd (Q4)"
        assert 0.0 in levels.tolist()


@given(power=st.integers(-10, 10), affine=st.booleans())
def test_powers_of_two_go_through(power: int, affine: bool) -> None:
    """Q5, and M9: ranges and rounded values of scaled activations are scaled, bitwise."""
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) + torch.arange(6)
    factor = 2.0**power
    small = initial_range(seen(x), affine_when_sign_constant=affine)
    large = initial_range(seen(x * factor), affine_when_sign_constant=affine)
    assert torch.equal(large.lo, small.lo * factor)
    assert torch.equal(large.hi, small.hi * factor)
    assert torch.equal(large.grid(4)(x * factor), small.grid(4)(x) * factor)


# ----------------------------------------------------------------------------- shrinking


def test_shrinking_a_symmetric_range() -> None:
    found = a_range([-4.0], [4.0], [False]).shrunk(0.5)
    assert (found.lo.item(), found.hi.item()) == (-2.0, 2.0)


@given(lo=values, hi=values, ratio=st.floats(0.1, 1.0))
def test_shrinking_keeps_the_near_edge(lo: float, hi: float, ratio: float) -> None:
    """Of a sign-constant range only the far edge moves (SPEC 2.6 [R])."""
    lo, hi = sorted(torch.tensor([lo, hi]).abs().add(1).tolist())
    positive = a_range([lo], [hi], [True]).shrunk(ratio)
    assert positive.lo.item() == lo
    assert positive.hi.item() == pytest.approx(lo + ratio * (hi - lo), rel=1e-5)
    negative = a_range([-hi], [-lo], [True]).shrunk(ratio)
    assert negative.hi.item() == -lo
    assert negative.lo.item() == pytest.approx(-lo - ratio * (hi - lo), rel=1e-5)


@given(lo=st.floats(-100, -0.125), hi=st.floats(0.125, 100), ratio=st.floats(0.1, 0.99))
def test_shrinking_an_affine_range_around_zero(lo: float, hi: float, ratio: float) -> None:
    """Both edges move, and zero stays inside: neither side may be cut off whole."""
    found = a_range([lo], [hi], [True]).shrunk(ratio)
    assert lo < found.lo.item() < 0 < found.hi.item() < hi
    assert found.hi.item() - found.lo.item() == pytest.approx(ratio * (hi - lo), rel=1e-4)


def test_shrinking_by_one_ratio_per_channel() -> None:
    start = initial_range(seen(ADVERSARIAL), affine_when_sign_constant=True)
    ratios = torch.tensor([1.0, 0.5, 0.25, 1.0, 0.1, 1.0])
    together = start.shrunk(ratios)
    for channel, ratio in enumerate(ratios.tolist()):
        alone = start.shrunk(ratio)
        assert together.lo[channel] == alone.lo[channel]
        assert together.hi[channel] == alone.hi[channel]
    unchanged = start.shrunk(1.0)
    torch.testing.assert_close(unchanged.lo, start.lo)
    torch.testing.assert_close(unchanged.hi, start.hi)


# ----------------------------------------------------------------------------- the slot's range


def activation(**changes: object) -> ActivationConfig:
    base: dict[str, object] = {"format": "int", "granularity": "per_channel", "mode": "static"}
    return ActivationConfig(**(base | changes))  # type: ignore[arg-type]


def by_modality(text: torch.Tensor, audio: torch.Tensor) -> ModalityStatistics:
    found = ModalityStatistics(text.shape[1])
    found.update(text, torch.zeros(len(text), dtype=torch.int8))
    found.update(audio, torch.full((len(audio),), 3, dtype=torch.int8))
    return found


def test_per_tensor_range() -> None:
    statistics = by_modality(ADVERSARIAL, ADVERSARIAL[:1])
    found = tensor_range(activation(granularity="per_tensor"), statistics)
    assert (found.lo.tolist(), found.hi.tolist()) == ([-99.0], [99.0])
    affine = tensor_range(activation(granularity="per_tensor", symmetric=False), statistics)
    assert (affine.lo.tolist(), affine.hi.tolist()) == ([-5.0], [99.0])
    assert affine.grid(4)(ADVERSARIAL).shape == ADVERSARIAL.shape


def test_per_modality_ranges_and_who_takes_them() -> None:
    """MSQ: text and audio have their own scales, image and video were never shown."""
    text, audio = torch.randn(50, 6), torch.randn(30, 6) * 20
    found = tensor_range(activation(granularity="per_modality"), by_modality(text, audio))
    edges = found.hi.flatten().tolist()
    largest, small = float(audio.abs().max()), float(text.abs().max())
    assert edges == pytest.approx([largest, small, largest, largest, largest])
    quantizer = StaticQuantizer(found, 4)
    assert quantizer.needs_labels
    x = torch.cat([text, audio])[None]
    labels = torch.tensor([0] * 50 + [3] * 30, dtype=torch.int8)[None]
    rounded = quantizer(x, labels)
    for values, edge, where in ((text, small, slice(0, 50)), (audio, largest, slice(50, 80))):
        expected = (values / (edge / 7)).round().clamp(-7, 7) * (edge / 7)
        torch.testing.assert_close(rounded[0, where], expected)
    unlabelled, padding = quantizer(x), quantizer(x, torch.full_like(labels, -1))
    assert torch.equal(unlabelled, padding)
    low, high = quantizer.bounds(x, labels)
    assert high[0, 0].item() == pytest.approx(small)
    assert low[0, -1].item() == pytest.approx(-largest)


def test_percentile_cuts_the_rare_values() -> None:
    x = torch.rand(1000, 10)
    x[0, 0] = 50.0
    config = activation(granularity="per_tensor", range=RangeConfig(name="percentile"))
    found = tensor_range(config, by_modality(x, x[1:2]))
    assert found.hi.item() == pytest.approx(1.0, rel=0.02)
    loose = config.range.model_copy(update={"percentile": 100.0})
    whole = tensor_range(config.model_copy(update={"range": loose}), by_modality(x, x[1:2]))
    assert whole.hi.item() == pytest.approx(50.0, rel=0.01)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_modality"])
def test_least_squares_ranges_of_a_tensor(granularity: str) -> None:
    """Every range by itself: the best of the ratios on its own tokens."""
    draw = torch.Generator().manual_seed(3)
    text, audio = (torch.randn(200, 6, generator=draw) * s for s in (1, 30))
    text[0, 0], audio[0, 0] = 12.0, 400.0
    settings = activation(granularity=granularity, range=RangeConfig(name="mse", min_ratio=0.1))
    start = tensor_range(settings, by_modality(text, audio))
    search = TensorSearch(start, 6, 4, settings.range)
    x = torch.cat([audio, text])
    labels = torch.tensor([3] * 200 + [0] * 200)
    search.update(x[:150], labels[:150])
    search.update(x[150:], labels[150:])
    chosen = search.result()
    rows = [(0, x)] if granularity == "per_tensor" else [(0, x), (1, text), (4, audio)]
    for row, values in rows:
        edge = start.hi.flatten()[row]
        errors = {}
        for ratio in search.searches[0].ratios:
            step = edge * ratio / 7
            rounded = (values / step).round().clamp(-7, 7) * step
            errors[ratio] = float(((values - rounded).double() ** 2).sum())
        best = chosen.hi.flatten()[row] / edge
        nearest = min(errors, key=lambda r: abs(r - float(best)))
        assert errors[nearest] <= min(errors.values()) * (1 + 1e-5)
        assert best < 1
    if granularity == "per_modality":
        assert chosen.hi.flatten()[2] == start.hi.flatten()[2]


def test_asymmetric_range_spans_the_channel() -> None:
    found = static_range(activation(symmetric=False), seen(ADVERSARIAL), None)
    assert found.affine.all()
    assert torch.equal(found.lo, ADVERSARIAL.amin(0))
    assert torch.equal(found.hi, ADVERSARIAL.amax(0))


def test_clip_ratio_of_a_sign_constant_channel_does_not_leave_the_values() -> None:
    """SPEC 2.6 [D]: multiplying both ends would move [3, 5] to [1.5, 2.5]."""
    config = activation(affine_when_sign_constant=True, range=RangeConfig(clip_ratio=0.5))
    found = static_range(config, seen(ADVERSARIAL), None)
    assert (found.lo[1].item(), found.hi[1].item()) == (3.0, 4.0)
    assert (found.lo[2].item(), found.hi[2].item()) == (-4.5, -4.0)
    assert (found.lo[0].item(), found.hi[0].item()) == (-1.0, 1.0)
