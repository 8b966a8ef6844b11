"""Causal attention over pages of latents: the decode of multi-head latent attention (arXiv:2405.04434, section 2.1).

All heads share one key, the latent and a rotated part, and one value, the latent:

    s_j    = scale * (q_latent[b, h] . latent[b, j] + q_rotated[b, h] . rotated[b, j])
    out[b] = sum over keys j of  softmax_j(s_j) * latent[b, j]

On Hopper, with bf16 and the sizes of DeepSeek's models, two kernels read the pages as they lie
(`pallas_kernels/attention/latent_decode.py`). Elsewhere XLA gathers the pages and computes all scores.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.attention.paged import attend_xla, gathered, keys_seen
from fp4jax.attention.pages import KeyValuePages, pages_of, seal
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.operands import check_array
from pallas_kernels.attention import config, latent_decode, parts as parts_of


def attend_latents(
    q_latent: Float[Array, "B S heads R"],
    q_rotated: Float[Array, "B S heads r"],
    pages: KeyValuePages,
    starts: Int[Array, "..."],
    *,
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "B S heads R"]:
    """Causal attention over latents; the query s of request b is at position starts[b] + s and sees the keys up to it.

    NaN in a latent or in a rotated key spoils the queries that see it, and no others. Places that are not filled may
    hold anything. The bits of a request do not depend on the other requests, nor on the page table.

    The kernels serve one query per request. They add keys in parts: of 256 keys, or of a larger multiple for requests
    of more than 4096, so that no request has more than 16 parts.

    Args:
      q_latent: the parts of queries for latents, bf16 or f32.
      q_rotated: their parts for rotated keys.
      pages: latents as `keys` and rotated keys as `values`, with one head, of the positions 0 .. starts[b] + S - 1,
        those of the S queries included. The rows of queries beyond `pages.counts` may hold anything.
      starts: i32 [B], or () for all requests.
      scale: the factor of the scores, positive.
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`).

    Returns:
      [B, S, heads, R] in the dtype of q_latent.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    check_array("attend_latents: q_latent", q_latent, jnp.floating)
    check_array("attend_latents: q_rotated", q_rotated, jnp.floating)
    batch, length, heads, rank = q_latent.shape
    latents, rotated = pages.keys, pages.values
    expected = (batch, length, heads, rotated.shape[3]), (1, rank), batch
    if (q_rotated.shape, (latents.shape[1], latents.shape[3]), pages.table.shape[0]) != expected:
        found = f"q {q_latent.shape} and {q_rotated.shape}, latents {latents.shape}, table {pages.table.shape}"
        raise ValueError(f"attend_latents: {found} do not fit; [B, S, heads, R] and [.., r], [P, 1, page, R], [B, n]")
    if not scale > 0:
        raise ValueError(f"attend_latents: scale must be positive, got {scale}")
    starts = jnp.broadcast_to(jnp.asarray(starts, jnp.int32), (batch,))
    problem = config.check_latents(q_latent, q_rotated, latents, rotated)
    return run_implementation(
        "attend_latents", implementation, (q_latent, q_rotated, pages, starts), problem=problem,
        xla=Call.of(_attend_xla, scale=scale), mosaic_gpu=Call.of(_attend_kernel, scale=scale),
    )  # fmt: skip


def _attend_xla(q_latent, q_rotated, pages, starts, *, scale):
    latent, rotated = (gathered(part, pages.table) for part in (pages.keys, pages.values))
    keys, values = seal(jnp.concatenate([latent, rotated.astype(latent.dtype)], axis=-1), latent)
    q = jnp.concatenate([q_latent, q_rotated.astype(q_latent.dtype)], axis=-1)
    return attend_xla(q, pages_of(keys, values)._replace(counts=pages.counts), starts, scale=scale)


def _attend_kernel(q_latent, q_rotated, pages, starts, *, scale):
    latents, rotated, table, *_ = pages
    lengths, most = keys_seen(pages, starts), config.MOST_PARTS
    # More keys per part for long requests. It depends on the request alone, and so do its bits.
    sizes = config.PART * jnp.maximum(-(-lengths // (config.PART * most)), 1)
    places = table.shape[1] * pages.page
    parts = parts_of.plan(lengths, places, sizes, min(most, -(-places // config.PART)))
    found = latent_decode.attend(
        q_latent[:, 0], q_rotated[:, 0], latents, rotated, table.astype(jnp.int32), lengths, parts, sizes, scale=scale
    )
    return parts_of.merge(*found, parts)[:, None]
