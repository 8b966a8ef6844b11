"""Grouped GEMM: the rows of each expert times the weights of that expert.

    out = cast(acc * (x_scale * w.global_scale)),  acc = x @ w^T in f32, without the global scales

Rows come in the masked layout, x [E, M, K] with `masked_m` valid rows per expert, or in the contiguous layout,
x [rows, K] sorted by expert with `group_sizes` rows per expert. Weights [E, N, K] are NVFP4, packed or as checkpoints
store them, or plain bf16 or f32 arrays (the unquantized baseline). code x block_scale is exact in bf16, so a bf16 GEMM
with f32 accumulation and the f32 global scales in the epilogue is the NVFP4 GEMM, up to the order of summation. Rows
that are not valid may hold anything, in x and in the result.

Implementation "xla" decodes one expert at a time and multiplies tiles of 32 rows. "mosaic_gpu" is the Hopper kernel,
which keeps packed weights in 4 bits until they are in registers. If it is named and w is an NVFP4Tensor, it packs w in
every call. None takes the kernel for PackedWeights only.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.grouped_gemm.checks import check_operands
from fp4jax.grouped_gemm.packed_weights import PackedWeights, pack_weights, unpack_weights
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.nvfp4_codes import decode_blocks
from pallas_kernels.gemm import choice as gemm_choice, config as gemm_config, grouped_gemm as masked_gemm, weight_layout

# XLA multiplies tiles of this many rows. Dots of the same shape give a row the same bits. With tiles of one fixed shape
# the bits of a row depend on that row and the weights only, not on M, on other rows or on the number of devices.
_TILE_M = 32

Weights = NVFP4Tensor | PackedWeights | Float[Array, "e n k"]


def masked_grouped_gemm(
    x: Float[Array, "e m k"] | NVFP4Tensor,
    w: Weights,
    masked_m: Int[Array, " e"],
    *,
    x_scale: Float[Array, "..."] | None = None,
    expected_m: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "e m n"]:
    """Multiplies the valid rows of every expert by its weights, in the masked layout.

        out[e, :masked_m[e]] = cast((x[e] @ w[e]^T) * (xs * w.global_scale))

    xs is the global scale of an NVFP4 x, or `x_scale`. All arithmetic is f32, with one rounding at the end.

    Args:
      x: NVFP4Tensor, bf16 or f32 [E, M, K].
      w: NVFP4Tensor, PackedWeights, bf16 or f32 [E, N, K]. Its global scale is [E, 1, 1], or [E, N, 1] where rows
        differ, as those of gate and up do.
      masked_m: i32 or i64 [E], valid rows per expert; values above M count as M.
      x_scale: f32 scale of a plain x, () or of rank 3 with a trailing 1, such as [E, 1, 1] or [E, M, 1]. None: 1.
      expected_m: the usual number of rows per expert, a hint that chooses the kernel's tuning. None: half of M. The
        result does not depend on it.
      out_dtype: dtype of the result; the kernel has bfloat16 only.
      implementation: "xla", "mosaic_gpu", or None for the best one, see the module.

    Returns:
      [E, M, N] in `out_dtype`; rows beyond masked_m[e] may hold anything.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit; the message has the offending values.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    check_operands("masked_grouped_gemm", x, w, masked_m, x_scale, expected_m, ndim=3)
    return run_gemm("masked_grouped_gemm", x, w, masked_m, x_scale, expected_m, out_dtype, implementation)


def contiguous_grouped_gemm(
    x: Float[Array, "rows k"] | NVFP4Tensor,
    w: Weights,
    group_sizes: Int[Array, " e"],
    *,
    x_scale: Float[Array, "..."] | None = None,
    expected_m: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "rows n"]:
    """Multiplies every row by the weights of its expert, in the contiguous layout. See `masked_grouped_gemm`.

    Args:
      x: NVFP4Tensor, bf16 or f32 [rows, K], sorted by expert.
      group_sizes: i32 or i64 [E], rows per expert. Rows at or beyond their sum are pads.
      x_scale: f32 scale of a plain x, () or [rows, 1]. None: 1.
      expected_m: the usual number of rows per expert, a hint. None: rows / E.

    All other arguments are those of `masked_grouped_gemm`.

    Returns:
      [rows, N] in `out_dtype`; pads may hold anything.

    Raises:
      ValueError, TypeError, NotImplementedError: as in `masked_grouped_gemm`.
    """
    check_operands("contiguous_grouped_gemm", x, w, group_sizes, x_scale, expected_m, ndim=2)
    return run_gemm("contiguous_grouped_gemm", x, w, group_sizes, x_scale, expected_m, out_dtype, implementation)


def run_gemm(
    op: str, x: Any, w: Any, counts: Any, x_scale: Any, expected_m: int | None, out_dtype: Any, implementation: Any
) -> jax.Array:
    """Runs a GEMM whose operands are checked already: masked if x has three axes, contiguous if it has two."""
    plan = plan_kernel(x, w, counts, expected_m, implementation)
    problem = plan.problem
    if problem is None and jnp.dtype(out_dtype) != jnp.bfloat16:
        problem = f"out_dtype must be bfloat16, got {jnp.dtype(out_dtype)}"
    return run_implementation(
        op,
        implementation,
        (x, w, counts, x_scale),
        xla=Call.of(gemm_xla, out_dtype=out_dtype),
        mosaic_gpu=Call.of(_gemm_kernel, config=plan.config),
        problem=problem,
    )


def gemm_xla(x, w, counts, x_scale, *, out_dtype):
    """Computes the GEMM in plain JAX: masked if x has three axes, contiguous if it has two."""
    *lead, _ = x.shape
    if len(lead) == 2:
        starts = jnp.arange(lead[0], dtype=jnp.int32) * lead[1]
        sizes = jnp.clip(counts, 0, lead[1]).astype(jnp.int32)
    else:
        ends = jnp.minimum(jnp.cumsum(jnp.clip(counts, 0, lead[0]).astype(jnp.int32)), lead[0])
        starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
        sizes = ends - starts
    rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), _operand(x))
    out = _multiply_rows(rows, _row_scale(x, x_scale, lead), w, starts, sizes, out_dtype)
    return out.reshape(*lead, out.shape[-1])


class KernelPlan(NamedTuple):
    """How the kernel would run one call.

    Attributes:
      config: its tuned configuration; None if a problem was found before one was chosen.
      problem: why the kernel cannot run the call, or None if it can.
    """

    config: gemm_config.TuningConfig | None
    problem: str | None


def plan_kernel(
    x: Any, w: Any, counts: Any, expected_m: int | None, implementation: Implementation | None, **fused: Any
) -> KernelPlan:
    """Plans one call of the kernel on these operands, which are arrays or structs.

    Args:
      fused: the options of the SwiGLU epilogue (`out` and `act_scale`); none for a plain GEMM.

    The other arguments are those of `masked_grouped_gemm`; counts are masked_m or group_sizes.
    """
    if not isinstance(w, NVFP4Tensor | PackedWeights):
        return KernelPlan(None, f"w must be NVFP4, got {w.dtype}")
    if problem := weight_layout.check_shape(w.shape):
        return KernelPlan(None, problem)
    if implementation is None and not isinstance(w, PackedWeights):
        return KernelPlan(None, "w is not packed, and packing it in every call takes longer than it saves")
    config = kernel_config(x, w, expected_m, fused=bool(fused))
    words = jax.ShapeDtypeStruct(weight_layout.packed_shape(w.shape), jnp.uint32)
    x_bf16 = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if isinstance(x, NVFP4Tensor) else x.dtype)
    return KernelPlan(
        config, masked_gemm.check_config(x_bf16, words, w.global_scale[..., 0], counts, config=config, **fused)
    )


def kernel_operands(x, w, x_scale):
    """Returns the operands of the kernel: x as bf16, the words of w, w_scale [E, 1 or N], x_scale [E] or [rows, 1]."""
    packed = w if isinstance(w, PackedWeights) else pack_weights(w)
    if isinstance(x, NVFP4Tensor):
        x, x_scale = decode_blocks(x.qdata, x.block_scale), x.global_scale
    experts, *lead = packed.shape[0], *x.shape[:-1]
    scale = jnp.ones((), jnp.float32) if x_scale is None else jnp.asarray(x_scale, jnp.float32)
    if scale.size == 1:
        scale = jnp.broadcast_to(scale.reshape(1), (experts,))
    elif x.ndim == 3 and scale.shape == (experts, 1, 1):
        scale = scale.reshape(experts)
    else:
        scale = jnp.broadcast_to(scale, (*lead, 1)).reshape(-1, 1)
    return x, packed.words, packed.global_scale[..., 0], scale


def kernel_config(x: Any, w: Any, expected_m: int | None, *, fused: bool = False) -> gemm_config.TuningConfig:
    """Returns the tuned configuration. Without the hint `expected_m`, it expects masked x to be half full."""
    experts, n, k = w.shape
    rows = x.shape[-2] / 2 if len(x.shape) == 3 else x.shape[0] / experts
    return gemm_choice.choose(k, n, experts, rows if expected_m is None else expected_m, fused=fused)


def _gemm_kernel(x, w, counts, x_scale, *, config):
    x, words, w_scale, x_scale = kernel_operands(x, w, x_scale)
    return masked_gemm.grouped_gemm(x, words, w_scale, counts, x_scale, config=config)[0]


def _multiply_rows(rows, scale, w, starts, sizes, out_dtype):
    """Multiplies the rows of every expert by its weights, in tiles of 32 rows -> [rows, N].

    A tile may reach beyond the rows of its expert. What it writes there is a pad, or a row of a later expert, which
    overwrites it because experts are served in the order of their rows.

    Args:
      rows: a tuple of arrays [rows, n]: (x,), or codes and block scales.
      scale: f32 [rows, 1].
      w: weights [E, N, K].
      starts: i32 [E], the first row of each expert, ascending.
      sizes: i32 [E], the number of rows of each expert.
      out_dtype: dtype of the result.
    """
    num_experts, n, _ = w.shape
    num_rows = scale.shape[0]
    dtype = rows[0].dtype if len(rows) == 1 else jnp.bfloat16
    # One tile of rows is added, so that no slice reaches beyond the end and is clamped.
    rows, scale = jax.tree.map(lambda a: jnp.pad(a, ((0, _TILE_M), (0, 0))), (rows, scale))
    out = _varying_like(jnp.zeros((num_rows + _TILE_M, n), out_dtype), (rows, scale, w, starts, sizes))

    def expert(e, out):
        def run(out):
            weights, weight_scale = _decode_expert(w, e, dtype)

            def tile(t, out):
                start = starts[e] + t * _TILE_M
                x_tile, scale_tile = (
                    jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, start, _TILE_M), leaf) for leaf in (rows, scale)
                )
                acc = lax.dot_general(
                    _decode_operand(x_tile, dtype),
                    weights,
                    (((1,), (1,)), ((), ())),
                    precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
                    preferred_element_type=jnp.float32,
                )
                y = (acc * (scale_tile * weight_scale)).astype(out_dtype)
                return lax.dynamic_update_slice_in_dim(out, y, start, axis=0)

            return lax.fori_loop(0, -(-sizes[e] // _TILE_M), tile, out)

        return lax.cond(sizes[e] > 0, run, lambda out: out, out)

    return lax.fori_loop(0, num_experts, expert, out)[:num_rows]


def _decode_expert(w, e, dtype):
    """Returns the decoded weights [N, K] of expert e without global scale, and that scale, f32 [1, 1] or [1, N]."""
    one = jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, e, keepdims=False), w)
    if isinstance(one, PackedWeights):
        one = unpack_weights(one)
    if not isinstance(one, NVFP4Tensor):
        return one.astype(dtype), jnp.ones((1, 1), jnp.float32)
    return decode_blocks(one.qdata, one.block_scale, dtype), one.global_scale.T


def _operand(x):
    return (x.qdata, x.block_scale) if isinstance(x, NVFP4Tensor) else (x,)


def _decode_operand(rows, dtype):
    return rows[0] if len(rows) == 1 else decode_blocks(rows[0], rows[1], dtype)


def _row_scale(x, x_scale, lead):
    """Returns the scale of every row, f32 [rows, 1]."""
    scale = x.global_scale if isinstance(x, NVFP4Tensor) else x_scale
    scale = jnp.ones((), jnp.float32) if scale is None else jnp.asarray(scale, jnp.float32)
    return jnp.broadcast_to(scale, (*lead, 1)).reshape(-1, 1)


def _varying_like(value, tree):
    """Makes `value` vary over the same shard_map axes as the leaves of `tree`, by adding sums of empty slices of them.

    A loop needs this: its carry must vary over the same axes at the start as after a step.
    """
    return value + sum(jnp.sum(leaf[:0].astype(value.dtype)) for leaf in jax.tree.leaves(tree))
