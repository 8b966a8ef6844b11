"""Rounding that gives the same bits on every backend, eager and under jit: division, e4m3, e2m1, subnormals.

XLA may rewrite float arithmetic in ways that change the last bit; each helper names the rewrite that it prevents.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

E4M3_MAX = 448.0
_F32_TINY = np.float32(np.finfo(np.float32).tiny)
_SIGN_BIT = np.uint32(1 << 31)


def div_rn(a: Float[Array, "..."] | np.float32, b: Float[Array, "..."] | np.float32) -> Float[Array, "..."]:
    """a / b in f32, broadcast and correctly rounded (nearest even).

    XLA may rewrite f32 division as multiplication by a reciprocal (CPU) or approximate it (GPU). The float64 quotient
    rounded to f32 is the correctly rounded f32 quotient (53 >= 2 * 24 + 2 bits). The barriers keep XLA from turning it
    back into f32 division, from multiplying by the reciprocal of a broadcast divisor, and, where one quotient divides
    another, from leaving out the rounding to f32 in between (seen on a GPU under jit).
    """
    a, b = jnp.broadcast_arrays(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    with jax.enable_x64(True):
        a, b = lax.optimization_barrier((a.astype(jnp.float64), b.astype(jnp.float64)))
        quotient = lax.optimization_barrier(a / b).astype(jnp.float32)
    return lax.optimization_barrier(quotient)


def round_to_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """f32 -> float8_e4m3fn, nearest even, saturating at +-448; NaN stays NaN.

    The plain cast gives NaN beyond 464, and XLA:GPU drops the rounding of f32 -> e4m3 -> f32 under jit without the
    barrier.
    """
    return lax.optimization_barrier(jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn))


def round_to_e2m1(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """f32 -> e2m1 code 0..15 (u8): nearest, ties to the even code, saturating at +-6; the sign of zero is kept."""
    a = jnp.abs(x)
    # Midpoints between neighbours; a tie goes up only where the upper code is even.
    code = (a > 0.25).astype(jnp.uint8) + (a >= 0.75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5.0)
    return code | ((lax.bitcast_convert_type(x, jnp.uint32) >> 28).astype(jnp.uint8) & 8)


def flush_subnormals(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """f32 values below 2^-126 -> zero of the same sign: what XLA:CPU does anyway, made explicit for all backends."""
    sign_only = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & _SIGN_BIT, jnp.float32)
    return jnp.where(jnp.abs(x) < _F32_TINY, sign_only, x)
