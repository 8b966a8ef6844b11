"""Token-major rows -> expert-major layouts and back, within one device.

Row order is stable: token order, then slot order. A route (token, slot) is dropped, counted and marked -1 in `row_map`
when its id is out of range or its expert is full; an id of -1 means "not here" and is skipped without counting. Rows
that no route fills may hold anything; only scale pads of the swizzled layout, which hardware reads, are zero.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array, Float, Int, Shaped

from fp4jax import scale_layout as scale_layouts
from fp4jax.implementations import Call, run_implementation
from fp4jax.nvfp4 import BLOCK_SIZE, NVFP4Tensor, decode_blocks
from fp4jax.operands import check_array, check_routes, check_unsharded
from pallas_kernels.rows import permute as permute_kernels, route_metadata as metadata_kernels


class Permuted(NamedTuple):
    """Masked layout. `scales` and `row_scale` are None where none were given, `scales` also after decoding.

    x [E, M, Hx]; scales [E, M, S], [E, S, M] or swizzled; row_scale [E, M, 1]; masked_m i32 [E] valid rows per expert;
    row_map i32 [T, k] = e * M + row or -1; dropped i32 [].
    """

    x: Shaped[Array, "e m hx"]
    scales: Any
    row_scale: Any
    masked_m: Int[Array, " e"]
    row_map: Int[Array, "t k"]
    dropped: Int[Array, ""]


class PermutedContiguous(NamedTuple):
    """Contiguous layout, sorted by expert; rows at or beyond sum(group_sizes) are pads.

    x [rows, Hx]; scales [rows, S], [S, rows] or swizzled; row_scale [rows, 1]; group_sizes i32 [E]; row_map i32 [T, k];
    dropped i32 [].
    """

    x: Shaped[Array, "rows hx"]
    scales: Any
    row_scale: Any
    group_sizes: Int[Array, " e"]
    row_map: Int[Array, "t k"]
    dropped: Int[Array, ""]


def permute_to_masked(
    x: Shaped[Array, "t hx"],
    scales: Shaped[Array, "t s"] | None,
    topk_ids: Int[Array, "t k"],
    *,
    row_scale: Float[Array, "t 1"] | None = None,
    num_experts: int,
    capacity: int,
    scale_layout: str = "linear",
    decode: bool = False,
    checked: bool = False,
    implementation: str | None = None,
) -> Permuted:
    """Copies every routed row of x (and its scales, untouched) to [expert, row]: at most `capacity` rows per expert.

    Args:
      x: u8 packed NVFP4 [T, H/2], e4m3, bf16, ... [T, H].
      scales: block scales of x, or None.
      topk_ids: expert of each route, 0 <= id < num_experts; -1 = not here. Any k >= 1.
      row_scale: f32 per token, copied along.
      num_experts: experts of this device (E). capacity: rows per expert (M).
      scale_layout: layout of the returned scales, "linear", "m_major" or "swizzled" (one byte per scale).
      decode: x is packed NVFP4; return bf16 code x block_scale (exact) and no scales.
      checked: `checkify.check` that no id is out of range and nothing overflows.

    Raises:
      ValueError, TypeError: shapes, dtypes or options that do not fit.
    """
    _check_args("permute_to_masked", x, scales, topk_ids, row_scale, num_experts, scale_layout, decode)
    if capacity < 1:
        raise ValueError(f"permute_to_masked: capacity must be at least 1, got {capacity}")
    target = _Target(num_experts, capacity, num_experts * capacity, scale_layout, decode)
    rows, filled, dropped, row_map = _permute(
        "permute_to_masked", implementation, x, scales, topk_ids, row_scale, target
    )
    if checked:
        checkify.check(dropped == 0, "permute_to_masked: {n} routes have a bad id or exceed the capacity", n=dropped)
    return Permuted(rows.x, rows.scales, rows.row_scale, filled, row_map, dropped)


def permute_to_contiguous(
    x: Shaped[Array, "t hx"],
    scales: Shaped[Array, "t s"] | None,
    topk_ids: Int[Array, "t k"],
    *,
    row_scale: Float[Array, "t 1"] | None = None,
    num_experts: int,
    num_rows: int | None = None,
    scale_layout: str = "linear",
    decode: bool = False,
    checked: bool = False,
    implementation: str | None = None,
) -> PermutedContiguous:
    """The same rows back to back, sorted by expert: no capacity per expert, `num_rows` in all (None: T*k, never full).

    With fewer rows the routes of the last experts that do not fit are dropped and counted. Other arguments and errors
    as in `permute_to_masked`.
    """
    _check_args("permute_to_contiguous", x, scales, topk_ids, row_scale, num_experts, scale_layout, decode)
    num_rows = topk_ids.size if num_rows is None else num_rows
    if num_rows < 0:
        raise ValueError(f"permute_to_contiguous: num_rows must not be negative, got {num_rows}")
    target = _Target(num_experts, None, num_rows, scale_layout, decode)
    rows, filled, dropped, row_map = _permute(
        "permute_to_contiguous", implementation, x, scales, topk_ids, row_scale, target
    )
    if checked:
        checkify.check(dropped == 0, "permute_to_contiguous: {n} routes have a bad id or exceed num_rows", n=dropped)
    return PermutedContiguous(rows.x, rows.scales, rows.row_scale, filled, row_map, dropped)


def depermute_combine(
    y: Float[Array, "..."],
    row_map: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    *,
    implementation: str | None = None,
) -> Float[Array, "t h"]:
    """out[t] = cast(sum over slots j in order, row_map[t, j] >= 0, of f32(y[row_map[t, j]]) * topk_weights[t, j]).

    y: [E, M, H] or [rows, H]. Each product is rounded to f32 before it is added and the sum is rounded once to y's
    dtype. A slot of -1 adds exactly nothing, whatever its weight; a token without slots is zero.
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
    check_unsharded(op, y, row_map, topk_weights)
    rows = y.reshape(-1, y.shape[-1])
    return run_implementation(
        op,
        implementation,
        (rows, row_map, topk_weights),
        xla=Call.of(_combine_xla),
        mosaic_gpu=Call.of(permute_kernels.depermute_combine),
        problem=permute_kernels.check_depermute(rows, row_map),
    )


def _combine_xla(rows, row_map, topk_weights):
    total = jnp.zeros((row_map.shape[0], rows.shape[1]), jnp.float32)
    if rows.shape[0] == 0:
        return total.astype(rows.dtype)
    for row, weight in zip(row_map.T, topk_weights.T, strict=True):
        product = jnp.take(rows, jnp.maximum(row, 0), axis=0, mode="clip").astype(jnp.float32)
        # The barrier keeps XLA from contracting product and sum into one FMA, which would change the last bit.
        product = lax.optimization_barrier(product * weight.astype(jnp.float32)[:, None])
        total = jnp.where((row >= 0)[:, None], total + product, total)
    return total.astype(rows.dtype)


class _Rows(NamedTuple):
    x: jax.Array
    scales: jax.Array | None
    row_scale: jax.Array | None


@dataclasses.dataclass(frozen=True)
class _Target:
    """Where rows go: `capacity` rows per expert (masked), or None for `num_rows` back to back (contiguous)."""

    num_experts: int
    capacity: int | None
    num_rows: int
    scale_layout: str
    decode: bool


def _permute(op, implementation, x, scales, topk_ids, row_scale, target):
    """-> _Rows in their final shapes, filled rows per expert, number of dropped routes, row_map."""
    rows, counts, filled, bad, row_map = run_implementation(
        op,
        implementation,
        (x, scales, topk_ids, row_scale),
        xla=Call.of(_permute_xla, target=target),
        mosaic_gpu=Call.of(_permute_kernels, target=target),
        problem=_kernel_problem(x, scales, topk_ids, row_scale, target),
    )
    return rows, filled, bad + jnp.sum(counts - filled, dtype=jnp.int32), row_map


def _permute_xla(x, scales, topk_ids, row_scale, *, target):
    group, rank, counts, bad = _rank_in_expert(topk_ids, target.num_experts)
    if target.capacity is None:
        start = jnp.cumsum(counts) - counts
        row = jnp.pad(start, (0, 1))[group] + rank
        fits, filled = row < target.num_rows, jnp.clip(target.num_rows - start, 0, counts)
    else:
        row, fits, filled = group * target.capacity + rank, rank < target.capacity, jnp.minimum(counts, target.capacity)
    row_map = jnp.where((group < target.num_experts) & fits, row, -1).reshape(topk_ids.shape)
    rows = _per_expert(_gather_rows(x, scales, row_scale, row_map, target.num_rows, target.decode), target)
    return rows._replace(scales=_lay_out(rows.scales, target.scale_layout)), counts, filled, bad, row_map


def _permute_kernels(x, scales, topk_ids, row_scale, *, target):
    arrange = scales is not None and not target.decode and target.scale_layout != "linear"
    meta = metadata_kernels.route_metadata(
        topk_ids, target.num_experts, capacity=target.capacity, num_rows=target.num_rows, with_source=arrange
    )
    if target.decode:
        decoded = permute_kernels.scatter_decoded_rows(x, scales, meta.row_map, target.num_rows)
        rows = _Rows(decoded, None, None)
        if row_scale is not None:
            rows = rows._replace(row_scale=permute_kernels.scatter_rows([row_scale], meta.row_map, target.num_rows)[0])
    else:
        leaves, structure = jax.tree.flatten(_Rows(x, None if arrange else scales, row_scale))  # without the Nones
        rows = jax.tree.unflatten(structure, permute_kernels.scatter_rows(leaves, meta.row_map, target.num_rows))
    rows = _per_expert(rows, target)
    if arrange:
        rows = rows._replace(scales=_arrange_by_kernel(scales, meta, target))
    return rows, meta.counts, meta.filled, meta.bad, meta.row_map


def _arrange_by_kernel(scales, meta, target):
    if target.capacity is not None:
        return permute_kernels.arrange_scales(scales, meta.source, meta.filled, target.capacity, target.scale_layout)
    filled = jnp.sum(meta.filled, dtype=jnp.int32).reshape(1)
    return permute_kernels.arrange_scales(scales, meta.source, filled, target.num_rows, target.scale_layout)[0]


def _per_expert(rows, target):
    if target.capacity is None:
        return rows
    return jax.tree.map(lambda r: r.reshape(target.num_experts, target.capacity, -1), rows)


def _rank_in_expert(topk_ids, num_experts):
    """-> per route (flattened): its expert (E = none) and its stable rank within it; per expert its routes; bad ids."""
    ids = topk_ids.reshape(-1)
    here = (ids >= 0) & (ids < num_experts)
    group = jnp.where(here, ids, num_experts).astype(jnp.int32)
    counts = jnp.zeros(num_experts + 1, jnp.int32).at[group].add(1)
    order = jnp.argsort(group, stable=True)
    sorted_rank = jnp.arange(ids.size, dtype=jnp.int32) - (jnp.cumsum(counts) - counts)[group[order]]
    rank = jnp.zeros(ids.size, jnp.int32).at[order].set(sorted_rank, unique_indices=True)
    bad = jnp.sum(~here & (ids != -1), dtype=jnp.int32)
    return group, rank, counts[:num_experts], bad


def _gather_rows(x, scales, row_scale, row_map, num_rows, decode):
    tokens, slots = row_map.shape
    token = jnp.repeat(jnp.arange(tokens, dtype=jnp.int32), slots)
    # A dropped route points beyond the last row, where the scatter ignores it.
    target = jnp.where(row_map < 0, num_rows, row_map).reshape(-1)
    source = jnp.full(num_rows, -1, jnp.int32).at[target].set(token, mode="drop")

    def take(rows):
        if tokens == 0:
            return jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
        return jnp.take(rows, jnp.maximum(source, 0), axis=0, mode="clip")

    rows = jax.tree.map(take, _Rows(x, scales, row_scale))
    if decode:
        return rows._replace(x=decode_blocks(rows.x, rows.scales), scales=None)
    if scales is not None:
        rows = rows._replace(scales=jnp.where((source >= 0)[:, None], rows.scales, jnp.zeros_like(rows.scales)))
    return rows


def _kernel_problem(x, scales, topk_ids, row_scale, target):
    """None, or why the GPU kernels cannot serve this call."""
    arranged = scales is not None and target.scale_layout != "linear" and not target.decode
    if arranged and scales.dtype.itemsize != 1:
        return f"scale_layout={target.scale_layout!r} of {scales.dtype} scales; the kernel lays out one-byte scales"
    if target.num_rows == 0:
        return "no rows"
    problem = metadata_kernels.check_config(topk_ids, target.num_experts)
    return problem or permute_kernels.check_config((x, scales, row_scale), target.num_rows)


def _lay_out(scales, layout):
    if scales is None or layout == "linear":
        return scales
    return scale_layouts.to_m_major(scales) if layout == "m_major" else scale_layouts.swizzle(scales)


def _check_args(op, x, scales, topk_ids, row_scale, num_experts, scale_layout, decode):
    if isinstance(x, NVFP4Tensor):
        raise TypeError(f"{op}: give x.qdata and x.block_scale as x and scales, with decode=True for bf16; got {x}")
    for name, value in (("x", x), ("scales", scales), ("row_scale", row_scale)):
        if name == "x" or value is not None:
            check_array(f"{op}: {name}", value)
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be [T, Hx], one row per token, got {x.shape}")
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
