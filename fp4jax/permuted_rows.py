"""Moves rows to their experts, for `permute`, which checks the arguments. XLA gathers rows, kernels scatter them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from fp4jax import scale_layout as scale_layouts
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.nvfp4_codes import decode_blocks
from pallas_kernels.rows import permute as permute_kernels, route_metadata as metadata_kernels


class Rows(NamedTuple):
    """The arrays that together hold rows.

    Attributes:
      x: values or NVFP4 codes; in the result of `permute._whole` also an NVFP4Tensor.
      scales: block scales, or None if the rows have none.
      row_scale: one f32 scale per row, or None if the rows have none.
    """

    x: Any
    scales: jax.Array | None
    row_scale: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Target:
    """The layout that rows are moved to.

    Attributes:
      num_experts: experts on this device (E).
      capacity: rows per expert in the masked layout; None: the layout is contiguous.
      num_rows: rows of all experts together.
      scale_layout: the layout of the moved block scales.
      decode: whether NVFP4 rows become bf16 on the way.
    """

    num_experts: int
    capacity: int | None
    num_rows: int
    scale_layout: str
    decode: bool


def permute_rows(
    op: str, implementation: Implementation | None, parts: Rows, topk_ids: Int[Array, "t k"], target: Target
) -> tuple[Rows, Int[Array, " e"], Int[Array, ""], Int[Array, "t k"]]:
    """Moves the row of every route to its expert.

    Args:
      op: the name of the public op, for errors.
      implementation: as in `permute.permute_to_masked`.
      parts: the arrays of the tokens' rows, [T, n] each.
      topk_ids: the expert of each route; -1 = not here.
      target: the layout to move them to.

    Returns:
      The moved parts, the number of filled rows per expert i32 [E], the number of dropped routes i32 (), and row_map
      i32 [T, k].
    """
    rows, counts, filled, bad, row_map = run_implementation(
        op,
        implementation,
        (*parts[:2], topk_ids, parts.row_scale),
        xla=Call.of(_permute_xla, target=target),
        mosaic_gpu=Call.of(_permute_kernels, target=target),
        problem=_kernel_problem(*parts[:2], topk_ids, parts.row_scale, target),
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
        rows = Rows(decoded, None, None)
        if row_scale is not None:
            rows = rows._replace(row_scale=permute_kernels.scatter_rows([row_scale], meta.row_map, target.num_rows)[0])
    else:
        leaves, structure = jax.tree.flatten(Rows(x, None if arrange else scales, row_scale))  # without None fields
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
    """Ranks the T*k routes within their experts, in token order, then slot order.

    Returns per route its expert (E for a route with none) and its rank; per expert its number of routes; and the number
    of ids that are out of range.
    """
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
    # A route without a row gets the index num_rows, beyond the last row, which the scatter ignores.
    target = jnp.where(row_map < 0, num_rows, row_map).reshape(-1)
    source = jnp.full(num_rows, -1, jnp.int32).at[target].set(token, mode="drop")

    def take(rows):
        if tokens == 0:
            return jnp.zeros((num_rows, rows.shape[1]), rows.dtype)
        return jnp.take(rows, jnp.maximum(source, 0), axis=0, mode="clip")

    rows = jax.tree.map(take, Rows(x, scales, row_scale))
    if decode:
        return rows._replace(x=decode_blocks(rows.x, rows.scales), scales=None)
    if scales is not None:
        rows = rows._replace(scales=jnp.where((source >= 0)[:, None], rows.scales, jnp.zeros_like(rows.scales)))
    return rows


def _kernel_problem(x, scales, topk_ids, row_scale, target):
    """Returns None if the GPU kernels can serve this call, else the reason why not."""
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
