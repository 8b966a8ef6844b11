"""Sums the expert rows of each token, by the row maps of route_metadata.py: the way back of permute.py.

    out[t] = sum_j weight[t, j] * y[row_map[t, j]] (+ residual[t])

A lane adds up 16 bytes of a token. Device memory bounds the time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rows.nvfp4_codec import unpack_bf16
from pallas_kernels.rows.permute import load_routes, row_access
from pallas_kernels.rows.route_metadata import MAX_TOP_K
from pallas_kernels.simt import lane_math, lanes, launch
from pallas_kernels.simt.lane_math import as_u32, unsigned_div


def check_depermute(y: Any, row_map: Any) -> str | None:
    """None if `depermute_combine` accepts these operands, else what does not fit."""
    if y.dtype not in (jnp.bfloat16, jnp.float32) or y.ndim != 2 or 0 in y.shape:
        return f"y must be bfloat16 or float32 [rows, H], not empty, got {y.dtype} {y.shape}"
    if y.dtype == jnp.bfloat16 and y.shape[1] % 2:
        return f"a bfloat16 y needs an even H, got {y.shape}"
    if max(y.shape[0], row_map.shape[0]) * row_access(y.shape[1] * y.dtype.itemsize).items >= lanes.MAX_INDEX:
        return f"y {y.shape} with row_map {row_map.shape} exceeds the kernel's 32-bit indices"
    if row_map.size == 0 or row_map.shape[1] > MAX_TOP_K:
        return f"row_map must be [T, k], not empty, k at most {MAX_TOP_K}, got {row_map.shape}"
    return None


def depermute_combine(
    y: jax.Array,
    row_map: jax.Array,
    topk_weights: jax.Array,
    residual: jax.Array | None = None,
    *,
    interpret: Any = None,
) -> jax.Array:
    """Sums up each token's rows: out[t] = sum over j of y[row_map[t, j]] * topk_weights[t, j], [T, H] of y's dtype.

    The sum runs over the j with row_map[t, j] >= 0, in order, and residual[t] is added last. Each product and each sum
    is rounded to f32, and the result is rounded once to y's dtype.

    Args:
      y: bf16 or f32 [rows, H].
      row_map: i32 [T, k].
      topk_weights: f32 [T, k].
      residual: [T, H] of y's dtype; None adds nothing.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_depermute`.
    """
    if problem := check_depermute(y, row_map):
        raise NotImplementedError(f"depermute_combine kernel: {problem}")
    tokens, _ = row_map.shape
    cut = row_access(y.shape[1] * y.dtype.itemsize)

    def body(map_ref, weight_ref, y_ref, *refs):
        *residual_ref, out_ref = refs

        def load(row, column, where):  # a row number beyond the last row reads the last row, as XLA's gather does
            return lanes.gather(y_ref, jnp.minimum(row, y.shape[0] - 1) * cut.items + column, cut.count, where=where)

        item = lanes.block_index() * lanes.LANES + lanes.lane_index()
        token = unsigned_div(item, cut.items)
        valid = token < tokens
        # The load of the residual is issued first: it does not wait for the row map, as those of y do.
        added = [lanes.gather(ref, item, cut.count, where=valid) for ref in residual_ref]
        words = sum_of_routes(token, item - token * cut.items, valid, load, map_ref, weight_ref, y.dtype, *added)
        lanes.scatter(out_ref, item, words, where=valid)

    grid = -(-tokens * cut.items // lanes.LANES)
    out = jax.ShapeDtypeStruct((tokens, y.shape[1]), y.dtype)
    operands = [row_map.astype(jnp.int32), topk_weights.astype(jnp.float32), y]
    if residual is not None:
        operands.append(residual)
    return launch.kernel(body, out, grid=grid, interpret=interpret)(*operands)


def sum_of_routes(
    token: jax.Array,
    column: jax.Array,
    valid: jax.Array,
    load: Callable[..., Any],
    map_ref: Any,
    weight_ref: Any,
    dtype: Any,
    residual: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """The sum of `depermute_combine` for one access of up to 16 bytes per lane, as u32 words.

    Args:
      token: i32 lane array, row of the result.
      column: i32 lane array, index of the access in the row.
      valid: lanes where it is False read nothing.
      load: load(row, column, where) returns the words of y at that access of that row; all three are lane arrays.
      map_ref: the row map, [T, k].
      weight_ref: the weights, f32 [T, k].
      dtype: of y and of the result, bf16 or f32.
      residual: the words of this access of the residual; empty adds nothing.
    """
    k = map_ref.shape[1]
    routes = load_routes(map_ref, token, k, valid)
    weights = [lax.bitcast_convert_type(w, jnp.float32) for w in lanes.gather(weight_ref, token, k, where=valid)]
    loaded = [load(row, column, valid & (row >= 0)) for row in routes]
    is_bf16 = dtype == jnp.bfloat16

    def values_of(words):
        return unpack_bf16(words) if is_bf16 else [lax.bitcast_convert_type(w, jnp.float32) for w in words]

    totals = [lanes.splat(0, jnp.float32)] * (len(loaded[0]) * (2 if is_bf16 else 1))
    for row, weight, words in zip(routes, weights, loaded, strict=True):
        products = [lane_math.mul_rn(v, weight) for v in values_of(words)]
        added = [lane_math.add_rn(t, p) for t, p in zip(totals, products, strict=True)]
        totals = [jnp.where(row >= 0, a, t) for a, t in zip(added, totals, strict=True)]
    if residual:
        totals = [lane_math.add_rn(t, v) for t, v in zip(totals, values_of(residual), strict=True)]
    if is_bf16:
        return [lane_math.pack_bf16(low, high) for low, high in zip(totals[::2], totals[1::2], strict=True)]
    return [as_u32(t) for t in totals]
