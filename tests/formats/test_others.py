"""Integer grids, packing, MXFP4 and NVFP4 against torchao's and compressed-tensors' own code.

torchao multiplies by reciprocals where this package divides, so a value within rounding errors of
a midpoint may take the neighbouring code there; nothing else may differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from morphoquant import formats
from morphoquant.compat import prepare_torchvision
from morphoquant.formats import Grid, GridKind
from morphoquant.formats.minifloat import E2M1_LEVELS
from morphoquant.formats.mxfp4 import quantize_mxfp4
from morphoquant.formats.nvfp4 import quantize_nvfp4

prepare_torchvision()  # transformers, which both may import, may need it

GROUP = 32
SIGNED_LEVELS = torch.tensor([*E2M1_LEVELS, *(-level for level in E2M1_LEVELS)])  # by code


def weight(seed: int = 0) -> torch.Tensor:
    """[64, 256] with rows of very different size, zeros and rows of one sign among them."""
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    w *= torch.logspace(-5, 5, 64).unsqueeze(1)
    w[3, :GROUP] = 0
    w[4], w[5] = w[4].abs() + 1, -w[5].abs() - 1
    return w


def ours(w: torch.Tensor, grid: Grid, group: int) -> tuple[torch.Tensor, Any, Any]:
    """Codes [64, 256], scale and zero point [64, groups]."""
    parts = w.unflatten(1, (-1, group))
    bounds = torch.aminmax(parts, dim=-1, keepdim=True)
    scale, zero = formats.scale_from_range(bounds.min, bounds.max, grid)
    codes = formats.quantize_codes(parts, scale, zero, grid).flatten(1)
    return codes, scale.squeeze(-1), None if zero is None else zero.squeeze(-1)


def only_ties_differ(found: torch.Tensor, theirs: torch.Tensor, unit: torch.Tensor) -> None:
    """``unit`` is x / scale: codes differ by one and only where it lies at a midpoint.

    Every group's largest value lies at one on the sym15 grid.
    """
    apart = (found.int() - theirs.int()).abs()
    assert int(apart.max()) <= 1
    to_midpoint = ((unit - unit.floor()) - 0.5).abs()
    assert (to_midpoint[apart > 0] < 1e-5).all()


@pytest.mark.parametrize("group", [GROUP, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["restricted", "sym15", "asymmetric"])
def test_integer_grids_are_torchaos(kind: GridKind, bits: int, group: int) -> None:
    """Its symmetric mapping is the restricted grid on -Q..Q and the sym15 grid on -Q-1..Q."""
    from torchao.quantization import quant_primitives as torchao

    w, grid = weight(), Grid(bits, kind)
    codes, scale, zero = ours(w, grid, group)
    mapping = torchao.MappingType.SYMMETRIC if grid.symmetric else torchao.MappingType.ASYMMETRIC
    container = torch.int8 if grid.symmetric else torch.uint8
    limits = (container, grid.low, grid.high)
    expected_scale, expected_zero = torchao.choose_qparams_affine(
        w, mapping, (1, group), *limits, zero_point_dtype=torch.int32
    )
    torch.testing.assert_close(scale, expected_scale.reshape(scale.shape), rtol=1e-6, atol=0)
    if zero is not None:
        expected_zero = expected_zero.reshape(zero.shape)
        only_ties_differ(zero, expected_zero, -w.unflatten(1, (-1, group)).amin(-1) / scale)
    # From here on with the same grid.
    integers = torch.zeros_like(scale, dtype=torch.int32) if zero is None else zero.int()
    theirs = torchao.quantize_affine(w, (1, group), scale, integers, *limits)
    only_ties_differ(codes, theirs, w / scale.repeat_interleave(group, 1))
    values = torchao.dequantize_affine(codes, (1, group), scale, integers, *limits)
    wide = [None if v is None else v.repeat_interleave(group, 1) for v in (scale, zero)]
    assert torch.equal(formats.dequantize(codes, *wide), values)


@pytest.mark.parametrize("group", [None, GROUP])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["sym15", "asymmetric"])
def test_integer_grids_are_compressed_tensors(kind: GridKind, bits: int, group: Any) -> None:
    """Scales, codes and values, bit for bit; its asymmetric codes lie 2^(bits-1) lower."""
    from compressed_tensors import quantization

    w, grid = weight(), Grid(bits, kind)
    w[3, :GROUP] += 1e-3  # it has another floor under the scale of an all-zero group
    codes, scale, zero = ours(w, grid, group or 256)
    arguments = quantization.QuantizationArgs(
        num_bits=bits,
        symmetric=grid.symmetric,
        strategy="group" if group else "channel",
        group_size=group,
    )
    parts = w.unflatten(1, (-1, group or 256))
    found = quantization.utils.calculate_qparams(parts.amin(-1), parts.amax(-1), arguments)
    torch.testing.assert_close(scale, found[0], rtol=1e-6, atol=0)
    shift = 0 if zero is None else 2 ** (bits - 1)
    if zero is not None:
        only_ties_differ(zero - shift, found[1], -parts.amin(-1) / scale)
    lowered = torch.zeros_like(scale) if zero is None else zero - shift
    theirs = quantization.lifecycle.forward.quantize(w, scale, lowered, arguments)
    assert torch.equal(codes.float() - shift, theirs)
    values = quantization.lifecycle.forward.dequantize(theirs, scale, lowered, arguments)
    wide = [None if v is None else v.repeat_interleave(group or 256, 1) for v in (scale, zero)]
    assert torch.equal(formats.dequantize(codes, *wide), values)


@pytest.mark.parametrize("channels", [64, 63, 8, 1])
def test_packing_is_compressed_tensors(channels: int) -> None:
    """Eight unsigned codes to an int32, the first in the lowest bits: our bytes in their order."""
    from compressed_tensors.compressors.pack_quantized import helpers

    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (5, channels), generator=draw).to(torch.int8)
    theirs = helpers.pack_to_int32(codes, 4)
    packed = formats.pack_int4(codes + 8)
    # An odd channel leaves a nibble, a short word leaves bytes: unsigned zeros in both.
    padded = torch.zeros(5, theirs.shape[1] * 4, dtype=torch.uint8)
    padded[:, : packed.shape[1]] = packed
    bits = (torch.arange(theirs.shape[1] * 8) < channels).to(torch.uint8) * 15
    kept = theirs.contiguous().view(torch.uint8) & formats.pack_int4(bits)
    assert torch.equal(padded, kept)
    assert torch.equal(helpers.unpack_from_int32(theirs, 4, codes.shape), codes)
    assert torch.equal(
        formats.unpack_int4(packed, channels, signed=False).to(torch.int8) - 8, codes
    )


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """torchao keeps the first of two codes in the low nibble."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def test_mxfp4_is_torchaos() -> None:
    """Scales and codes bit for bit; its FLOOR mode is the OCP specification's rule."""
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    w = weight(1)
    scale, codes = to_mx(w, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)
    found = quantize_mxfp4(w)
    exponents = scale.view(torch.uint8).int() - 127
    assert torch.equal(found.scales, torch.exp2(exponents.float()))
    theirs = unpacked(codes.view(torch.uint8))
    assert torch.equal(SIGNED_LEVELS[found.codes.int()], SIGNED_LEVELS[theirs.int()])


def test_nvfp4_is_torchaos() -> None:
    """Block scales bit for bit, codes but for midpoints: it multiplies by a reciprocal."""
    from torchao.prototype.mx_formats import nvfp4_tensor as torchao

    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    w[:, ::50] *= 20
    shared = torchao.per_tensor_amax_to_scale(w.abs().max())
    scales, codes = torchao.nvfp4_quantize(w, 16, shared)
    found = quantize_nvfp4(w)
    torch.testing.assert_close(
        found.tensor_scale.reshape(()), shared.reshape(()), rtol=1e-6, atol=0
    )
    found = quantize_nvfp4(w, shared)
    assert torch.equal(found.scales, scales.float())
    levels = SIGNED_LEVELS[found.codes.int()]
    theirs = SIGNED_LEVELS[unpacked(codes).int()]
    unit = w / (found.scales.repeat_interleave(16, 1) * shared)
    # At a midpoint both levels are equally far.
    differ = levels != theirs
    assert differ.double().mean() < 1e-3
    distance = (unit - levels).abs() - (unit - theirs).abs()
    assert (distance.abs()[differ] < 1e-5).all()
