"""Causal grouped-query attention with rotary position embeddings (RoPE), with or without a cache of keys and values.

Letters of the shapes: B sequences, S queries, K keys, D size of a query or key, V size of a value.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fp4jax.layers.linear import Linear, RMSNorm, exact_precision


def rope_frequency(theta: float, dim: int) -> Float[Array, "half"]:
    """The angle per position of every RoPE pair: theta^(-2i / dim) for the pairs i = 0 .. dim / 2 - 1."""
    half = dim // 2
    return theta ** -(jnp.arange(half, dtype=jnp.float32) / half)


def rope(
    x: Float[Array, "B S heads D"],
    positions: Int[Array, "..."],
    frequency: Float[Array, "half"],
    *,
    interleaved: bool = False,
) -> Float[Array, "B S heads D"]:
    """Rotate pairs of values by the angle position * frequency, computed in float32 (RoPE, arXiv:2104.09864).

    Args:
      x: queries or keys.
      positions: the position of every token: [S] or [1, S] for all sequences, or [B, S].
      frequency: the angle per position of each of the D / 2 pairs.
      interleaved: False pairs x[i] with x[i + D/2]; True pairs x[2i] with x[2i + 1].
    """
    angle = positions.reshape(-1, x.shape[1], 1, 1).astype(jnp.float32) * frequency.reshape(1, 1, 1, -1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    wide = x.astype(jnp.float32)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    rotated = first * cos - second * sin, second * cos + first * sin
    out = jnp.stack(rotated, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(rotated, axis=-1)
    return out.astype(x.dtype)


def attention(
    q: Float[Array, "B S heads D"],
    k: Float[Array, "B kv_heads K D"],
    v: Float[Array, "B kv_heads K V"],
    positions: Int[Array, "..."],
    *,
    scale: float | None = None,
) -> Float[Array, "B S heads V"]:
    """Causal grouped-query attention; the softmax is computed in float32.

    A query at position p sees the keys 0 .. p. NaN or infinity in a key or value spoils the results of the queries
    that see it, and no others.

    Args:
      q: queries; `heads` is a multiple of `kv_heads`.
      k: keys of the positions 0 .. K - 1.
      v: values of the positions 0 .. K - 1.
      positions: the position of every query: [S] or [1, S] for all sequences, or [B, S].
      scale: the factor of the scores q k^T; None: 1 / sqrt(D).
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
    # A value that a query does not see has the weight 0, but 0 * NaN is NaN. So values that are not finite are replaced
    # by 0 before the product, and afterwards the queries from the first such position on are set to NaN.
    finite = jnp.all(jnp.isfinite(v), axis=-1)
    v = jnp.where(finite[..., None], v, jnp.zeros_like(v))
    out = product("xqk,xkd->xqd", flat(probabilities), flat(v)).astype(q.dtype)
    out = out.reshape(batch, kv_heads, heads // kv_heads, length, -1)
    first_spoiled = jnp.min(jnp.where(finite, k.shape[2], places.reshape(1, 1, -1)), axis=-1)
    out = jnp.where(first_spoiled[:, :, None, None, None] <= positions, jnp.asarray(jnp.nan, out.dtype), out)
    out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, -1)


class Attention(nnx.Module):
    """Causal grouped-query attention with RoPE and its four projections.

    Args:
      hidden_size: the size of the input and output, H.
      num_heads: the number of query heads.
      num_kv_heads: the number of key and value heads, a divisor of `num_heads`.
      head_dim: the size of a query, key or value.
      theta: the base of the RoPE frequencies.
      interleaved: which values RoPE pairs, see `rope`.
      norm_eps: the epsilon of an RMSNorm on every query and key head, applied before RoPE; None: no such norm.
      dtype: the dtype that the module computes in.
      param_dtype: the dtype that the weights are stored in.
      stddev: the standard deviation of the initial weights.
      rngs: the source of the initial weights.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        theta: float,
        interleaved: bool = False,
        norm_eps: float | None = None,
        dtype: Any,
        param_dtype: Any,
        stddev: float,
        rngs: nnx.Rngs,
    ):
        self.head_dim, self.theta, self.interleaved = head_dim, theta, interleaved
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        linear: dict[str, Any] = dict(stddev=stddev, rngs=rngs, **kinds)
        self.q_proj = Linear(hidden_size, num_heads * head_dim, **linear)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, **linear)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, **linear)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, **linear)
        self.q_norm = self.k_norm = nnx.data(None)
        if norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, eps=norm_eps, **kinds)
            self.k_norm = RMSNorm(head_dim, eps=norm_eps, **kinds)

    def __call__(
        self, x: jax.Array, start: jax.Array, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        q, k, v = (p(x).reshape(*x.shape[:2], -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        positions = positions_from(start, x.shape[1])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        frequency = rope_frequency(self.theta, self.head_dim)
        q, k = (rope(part, positions, frequency, interleaved=self.interleaved) for part in (q, k))
        k, v = (jnp.swapaxes(part, 1, 2) for part in (k, v))  # heads first, as the batched products read them
        if cache is not None:
            k, v = cache = (write_cache(cache[0], k, start), write_cache(cache[1], v, start))
            v = clear_beyond(v, positions)
        out = attention(q, k, v, positions)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache


def positions_from(start: jax.Array, length: int) -> jax.Array:
    """The positions of `length` tokens from `start` on: i32 [1, length] for a start (), [B, length] for [B]."""
    return start.reshape(-1, 1) + jnp.arange(length, dtype=jnp.int32)[None, :]


def clear_beyond(values: jax.Array, positions: jax.Array) -> jax.Array:
    """Set the cached values [B, heads, length, D] beyond the newest position to zero.

    Cache places that are not filled yet may hold anything. Attention gives them the weight 0, but 0 * NaN is NaN.
    """
    place = jnp.arange(values.shape[2], dtype=jnp.int32).reshape(1, 1, -1, 1)
    return jnp.where(place <= positions[:, -1].reshape(-1, 1, 1, 1), values, 0)


def write_cache(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Write `new` [B, heads, S, D] into `cache` [B, heads, length, D] from position `start` on.

    `start` is i32 () for all sequences, or i32 [B] with one position per sequence.
    """
    write = lambda old, new, start: jax.lax.dynamic_update_slice_in_dim(old, new, start, 1)  # noqa: E731
    return jax.vmap(write, in_axes=(0, 0, 0 if start.ndim else None))(cache, new.astype(cache.dtype), start)
