"""Arithmetic on lane arrays whose rounding no compiler pass may change, mostly as single PTX instructions."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.simt import lanes
from pallas_kernels.simt.formats import E4M3_MAX, F32_TINY


def mul_rn(a: lanes.Value, b: lanes.Value) -> jax.Array:
    """a * b rounded to nearest even, never contracted into an FMA."""
    return lanes.instruction("mul.rn.f32 $0, $1, $2;", lambda a, b: lax.optimization_barrier(a * b), a, b)


def add_rn(a: lanes.Value, b: lanes.Value) -> jax.Array:
    """a + b rounded to nearest even, never contracted into an FMA."""
    return lanes.instruction("add.rn.f32 $0, $1, $2;", lambda a, b: lax.optimization_barrier(a + b), a, b)


def fma_rn(a: lanes.Value, b: lanes.Value, c: lanes.Value) -> jax.Array:
    """a * b + c, rounded once."""
    return lanes.instruction("fma.rn.f32 $0, $1, $2, $3;", _in_float64(lambda a, b, c: a * b + c), a, b, c)


def div_rn(a: lanes.Value, b: lanes.Value) -> jax.Array:
    """a / b, correctly rounded."""
    return lanes.instruction("div.rn.f32 $0, $1, $2;", _in_float64(lambda a, b: a / b), a, b)


def abs_mul_flush(a: lanes.Value, b: lanes.Value) -> jax.Array:
    """|a| * b. Subnormal operands and results count as zero."""

    def flushed(a, b):
        a, b = (jnp.where(jnp.abs(v) < F32_TINY, np.float32(0), jnp.abs(v)) for v in (a, b))
        product = a * b
        return jnp.where(product < F32_TINY, np.float32(0), product)

    return lanes.instruction("{ .reg .f32 t; abs.f32 t, $1; mul.rn.ftz.f32 $0, t, $2; }", flushed, a, b)


def reciprocal_approx(a: jax.Array) -> jax.Array:
    """1 / a within 1 ulp for 2^-126 <= |a| <= 2^126."""
    return lanes.instruction("rcp.approx.ftz.f32 $0, $1;", lambda a: np.float32(1) / a, a)


def reciprocal_approx_subnormal(a: jax.Array) -> jax.Array:
    """1 / a within 1 ulp for any a, results below 2^-126 too. It takes more instructions than `reciprocal_approx`."""
    return lanes.instruction("rcp.approx.f32 $0, $1;", lambda a: np.float32(1) / a, a)


def max_u16x2(a: jax.Array, b: jax.Array) -> jax.Array:
    """Maximum of a and b in each of the two unsigned 16-bit halves of u32 lane arrays."""

    def halves(a, b):
        low = jnp.maximum(a & 0xFFFF, b & 0xFFFF)
        return jnp.maximum(a >> 16, b >> 16) << 16 | low

    return lanes.instruction("max.u16x2 $0, $1, $2;", halves, a, b, dtype=jnp.uint32)


def exp2_approx(a: jax.Array) -> jax.Array:
    """2^a within 2 ulp. Results below 2^-126 are zero."""
    return lanes.instruction("ex2.approx.ftz.f32 $0, $1;", _in_float64(jnp.exp2), a)


def exp2_approx_subnormal(a: jax.Array) -> jax.Array:
    """2^a within 2 ulp, results below 2^-126 too. It takes more instructions than `exp2_approx`."""
    return lanes.instruction("ex2.approx.f32 $0, $1;", _in_float64(jnp.exp2), a)


def pack_bf16(low: jax.Array, high: jax.Array) -> jax.Array:
    """Rounds two f32 to bf16 (nearest even, NaN stays NaN) and packs them into one u32."""

    def packed(low, high):
        both = jnp.stack([low, high], axis=-1).astype(jnp.bfloat16)
        return lax.bitcast_convert_type(both, jnp.uint32)

    return lanes.instruction("cvt.rn.bf16x2.f32 $0, $2, $1;", packed, low, high, dtype=jnp.uint32)


def pack_e4m3(values: Sequence[jax.Array]) -> jax.Array:
    """Rounds four f32 to e4m3 (nearest even, saturating at +-448, NaN becomes 0x7F) and packs them into one u32."""

    def packed(*values):
        x = jnp.clip(jnp.stack(values, axis=-1), -E4M3_MAX, E4M3_MAX)
        codes = lax.bitcast_convert_type(lax.optimization_barrier(x.astype(jnp.float8_e4m3fn)), jnp.uint8)
        return lax.bitcast_convert_type(jnp.where(x != x, np.uint8(0x7F), codes), jnp.uint32)

    low, high = (f"cvt.rn.satfinite.e4m3x2.f32 {t}, ${i + 1}, ${i};" for t, i in (("a", 1), ("b", 3)))
    asm = f"{{ .reg .b16 a, b; {low} {high} mov.b32 $0, {{a, b}}; }}"
    return lanes.instruction(asm, packed, *values, dtype=jnp.uint32)


def high_halves(low: jax.Array, high: jax.Array) -> jax.Array:
    """The upper 16 bits of two f32, packed into one u32."""

    def halves(low, high):
        low, high = (lax.bitcast_convert_type(v, jnp.uint32) for v in (low, high))
        return (low >> 16) | (high & np.uint32(0xFFFF0000))

    asm = "{ .reg .b32 a, b; mov.b32 a, $1; mov.b32 b, $2; prmt.b32 $0, a, b, 0x7632; }"
    return lanes.instruction(asm, halves, low, high, dtype=jnp.uint32)


def decode_bf16x2(words: jax.Array, scale: jax.Array) -> jax.Array:
    """words * scale * 2^7 in both bf16 halves, which is value * s for words = value * 2^-126 and scale = s * 2^119."""

    def decoded(words, scale):
        halves = []
        for shift in (16, 0):  # computes the value from bits 8..6 in f32: as a subnormal bf16 a CPU would flush it
            code = (words << shift >> 22 & 7).astype(jnp.float32)
            value = jnp.maximum(jnp.maximum(code * np.float32(0.5), code - np.float32(2)), code * 2 - np.float32(8))
            factor = lax.bitcast_convert_type(scale & np.uint32(0xFFFF0000), jnp.float32) * np.float32(2.0**-119)
            bits = lax.bitcast_convert_type(value * factor, jnp.uint32)
            halves.append(bits | (words << shift & np.uint32(0x80000000)))
        return (halves[0] >> 16) | (halves[1] & np.uint32(0xFFFF0000))

    asm = "{ .reg .b32 t, u; mov.b32 u, 0x43004300; mul.bf16x2 t, $1, $2; mul.bf16x2 $0, t, u; }"  # 2^7 twice
    return lanes.instruction(asm, decoded, words, scale, dtype=jnp.uint32)


def negative_fma_rn(a: jax.Array, b: jax.Array, c: lanes.Value) -> jax.Array:
    """-a * b + c, rounded once. The compiler folds the sign into the FMA."""
    asm = "{ .reg .f32 t; neg.f32 t, $1; fma.rn.f32 $0, t, $2, $3; }"
    return lanes.instruction(asm, _in_float64(lambda a, b, c: c - a * b), a, b, c)


def _in_float64(function):
    """The function computed in float64 and rounded to f32. In float64 XLA:CPU neither contracts nor approximates."""

    def run(*args):
        with jax.enable_x64(True):
            args = lax.optimization_barrier([a.astype(jnp.float64) for a in args])
            return lax.optimization_barrier(function(*args)).astype(jnp.float32)

    return run


def unsigned_div(a: jax.Array, b: int) -> jax.Array:
    """a // b for an i32 lane array a >= 0."""
    return lax.div(a.astype(jnp.uint32), jnp.full(a.shape, b, jnp.uint32)).astype(jnp.int32)


def as_u32(x: jax.Array) -> jax.Array:
    """The bits of an f32 lane array."""
    return lax.bitcast_convert_type(x, jnp.uint32)
