"""Permute token rows to an expert-major layout and back, within one device.

The rows of an expert are in token order, then slot order. A route (token, slot) whose id is -1 has no expert on this
device and is skipped. A route whose id is out of range, or whose expert is full, is dropped and counted. Both get -1 in
`row_map`. Rows that no route fills may hold anything. Only the scale pads of the swizzled layout are zero, because
hardware reads them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array, Float, Int, Shaped

from fp4jax import scale_layout as scale_layouts
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.nvfp4 import BLOCK_SIZE, NVFP4Tensor
from fp4jax.operands import check_array, check_routes, check_unsharded
from fp4jax.permuted_rows import Rows, Target, permute_rows
from pallas_kernels.rows import depermute as kernels


class Permuted(NamedTuple):
    """Rows in the masked layout: the valid rows of expert e are x[e, :masked_m[e]].

    Attributes:
      x: an NVFP4Tensor [E, M, H] with global scale () or [E, M, 1] if x was one and decode=False, else an array
        [E, M, Hx].
      scales: the block scales of an array x, [E, M, S], [E, S, M] or swizzled; None if x had none, was decoded, or is
        an NVFP4Tensor.
      row_scale: f32 [E, M, 1], the moved `row_scale`; the global scale, () or [E, M, 1], of an NVFP4Tensor that was
        decoded; else None.
      masked_m: i32 [E], the number of valid rows per expert.
      row_map: i32 [T, k], e * M + row of each route, or -1.
      dropped: i32 (), the number of routes with a bad id or beyond the capacity.
    """

    x: Shaped[Array, "e m hx"] | NVFP4Tensor
    scales: Shaped[Array, "..."] | None
    row_scale: Float[Array, "..."] | None
    masked_m: Int[Array, " e"]
    row_map: Int[Array, "t k"]
    dropped: Int[Array, ""]


class PermutedContiguous(NamedTuple):
    """Rows in the contiguous layout: sorted by expert; rows at or beyond sum(group_sizes) are pads.

    Attributes:
      x: an NVFP4Tensor [rows, H] with global scale () or [rows, 1] if x was one and decode=False, else an array
        [rows, Hx].
      scales: the block scales of an array x, [rows, S], [S, rows] or swizzled; None as in `Permuted`.
      row_scale: f32 [rows, 1], the moved `row_scale`; the global scale, () or [rows, 1], of an NVFP4Tensor that was
        decoded; else None.
      group_sizes: i32 [E], the number of valid rows per expert.
      row_map: i32 [T, k], the row of each route, or -1.
      dropped: i32 (), the number of routes with a bad id or beyond `num_rows`.
    """

    x: Shaped[Array, "rows hx"] | NVFP4Tensor
    scales: Shaped[Array, "..."] | None
    row_scale: Float[Array, "..."] | None
    group_sizes: Int[Array, " e"]
    row_map: Int[Array, "t k"]
    dropped: Int[Array, ""]


def permute_to_masked(
    x: Shaped[Array, "t hx"] | NVFP4Tensor,
    scales: Shaped[Array, "t s"] | None,
    topk_ids: Int[Array, "t k"],
    *,
    row_scale: Float[Array, "t 1"] | None = None,
    num_experts: int,
    capacity: int,
    scale_layout: scale_layouts.ScaleLayout = "linear",
    decode: bool = False,
    checked: bool = False,
    implementation: Implementation | None = None,
) -> Permuted:
    """Copies the row of every route, with its scales, to its expert in the masked layout [E, M, ...].

    Args:
      x: an NVFP4Tensor [T, H] with global scale () or [T, 1]; or an array [T, Hx] of any dtype, such as bf16 or e4m3
        [T, H] or NVFP4 codes u8 [T, H/2].
      scales: the block scales [T, S] of an array x; None if x has none or is an NVFP4Tensor.
      topk_ids: i32 or i64 [T, k], the expert of each route, 0 <= id < num_experts; -1 = not here. Any k >= 1.
      row_scale: f32 [T, 1], a scale per row of an array x, which is copied with the row. An NVFP4Tensor carries its
        own.
      num_experts: the number of experts on this device (E).
      capacity: rows per expert (M).
      scale_layout: the layout of the returned `scales`: "linear", "m_major" or "swizzled" (one-byte scales only). The
        scales of an NVFP4Tensor stay linear.
      decode: return NVFP4 rows as bf16 code x block_scale, which is exact, and the global scale of an NVFP4Tensor as
        `row_scale`.
      checked: use `checkify.check` to assert that no id is out of range and no expert overflows.
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`).

    Raises:
      ValueError, TypeError: shapes, dtypes or options do not fit.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    _check_args("permute_to_masked", x, scales, topk_ids, row_scale, num_experts, scale_layout, decode)
    parts = _parts(x, scales, row_scale)
    if capacity < 1:
        raise ValueError(f"permute_to_masked: capacity must be at least 1, got {capacity}")
    target = Target(num_experts, capacity, num_experts * capacity, scale_layout, decode)
    rows, filled, dropped, row_map = permute_rows("permute_to_masked", implementation, parts, topk_ids, target)
    rows = _whole(rows, x, decode)
    if checked:
        checkify.check(dropped == 0, "permute_to_masked: {n} routes have a bad id or exceed the capacity", n=dropped)
    return Permuted(rows.x, rows.scales, rows.row_scale, filled, row_map, dropped)


def permute_to_contiguous(
    x: Shaped[Array, "t hx"] | NVFP4Tensor,
    scales: Shaped[Array, "t s"] | None,
    topk_ids: Int[Array, "t k"],
    *,
    row_scale: Float[Array, "t 1"] | None = None,
    num_experts: int,
    num_rows: int | None = None,
    scale_layout: scale_layouts.ScaleLayout = "linear",
    decode: bool = False,
    checked: bool = False,
    implementation: Implementation | None = None,
) -> PermutedContiguous:
    """Copies the row of every route, with its scales, to the contiguous layout [rows, ...], sorted by expert.

    Experts have no capacity of their own.

    Args:
      num_rows: rows of the result. None: T * k, which every batch fits into. Where there are fewer rows than routes,
        the routes that come last in the order of experts are dropped and counted.

    All other arguments, and the errors, are those of `permute_to_masked`.
    """
    _check_args("permute_to_contiguous", x, scales, topk_ids, row_scale, num_experts, scale_layout, decode)
    parts = _parts(x, scales, row_scale)
    num_rows = topk_ids.size if num_rows is None else num_rows
    if num_rows < 0:
        raise ValueError(f"permute_to_contiguous: num_rows must not be negative, got {num_rows}")
    target = Target(num_experts, None, num_rows, scale_layout, decode)
    rows, filled, dropped, row_map = permute_rows("permute_to_contiguous", implementation, parts, topk_ids, target)
    rows = _whole(rows, x, decode)
    if checked:
        checkify.check(dropped == 0, "permute_to_contiguous: {n} routes have a bad id or exceed num_rows", n=dropped)
    return PermutedContiguous(rows.x, rows.scales, rows.row_scale, filled, row_map, dropped)


def depermute_combine(
    y: Float[Array, "..."],
    row_map: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    residual: Float[Array, "t h"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "t h"]:
    """Sums the weighted expert rows of every token, in slot order, and adds a residual if there is one.

        out[t] = cast(sum over the slots j with row_map[t, j] >= 0 of f32(y[row_map[t, j]]) * topk_weights[t, j]
                      + f32(residual[t]))

    Each product is rounded to f32 before it is added, the residual is added last, and the sum is rounded once to y's
    dtype. A slot with row_map -1 adds exactly nothing, even if its weight is NaN. A token with no other slots becomes
    zero, or its residual.

    Args:
      y: floating-point [E, M, H] or [rows, H], the rows of the experts.
      row_map: integer [T, k], the row of each route in y.reshape(-1, H), or -1.
      topk_weights: floating-point [T, k].
      residual: [T, H] in y's dtype, such as the input of the layer or the result of shared experts; None: nothing is
        added. A separate addition would read and write all tokens once more, and round twice.
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`).

    Returns:
      The tokens [T, H] in y's dtype.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    op = "depermute_combine"
    check_array(f"{op}: y", y, jnp.floating)
    check_array(f"{op}: row_map", row_map, jnp.integer)
    check_array(f"{op}: topk_weights", topk_weights, jnp.floating)
    if y.ndim not in (2, 3) or row_map.shape != topk_weights.shape:
        raise ValueError(
            f"{op}: y must be [E, M, H] or [rows, H] and row_map and topk_weights [T, k]; "
            f"got {y.shape}, {row_map.shape}, {topk_weights.shape}"
        )
    if residual is not None:
        check_array(f"{op}: residual", residual)
        wanted = (row_map.shape[0], y.shape[-1])
        if residual.shape != wanted or residual.dtype != y.dtype:
            raise ValueError(f"{op}: residual must be {y.dtype} {wanted}, got {residual.dtype} {residual.shape}")
    check_unsharded(op, y, row_map, topk_weights, residual)
    rows = y.reshape(-1, y.shape[-1])
    return run_implementation(
        op,
        implementation,
        (rows, row_map, topk_weights, residual),
        xla=Call.of(_combine_xla),
        mosaic_gpu=Call.of(kernels.depermute_combine),
        problem=kernels.check_depermute(rows, row_map),
    )


def _combine_xla(rows, row_map, topk_weights, residual):
    total = jnp.zeros((row_map.shape[0], rows.shape[1]), jnp.float32)
    for row, weight in zip(row_map.T, topk_weights.T, strict=True) if rows.shape[0] else ():
        product = jnp.take(rows, jnp.maximum(row, 0), axis=0, mode="clip").astype(jnp.float32)
        # The barrier keeps XLA from contracting product and sum into one FMA, which would change the last bit.
        product = lax.optimization_barrier(product * weight.astype(jnp.float32)[:, None])
        total = jnp.where((row >= 0)[:, None], total + product, total)
    if residual is not None:
        total += residual.astype(jnp.float32)
    return total.astype(rows.dtype)


def _parts(x, scales, row_scale):
    """Returns the arrays that move row by row. A global scale that all rows share does not move."""
    if not isinstance(x, NVFP4Tensor):
        return Rows(x, scales, row_scale)
    own_scale = None if x.global_scale.ndim == 0 else jnp.broadcast_to(x.global_scale, (x.shape[0], 1))
    return Rows(x.qdata, x.block_scale, own_scale)


def _whole(rows, x, decode):
    """Returns moved rows in the form of x: an NVFP4Tensor, or with `decode` its values and its global scale."""
    if not isinstance(x, NVFP4Tensor):
        return rows
    global_scale = x.global_scale if rows.row_scale is None else rows.row_scale
    if decode:
        return Rows(rows.x, None, global_scale)
    return Rows(NVFP4Tensor(rows.x, rows.scales, global_scale), None, None)


def _check_args(op, x, scales, topk_ids, row_scale, num_experts, scale_layout, decode):
    for name, value in (("x", x), ("scales", scales), ("row_scale", row_scale)):
        if isinstance(value, NVFP4Tensor) and name == "x":
            value.validate()
        elif name == "x" or value is not None:
            check_array(f"{op}: {name}", value)
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be [T, Hx], one row per token, got {x.shape}")
    if isinstance(x, NVFP4Tensor):
        if scales is not None or row_scale is not None:
            raise ValueError(
                f"{op}: scales and row_scale belong to an array x; an NVFP4Tensor carries its own, got {x}"
            )
        if scale_layout != "linear":
            raise ValueError(
                f"{op}: the block scales of an NVFP4Tensor stay linear; for scale_layout={scale_layout!r} give x.qdata "
                "and x.block_scale as x and scales"
            )
        x, scales = x.qdata, x.block_scale
    tokens = x.shape[0]
    check_routes(op, tokens, topk_ids)
    check_unsharded(op, x, scales, topk_ids, row_scale)
    if num_experts < 1:
        raise ValueError(f"{op}: num_experts must be at least 1, got {num_experts}")
    if scale_layout not in scale_layouts.SCALE_LAYOUTS:
        raise ValueError(f"{op}: scale_layout={scale_layout!r} is unknown; choose {scale_layouts.SCALE_LAYOUTS}")
    if scales is not None and (scales.ndim != 2 or scales.shape[0] != tokens):
        raise ValueError(f"{op}: scales must be [T, S] with T = {tokens}, got {scales.shape}")
    if scale_layout == "swizzled" and scales is not None and scales.dtype.itemsize != 1:
        raise TypeError(f"{op}: the swizzled layout is for one-byte scales, got {scales.dtype}")
    if row_scale is not None and row_scale.shape != (tokens, 1):
        raise ValueError(f"{op}: row_scale must be [{tokens}, 1], got {row_scale.shape}")
    if decode:
        wanted = (tokens, 2 * x.shape[1] // BLOCK_SIZE)
        if 2 * x.shape[1] % BLOCK_SIZE:
            raise ValueError(f"{op}: decode=True needs K a multiple of {BLOCK_SIZE}, got x {x.shape}")
        if x.dtype != jnp.uint8 or scales is None or scales.shape != wanted or scales.dtype != jnp.float8_e4m3fn:
            found = None if scales is None else (scales.dtype, scales.shape)
            raise ValueError(f"{op}: decode=True needs u8 x and e4m3 scales {wanted}, got {x.dtype} {x.shape}, {found}")
