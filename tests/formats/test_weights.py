"""Round-to-nearest of weights: granularities, clip search, cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphoquant import formats
from morphoquant.formats.weights import SEARCH_POWER, SEARCH_STEPS


def weight(rows: int = 6, columns: int = 37, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "count"), [("per_channel", 1), ("per_group", 5)])
def test_shapes_and_consistency(granularity: Any, count: int, symmetric: bool) -> None:
    w = weight()
    found = formats.fake_quantize_weight(w, 4, granularity, 8, symmetric)
    assert found.codes.shape == w.shape
    assert found.scale.shape == (6, count)
    assert (found.zero_point is None) == symmetric
    scale = formats.expand_slices(found.scale, 37, granularity, 8)
    zero = found.zero_point
    if zero is not None:
        zero = formats.expand_slices(zero, 37, granularity, 8)
    assert torch.equal(formats.dequantize(found.codes, scale, zero), found.dequantized)
    assert ((found.dequantized - w).abs() <= scale * (0.5 if symmetric else 1.0) + 1e-6).all()


def test_per_tensor_has_one_scale() -> None:
    w = weight()
    found = formats.fake_quantize_weight(w, 8, "per_tensor")
    assert found.scale.shape == (1,)
    assert found.scale.item() == pytest.approx(w.abs().max().item() / 127)
    assert found.codes.shape == w.shape


def test_per_channel_formula() -> None:
    """SPEC 1.4: s_n = max_k |W_nk| / Q."""
    w = weight()
    scale = w.abs().amax(dim=1, keepdim=True) / 7
    expected = (w / scale).round().clamp(-7, 7) * scale
    assert torch.equal(formats.fake_quantize_weight(w, 4).dequantized, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_pytorchs_own_fake_quantization(symmetric: bool) -> None:
    """An independent implementation of the same grid, given our scales."""
    w = weight(rows=64, columns=96)
    found = formats.fake_quantize_weight(w, 4, symmetric=symmetric)
    zero = torch.zeros(64, 1) if found.zero_point is None else found.zero_point
    low, high = (-7, 7) if symmetric else (0, 15)
    expected = torch.fake_quantize_per_channel_affine(
        w, found.scale[:, 0], zero[:, 0].to(torch.int32), 0, low, high
    )
    torch.testing.assert_close(found.dequantized, expected, rtol=0, atol=1e-6)


def test_groups_of_the_leftover_are_their_own() -> None:
    """Q10: quantizing the leftover columns by themselves gives the same."""
    w = weight(columns=70)
    whole = formats.fake_quantize_weight(w, 4, "per_group", 32).dequantized
    for start, stop in ((0, 32), (32, 64), (64, 70)):
        alone = formats.fake_quantize_weight(w[:, start:stop], 4).dequantized
        assert torch.equal(whole[:, start:stop], alone)


def loss(w: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return (w - found).abs().pow(SEARCH_POWER).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_clip_search_equals_brute_force(width: int, symmetric: bool) -> None:
    w = weight(columns=24)
    w[0, 3] = 20.0  # an outlier that is worth clipping
    found = formats.fake_quantize_weight(w, width, symmetric=symmetric, clip="mse")
    grid = formats.Grid(width, "restricted" if symmetric else "asymmetric")
    best = torch.full((6,), torch.inf)
    for step in range(SEARCH_STEPS):
        ratio = 1 - step / 100
        lo, hi = w.amin(1, keepdim=True) * ratio, w.amax(1, keepdim=True) * ratio
        tried = formats.fake_quantize(w, *formats.scale_from_range(lo, hi, grid), grid)
        best = torch.minimum(best, loss(w, tried))
    torch.testing.assert_close(loss(w, found.dequantized), best)
    full = formats.fake_quantize_weight(w, width, symmetric=symmetric).dequantized
    assert (loss(w, found.dequantized) <= loss(w, full) + 1e-6).all()


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
def test_clip_search_in_chunks_changes_nothing(
    granularity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weight(rows=9)
    whole = formats.fake_quantize_weight(w, 4, granularity, 8, clip="mse")
    monkeypatch.setattr("morphoquant.formats.weights.SEARCH_CHUNK", 64)
    pieces = formats.fake_quantize_weight(w, 4, granularity, 8, clip="mse")
    assert torch.equal(whole.codes, pieces.codes)


def test_all_zero_rows_survive_every_setting() -> None:
    """Q7."""
    w = weight()
    w[2] = 0
    for clip in ("minmax", "mse"):
        for symmetric in (True, False):
            found = formats.fake_quantize_weight(w, 4, "per_group", 8, symmetric, clip)  # type: ignore[arg-type]
            assert torch.equal(found.dequantized[2], torch.zeros(37))
            assert torch.isfinite(found.dequantized).all()


@pytest.mark.parametrize("clip", ["minmax", "mse"])
def test_dtype_is_kept(clip: Any) -> None:
    w = weight().bfloat16()
    found = formats.fake_quantize_weight(w, 4, clip=clip)
    assert found.dequantized.dtype == torch.bfloat16
    wide = formats.fake_quantize_weight(w.float(), 4, clip=clip)
    assert torch.equal(found.codes, wide.codes)


def test_only_matrices() -> None:
    with pytest.raises(ValueError, match=r"\[out, in\]"):
        formats.fake_quantize_weight(torch.zeros(3), 4)


@pytest.mark.parametrize(
    ("granularity", "symmetric", "expected"),
    [
        ("per_tensor", True, 4 + 16 / (8 * 300)),
        ("per_channel", True, 4 + 16 / 300),
        ("per_group", True, 4 + 3 * 16 / 300),
        ("per_group", False, 4 + 3 * 20 / 300),
    ],
)
def test_storage_bits(granularity: Any, symmetric: bool, expected: float) -> None:
    found = formats.int_storage_bits((8, 300), 4, granularity, 128, symmetric)
    assert found == pytest.approx(expected)
