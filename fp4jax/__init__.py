"""Mixture-of-Experts layers in NVFP4 (4-bit) for JAX: the public functions and types of the library."""

__version__ = "0.1.0"

from fp4jax.expert_parallel import (
    Dispatched as Dispatched,
    ReceiveBuffers as ReceiveBuffers,
    WireBytes as WireBytes,
    combine as combine,
    dispatch as dispatch,
    wire_bytes as wire_bytes,
)
from fp4jax.experts import MoEWeights as MoEWeights, prepare_experts as prepare_experts
from fp4jax.grouped_gemm import (
    PackedWeights as PackedWeights,
    contiguous_grouped_gemm as contiguous_grouped_gemm,
    grouped_gemm_swiglu as grouped_gemm_swiglu,
    masked_grouped_gemm as masked_grouped_gemm,
    pack_weights as pack_weights,
    unpack_weights as unpack_weights,
)
from fp4jax.moe import MoEStats as MoEStats, moe_layer as moe_layer
from fp4jax.moe_config import MoEConfig as MoEConfig
from fp4jax.nvfp4 import (
    NVFP4Tensor as NVFP4Tensor,
    QuantStats as QuantStats,
    dequantize as dequantize,
    quantize as quantize,
)
from fp4jax.permute import (
    Permuted as Permuted,
    PermutedContiguous as PermutedContiguous,
    depermute_combine as depermute_combine,
    permute_to_contiguous as permute_to_contiguous,
    permute_to_masked as permute_to_masked,
)
from fp4jax.routing import Routing as Routing, route as route
from fp4jax.sharded_moe import sharded_moe_layer as sharded_moe_layer
from fp4jax.swiglu import swiglu_quantize as swiglu_quantize
