"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), and RoPE for long contexts (YaRN).

The keys and values of all heads h are linear functions of one small vector per token, the latent. A key also has a
rotated part that all heads share. The cache keeps only the latent and that shared part:

    latent = norm(W_a x)
    k_h    = [W_k,h latent, rope(W_r x)]
    v_h    = W_v,h latent
    q_h    = [W_q,h x, rope(W_q',h x)]

If the model has a `q_lora_rank`, W_q and W_q' are applied to a small vector norm(W_b x) instead of to x.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fp4jax.attention import KeyValuePages, PageFormat, attend, attend_latents, pages_of
from fp4jax.attention.paged import gathered
from fp4jax.attention.pages import positions_from, seal
from fp4jax.attention.rotary import rope, rope_frequency
from fp4jax.implementations import Implementation
from fp4jax.layers.linear import Linear, RMSNorm
from fp4jax.rounding import exact_precision


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: RoPE for contexts that are `factor` times as long as the model was trained for (arXiv:2309.00071).

    The fields are those of `rope_scaling` with type "yarn" in `config.json`.

    Attributes:
      factor: how many times as long contexts become.
      original_max_position_embeddings: the context length before scaling, in tokens.
      beta_fast: pairs that turn at least this often within the original context keep their frequency.
      beta_slow: pairs that turn at most this often within the original context turn `factor` times slower.
      mscale: a coefficient of `rotation_scale`; 0 if the config has none.
      mscale_all_dim: a coefficient of `rotation_scale` and `score_scale`; 0 if the config has none.

    Raises:
      ValueError: one of the first four fields is not positive.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rope_scaling of type yarn: {name} must be positive, got {getattr(self, name)}")

    def frequency(self, theta: float, dim: int) -> Float[Array, "half"]:
        """The angle per position of every RoPE pair (arXiv:2309.00071, section 3.2).

        Fast pairs keep the angle that they have without YaRN, slow pairs get 1 / factor of it, and pairs in between a
        linear mix of both.
        """
        plain = theta ** (-np.arange(0, dim, 2) / dim)

        def pair_that_turns(times: float) -> float:
            return dim * math.log(self.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.beta_slow)), dim - 1)
        slow = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return jnp.asarray(plain * (1 - slow) + plain / self.factor * slow, jnp.float32)

    def _scale(self, mscale: float) -> float:
        """The length correction 0.1 * mscale * ln(factor) + 1; 1 if the context is not longer than the original."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def rotation_scale(self) -> float:
        """The factor of the rotated parts of queries and keys."""
        if self.mscale and self.mscale_all_dim:
            return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
        return self._scale(1.0)

    @property
    def score_scale(self) -> float:
        """The factor of the attention scores, beside 1 / sqrt(size of a query)."""
        return self._scale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


class LatentAttention(nnx.Module):
    """The attention that the module's docstring defines, with its projections.

    Args:
      hidden_size: the size of the input and output, H.
      num_heads: the number of heads.
      q_lora_rank: the size of the small vector that queries are made from; None: queries are made from x.
      kv_lora_rank: the size of the latent.
      qk_nope_head_dim: the size of the part of a query or key that is not rotated.
      qk_rope_head_dim: the size of the rotated part.
      v_head_dim: the size of a value.
      theta: the base of the RoPE frequencies.
      interleaved: which values RoPE pairs, see `fp4jax.layers.attention.rope`.
      yarn: the scaling of RoPE for long contexts; None: no scaling.
      norm_eps: the epsilon of the norms of the latent and of the queries' small vector.
      dtype: the dtype that the module computes in.
      param_dtype: the dtype that the weights are stored in.
      stddev: the standard deviation of the initial weights.
      rngs: the source of the initial weights.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        theta: float,
        interleaved: bool = True,
        yarn: Yarn | None = None,
        norm_eps: float = 1e-6,
        dtype: Any,
        param_dtype: Any,
        stddev: float,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        linear: dict[str, Any] = dict(stddev=stddev, rngs=rngs, **kinds)
        self.dtype = jnp.dtype(dtype)
        self.rank, self.nope, self.rotated, self.v_dim = kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.num_heads, self.theta, self.interleaved, self.yarn = num_heads, theta, interleaved, yarn
        self.implementation: Implementation | None = None  # of attention; `Decoder.place_attention` sets it
        head_dim = qk_nope_head_dim + qk_rope_head_dim
        self.q_proj: Any = nnx.data(None)
        self.q_a_proj: Any = nnx.data(None)
        self.q_a_layernorm: Any = nnx.data(None)
        self.q_b_proj: Any = nnx.data(None)
        if q_lora_rank is None:
            self.q_proj = Linear(hidden_size, num_heads * head_dim, **linear)
        else:
            self.q_a_proj = Linear(hidden_size, q_lora_rank, **linear)
            self.q_a_layernorm = RMSNorm(q_lora_rank, eps=norm_eps, **kinds)
            self.q_b_proj = Linear(q_lora_rank, num_heads * head_dim, **linear)
        self.kv_a_proj_with_mqa = Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, **linear)
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, eps=norm_eps, **kinds)
        self.kv_b_proj = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), **linear)
        self.o_proj = Linear(num_heads * v_head_dim, hidden_size, **linear)

    def __call__(
        self, x: jax.Array, start: jax.Array, cache: KeyValuePages | None
    ) -> tuple[jax.Array, KeyValuePages | None]:
        """Compute the attention of the tokens x [B, S, H].

        Args:
          x: hidden states.
          start: the position of x[:, 0]: i32 () for all sequences, or i32 [B].
          cache: the latents (as keys, of size kv_lora_rank) and rotated keys (as values, of size qk_rope_head_dim) of
            the earlier positions, with one head; None: the tokens attend to each other only.

        Returns:
          The result [B, S, H] and the updated cache, or None if there was none.
        """
        batch, length, _ = x.shape
        positions = positions_from(start, length)
        q = self.q_proj(x) if self.q_proj is not None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(batch, length, self.num_heads, self.nope + self.rotated)
        q_nope, q_rotated = q[..., : self.nope], self._rotate(q[..., self.nope :], positions)
        both = self.kv_a_proj_with_mqa(x)
        latent = self.kv_a_layernorm(both[..., : self.rank])
        shared = self._rotate(both[..., None, self.rank :], positions)[:, :, 0]
        pages = pages_of(latent[:, None], shared[:, None])
        if cache is not None:
            pages = cache = cache.write(latent[:, :, None], shared[:, :, None], start)
        attended = self._in_latent_space if length == 1 and type(self.kv_b_proj) is Linear else self._expanded
        out = attended(q_nope, q_rotated, pages, start)
        return self.o_proj(out.reshape(batch, length, -1)), cache

    @property
    def cache_format(self) -> PageFormat:
        """What the layer keeps of the tokens before: latents as keys, and rotated keys as values, for all heads."""
        return PageFormat((1, self.rank), (1, self.rotated), self.dtype)

    @property
    def _score_scale(self) -> float:
        return (self.nope + self.rotated) ** -0.5 * (1.0 if self.yarn is None else self.yarn.score_scale)

    def _expanded(self, q_nope, q_rotated, pages, start):
        """Attention over the keys and values of all heads, which are made from the latents: for many queries."""
        latent, shared = (gathered(part, pages.table)[:, 0] for part in (pages.keys, pages.values))
        kv = self.kv_b_proj(latent).reshape(*latent.shape[:2], self.num_heads, self.nope + self.v_dim)
        shared = jnp.broadcast_to(shared[:, :, None], (*kv.shape[:3], self.rotated))
        k = jnp.concatenate([kv[..., : self.nope], shared.astype(kv.dtype)], axis=-1)
        k, v = (jnp.swapaxes(part, 1, 2) for part in seal(k, kv[..., self.nope :]))
        q = jnp.concatenate([q_nope, q_rotated], axis=-1)
        pages = pages_of(k, v)._replace(counts=pages.counts)
        return attend(q, pages, start, scale=self._score_scale, implementation=self.implementation)

    def _in_latent_space(self, q_nope, q_rotated, pages, start):
        """Attention over the latents themselves, for one query: W_k,h is applied to it, and W_v,h to the sum.

        q_h . W_k,h latent = (W_k,h^T q_h) . latent, so all heads share one key, [latent, rope(W_r x)], and one value.
        """
        weight = self.kv_b_proj.weight[...].astype(q_nope.dtype)
        by_head = weight.reshape(self.num_heads, self.nope + self.v_dim, self.rank)
        product = functools.partial(jnp.einsum, precision=exact_precision(q_nope.dtype))
        q = product("bhn,hnr->bhr", q_nope[:, 0], by_head[:, : self.nope])[:, None]
        out = attend_latents(q, q_rotated, pages, start, scale=self._score_scale, implementation=self.implementation)
        return product("bhr,hvr->bhv", out[:, 0], by_head[:, self.nope :])[:, None]

    def _rotate(self, x, positions):
        """Apply RoPE, with YaRN's frequencies and factor if the model uses YaRN."""
        if self.yarn is None:
            return rope(x, positions, rope_frequency(self.theta, self.rotated), interleaved=self.interleaved)
        turned = rope(x, positions, self.yarn.frequency(self.theta, self.rotated), interleaved=self.interleaved)
        return turned if self.yarn.rotation_scale == 1 else (turned * self.yarn.rotation_scale).astype(x.dtype)
