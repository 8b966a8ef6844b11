"""Causal grouped-query attention with rotary position embeddings (RoPE), with or without a cache of keys and values.

Letters of the shapes: B sequences, S queries, K keys, D size of a query or key, V size of a value.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fp4jax.attention import KeyValuePages, PageFormat, attend, pages_of
from fp4jax.attention.cache_formats import FP8
from fp4jax.attention.pages import seal
from fp4jax.attention.rotary import rope_frequency, rotate_and_write, rotated
from fp4jax.implementations import Implementation
from fp4jax.layers.fused import FusedLinear, fuse
from fp4jax.layers.linear import Linear, RMSNorm


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
        self.dtype = jnp.dtype(dtype)
        self.cache_dtype = self.dtype  # of keys and values; `Decoder.set_cache_dtype` sets it
        self.k_scale: Any = nnx.data(None)  # f32 () Variables: the scales of a cache in e4m3; None: 1
        self.v_scale: Any = nnx.data(None)
        self.head_dim, self.theta, self.interleaved, self.norm_eps = head_dim, theta, interleaved, norm_eps
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.implementation: Implementation | None = None  # of attention; `Decoder.place_attention` sets it
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

    @property
    def cache_format(self) -> PageFormat:
        """What the layer keeps of the tokens before."""
        part = self.num_kv_heads, self.head_dim
        return PageFormat(part, part, self.cache_dtype)

    def _cache_scales(self) -> jax.Array:
        """The scales of keys and of values in e4m3, f32 [2]."""
        return jnp.stack(
            [jnp.float32(1) if s is None else s[...].astype(jnp.float32) for s in (self.k_scale, self.v_scale)]
        )

    def fuse_projections(self) -> None:
        """Makes one product of the projections to queries, keys and values, where `fused.fuse` can."""
        if self.qkv_proj is not None:
            return
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
            projected = jnp.concatenate([p(x) for p in (self.q_proj, self.k_proj, self.v_proj)], axis=-1)
        else:
            projected = self.qkv_proj.linear(x)
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = jnp.stack([self.q_norm.weight[...], self.k_norm.weight[...]])
        made: dict[str, Any] = dict(
            heads=self.num_heads, norms=norms, epsilon=self.norm_eps, interleaved=self.interleaved
        )
        frequency = rope_frequency(self.theta, self.head_dim)
        if cache is None:
            q, k, v = rotated(projected, start, frequency, kv_heads=self.num_kv_heads, **made)
            pages = pages_of(*(jnp.swapaxes(part, 1, 2) for part in seal(k, v)))
        else:
            if cache.keys.dtype == FP8:
                cache = cache._replace(scales=self._cache_scales())
            q, pages = rotate_and_write(
                projected, cache, start, frequency, implementation=self.implementation, **made
            )  # fmt: skip
        out = attend(q, pages, start, implementation=self.implementation)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), None if cache is None else pages._replace(scales=None)
