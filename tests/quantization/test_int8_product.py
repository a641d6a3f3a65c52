"""Products on 8-bit integers give the exact sums, or are not offered."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from morphoquant.quantization.folding import fold_weight
from morphoquant.quantization.int8_product import pack
from morphoquant.quantization.integer_linear import IntegerLinear
from morphoquant.quantization.ranges import StaticRange

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def codes(rows: int, columns: int, top: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top + 1, (rows, columns), generator=draw, dtype=torch.int8)


@pytest.mark.parametrize("device", DEVICES)
@given(
    tokens=st.integers(1, 40),
    outputs=st.integers(1, 50),
    channels=st.integers(1, 300),
    top=st.sampled_from([1, 3, 7, 31]),
    seed=st.integers(0, 1000),
)
def test_sums_are_exact(
    device: str, tokens: int, outputs: int, channels: int, top: int, seed: int
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight, q = codes(outputs, channels, top, seed), codes(tokens, channels, top, seed + 1)
    product = pack(weight.to(device), -top, top)
    assert product is not None
    found = product(q.to(device)).cpu()
    assert torch.equal(found.long(), q.long() @ weight.long().T)


@pytest.mark.parametrize("top", [7, 15])
def test_extreme_codes_do_not_saturate(top: int) -> None:
    """All codes at the largest magnitude: the case in which int16 sums would overflow first."""
    weight = torch.full((8, 512), -top, dtype=torch.int8)
    q = torch.full((4, 512), top, dtype=torch.int8)
    product = pack(weight, -top, top)
    assert product is not None
    assert torch.equal(product(q).long(), q.long() @ weight.long().T)


def test_operands_that_could_saturate_are_not_taken() -> None:
    wide = codes(8, 64, 127, 0)
    wide[0, 0] = 127
    assert pack(wide, -127, 127) is None
    long = torch.full((1, 2**18), 7, dtype=torch.int8)
    assert pack(long, -7, 7) is None, "its sums have no exact float32"


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("affine", [False, True])
def test_the_packed_linear_equals_the_emulation(group: int | None, affine: bool) -> None:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(9, 48, generator=draw) * torch.logspace(-2, 2, 48)
    if affine:
        x[:, ::5] = x[:, ::5].abs() + 1
    lo, hi = x.amin(0), x.amax(0)
    one_sided = (lo * hi > 0) & affine
    edge = 0.9 * torch.maximum(lo.abs(), hi.abs())
    chosen = StaticRange(
        torch.where(one_sided, lo, -edge), torch.where(one_sided, hi, edge), one_sided
    )
    mask = torch.rand(48, generator=draw) < 0.1
    weight = torch.randn(24, 48, generator=draw)
    grid = chosen.grid(4)
    linear = IntegerLinear(fold_weight(weight, grid, mask, 4, group), grid, torch.ones(24))
    before = linear(x)
    assert not linear.product.packed
    assert linear.pack()
    assert linear.product.packed
    assert torch.equal(linear(x), before)


def test_what_cannot_be_packed_stays_an_emulation() -> None:
    draw = torch.Generator().manual_seed(4)
    x, weight = torch.randn(5, 32, generator=draw), torch.randn(6, 32, generator=draw)
    edge = x.abs().amax(0)
    grid = StaticRange(-edge, edge, torch.zeros(32, dtype=torch.bool)).grid(8)
    linear = IntegerLinear(fold_weight(weight, grid, None, 8, None), grid)
    before = linear(x)
    assert not linear.pack()
    assert not linear.product.packed
    assert torch.equal(linear(x), before)
