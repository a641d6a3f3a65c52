"""GPTQ against the textbook loop, llm-compressor's implementation, and its invariants."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant import formats
from morphoquant.compat import prepare_torchvision
from morphoquant.errors import ActivationError
from morphoquant.models.structure import Modality
from morphoquant.quantization import gptq as module
from morphoquant.quantization.gptq import BALANCED, Hessian, gptq

CHANNELS = 40
GROUP = 12  # 40 channels end in a shorter group
GRIDS = [
    {"granularity": granularity, "symmetric": symmetric, "group_size": GROUP}
    for granularity in ("per_tensor", "per_channel", "per_group")
    for symmetric in (True, False)
]


def weight(rows: int = 24, channels: int = CHANNELS, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 0.05 * torch.randn(rows, channels, generator=draw, dtype=torch.float64)


def activations(
    tokens: int = 200, channels: int = CHANNELS, seed: int = 1, outlier: float = 8.0
) -> torch.Tensor:
    """Correlated channels of different sizes, float64 [tokens, channels]."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=draw, dtype=torch.float64)
    mix = mix * torch.rand(channels, generator=draw, dtype=torch.float64) ** 2
    x = torch.randn(tokens, channels, generator=draw, dtype=torch.float64) @ mix
    x[:, ::13] *= outlier
    return x


def moments(x: torch.Tensor) -> torch.Tensor:
    return 2 / len(x) * x.T @ x


def loss(quantized: torch.Tensor, w: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr(E H E^T): the layer's squared output error."""
    error = quantized.double() - w.double()
    return float(((error @ hessian.double()) * error).sum())


def textbook(
    w: torch.Tensor, hessian: torch.Tensor, bits: int, act_order: bool, grid: Any
) -> torch.Tensor:
    """Frantar et al.'s algorithm as printed: the inverse, its Cholesky factor, no blocks."""
    w, channels, symmetric = w.clone(), w.shape[1], grid["symmetric"]
    levels = formats.Grid(bits, "restricted" if symmetric else "asymmetric")
    static = formats.fake_quantize_weight(w, bits, **grid)

    def spread(values: torch.Tensor | None) -> torch.Tensor:
        if values is None:
            return torch.zeros_like(w)
        wide = formats.expand_slices(values, channels, grid["granularity"], GROUP)
        return wide.expand(w.shape).clone()

    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(channels)
    w, scale, zero = (t[:, order] for t in (w, spread(static.scale), spread(static.zero_point)))
    hessian = hessian[order][:, order]
    damping = 0.01 * hessian.diagonal().mean() * torch.eye(channels, dtype=w.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian + damping), upper=True)
    out = torch.zeros_like(w)
    for j in range(channels):
        if grid["granularity"] == "per_group" and not act_order and j % GROUP == 0:
            group = slice(j, j + GROUP)
            fresh = formats.fake_quantize_weight(w[:, group], bits, symmetric=symmetric)
            scale[:, group] = fresh.scale
            zero[:, group] = 0 if fresh.zero_point is None else fresh.zero_point
        out[:, j] = formats.fake_quantize(w[:, j], scale[:, j], zero[:, j], levels)
        w[:, j:] -= ((w[:, j] - out[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    return out[:, order.argsort()]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_equals_the_textbook_loop(grid: Any, act_order: bool) -> None:
    w, hessian = weight(), moments(activations())
    found = gptq(w, hessian, 3, act_order=act_order, block=16, **grid)
    expected = textbook(w, hessian, 3, act_order, grid)
    torch.testing.assert_close(found.dequantized, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("options", [{}, {"clip": "mse"}, {"act_order": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_independent_channels_are_rounded_to_nearest(
    grid: Any, options: Any, dtype: torch.dtype
) -> None:
    """T9, and any diagonal H: bitwise, in codes, scales and values."""
    w, clip = weight().to(dtype), options.get("clip", "minmax")
    expected = formats.fake_quantize_weight(w, 4, clip=clip, **grid)
    for diagonal in (torch.ones(CHANNELS), torch.logspace(-4, 4, CHANNELS)):
        found = gptq(w, diagonal.diag(), 4, block=7, **grid, **options)
        for name in ("codes", "scale", "zero_point", "dequantized"):
            one, other = getattr(found, name), getattr(expected, name)
            assert one is other or (torch.equal(one, other) and one.dtype == other.dtype)


@given(
    seed=st.integers(0, 1000),
    bits=st.integers(2, 6),
    granularity=st.sampled_from(["per_tensor", "per_channel", "per_group"]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
    clip=st.sampled_from(["minmax", "mse"]),
)
def test_output_error_is_no_larger_than_of_round_to_nearest(
    seed: int, bits: int, granularity: Any, symmetric: bool, act_order: bool, clip: Any
) -> None:
    """Not a theorem, least of all for scales refreshed at two bits: group scales are static."""
    w = weight(seed=seed).float()
    hessian = moments(activations(seed=seed + 1, outlier=1.0)).float()
    grid = (granularity, 16, symmetric, clip)
    found = gptq(w, hessian, bits, *grid, act_order=act_order, static_groups=True)
    nearest = formats.fake_quantize_weight(w, bits, *grid)
    assert loss(found.dequantized, w, hessian) <= loss(nearest.dequantized, w, hessian)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_blocks_and_other_rows_do_not_matter(grid: Any, act_order: bool) -> None:
    w, hessian = weight(), moments(activations())
    options = {"act_order": act_order, "static_groups": True, **grid}
    found = [gptq(w, hessian, 4, block=block, **options).codes for block in (1, 7, 39, 1000)]
    if grid["granularity"] != "per_tensor":  # linears of one input group, stacked or apart
        found.append(torch.cat([gptq(rows, hessian, 4, **options).codes for rows in w.split(9)]))
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_act_order_is_a_permutation_by_hand() -> None:
    w, hessian = weight(), moments(activations())
    order = hessian.diagonal().argsort(descending=True)
    found = gptq(w, hessian, 4, act_order=True)
    by_hand = gptq(w[:, order], hessian[order][:, order], 4)
    assert torch.equal(found.codes[:, order], by_hand.codes)
    assert not torch.equal(found.codes, gptq(w, hessian, 4).codes)


@pytest.mark.parametrize("option", ["act_order", "static_groups"])
def test_static_groups_have_the_scales_of_the_original_weight(option: Any) -> None:
    w, hessian = weight(), moments(activations())
    plain = formats.fake_quantize_weight(w, 4, "per_group", GROUP).scale
    static = gptq(w, hessian, 4, "per_group", GROUP, **{option: True}).scale
    refreshed = gptq(w, hessian, 4, "per_group", GROUP).scale
    assert torch.equal(static, plain)
    assert torch.equal(refreshed[:, 0], plain[:, 0])
    assert (refreshed[:, 1:] != plain[:, 1:]).any()


@pytest.mark.parametrize("grid", GRIDS[:4], ids=str)
@pytest.mark.parametrize("act_order", [False, True])
def test_dead_columns_are_as_if_absent(grid: Any, act_order: bool) -> None:
    """Not in the range, not in the damping, not in the errors of others; themselves zero."""
    w, x = weight(), activations()
    dead = torch.zeros(CHANNELS, dtype=torch.bool)
    dead[[0, 5, 6, 39]] = True
    w[:, dead], x[:, dead] = 9.0, 0.0
    found = gptq(w, moments(x), 4, act_order=act_order, **grid)
    alone = gptq(w[:, ~dead], moments(x[:, ~dead]), 4, act_order=act_order, **grid)
    assert (found.dequantized[:, dead] == 0).all()
    assert torch.equal(found.codes[:, ~dead], alone.codes)
    torch.testing.assert_close(found.scale, alone.scale)


@given(power=st.integers(-20, 20))
def test_the_size_of_the_hessian_does_not_matter(power: int) -> None:
    w, x = weight().float(), activations()
    x[:, 3] = 0
    hessian = moments(x).float()
    assert torch.equal(gptq(w, hessian * 2.0**power, 4).codes, gptq(w, hessian, 4).codes)


@pytest.mark.parametrize("act_order", [False, True])
def test_inputs_are_left_alone(act_order: bool) -> None:
    w, x = weight().float(), activations()
    x[:, 3] = 0
    hessian = moments(x).float()
    before = w.clone(), hessian.clone()
    gptq(w, hessian, 4, "per_group", GROUP, act_order=act_order)
    assert torch.equal(w, before[0])
    assert torch.equal(hessian, before[1])


def test_indefinite_hessian_is_refused_with_advice() -> None:
    hessian = torch.eye(CHANNELS)
    hessian[0, 1] = hessian[1, 0] = 2.0
    with pytest.raises(ActivationError, match=r"not positive definite.*raise the damping"):
        gptq(weight(), hessian, 4)
    gptq(weight(), hessian, 4, damping=1.5)


def test_fewer_tokens_than_channels_will_do() -> None:
    w, hessian = weight().float(), moments(activations(3, outlier=1.0)).float()
    found, nearest = gptq(w, hessian, 4, act_order=True), formats.fake_quantize_weight(w, 4)
    assert loss(found.dequantized, w, hessian) < 0.2 * loss(nearest.dequantized, w, hessian)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hessian": torch.zeros(CHANNELS, CHANNELS)}, "activations of this layer were zero"),
        ({"hessian": torch.eye(CHANNELS) * torch.nan}, "NaN"),
        ({"hessian": torch.eye(3)}, "needs a Hessian"),
        ({"weight": torch.ones(3)}, "expected a weight"),
        ({"bits": 16}, "2 to 8 bits"),
        ({"damping": -1.0}, "damping"),
        ({"block": 0}, "block"),
    ],
)
def test_wrong_arguments_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gptq(**({"weight": weight(), "hessian": torch.eye(CHANNELS), "bits": 4} | changes))


@pytest.fixture(scope="module")
def llm_compressor() -> Any:
    """Its GPTQ: with its own scales and zero points, or with our scales on a symmetric grid."""
    prepare_torchvision()  # transformers, which it imports, may need it
    from compressed_tensors import quantization
    from llmcompressor.modifiers.gptq import gptq_quantize as theirs

    def quantize(
        w: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor | None, **settings: Any
    ) -> torch.Tensor:
        arguments = quantization.QuantizationArgs(symmetric=scale is not None, **settings)
        parts = w.reshape(len(w), -1, arguments.group_size or w.shape[1])
        bounds = parts.amin(-1), parts.amax(-1)
        own, zero = quantization.utils.calculate_qparams(*bounds, arguments)
        inputs = (w, hessian, own if scale is None else scale, zero)
        batch = [each[None].clone() for each in inputs]  # it works in place
        found, _, fallback = theirs.quantize_weight(*batch, None, arguments)
        assert not fallback.any()
        return found[0]

    return quantize


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("order", [None, "static"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_no_worse_than_llm_compressor(
    llm_compressor: Any, group: int | None, order: Any, symmetric: bool
) -> None:
    """Its symmetric grid has a level more than ours: 8 bits, where that hardly matters."""
    bits, channels, ours, theirs = 8 if symmetric else 4, 256, 0.0, 0.0
    grid: Any = (bits, "per_group" if group else "per_channel", group or 128, symmetric)
    settings = {"num_bits": bits, "group_size": group, "actorder": order}
    settings["strategy"] = "group" if group else "channel"
    for seed in range(3):
        w = weight(64, channels, seed).float()
        hessian = moments(activations(600, channels, seed + 1)).float()
        found = gptq(w, hessian, *grid, act_order=order is not None, static_groups=True)
        reference = llm_compressor(w, hessian, found.scale if symmetric else None, **settings)
        ours += loss(found.dequantized, w, hessian)
        theirs += loss(reference, w, hessian)
        if not symmetric:  # one grid: one result, but for ties within rounding errors
            same = torch.isclose(found.dequantized, reference, rtol=1e-5, atol=1e-7)
            assert same.float().mean() > 0.995
    assert ours <= 1.01 * theirs


def labelled(tokens: int = 120, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Mostly image tokens, some text, a little audio, padding full of large values."""
    x = activations(tokens, seed=seed)
    labels = torch.full((tokens,), int(Modality.IMAGE), dtype=torch.int8)
    labels[::7] = int(Modality.TEXT)
    labels[::31] = int(Modality.AUDIO)
    labels[::5] = int(Modality.PADDING)
    x[labels == Modality.PADDING] = 1e6
    return x, labels


def streamed(x: torch.Tensor, labels: torch.Tensor | None, **options: Any) -> Hessian:
    found = Hessian(x.shape[-1], **({"dtype": torch.float64} | options))
    found.update(x, labels)
    return found


def test_pooled_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the shape of the batch and the size of the pieces that are multiplied."""
    x, labels = labelled()
    expected = moments(x[labels >= 0])
    torch.testing.assert_close(streamed(x, labels).value(), expected)
    monkeypatch.setattr(module, "PIECE", 7 * CHANNELS)
    folded = streamed(x.reshape(4, 30, CHANNELS), labels.reshape(4, 30))
    other = Hessian(CHANNELS, dtype=torch.float64)
    other.merge(folded)
    other.update(x, labels)  # of the merged copy, not of the original
    torch.testing.assert_close(folded.value(), expected)


def test_balanced_moments() -> None:
    x, labels = labelled()
    weights = {Modality.TEXT: 2.0, Modality.IMAGE: 0.5, Modality.VIDEO: 1.0}
    expected = sum(
        weights[m] / int((labels == m).sum()) * x[labels == m].T @ x[labels == m]
        for m in (Modality.TEXT, Modality.IMAGE)
    )
    found = streamed(x, labels, modality_weights=weights)
    torch.testing.assert_close(found.value(), expected)
    assert len(found._sums) == 2, "a modality that never came takes no memory"


def test_balanced_moments_do_not_count_heads() -> None:
    """The same image tokens three times over change the pooled moments only."""
    x, labels = labelled()
    image = labels == Modality.IMAGE
    more = torch.cat([x, x[image], x[image]]), torch.cat([labels, labels[image].repeat(2)])
    few, many = (streamed(*pair, modality_weights=BALANCED) for pair in ((x, labels), more))
    torch.testing.assert_close(few.value(), many.value())
    assert not torch.allclose(streamed(x, labels).value(), streamed(*more).value(), rtol=1e-2)


def test_balanced_moments_serve_the_minority() -> None:
    """Text and images live in different directions; text is a fiftieth of the tokens."""
    text, image = activations(40, seed=5), activations(1960, seed=6)
    labels = torch.tensor([int(Modality.TEXT)] * 40 + [int(Modality.IMAGE)] * 1960)
    w, error = weight(96), []
    for weights in (BALANCED, None):
        hessian = streamed(torch.cat([text, image]), labels, modality_weights=weights).value()
        error.append(loss(gptq(w, hessian, 3).dequantized, w, moments(text)))
    assert error[0] < 0.9 * error[1]


@pytest.mark.parametrize("weights", [None, BALANCED])
@given(
    cuts=st.lists(st.integers(0, 120), max_size=4),
    order=st.randoms(use_true_random=False),
    split=st.integers(0, 4),
)
def test_order_batches_and_merging_do_not_matter(
    weights: Any, cuts: list[int], order: Any, split: int
) -> None:
    x, labels = labelled()
    rows = list(range(120))
    order.shuffle(rows)
    pair = [Hessian(CHANNELS, modality_weights=weights, dtype=torch.float64) for _ in range(2)]
    for i, (start, stop) in enumerate(itertools.pairwise([0, *sorted(cuts), 120])):
        part = rows[start:stop]
        pair[i < split].update(x[part], labels[part])
    pair[0].merge(pair[1])
    whole = streamed(x, labels, modality_weights=weights)
    torch.testing.assert_close(pair[0].value(), whole.value(), rtol=1e-11, atol=1e-12)
    assert pair[0].tokens == whole.tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float32_sums_of_a_long_stream_are_accurate(dtype: torch.dtype) -> None:
    """300 batches; errors are measured against what rounding a single product may lose."""
    found, exact = Hessian(CHANNELS), torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64)
    for seed in range(300):
        x = activations(64, seed=seed).to(dtype)
        found.update(x)
        exact += x.double().T @ x.double() / (150 * 64)
    size = exact.diagonal().sqrt()
    error = (found.value().double() - exact).abs() / (size[:, None] * size)
    assert found.value().dtype == torch.float32
    assert float(error.max()) < 2e-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_unusable_activations_are_refused(bad: float) -> None:
    found, x = Hessian(CHANNELS), torch.ones(2, CHANNELS)
    found.update(x, torch.full((2,), int(Modality.PADDING)))
    with pytest.raises(ActivationError, match="no calibration token"):
        found.value()
    x[1, 2] = bad
    found.update(x)
    with pytest.raises(ActivationError, match="NaN or infinite"):
        found.value()


def test_wrong_use_is_refused() -> None:
    one, balanced = torch.ones(2, CHANNELS), Hessian(CHANNELS, modality_weights=BALANCED)
    for weights in ({}, {Modality.TEXT: 0.0}, {Modality.TEXT: -1.0, Modality.IMAGE: 1.0}):
        with pytest.raises(ValueError, match="must not be negative and one must be positive"):
            Hessian(CHANNELS, modality_weights=weights)
    with pytest.raises(ValueError, match="needs the labels"):
        balanced.update(one)
    with pytest.raises(ValueError, match="do not fit"):
        Hessian(CHANNELS).update(one, torch.zeros(3))
    with pytest.raises(ValueError, match="expected 40 channels"):
        Hessian(CHANNELS).update(one[:, :3])
    with pytest.raises(ValueError, match="equal channels"):
        Hessian(CHANNELS).merge(balanced)
