"""Grouped GEMMs: the rows of every expert times its own 4-bit matrix, in the masked and the contiguous layout."""

from fp4jax.grouped_gemm.fused_swiglu import grouped_gemm_swiglu as grouped_gemm_swiglu
from fp4jax.grouped_gemm.gemm import (
    contiguous_grouped_gemm as contiguous_grouped_gemm,
    masked_grouped_gemm as masked_grouped_gemm,
)
from fp4jax.grouped_gemm.packed_weights import (
    PackedWeights as PackedWeights,
    pack_weights as pack_weights,
    unpack_weights as unpack_weights,
)
