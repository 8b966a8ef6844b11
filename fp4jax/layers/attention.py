"""Causal grouped-query attention with rotary position embeddings (RoPE), with or without a cache of keys and values.

Letters of the shapes: B sequences, S queries, K keys, D size of a query or key, V size of a value.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fp4jax.attention import KeyValuePages, attend, pages_of
from fp4jax.attention.pages import positions_from, seal
from fp4jax.layers.fused import FusedLinear, fuse
from fp4jax.layers.linear import Linear, RMSNorm


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
        self.q_proj: Any = Linear(hidden_size, num_heads * head_dim, **linear)
        self.k_proj: Any = Linear(hidden_size, num_kv_heads * head_dim, **linear)
        self.v_proj: Any = Linear(hidden_size, num_kv_heads * head_dim, **linear)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, **linear)
        self.qkv_proj: FusedLinear | None = nnx.data(None)
        self.q_norm = self.k_norm = nnx.data(None)
        if norm_eps is not None:
            self.q_norm = RMSNorm(head_dim, eps=norm_eps, **kinds)
            self.k_norm = RMSNorm(head_dim, eps=norm_eps, **kinds)

    def fuse_projections(self) -> None:
        """Makes one product of the projections to queries, keys and values, where `fused.fuse` can."""
        self.qkv_proj = nnx.data(fuse(self.q_proj, self.k_proj, self.v_proj))
        if self.qkv_proj is not None:
            self.q_proj = self.k_proj = self.v_proj = nnx.data(None)

    def __call__(
        self, x: jax.Array, start: jax.Array, cache: KeyValuePages | None
    ) -> tuple[jax.Array, KeyValuePages | None]:
        """Compute the attention of the tokens x [B, S, H].

        Args:
          x: hidden states.
          start: the position of x[:, 0]: i32 () for all sequences, or i32 [B].
          cache: keys and values of the earlier positions; None: the tokens attend to each other only.

        Returns:
          The result [B, S, H], and the cache with the new positions in it, or None if there was none.
        """
        if self.qkv_proj is None:
            projected = [p(x) for p in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            projected = self.qkv_proj(x)
        q, k, v = (part.reshape(*x.shape[:2], -1, self.head_dim) for part in projected)
        positions = positions_from(start, x.shape[1])
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        frequency = rope_frequency(self.theta, self.head_dim)
        q, k = (rope(part, positions, frequency, interleaved=self.interleaved) for part in (q, k))
        if cache is None:
            pages = pages_of(*(jnp.swapaxes(part, 1, 2) for part in seal(k, v)))
        else:
            pages = cache = cache.write(k, v, start)
        out = attend(q, pages, start)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache
