"""Block-wise FP8: e4m3 weights in blocks of 128 x 128, e4m3 activations in groups of 128 per token, and their matmul.

    y[t, n] = sum over blocks g of K:  (x8[t, g] . w8[n, g]) * (x_scale[t, g] * w_scale[n // 128, g])

A scale is amax / 448 in f32 and decodes by multiplication; checkpoints in DeepSeek's layout store the scales of weights
as `weight_scale_inv`. Scales of activations may be rounded up to powers of two. The products of e4m3 values are exact.
They are summed in f32 within a block, and the blocks are added in f32 in the order of K.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.operands import check_array, check_type, summary
from fp4jax.rounding import div_rn, largest_magnitude, round_to_e4m3
from pallas_kernels.fp8 import config as fp8_config, gemm as fp8_gemm, quantize as quantize_fp8
from pallas_kernels.simt.formats import E4M3_MAX, FP8_BLOCK as BLOCK


@functools.partial(jax.tree_util.register_dataclass, data_fields=["qdata", "block_scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class BlockFP8Weights:
    """A weight [N, K] in block-wise FP8, a pytree of two arrays.

    Under tree operations the leaves may also be PartitionSpec, ShapeDtypeStruct or None, so the constructor checks
    nothing; `validate()` does.

    Attributes:
      qdata: e4m3 [N, K].
      block_scale: f32 [ceil(N / 128), ceil(K / 128)], decode direction (multiply).
    """

    qdata: Any
    block_scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [N, K] of the values."""
        return self.qdata.shape

    def __repr__(self) -> str:
        return summary(self, f"e4m3 in blocks of {BLOCK} x {BLOCK}")

    def validate(self) -> "BlockFP8Weights":
        """Returns the weight itself if its leaves fit together.

        Raises:
          TypeError, ValueError: a dtype or shape does not fit; the message names the leaf.
        """
        for name, dtype in (("qdata", jnp.float8_e4m3fn), ("block_scale", jnp.float32)):
            found = getattr(getattr(self, name), "dtype", None)
            if found != dtype:
                raise TypeError(f"BlockFP8Weights.{name} must be {jnp.dtype(dtype)}, got {found}")
        if self.qdata.ndim != 2 or self.block_scale.shape != scale_shape(self.shape):
            raise ValueError(
                f"BlockFP8Weights: qdata {self.shape} needs block_scale {scale_shape(self.shape)}, "
                f"got {self.block_scale.shape}"
            )
        return self


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns how many blocks of 128 x 128 cover a weight [N, K] along N and along K."""
    n, k = shape[-2:]
    return -(-n // BLOCK), -(-k // BLOCK)


def quantize_blocks(w: Float[Array, "n k"]) -> BlockFP8Weights:
    """Quantizes a weight to block-wise FP8, to nearest even.

    The scale of a block is its amax / 448, or 1 for a block of zeros. A block with a NaN or Inf decodes to NaN
    everywhere.

    Args:
      w: floating-point [N, K]; N and K need not be multiples of 128.

    Raises:
      TypeError, ValueError: w is not a floating-point array, or not [N, K].
    """
    check_array("quantize_blocks: w", w, jnp.floating)
    if w.ndim != 2:
        raise ValueError(f"quantize_blocks: w must be [N, K], got {w.shape}")
    blocks = _blocks(w.astype(jnp.float32))
    amax = largest_magnitude(blocks, axis=(1, 3))
    scale = jnp.where(amax < E4M3_MAX * 2.0**-126, np.float32(1), div_rn(amax, np.float32(E4M3_MAX)))
    values = round_to_e4m3(div_rn(blocks, scale[:, None, :, None]))
    (rows, columns), (n, k) = scale.shape, w.shape
    return BlockFP8Weights(values.reshape(rows * BLOCK, columns * BLOCK)[:n, :k], scale)


def dequantize_blocks(w: BlockFP8Weights, dtype: Any = jnp.bfloat16) -> Float[Array, "n k"]:
    """Returns qdata x block_scale [N, K], rounded once to `dtype`."""
    check_type("dequantize_blocks: w", w, BlockFP8Weights, "`quantize_blocks` makes one of an array")
    n, k = w.shape
    wide = jnp.repeat(jnp.repeat(w.block_scale, BLOCK, axis=0)[:n], BLOCK, axis=1)[:, :k]
    return (w.qdata.astype(jnp.float32) * wide).astype(dtype)


def block_fp8_matmul(
    x: Float[Array, "t k"],
    w: BlockFP8Weights,
    *,
    out_dtype: Any = jnp.bfloat16,
    power_of_two_scales: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "t n"]:
    """Quantizes x to FP8 per token and group of 128, and returns x @ w^T [T, N], rounded once to `out_dtype`.

    Args:
      x: floating-point [T, K].
      w: weights [N, K].
      out_dtype: dtype of the result.
      power_of_two_scales: round the scales of x up to powers of two, 2^ceil(log2(amax / 448)), which checkpoints call
        `scale_fmt: ue8m0`. The scales of w are used as they are.
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`).

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    check_array("block_fp8_matmul: x", x, jnp.floating)
    check_type("block_fp8_matmul: w", w, BlockFP8Weights, "`quantize_blocks` makes one of an array")
    w.validate()
    if x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"block_fp8_matmul: x {x.shape} does not fit w {w.shape}; [T, K] and [N, K]")
    problem = quantize_fp8.check_config(x) or fp8_config.shape_problem(x.shape[0], w.shape[0], w.shape[1], out_dtype)
    options = dict(out_dtype=out_dtype, power_of_two_scales=power_of_two_scales)
    return run_implementation(
        "block_fp8_matmul", implementation, (x, w), problem=problem,
        xla=Call.of(_matmul_xla, **options), mosaic_gpu=Call.of(_matmul_kernel, **options),
    )  # fmt: skip


def _matmul_kernel(x, w, *, out_dtype, power_of_two_scales):
    values, scales = quantize_fp8.quantize(x, power_of_two_scales=power_of_two_scales)
    return fp8_gemm.gemm(values, w.qdata, scales, w.block_scale, out_dtype=out_dtype)


def _matmul_xla(x, w, *, out_dtype, power_of_two_scales):
    """Computes one dot per block of K. The operands are bf16, in which e4m3 values are exact."""
    x, x_scale = to_fp8(x, power_of_two_scales=power_of_two_scales)
    tokens, n = x.shape[0], w.shape[0]
    groups = x_scale.shape[1]

    def grouped(a):
        padded = jnp.pad(a.astype(jnp.bfloat16), ((0, 0), (0, groups * BLOCK - a.shape[1])))
        return jnp.moveaxis(padded.reshape(a.shape[0], groups, BLOCK), 1, 0)

    def add(total, group):
        x, w, x_scale, w_scale = group
        product = lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return total + product * (x_scale[:, None] * jnp.repeat(w_scale, BLOCK)[None, :n]), None

    per_group = grouped(x), grouped(w.qdata), x_scale.T, w.block_scale.T
    total = jnp.zeros((tokens, n), jnp.float32)
    return lax.scan(add, total, per_group)[0].astype(out_dtype)


def _blocks(w):
    """Cuts [N, K] into blocks [ceil(N / 128), 128, ceil(K / 128), 128]; zeros fill up the last blocks."""
    rows, columns = scale_shape(w.shape)
    padded = jnp.pad(w, ((0, rows * BLOCK - w.shape[0]), (0, columns * BLOCK - w.shape[1])))
    return padded.reshape(rows, BLOCK, columns, BLOCK)


def from_fp8(x: Float[Array, "rows h"], scales: Float[Array, "rows groups"]) -> Float[Array, "rows h"]:
    """Decodes rows in the fp8 wire format to bf16: e4m3 value x f32 scale of its group of 128, rounded once.

    Args:
      x: e4m3 [rows, H].
      scales: f32 [rows, ceil(H/128)], as `to_fp8` returns them.
    """
    wide = jnp.repeat(scales, BLOCK, axis=-1)[:, : x.shape[-1]]
    # Without the barrier XLA:GPU leaves out the rounding to bf16 where f32 arithmetic follows in the same program.
    return lax.optimization_barrier((x.astype(jnp.float32) * wide).astype(jnp.bfloat16))


def to_fp8(
    x: Float[Array, "t h"], *, power_of_two_scales: bool = False
) -> tuple[Float[Array, "t h"], Float[Array, "t groups"]]:
    """Quantizes rows to FP8 with one scale per group of 128 values: amax of the group / 448, or 1 for a group of zeros.

    A group with a NaN or Inf decodes to NaN everywhere.

    Args:
      x: floating-point [T, H].
      power_of_two_scales: round scales up to powers of two, 2^ceil(log2(amax / 448)), which checkpoints call
        `scale_fmt: ue8m0`.

    Returns:
      The values, e4m3 [T, H], and their scales, f32 [T, ceil(H/128)], which decode by multiplication.
    """
    tokens, hidden = x.shape
    groups = -(-hidden // BLOCK)
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, groups * BLOCK - hidden))).reshape(tokens, groups, BLOCK)
    amax = largest_magnitude(wide, axis=-1)
    # For amax below 448 * 2^-126, amax / 448 would be subnormal, and CPUs flush it to zero. With scale 1 the values of
    # such a group round to zero.
    scales = jnp.where(amax < E4M3_MAX * 2.0**-126, np.float32(1), div_rn(amax, np.float32(E4M3_MAX)))
    if power_of_two_scales:
        scales = quantize_fp8.power_of_two(scales)
    values = round_to_e4m3(div_rn(wide, scales[..., None]))
    return values.reshape(tokens, groups * BLOCK)[:, :hidden], scales
