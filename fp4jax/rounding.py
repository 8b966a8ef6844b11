"""Rounding and maxima that give the same bits on every backend, eager and under jit.

XLA may rewrite float arithmetic in ways that change the last bit; each helper names the rewrite that it prevents.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.simt.formats import E4M3_MAX

_F32_TINY = np.float32(np.finfo(np.float32).tiny)
_SIGN_BIT = np.uint32(1 << 31)
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)


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
    """f32 -> float8_e4m3fn, nearest even, saturating at +-448; every NaN becomes 0x7F.

    The plain cast gives NaN beyond 464, and XLA:GPU drops the rounding of f32 -> e4m3 -> f32 under jit without the
    barrier.
    """
    clipped = jnp.where(jnp.isnan(x), np.float32(np.nan), jnp.clip(x, -E4M3_MAX, E4M3_MAX))
    return lax.optimization_barrier(clipped.astype(jnp.float8_e4m3fn))


def round_to_e2m1(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """f32 -> e2m1 code 0..15 (u8): nearest, ties to the even code, saturating at +-6; the sign of zero is kept."""
    a = jnp.abs(x)
    # Midpoints between neighbours; a tie goes up only where the upper code is even.
    passed = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
    code = functools.reduce(operator.add, (midpoint.astype(jnp.uint8) for midpoint in passed))
    return code | ((lax.bitcast_convert_type(x, jnp.uint32) >> 28).astype(jnp.uint8) & 8)


def largest_magnitude(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """Largest |x| over `axis` (None: over all) in f32, 0 of no values; NaN where there is one.

    Magnitudes are ordered like their bits, Inf and then NaN on top. XLA:CPU's maximum of floats over a short axis loses
    NaNs from some thousand elements on.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & _MAGNITUDE_BITS
    return lax.bitcast_convert_type(jnp.max(bits, axis=axis, initial=0), jnp.float32)


def flush_subnormals(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """f32 values below 2^-126 -> zero of the same sign: what XLA:CPU does anyway, made explicit for all backends."""
    sign_only = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & _SIGN_BIT, jnp.float32)
    return jnp.where(jnp.abs(x) < _F32_TINY, sign_only, x)
