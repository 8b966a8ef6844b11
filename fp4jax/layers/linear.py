"""Flax NNX modules, thin over the pure functions: linears (bf16, NVFP4, block-wise FP8), RMSNorm, SwiGLU MLP.

Weights are [out, in], as checkpoints store them. `dtype` is what a module computes in, `param_dtype` what it stores;
float32 means float32 products on every device (no TF32).
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fp4jax import implementations, nvfp4
from fp4jax.block_fp8 import BlockFP8Weights, block_fp8_matmul, quantize_blocks
from fp4jax.grouped_gemm.gemm import contiguous_grouped_gemm
from fp4jax.grouped_gemm.packed_weights import PackedWeights, packed_if
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.rounding import largest_magnitude


def exact_precision(dtype: Any) -> jax.lax.Precision | None:
    """float32 models multiply in float32 on every device; GPUs would use TF32 otherwise."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def dot(
    x: Float[Array, "... K"], weight: Float[Array, "N K"], *, dtype: Any, out_dtype: Any = None
) -> Float[Array, "... N"]:
    """x W^T with operands rounded to `dtype`, sums in float32, rounded once to `out_dtype` (None: `dtype`)."""
    out_dtype = jnp.dtype(out_dtype or dtype)
    # XLA turns one row into products and a sum, which it keeps in the type it is asked for: then ask for float32.
    one_row = math.prod(x.shape[:-1]) == 1
    y = jnp.einsum(
        "...k,nk->...n",
        x.astype(dtype),
        weight.astype(dtype),
        precision=exact_precision(dtype),
        preferred_element_type=jnp.float32 if one_row else out_dtype,
    )
    return y.astype(out_dtype)


def largest(x: Float[Array, "..."], where: Any = True) -> Float[Array, ""]:
    """Largest magnitude in float32 of the values `where` holds, at least 0; NaN where there is one."""
    return largest_magnitude(jnp.where(where, x, jnp.zeros_like(x)))


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, dtype: Any) -> nnx.Param:
    """A parameter with normal initial values, drawn in float32."""
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * stddev).astype(dtype))


class Linear(nnx.Module):
    """y = x W^T with W [out, in]; products in `dtype`, sums in float32, one rounding at the end."""

    def __init__(
        self, in_features: int, out_features: int, *, dtype: Any, param_dtype: Any, stddev: float, rngs: nnx.Rngs
    ):
        self.dtype = jnp.dtype(dtype)
        self.weight = normal_param(rngs, (out_features, in_features), stddev, param_dtype)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        return dot(x, self.weight[...], dtype=self.dtype)


class NVFP4Linear(nnx.Module):
    """y = (x W^T) with W an NVFP4Tensor [N, K]; `activation_format` "bf16" is W4A16, "nvfp4" is W4A4.

    Codes times block scales are exact in bf16; the global scales are applied to the float32 sums. W4A4 quantizes x with
    `input_scale` where given, else with one scale per token. Where JAX sees a Hopper GPU, weights of a bf16 layer are
    packed for the kernel of the grouped GEMM, as those of one expert, if N and K are multiples of 64.
    """

    def __init__(
        self,
        weight: NVFP4Tensor,
        *,
        dtype: Any,
        activation_format: Literal["nvfp4", "bf16"] = "nvfp4",
        input_scale: Float[Array, ""] | None = None,
    ):
        if activation_format not in ("nvfp4", "bf16"):
            raise ValueError(f"activation_format must be 'nvfp4' or 'bf16', got {activation_format!r}")
        if len(weight.shape) != 2:
            raise ValueError(f"NVFP4Linear takes one weight [N, K], got shape {weight.shape}")
        self.dtype = jnp.dtype(dtype)
        self.activation_format = activation_format
        one_expert = NVFP4Tensor(
            weight.qdata[None], weight.block_scale[None], weight.global_scale.reshape(1, -1, 1)
        )  # fmt: skip
        packed = packed_if(one_expert, implementations.has_hopper_gpu() and self.dtype == jnp.bfloat16)
        self.weight = nnx.Param(packed if isinstance(packed, PackedWeights) else weight)
        self.input_scale = nnx.data(None if input_scale is None else nnx.Param(input_scale))

    @classmethod
    def from_linear(cls, linear: Linear, **kwargs: Any) -> "NVFP4Linear":
        """Quantize a linear's weight (one computed global scale); keyword arguments go to the constructor."""
        return cls(nvfp4.quantize(linear.weight[...]), dtype=linear.dtype, **kwargs)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        weight = self.weight.get_value()
        if isinstance(weight, PackedWeights):
            return self._on_kernel(x, weight)
        scale = weight.global_scale.T  # [], or one for every column of the result
        rows = self._rows(x)
        if isinstance(rows, NVFP4Tensor):
            quantized = rows
            rows = nvfp4.decode_blocks(quantized.qdata, quantized.block_scale, self.dtype)
            scale = quantized.global_scale * scale
        decoded = nvfp4.decode_blocks(weight.qdata, weight.block_scale, self.dtype)
        out = dot(rows, decoded, dtype=self.dtype, out_dtype=jnp.float32)
        return (out * scale).astype(self.dtype).reshape(*x.shape[:-1], -1)

    def _rows(self, x):
        """[T, K], quantized for W4A4."""
        rows = x.reshape(-1, x.shape[-1])
        if self.activation_format == "bf16":
            return rows
        return nvfp4.quantize(rows, global_scale="per_token" if self.input_scale is None else self.input_scale[...])

    def _on_kernel(self, x, weight):
        rows = self._rows(x)
        rows = rows if isinstance(rows, NVFP4Tensor) else rows.astype(self.dtype)
        out = contiguous_grouped_gemm(rows, weight, jnp.full(1, rows.shape[0], jnp.int32), out_dtype=self.dtype)
        return out.reshape(*x.shape[:-1], -1)


class BlockFP8Linear(nnx.Module):
    """y = x W^T with W in FP8 blocks of 128 x 128, and x quantized per token in groups of 128: see `block_fp8`.

    power_of_two_scales: those of x, as checkpoints with `scale_fmt: ue8m0` want them.
    """

    def __init__(self, weight: BlockFP8Weights, *, dtype: Any, power_of_two_scales: bool = False):
        self.dtype = jnp.dtype(dtype)
        self.power_of_two_scales = power_of_two_scales
        self.weight = nnx.Param(weight)

    @classmethod
    def from_linear(cls, linear: Linear, **kwargs: Any) -> "BlockFP8Linear":
        """Quantize a linear's weight; keyword arguments go to the constructor."""
        return cls(quantize_blocks(linear.weight[...]), dtype=linear.dtype, **kwargs)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = block_fp8_matmul(
            rows, self.weight.get_value(), out_dtype=self.dtype, power_of_two_scales=self.power_of_two_scales
        )
        return y.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; float32 inside, one rounding."""

    def __init__(self, features: int, *, eps: float, dtype: Any, param_dtype: Any):
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.weight = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        weight = jnp.broadcast_to(self.weight[...].astype(jnp.float32), x.shape)
        return (x * weight).astype(self.dtype)


class MLP(nnx.Module):
    """down(silu(gate(x)) * up(x)): a dense SwiGLU layer, also used for shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, **linear: Any):
        self.gate_proj = Linear(hidden_size, intermediate_size, **linear)
        self.up_proj = Linear(hidden_size, intermediate_size, **linear)
        self.down_proj = Linear(intermediate_size, hidden_size, **linear)

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        gate = self.gate_proj(x).astype(jnp.float32)
        return self.down_proj(jax.nn.silu(gate) * self.up_proj(x).astype(jnp.float32))
