"""NVFP4: E2M1 elements, an E4M3 scale per block of 16, a float32 scale per tensor (SPEC 1.5).

``x_hat = tensor_scale * block_scale * level``. The tensor scale, ``amax / (6 * 448)``, is divided
out first; it puts the largest block scale at the top of E4M3. Without it a tensor of small
magnitude underflows: at a standard deviation of 1e-3 every block scale is 0 or subnormal.

For activations pass a tensor scale fixed in calibration. One taken from the tensor itself makes
the values of a token depend on whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from morphoquant.formats.minifloat import (
    E2M1_MAX,
    E4M3_MAX,
    E4M3_MIN,
    block_absmax,
    e2m1_codes,
    in_blocks,
    out_of_blocks,
    round_e2m1,
    round_e4m3,
    storage_bits,
)

BLOCK = 16
RANGE = E2M1_MAX * E4M3_MAX  # 2688, the largest value in units of the tensor scale


@dataclass(frozen=True)
class NVFP4Tensor:
    """A tensor in NVFP4.

    Attributes:
        dequantized: [..., K], the dtype of the original.
        codes: uint8 0..15 [..., K]; bits 0 to 2 index ``E2M1_LEVELS``, bit 3 is the sign.
        scales: float32 [..., ceil(K / 16)], E4M3 values; NaN for a block with NaN or infinity.
        tensor_scale: float32 scalar.
    """

    dequantized: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor


def nvfp4_tensor_scale(largest: torch.Tensor) -> torch.Tensor:
    """The per-tensor scale for a largest magnitude: float32, the shape of ``largest``.

    At least the smallest normal float32, so that an all-zero tensor has a scale to divide by.
    """
    return (largest.float() / RANGE).clamp_(min=torch.finfo(torch.float32).tiny)


def _rounded(
    x: torch.Tensor, tensor_scale: torch.Tensor | float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels [..., blocks, 16], block scales [..., blocks, 1] and the tensor scale []."""
    blocks = in_blocks(x, BLOCK)
    largest = block_absmax(blocks)
    if tensor_scale is None:
        # A block that is NaN keeps to itself; the zero covers a tensor without elements.
        finite = largest.nan_to_num(nan=0.0).flatten()
        shared = nvfp4_tensor_scale(torch.cat((finite, finite.new_zeros(1))).amax())
    else:
        shared = torch.as_tensor(tensor_scale, dtype=torch.float32, device=x.device)
        if shared.numel() != 1:
            raise ValueError(
                f"NVFP4 has one scale per tensor, got one of shape {tuple(shared.shape)}"
            )
        shared = shared.reshape(())
    unit = shared.to(blocks.dtype)
    # The floor keeps a block far below the rest of the tensor at E4M3's smallest value, where
    # rounding to nearest would make its scale 0 and lose it whole.
    scale = round_e4m3(largest / unit / E2M1_MAX).clamp_(min=E4M3_MIN)
    return round_e2m1((blocks / unit).div_(scale)), scale, shared


def fake_quantize_nvfp4(
    x: torch.Tensor, tensor_scale: torch.Tensor | float | None = None
) -> torch.Tensor:
    """The NVFP4 value of every element, blocks along the last axis.

    Args:
        x: [..., K], activations or a weight [out, in].
        tensor_scale: one positive number, see :func:`nvfp4_tensor_scale`; magnitudes above 2688
            times it saturate. None: from the finite blocks of this tensor.

    Returns:
        [..., K] in the dtype of ``x``. A block with a NaN or an infinity is NaN as a whole.

    Raises:
        ValueError: ``tensor_scale`` is not one number.
    """
    levels, scale, shared = _rounded(x, tensor_scale)
    values = levels.mul_(scale).mul_(shared)
    return out_of_blocks(values, x.shape[-1]).to(x.dtype)


def quantize_nvfp4(
    x: torch.Tensor, tensor_scale: torch.Tensor | float | None = None
) -> NVFP4Tensor:
    """Codes, scales and values of ``x`` [..., K]; arguments of :func:`fake_quantize_nvfp4`."""
    levels, scale, shared = _rounded(x, tensor_scale)
    channels = x.shape[-1]
    return NVFP4Tensor(
        dequantized=out_of_blocks(levels * scale * shared, channels).to(x.dtype),
        codes=out_of_blocks(e2m1_codes(levels), channels),
        scales=scale.squeeze(-1).float(),
        tensor_scale=shared,
    )


def nvfp4_storage_bits(shape: tuple[int, ...]) -> float:
    """Bits per value of a tensor [..., K]: 4, 8 per block of 16, and 32 for the tensor."""
    return storage_bits(shape, element_bits=4, block=BLOCK, scale_bits=8, tensor_bits=32)
