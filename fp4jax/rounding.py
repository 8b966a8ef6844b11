"""Rounding and maxima that give the same bits on every backend, eager and under jit.

XLA may rewrite float arithmetic in ways that change the last bit; each helper names the rewrite that it prevents.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from pallas_kernels.simt.formats import E4M3_MAX

_F32_TINY = np.float32(np.finfo(np.float32).tiny)
_SIGN_BIT = np.uint32(1 << 31)
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)


def exact_precision(dtype: Any) -> lax.Precision | None:
    """The `precision` of products in `dtype`: HIGHEST for float32, as GPUs would use TF32; else None."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def div_rn(a: Float[Array, "..."] | np.float32, b: Float[Array, "..."] | np.float32) -> Float[Array, "..."]:
    """Returns a / b in f32, correctly rounded to nearest even, with a and b broadcast against each other.

    XLA may rewrite an f32 division as a multiplication by the reciprocal (CPU) or approximate it (GPU). This function
    divides in float64 and rounds the quotient to f32. Rounding twice gives the correctly rounded f32 quotient, because
    float64 has 53 significant bits and 2 * 24 + 2 = 50 are enough. Each barrier prevents one rewrite by XLA: the one
    before the division keeps XLA from multiplying by the reciprocal of a broadcast divisor, the one on the float64
    quotient from dividing in f32 after all, and the one on the result from leaving out the rounding to f32 where the
    result is divided again (seen on a GPU under jit).
    """
    a, b = jnp.broadcast_arrays(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    with jax.enable_x64(True):
        a, b = lax.optimization_barrier((a.astype(jnp.float64), b.astype(jnp.float64)))
        quotient = lax.optimization_barrier(a / b).astype(jnp.float32)
    return lax.optimization_barrier(quotient)


def round_to_e4m3(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds f32 to float8_e4m3fn: to nearest even, saturating at +-448. Every NaN becomes the byte 0x7F.

    Values are clipped first because the plain cast gives NaN beyond 464. Without the barrier, XLA:GPU under jit cancels
    this cast against a later cast back to f32, and the values stay unrounded.
    """
    clipped = jnp.where(jnp.isnan(x), np.float32(np.nan), jnp.clip(x, -E4M3_MAX, E4M3_MAX))
    return lax.optimization_barrier(clipped.astype(jnp.float8_e4m3fn))


def round_to_e2m1(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Rounds f32 to e2m1 codes 0..15 (u8): to nearest, ties to the even code, saturating at +-6.

    Zeros keep their sign: -0 becomes code 8.
    """
    a = jnp.abs(x)
    # The code is the number of midpoints between neighbouring values that |x| has passed. A value on a midpoint goes up
    # (>=) only where the upper code is even.
    passed = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
    code = functools.reduce(operator.add, (midpoint.astype(jnp.uint8) for midpoint in passed))
    return code | ((lax.bitcast_convert_type(x, jnp.uint32) >> 28).astype(jnp.uint8) & 8)


def largest_magnitude(x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None) -> Float[Array, "..."]:
    """Returns the largest |x| in f32 over `axis` (None: all axes): NaN if a value is NaN, 0 if there are no values.

    The maximum is taken over the bits of |x| as integers. Their order is that of the magnitudes, with Inf above all
    finite values and NaN above Inf. A maximum of floats would not do: XLA:CPU loses NaNs when it reduces a short axis
    of an array of some thousand elements or more.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & _MAGNITUDE_BITS
    return lax.bitcast_convert_type(jnp.max(bits, axis=axis, initial=0), jnp.float32)


def flush_subnormals(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Replaces f32 values with |x| < 2^-126 by zeros of the same sign.

    XLA:CPU flushes such subnormal numbers anyway; with this function every backend does.
    """
    sign_only = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) & _SIGN_BIT, jnp.float32)
    return jnp.where(jnp.abs(x) < _F32_TINY, sign_only, x)
