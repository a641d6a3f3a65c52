"""One integer product per run of a modality equals the simulation, which looks scales up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from morphoquant.calibration.walk import enter, observing, run_block
from morphoquant.formats import fake_quantize_weight
from morphoquant.models.structure import MODALITIES, TokenLabels
from morphoquant.quantization.activation import StaticQuantizer
from morphoquant.quantization.arrange import RUNS, Arrangement
from morphoquant.quantization.integer_modality import ModalityIntegerLinear
from morphoquant.quantization.linear import GroupInput, QuantizedLinear
from morphoquant.quantization.mixed import HigherPrecision
from morphoquant.quantization.ranges import StaticGrid, StaticRange


def ranges(draw: torch.Generator, affine: bool) -> StaticRange:
    """[1 + modalities, 1], over four decades."""
    edge = 10 ** (4 * torch.rand(1 + len(MODALITIES), 1, generator=draw) - 2)
    low = torch.rand(edge.shape, generator=draw) * edge if affine else edge
    return StaticRange(-low, edge, torch.full_like(edge, affine, dtype=torch.bool))


def both(
    seed: int, channels: int, affine: bool, bits: int, group: int | None, share: float
) -> tuple[ModalityIntegerLinear, QuantizedLinear, TokenLabels]:
    """The integer layer and the simulated one, with random weights (float64), bias and mask."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, channels, generator=draw, dtype=torch.float64)
    bias = torch.randn(6, generator=draw, dtype=torch.float64)
    mask = torch.rand(channels, generator=draw) < share
    granularity = "per_channel" if group is None else "per_group"
    rounded = fake_quantize_weight(weight.masked_fill(mask, 0.0), 4, granularity, group or channels)
    chosen = ranges(draw, affine)
    source = GroupInput(1)
    quantizer = source.quantizer = StaticQuantizer(chosen, bits)
    # The simulation multiplies codes and steps in float32: exactly, where steps are powers of two.
    quantizer.step.copy_(2.0 ** quantizer.step.log2().round())
    grid = StaticGrid(quantizer.step, quantizer.offset, quantizer.low, quantizer.high)
    integer = ModalityIntegerLinear(rounded, grid, bias, mask, weight[:, mask], group)
    source.compensation, source.labels = HigherPrecision(mask, 16), TokenLabels()
    whole = torch.where(mask, weight, rounded.dequantized)
    return integer, QuantizedLinear(whole, bias, source), source.labels


@given(
    seed=st.integers(0, 9999),
    size=st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 40)),
    affine=st.booleans(),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([None, 1, 8]),
    share=st.sampled_from([0.0, 0.2, 1.0]),
)
@settings(max_examples=50)
def test_equals_the_simulation(
    seed: int,
    size: tuple[int, int, int],
    affine: bool,
    bits: int,
    group: int | None,
    share: float,
) -> None:
    """Any mixture of modalities and padding; to 1e-12 of the terms of a sum."""
    batch, tokens, channels = size
    integer, simulated, labels = both(seed, channels, affine, bits, group, share)
    draw = torch.Generator().manual_seed(seed + 1)
    kinds = torch.randint(-1, 4, (batch, tokens), generator=draw).to(torch.int8)
    x = 10 * torch.randn(batch, tokens, channels, generator=draw, dtype=torch.float64)
    labels.current = kinds
    expected = simulated(x)
    arrangement = Arrangement.of(kinds)
    found = arrangement.undo(integer(arrangement.apply(x), arrangement))
    assert found.dtype == x.dtype
    sizes = x.abs() + simulated.source.round(x).abs() + integer.step.max() * 2**bits
    terms = sizes @ simulated.weight.abs().T + simulated.bias.abs()
    assert ((found - expected).abs() <= 1e-12 * terms).all()


def test_every_modality_has_its_own_scale() -> None:
    """The same token, labelled in every way, has one code times another step."""
    integer, _, _ = both(0, 16, False, 8, None, 0.0)
    kinds = torch.tensor([[int(kind) for kind in RUNS]])
    arrangement = Arrangement.of(kinds)
    x = 1e6 * torch.ones(1, len(RUNS), 16, dtype=torch.float64)  # all codes at the edge
    found = integer(x, arrangement)[0] - integer.bias
    torch.testing.assert_close(
        found / integer.step.double(), (found[:1] / integer.step[0].double()).expand_as(found)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_on_8_bit_integers(bits: int) -> None:
    """Packed, where the device has such a product: the same sums, so the same outputs."""
    integer, _, _ = both(1, 64, False, bits, None, 0.1)
    kinds = torch.tensor([[0, 1, 1, 0, 3], [-1, -1, 2, 0, 2]])
    arrangement = Arrangement.of(kinds)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    expected = integer(x, arrangement)
    assert integer.pack() or not hasattr(torch.ops.onednn, "qlinear_pointwise")
    assert torch.equal(integer(x, arrangement), expected)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    grid = ranges(torch.Generator().manual_seed(0), False).grid(8)
    rounded = fake_quantize_weight(weight, 4)
    mask = torch.arange(8) == 2
    with pytest.raises(ValueError, match="in the codes already"):
        ModalityIntegerLinear(rounded, grid, None, mask, weight[:, mask])
    with pytest.raises(ValueError, match="do not fit a weight"):
        ModalityIntegerLinear(rounded, grid, None, mask)
    with pytest.raises(ValueError, match="expected a bias"):
        ModalityIntegerLinear(rounded, grid, torch.zeros(2))
    with pytest.raises(ValueError, match="zero points"):
        ModalityIntegerLinear(fake_quantize_weight(weight, 4, symmetric=False), grid)
    with pytest.raises(ValueError, match="for groups of 4"):
        ModalityIntegerLinear(rounded, grid, group_size=4)
    one = StaticRange(-torch.ones(1), torch.ones(1), torch.zeros(1, dtype=torch.bool)).grid(8)
    with pytest.raises(ValueError, match="expected steps"):
        ModalityIntegerLinear(rounded, one)
    integer = ModalityIntegerLinear(rounded, grid)
    with pytest.raises(ValueError, match="does not fit an activation"):
        integer(torch.zeros(1, 4, 8), Arrangement.of(torch.zeros(1, 5)))


@torch.no_grad()
def test_the_linears_of_a_decoder(methods: Any, quantize: Any, omni: Any, mixed: Any) -> None:
    """Every linear of a quantized decoder, on the activations that reach it, padding and all."""
    activation = methods["tensor"].activation.model_copy(update={"granularity": "per_modality"})
    method = methods["rtn"].model_copy(update={"activation": activation})
    adapter, quantizer = quantize(method, towers=["decoder"], observe=False)
    (segment,) = enter(adapter, "decoder", [adapter.encode(mixed)])
    labels, arrangement = segment.labels, Arrangement.of(segment.labels)
    seen: dict[str, torch.Tensor] = {}
    quantizer.labels.current = labels
    for index, (block, plain) in enumerate(
        zip(adapter.blocks("decoder"), omni.blocks("decoder"), strict=True)
    ):
        with observing(block, lambda: labels, lambda group, x, _: seen.update({group.name: x})):
            segment.hidden = run_block(block, index, segment)
        for group in block.groups:
            x = seen[group.name]
            for name in group.linears:
                simulated = block.linear(name)
                chosen = quantizer.choices[block.name, group.name].final
                rounded = fake_quantize_weight(plain.linear(name).weight, 4)
                integer = ModalityIntegerLinear(rounded, chosen.grid(4), simulated.bias)
                found = arrangement.undo(integer(arrangement.apply(x), arrangement))
                expected = simulated.product(simulated.source.round(x), bias=simulated.bias)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert set(seen) == {"attn_in", "attn_out", "mlp_in", "mlp_out"}
