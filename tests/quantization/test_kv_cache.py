"""Keys and values on their grids, as tensors: by hand, token by token, and behind R3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.quantization.hadamard import hadamard
from morphoquant.quantization.kv_cache import KVCacheError, KVQuantizer, KVSettings

HEAD_DIM = 32
INT4 = KVSettings(bits=4)


def quantizer(settings: KVSettings, head_dim: int = HEAD_DIM) -> KVQuantizer:
    return KVQuantizer(settings, head_dim, None)


def keys(*shape: int, seed: int = 0) -> torch.Tensor:
    """float64 normal numbers with a strong outlier channel in every head."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[..., 3] = x[..., 3] * 4 + 30
    return x


def by_hand(x: torch.Tensor, settings: KVSettings) -> torch.Tensor:
    """Quantize [..., head_dim], one group at a time."""
    width = settings.group_size or x.shape[-1]
    out = torch.empty_like(x)
    rows, done = x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    for start in range(0, x.shape[-1], width):
        for row, target in zip(rows, done, strict=True):
            group = row[start : start + width]
            if settings.symmetric:
                top = 2 ** (settings.bits - 1) - 1
                step = group.abs().max() * settings.clip_ratio / top
                codes = torch.round(group / step).clamp(-top, top)
            else:
                top = 2**settings.bits - 1
                low = group.min().clamp_max(0) * settings.clip_ratio
                high = group.max().clamp_min(0) * settings.clip_ratio
                step = (high - low) / top
                zero = torch.round(-low / step)
                codes = (torch.round(group / step) + zero).clamp(0, top) - zero
            target[start : start + width] = codes * step
    return out


@given(
    st.integers(2, 8),
    st.sampled_from([None, 4, 8, 16, 32]),
    st.booleans(),
    st.sampled_from([1.0, 0.9]),
    st.integers(0, 99),
)
def test_by_hand(
    bits: int, group: int | None, symmetric: bool, clip_ratio: float, seed: int
) -> None:
    settings = KVSettings(bits, group, symmetric, clip_ratio=clip_ratio)
    x = keys(2, 2, 3, HEAD_DIM, seed=seed)
    found = quantizer(settings).quantize(x)
    torch.testing.assert_close(found, by_hand(x, settings), rtol=1e-12, atol=1e-12)
    assert not torch.equal(found, x)


@given(
    st.integers(2, 8),
    st.sampled_from([None, 8, 16, 32]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_every_token_is_rounded_by_itself(
    bits: int, group: int | None, symmetric: bool, rotate: bool, seed: int
) -> None:
    """Neither other tokens, nor other heads, nor other rows of the batch can be felt (bitwise)."""
    found = quantizer(KVSettings(bits, group, symmetric, rotate))
    x = keys(3, 2, 5, HEAD_DIM, seed=seed)
    _, key, value = found(x, x, x)
    other = x.clone()
    other[0], other[:, 0], other[:, :, 0] = 1e4, -1e4, 1e4
    _, k, v = found(other, other, other)
    assert torch.equal(value[1:, 1:, 1:], v[1:, 1:, 1:])
    assert torch.equal(key[1:, 1:, 1:], k[1:, 1:, 1:])
    assert not torch.equal(value, x)


def test_r3_rotates_queries_and_keys_and_not_values() -> None:
    q, k, v = keys(1, 8, 3, HEAD_DIM), keys(1, 2, 5, HEAD_DIM, seed=1), keys(1, 2, 5, HEAD_DIM)
    new_q, new_k, new_v = quantizer(KVSettings(rotate=True))(q, k, v)
    matrix = hadamard(HEAD_DIM) / HEAD_DIM**0.5
    torch.testing.assert_close(new_q, q @ matrix)
    torch.testing.assert_close(new_k, k @ matrix)
    assert new_v is v


def test_16_bits_pass_the_very_tensors_on() -> None:
    """Q9. They are counted nevertheless, as tokens."""
    k = keys(1, 2, 3, HEAD_DIM)
    found = quantizer(KVSettings())
    assert all(new is k for new in found(k, k, k))
    assert (found.tokens, found.elements) == (3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    """Computed in float32 and rounded once more at the end."""
    x = keys(1, 2, 5, HEAD_DIM).to(dtype)
    for new in quantizer(KVSettings(bits=4, rotate=True))(x, x, x):
        assert (new.dtype, new.shape) == (dtype, x.shape)
    low = quantizer(INT4).quantize(x)
    assert torch.equal(low, quantizer(INT4).quantize(x.float()).to(dtype))


def test_smaller_groups_are_closer() -> None:
    x = keys(1, 2, 64, HEAD_DIM)
    errors = [
        float((quantizer(KVSettings(4, group)).quantize(x) - x).norm())
        for group in (None, 16, 8, 4)
    ]
    assert errors == sorted(errors, reverse=True)


def test_rotation_helps_keys_with_an_outlier_channel() -> None:
    """Scores of 4-bit keys against the exact ones; without outliers R3 has nothing to gain."""
    outlying = keys(1, 2, 200, HEAD_DIM)
    tame = outlying.clone()
    tame[..., 3] = tame[..., 4].flip(-1)
    query = keys(1, 2, 50, HEAD_DIM, seed=1)
    query[..., 3] = query[..., 5].flip(-1)

    def error(k: torch.Tensor, rotate: bool) -> float:
        new_q, new_k, _ = quantizer(replace(INT4, rotate=rotate))(query, k, k)
        scores, found = query @ k.transpose(-1, -2), new_q @ new_k.transpose(-1, -2)
        return float((scores - found).norm() / scores.norm())

    assert error(outlying, rotate=True) < 0.7 * error(outlying, rotate=False)
    assert error(tame, rotate=True) == pytest.approx(error(tame, rotate=False), rel=0.3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (KVSettings(), 16.0),
        (KVSettings(rotate=True, group_size=32), 16.0),
        (KVSettings(bits=4), 4 + 20 / 128),
        (KVSettings(bits=4, symmetric=True), 4 + 16 / 128),
        (KVSettings(bits=2, group_size=32), 2 + 18 / 32),
    ],
)
def test_effective_bits(settings: KVSettings, expected: float) -> None:
    assert quantizer(settings, 128).effective_bits == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 1}, "bits"),
        ({"bits": 12}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"clip_ratio": 0.0}, "clip_ratio"),
        ({"clip_ratio": 1.5}, "clip_ratio"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(KVCacheError, match=message):
        KVSettings(**values)


def test_settings_have_to_fit_the_heads() -> None:
    with pytest.raises(KVCacheError, match="24 does not divide the 32"):
        quantizer(KVSettings(bits=4, group_size=24))
    with pytest.raises(KVCacheError, match=r"kv_cache\.rotate: .*70"):
        quantizer(KVSettings(rotate=True), 70)
