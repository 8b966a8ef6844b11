"""Causal grouped-query attention by plain JAX, over keys and values that lie in order of their positions.

Letters of the shapes: B sequences, S queries, K keys, D size of a query or key, V size of a value.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.rounding import exact_precision


def attention(
    q: Float[Array, "B S heads D"],
    k: Float[Array, "B kv_heads K D"],
    v: Float[Array, "B kv_heads K V"],
    positions: Int[Array, "..."],
    *,
    scale: Any = None,
    value_scale: Any = None,
) -> Float[Array, "B S heads V"]:
    """Causal grouped-query attention; the softmax is computed in float32.

    A query at position p sees the keys 0 .. p. NaN in a key spoils the results of the queries that see it, and no
    others. Values must be finite (`pages.seal`): those that a query does not see have the weight 0, and 0 * NaN is NaN.

    Args:
      q: queries; `heads` is a multiple of `kv_heads`.
      k: keys of the positions 0 .. K - 1.
      v: values of the positions 0 .. K - 1.
      positions: the position of every query: [S] or [1, S] for all sequences, or [B, S].
      scale: the factor of the scores q k^T, a number or f32 (); None: 1 / sqrt(D).
      value_scale: a factor of the result, f32 (); None: 1.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    # Sequences and key heads become one axis, and so do the query heads of a group and their positions, so that both
    # products are plain batched matrix products. With four axes XLA:CPU of JAX 0.11 and 0.12 refuses bf16 at run time.
    precision = exact_precision(q.dtype)
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    flat = lambda a: a.reshape(batch * kv_heads, -1, a.shape[-1])  # noqa: E731
    scores = product("xqd,xkd->xqk", flat(grouped), flat(k)).reshape(*grouped.shape[:-1], -1)
    positions = positions.reshape(-1, 1, 1, length, 1)
    places = jnp.arange(k.shape[2], dtype=positions.dtype).reshape(1, 1, 1, 1, -1)
    visible = places <= positions
    scores = jnp.where(visible, scores * (dim**-0.5 if scale is None else scale), -jnp.inf)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    out = product("xqk,xkd->xqd", flat(probabilities), flat(v))
    out = (out if value_scale is None else out * value_scale).astype(q.dtype)
    out = out.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, -1)


def clear_beyond(values: jax.Array, positions: jax.Array) -> jax.Array:
    """Set the cached values [B, heads, length, D] beyond the newest position to zero.

    Cache places that are not filled yet may hold anything. Attention gives them the weight 0, but 0 * NaN is NaN.
    """
    place = jnp.arange(values.shape[2], dtype=jnp.int32).reshape(1, 1, -1, 1)
    return jnp.where(place <= positions[:, -1].reshape(-1, 1, 1, 1), values, 0)
