"""RMSNorm."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(x: Float[Array, "... H"], weight: Float[Array, "H"], epsilon: float) -> Float[Array, "... H"]:
    """Returns x / sqrt(mean(x^2) + epsilon) * weight over the last axis, computed in float32; the result is float32."""
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
    return x * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)
