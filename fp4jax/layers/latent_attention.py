"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) and RoPE for long contexts (YaRN).

Keys and values of all heads come from one small vector per token, which is what the cache keeps, next to one rotated
key that all heads share:

    latent = norm(W_a x);   k_h = [W_k,h latent, rope(W_r x)],   v_h = W_v,h latent
    q_h = [W_q,h x, rope(W_q',h x)];   both q parts may come through a small vector of their own
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fp4jax.layers.attention import attention, clear_beyond, positions_from, rope, rope_frequency, write_cache
from fp4jax.layers.linear import Linear, RMSNorm


@dataclasses.dataclass(frozen=True)
class Yarn:
    """`rope_scaling` of type yarn: contexts `factor` times as long as `original_max_position_embeddings`.

    mscale, mscale_all_dim: 0 where a config has none.
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
        """Angles per position (arXiv:2309.00071, section 3.2): slow pairs turn `factor` times slower, fast ones not."""
        plain = theta ** (-np.arange(0, dim, 2) / dim)

        def pair_that_turns(times: float) -> float:
            return dim * math.log(self.original_max_position_embeddings / (times * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_that_turns(self.beta_fast)), 0)
        high = min(math.ceil(pair_that_turns(self.beta_slow)), dim - 1)
        slow = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
        return jnp.asarray(plain * (1 - slow) + plain / self.factor * slow, jnp.float32)

    def _scale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    @property
    def rotation_scale(self) -> float:
        """Of what is rotated."""
        if self.mscale and self.mscale_all_dim:
            return self._scale(self.mscale) / self._scale(self.mscale_all_dim)
        return self._scale(1.0)

    @property
    def score_scale(self) -> float:
        """Of scores."""
        return self._scale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0


class LatentAttention(nnx.Module):
    """See the module; `q_lora_rank` None: queries straight from x."""

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
        self.rank, self.nope, self.rotated, self.v_dim = kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim
        self.num_heads, self.theta, self.interleaved, self.yarn = num_heads, theta, interleaved, yarn
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
        self, x: jax.Array, start: jax.Array, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """x [B, S, H]; the cache holds latents [B, 1, length, rank] and rotated keys [B, 1, length, rope dim]."""
        batch, length, _ = x.shape
        positions = positions_from(start, length)
        q = self.q_proj(x) if self.q_proj is not None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(batch, length, self.num_heads, self.nope + self.rotated)
        q = jnp.concatenate([q[..., : self.nope], self._rotate(q[..., self.nope :], positions)], axis=-1)
        both = self.kv_a_proj_with_mqa(x)
        latent = self.kv_a_layernorm(both[..., : self.rank])[:, None]
        shared = jnp.swapaxes(self._rotate(both[..., None, self.rank :], positions), 1, 2)
        if cache is not None:
            latent, shared = cache = (write_cache(cache[0], latent, start), write_cache(cache[1], shared, start))
            latent = clear_beyond(latent, positions)
        kv = self.kv_b_proj(latent[:, 0]).reshape(batch, -1, self.num_heads, self.nope + self.v_dim).swapaxes(1, 2)
        shared = jnp.broadcast_to(shared, (batch, self.num_heads, *shared.shape[2:]))
        k = jnp.concatenate([kv[..., : self.nope], shared.astype(kv.dtype)], axis=-1)
        scale = q.shape[-1] ** -0.5 * (1.0 if self.yarn is None else self.yarn.score_scale)
        out = attention(q, k, kv[..., self.nope :], positions, scale=scale)
        return self.o_proj(out.reshape(batch, length, -1)), cache

    def _rotate(self, x, positions):
        if self.yarn is None:
            return rope(x, positions, rope_frequency(self.theta, self.rotated), interleaved=self.interleaved)
        turned = rope(x, positions, self.yarn.frequency(self.theta, self.rotated), interleaved=self.interleaved)
        return turned if self.yarn.rotation_scale == 1 else (turned * self.yarn.rotation_scale).astype(x.dtype)
