"""Grouped GEMM: each expert's rows times that expert's weights, out = cast(acc * (x_scale * w.global_scale)).

Masked layout x [E, M, K] with `masked_m` valid rows per expert, or contiguous x [rows, K] sorted by expert with
`group_sizes`. Weights [E, N, K] in NVFP4, as checkpoints have them or packed, or plain bf16 / f32 arrays (the
unquantized baseline). code x block_scale is exact in bf16, so bf16 operands with f32 accumulation and the f32 global
scales in the epilogue are the NVFP4 GEMM, up to the order of summation. Rows that are not valid may hold anything, in x
as in the result.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.implementations import resolve_implementation
from fp4jax.nvfp4 import NVFP4Tensor, check_scale_shape, decode_blocks
from fp4jax.packed_weights import PackedWeights, pack_weights, unpack_weights

__all__ = [
    "PackedWeights",
    "contiguous_grouped_gemm",
    "masked_grouped_gemm",
    "pack_weights",
    "unpack_weights",
]

# Rows are multiplied in tiles of one fixed shape: a library dot gives a row the same bits whenever its shape is the
# same, so a row's bits depend on that row and the weights, not on M, on its neighbours or on the number of devices.
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
    implementation: str | None = None,
) -> Float[Array, "e m n"]:
    """out[e, :masked_m[e]] = cast((x[e] @ w[e]^T) * (xs * w.global_scale)) in f32, one rounding at the end.

    Args:
      x: bf16 or f32 [E, M, K], or NVFP4Tensor (then xs = x.global_scale).
      w: NVFP4Tensor, PackedWeights or bf16 / f32 array, [E, N, K]; global_scale [E, 1, 1] or [E, N, 1] (gate and up
        rows may differ).
      masked_m: valid rows per expert; values above M count as M.
      x_scale: f32 scale of a plain x: (), or rank 3 with trailing 1, e.g. [E, 1, 1] or [E, M, 1]; None = 1.
      expected_m: a hint for kernels that tune by the usual rows per expert; results do not depend on it.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, with the offending values.
    """
    resolve_implementation("masked_grouped_gemm", implementation)
    num_experts, capacity = _check_args("masked_grouped_gemm", x, w, masked_m, x_scale, expected_m, ndim=3)
    starts = jnp.arange(num_experts, dtype=jnp.int32) * capacity
    sizes = jnp.clip(masked_m, 0, capacity)
    rows = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), _operand(x))
    scale = _row_scale(x, x_scale, (num_experts, capacity))
    out = _multiply_rows(rows, scale, w, starts, sizes, out_dtype)
    return out.reshape(num_experts, capacity, out.shape[-1])


def contiguous_grouped_gemm(
    x: Float[Array, "rows k"] | NVFP4Tensor,
    w: Weights,
    group_sizes: Int[Array, " e"],
    *,
    x_scale: Float[Array, "..."] | None = None,
    expected_m: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> Float[Array, "rows n"]:
    """The same for rows [rows, K] sorted by expert; rows beyond sum(group_sizes) are pads.

    x_scale: () or rank 2 with trailing 1, [rows, 1]. Other arguments and errors as in `masked_grouped_gemm`.
    """
    resolve_implementation("contiguous_grouped_gemm", implementation)
    (num_rows,) = _check_args("contiguous_grouped_gemm", x, w, group_sizes, x_scale, expected_m, ndim=2)
    ends = jnp.minimum(jnp.cumsum(jnp.maximum(group_sizes, 0)), num_rows)
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    scale = _row_scale(x, x_scale, (num_rows,))
    return _multiply_rows(_operand(x), scale, w, starts, ends - starts, out_dtype)


def _multiply_rows(rows, scale, w, starts, sizes, out_dtype):
    """rows (pytree of [R, ..]) of expert e at starts[e] .. + sizes[e] -> [R, N]; starts ascend.

    A tile may reach beyond its expert: what it writes there belongs to a later expert, which overwrites it, or to a
    pad.
    """
    num_experts, n, _ = w.shape
    num_rows = scale.shape[0]
    dtype = rows[0].dtype if len(rows) == 1 else jnp.bfloat16
    # One more tile of rows, so that no slice is clamped.
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
    """-> weights [N, K] of expert e, the only ones decoded at a time, and their f32 scale [1, 1] or [1, N]."""
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
    """f32 [rows, 1]."""
    scale = x.global_scale if isinstance(x, NVFP4Tensor) else x_scale
    scale = jnp.ones((), jnp.float32) if scale is None else jnp.asarray(scale, jnp.float32)
    return jnp.broadcast_to(scale, (*lead, 1)).reshape(-1, 1)


def _varying_like(value, tree):
    """Adds empty sums of all leaves: under shard_map, `value` then varies over the axes its loop carry varies over."""
    return value + sum(jnp.sum(leaf[:0].astype(value.dtype)) for leaf in jax.tree.leaves(tree))


def _check_args(op, x, w, sizes, x_scale, expected_m, ndim):
    for name, t in (("x", x), ("w", w)):
        if isinstance(t, NVFP4Tensor | PackedWeights):
            t.validate()
        elif t.dtype not in (jnp.bfloat16, jnp.float32):
            raise TypeError(f"{op}: {name} must be an NVFP4Tensor, bfloat16 or float32, got {t.dtype}")
    if len(x.shape) != ndim or len(w.shape) != 3 or x.shape[-1] != w.shape[-1] or sizes.shape != w.shape[:1]:
        raise ValueError(f"{op}: shapes do not fit: x {x.shape}, w {w.shape} (must be [E, N, K]), counts {sizes.shape}")
    if ndim == 3 and x.shape[0] != w.shape[0]:
        raise ValueError(f"{op}: x has {x.shape[0]} experts and w has {w.shape[0]}: x {x.shape}, w {w.shape}")
    if isinstance(w, NVFP4Tensor) and (w.global_scale.ndim != 3 or w.global_scale.shape[0] != w.shape[0]):
        raise ValueError(f"{op}: w.global_scale must be [E, 1, 1] or [E, N, 1], got {w.global_scale.shape}")
    if isinstance(x, NVFP4Tensor) and x_scale is not None:
        raise ValueError(f"{op}: x_scale is for a plain x; an NVFP4Tensor carries its own global_scale")
    if x_scale is not None:
        check_scale_shape(f"{op}: x_scale", jnp.shape(x_scale), x.shape)
    if expected_m is not None and expected_m < 0:
        raise ValueError(f"{op}: expected_m must not be negative, got {expected_m}")
    return x.shape[:-1]
