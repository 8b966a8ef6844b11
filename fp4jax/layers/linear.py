"""Linear layers (bf16, NVFP4 or block-wise FP8 weights) and RMSNorm, as Flax NNX modules.

Weights are [out, in], as checkpoints store them. `dtype` is the dtype that a module computes in, `param_dtype` the one
that it stores its weights in. With dtype float32 all products are exact float32 products, without TF32 on GPUs.
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
from fp4jax.norms import rms_norm
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.rounding import exact_precision, largest_magnitude


def dot(
    x: Float[Array, "... K"], weight: Float[Array, "N K"], *, dtype: Any, out_dtype: Any = None
) -> Float[Array, "... N"]:
    """Compute x W^T for W [N, K].

    The operands are rounded to `dtype`, the sums are float32, and the result is rounded once to `out_dtype` (None:
    `dtype`).
    """
    out_dtype = jnp.dtype(out_dtype or dtype)
    if jnp.dtype(dtype) == jnp.float32 and x.dtype == jnp.bfloat16:
        return _dot_of_bf16(x, weight).astype(out_dtype)
    x, weight = x.astype(dtype), weight.astype(dtype)
    if math.prod(x.shape[:-1]) == 1:  # a product of a matrix and a vector: XLA's reduction reads the matrix faster
        y = jnp.sum(x.reshape(1, -1).astype(jnp.float32) * weight.astype(jnp.float32), axis=-1)
        return y.reshape(*x.shape[:-1], -1).astype(out_dtype)
    precision = exact_precision(dtype)
    return jnp.einsum("...k,nk->...n", x, weight, precision=precision, preferred_element_type=out_dtype)


@jax.custom_jvp
def _dot_of_bf16(x, weight):
    """x W^T in float32 for a bf16 x: exact products and float32 sums, on tensor cores.

    A float32 weight is the sum of three bf16 values of 8 significant bits each.
    """
    parts, rest = [], weight.astype(jnp.float32)
    for _ in range(1 if weight.dtype == jnp.bfloat16 else 3):
        # XLA may leave out a conversion to bf16 and back, but never this rounding.
        parts.append(jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7))
        rest = rest - parts[-1]
    stacked = jnp.concatenate(parts[::-1]).astype(jnp.bfloat16)
    products = jnp.einsum("...k,nk->...n", x, stacked, preferred_element_type=jnp.float32)
    return products.reshape(*x.shape[:-1], len(parts), weight.shape[0]).sum(-2)  # the smallest parts first


@_dot_of_bf16.defjvp
def _dot_of_bf16_jvp(primals, tangents):
    """The derivatives of a plain float32 product: those of the parts would be rounded to bf16."""

    def plain(x, weight):
        precision = exact_precision(jnp.float32)
        return jnp.einsum("...k,nk->...n", x.astype(jnp.float32), weight.astype(jnp.float32), precision=precision)

    return _dot_of_bf16(*primals), jax.jvp(plain, primals, tangents)[1]


def largest(x: Float[Array, "..."], where: Any = True) -> Float[Array, ""]:
    """The largest magnitude of x, f32 (); NaN if there is a NaN.

    Args:
      x: the values.
      where: a boolean mask that broadcasts to x; values where it is False do not count. If none counts, the result is
        0.
    """
    return largest_magnitude(jnp.where(where, x, jnp.zeros_like(x)))


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], stddev: float, dtype: Any) -> nnx.Param:
    """A parameter with normally distributed initial values, which are drawn in float32 and rounded to `dtype`."""
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * stddev).astype(dtype))


class Linear(nnx.Module):
    """y = x W^T with W [out, in]: operands in `dtype`, sums in float32, one rounding at the end."""

    def __init__(
        self, in_features: int, out_features: int, *, dtype: Any, param_dtype: Any, stddev: float, rngs: nnx.Rngs
    ):
        self.dtype = jnp.dtype(dtype)
        self.weight = normal_param(rngs, (out_features, in_features), stddev, param_dtype)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        return dot(x, self.weight[...], dtype=self.dtype)


class NVFP4Linear(nnx.Module):
    """y = x W^T with an NVFP4 weight W [N, K].

    The products use codes times block scales, which are exact in bf16; the global scales multiply the float32 sums.
    Where JAX sees a Hopper GPU and `dtype` is bf16, the weight is packed for the kernel of the grouped GEMM, as a stack
    of one expert, if N and K are multiples of 64. The kernel then computes the layer.

    Args:
      weight: NVFP4Tensor [N, K].
      dtype: the dtype that the layer computes in and returns.
      activation_format: "bf16" leaves x as it is (W4A16); "nvfp4" quantizes x (W4A4).
      input_scale: the global scale of x for "nvfp4", f32 (); None: a scale per token, computed from x.

    Raises:
      ValueError: the format is unknown, or the weight does not have two axes.
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
        """Quantize the weight of a `Linear` with one global scale that is computed from it.

        The other arguments are those of the constructor.
        """
        return cls(nvfp4.quantize(linear.weight[...]), dtype=linear.dtype, **kwargs)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        weight = self.weight.get_value()
        if isinstance(weight, PackedWeights):
            return self._on_kernel(x, weight)
        scale = weight.global_scale.T  # (), or [1, N]: one for every column of the result
        rows = self._rows(x)
        if isinstance(rows, NVFP4Tensor):
            quantized = rows
            rows = nvfp4.decode_blocks(quantized.qdata, quantized.block_scale, self.dtype)
            scale = quantized.global_scale * scale
        decoded = nvfp4.decode_blocks(weight.qdata, weight.block_scale, self.dtype)
        out = dot(rows, decoded, dtype=self.dtype, out_dtype=jnp.float32)
        return (out * scale).astype(self.dtype).reshape(*x.shape[:-1], -1)

    def _rows(self, x):
        """x as rows [T, K], an NVFP4Tensor if the layer quantizes activations."""
        rows = x.reshape(-1, x.shape[-1])
        if self.activation_format == "bf16":
            return rows
        return nvfp4.quantize(rows, global_scale="per_token" if self.input_scale is None else self.input_scale[...])

    def _on_kernel(self, x, weight):
        """The layer computed by the grouped GEMM: all rows belong to its only expert."""
        rows = self._rows(x)
        rows = rows if isinstance(rows, NVFP4Tensor) else rows.astype(self.dtype)
        out = contiguous_grouped_gemm(rows, weight, jnp.full(1, rows.shape[0], jnp.int32), out_dtype=self.dtype)
        return out.reshape(*x.shape[:-1], -1)


class BlockFP8Linear(nnx.Module):
    """y = x W^T with a weight in FP8 blocks; `fp4jax.block_fp8` explains the format.

    The weight has a scale per block of 128 x 128. x is quantized with a scale per token and group of 128 along K.

    Args:
      weight: the quantized weight [N, K].
      dtype: the dtype that x is rounded to before it is quantized, and that of the result.
      power_of_two_scales: whether the scales of x are rounded to powers of two, as checkpoints with `scale_fmt: ue8m0`
        ask for.
    """

    def __init__(self, weight: BlockFP8Weights, *, dtype: Any, power_of_two_scales: bool = False):
        self.dtype = jnp.dtype(dtype)
        self.power_of_two_scales = power_of_two_scales
        self.weight = nnx.Param(weight)

    @classmethod
    def from_linear(cls, linear: Linear, **kwargs: Any) -> "BlockFP8Linear":
        """Quantize the weight of a `Linear`; the other arguments are those of the constructor."""
        return cls(quantize_blocks(linear.weight[...]), dtype=linear.dtype, **kwargs)

    def __call__(self, x: Float[Array, "... K"]) -> Float[Array, "... N"]:
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        y = block_fp8_matmul(
            rows, self.weight.get_value(), out_dtype=self.dtype, power_of_two_scales=self.power_of_two_scales
        )
        return y.reshape(*x.shape[:-1], -1)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32 and rounded once to `dtype`."""

    def __init__(self, features: int, *, eps: float, dtype: Any, param_dtype: Any):
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.weight = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x: Float[Array, "... H"]) -> Float[Array, "... H"]:
        return rms_norm(x, self.weight[...], self.eps).astype(self.dtype)
