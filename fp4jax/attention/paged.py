"""Causal attention over pages of keys and values: prefill of a chunk of queries, and decode of one query per request.

    out[b, s] = sum over keys j <= starts[b] + s of  softmax_j(scale * q[b, s] . k[b, j]) * v[b, j]

On Hopper, with bf16 queries, it is one kernel for prefill, and two for decode (`pallas_kernels/attention`). Elsewhere
XLA gathers the pages and computes all scores. Keys and values may be e4m3 codes; decode reads them as they are.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.attention.cache_formats import FP8
from fp4jax.attention.dense import attention, clear_beyond
from fp4jax.attention.pages import KeyValuePages, positions_from
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.operands import check_array
from pallas_kernels.attention import config, decode, parts as parts_of, prefill


def attend(
    q: Float[Array, "B S heads D"],
    pages: KeyValuePages,
    starts: Int[Array, "..."],
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "B S heads V"]:
    """Causal grouped-query attention; the query s of request b is at position starts[b] + s and sees the keys up to it.

    NaN in a key spoils the queries that see it, and no others. Values must be finite at filled places;
    `KeyValuePages.write` takes care of that. Places that are not filled may hold anything.

    The bits of a request do not depend on the other requests, nor on the page table. With S = 1 the keys are added in
    parts of a fixed number, with S > 1 in one pass, so the same query may differ in the last bit between the two.

    Args:
      q: queries, bf16 or f32. `heads` is a multiple of the pages' heads.
      pages: keys and values of the positions 0 .. starts[b] + S - 1, those of the S queries included. The rows of
        queries beyond `pages.counts` may hold anything.
      starts: i32 [B], or () for all requests.
      scale: the factor of the scores, positive; None: 1 / sqrt(D).
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`).

    Returns:
      [B, S, heads, V] in the dtype of q.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    check_array("attend: q", q, jnp.floating)
    batch, _, heads, dim = q.shape
    if pages.table.shape[0] != batch or heads % pages.keys.shape[1] or pages.keys.shape[3] != dim:
        found = f"q {q.shape}, keys {pages.keys.shape}, table {pages.table.shape}"
        raise ValueError(f"attend: {found} do not fit; [B, S, heads, D], [P, kv_heads, page, D], [B, n]")
    if scale is not None and not scale > 0:
        raise ValueError(f"attend: scale must be positive, got {scale}")
    starts = jnp.broadcast_to(jnp.asarray(starts, jnp.int32), (batch,))
    factor = dim**-0.5 if scale is None else scale
    if (pages.scales is None) != (pages.keys.dtype != FP8):
        has = "no scales" if pages.scales is None else "scales"
        raise TypeError(f"attend: pages in {pages.keys.dtype} have {has}; e4m3 needs scales, other types have none")
    problem = config.check_config(q, pages.keys, pages.values, pages.table)
    return run_implementation(
        "attend", implementation, (q, pages, starts), problem=problem,
        xla=Call.of(attend_xla, scale=factor), mosaic_gpu=Call.of(_attend_kernel, scale=factor),
    )  # fmt: skip


def attend_xla(
    q: Float[Array, "B S heads D"], pages: KeyValuePages, starts: Int[Array, "B"], *, scale: float
) -> Float[Array, "B S heads V"]:
    """`attend` in plain JAX."""
    keys, values = (gathered(part, pages.table) for part in pages.arrays)
    factor, value_scale = scale, None
    if pages.scales is not None:
        # Codes are exact in q's dtype. The scales multiply float32 sums, as they do in decode's kernel.
        keys, values = keys.astype(q.dtype), values.astype(q.dtype)
        factor, value_scale = scale * pages.scales[0], pages.scales[1]
    positions = positions_from(starts, q.shape[1])
    newest = positions[:, -1:] if pages.counts is None else (starts + pages.counts - 1)[:, None]
    # Keys too, as their gradients are not masked.
    keys, values = (clear_beyond(part, newest) for part in (keys, values))
    return attention(q, keys, values, positions, scale=factor, value_scale=value_scale)


def gathered(part: Float[Array, "P heads page D"], table: Int[Array, "B n"]) -> Float[Array, "B heads K D"]:
    """Returns pages in the order of their positions, with K = n * page."""
    batch, n = table.shape
    _, heads, page, dim = part.shape
    if n == 1:
        return part[table[:, 0]]
    return jnp.moveaxis(part[table], 2, 1).reshape(batch, heads, n * page, dim)


def keys_seen(pages: KeyValuePages, starts: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns how many keys the one query of each request sees, which is at position `starts`; 0 if it is not valid."""
    seen = jnp.minimum(starts + 1, pages.table.shape[1] * pages.page)
    return seen if pages.counts is None else jnp.where(pages.counts > 0, seen, 0)


def _attend_kernel(q, pages, starts, *, scale):
    keys, values, table, counts, scales = pages
    length = q.shape[1]
    if length > 1 and scales is not None:  # prefill reads every key many times, so they are decoded once before it
        decoded = lambda part, by: (gathered(part, table).astype(jnp.float32) * by).astype(q.dtype)  # noqa: E731
        keys, values = decoded(keys, scales[0]), decoded(values, scales[1])
        table = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    if unaligned := -keys.shape[2] % config.ALIGNMENT:  # of one page per request
        keys, values = (jnp.pad(part, ((0, 0), (0, 0), (0, unaligned), (0, 0))) for part in (keys, values))
    table = table.astype(jnp.int32)
    if length > 1:
        counts = jnp.full(q.shape[:1], length, jnp.int32) if counts is None else counts.astype(jnp.int32)
        return prefill.attend(q, keys, values, table, starts, counts, scale=scale, config=config.prefill(q.shape[3]))
    lengths = keys_seen(pages, starts)
    parts = parts_of.plan(lengths, table.shape[1] * keys.shape[2], config.PART)
    chosen = config.decode(q.shape[3], values.shape[3], keys.dtype)
    found = decode.attend(
        q[:, 0], keys, values, table, lengths, parts, scales, part=config.PART, scale=scale, config=chosen
    )  # fmt: skip
    return parts_of.merge(*found, parts)[:, None]
