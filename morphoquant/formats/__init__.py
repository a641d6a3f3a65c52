"""Number formats: small pure functions on tensors. Imports torch and nothing else."""

from morphoquant.formats.fp4 import (
    FP4_LEVELS,
    FP4Tensor,
    fake_quantize_fp4,
    fp4_storage_bits,
    quantize_fp4,
)
from morphoquant.formats.hif4 import (
    HiF4Tensor,
    fake_quantize_hif4,
    hif4_storage_bits,
    quantize_hif4,
)
from morphoquant.formats.hif8 import (
    HiF8Tensor,
    fake_quantize_hif8,
    hif8_storage_bits,
    hif8_values,
    quantize_hif8,
)
from morphoquant.formats.integer import (
    Granularity,
    Grid,
    GridKind,
    dequantize,
    expand_slices,
    fake_quantize,
    fake_quantize_activation,
    pack_int4,
    quantize_codes,
    reduce_absmax,
    reduce_minmax,
    scale_from_range,
    slices,
    unpack_int4,
)
from morphoquant.formats.minifloat import E2M1_LEVELS
from morphoquant.formats.mxfp4 import (
    MXFP4Tensor,
    fake_quantize_mxfp4,
    mxfp4_storage_bits,
    quantize_mxfp4,
)
from morphoquant.formats.nf4 import (
    NF4_LEVELS,
    NF4Weight,
    dynamic_codebook,
    nf4_storage_bits,
    quantize_nf4,
)
from morphoquant.formats.nvfp4 import (
    NVFP4Tensor,
    fake_quantize_nvfp4,
    nvfp4_storage_bits,
    nvfp4_tensor_scale,
    quantize_nvfp4,
)
from morphoquant.formats.weights import (
    QuantizedWeight,
    fake_quantize_weight,
    int_storage_bits,
)

__all__ = [
    "E2M1_LEVELS",
    "FP4_LEVELS",
    "NF4_LEVELS",
    "FP4Tensor",
    "Granularity",
    "Grid",
    "GridKind",
    "HiF4Tensor",
    "HiF8Tensor",
    "MXFP4Tensor",
    "NF4Weight",
    "NVFP4Tensor",
    "QuantizedWeight",
    "dequantize",
    "dynamic_codebook",
    "expand_slices",
    "fake_quantize",
    "fake_quantize_activation",
    "fake_quantize_fp4",
    "fake_quantize_hif4",
    "fake_quantize_hif8",
    "fake_quantize_mxfp4",
    "fake_quantize_nvfp4",
    "fake_quantize_weight",
    "fp4_storage_bits",
    "hif4_storage_bits",
    "hif8_storage_bits",
    "hif8_values",
    "int_storage_bits",
    "mxfp4_storage_bits",
    "nf4_storage_bits",
    "nvfp4_storage_bits",
    "nvfp4_tensor_scale",
    "pack_int4",
    "quantize_codes",
    "quantize_fp4",
    "quantize_hif4",
    "quantize_hif8",
    "quantize_mxfp4",
    "quantize_nf4",
    "quantize_nvfp4",
    "reduce_absmax",
    "reduce_minmax",
    "scale_from_range",
    "slices",
    "unpack_int4",
]
