"""Number formats: small pure functions on tensors. Imports torch and nothing else."""

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
from morphoquant.formats.nf4 import (
    NF4_LEVELS,
    NF4Weight,
    dynamic_codebook,
    nf4_storage_bits,
    quantize_nf4,
)
from morphoquant.formats.weights import (
    QuantizedWeight,
    fake_quantize_weight,
    int_storage_bits,
)

__all__ = [
    "NF4_LEVELS",
    "Granularity",
    "Grid",
    "GridKind",
    "NF4Weight",
    "QuantizedWeight",
    "dequantize",
    "dynamic_codebook",
    "expand_slices",
    "fake_quantize",
    "fake_quantize_activation",
    "fake_quantize_weight",
    "int_storage_bits",
    "nf4_storage_bits",
    "pack_int4",
    "quantize_codes",
    "quantize_nf4",
    "reduce_absmax",
    "reduce_minmax",
    "scale_from_range",
    "slices",
    "unpack_int4",
]
