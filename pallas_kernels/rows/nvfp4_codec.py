"""NVFP4 arithmetic on lane arrays: `fp4jax.nvfp4.quantize` with dialect "exact", bit for bit, and its inverse.

Each lane encodes one block of 16 values, which are 16 f32 lane arrays. The block's codes are 2 u32 words: element i is
at bits 4 (i % 8) of word i / 8. All functions are elementwise, so in interpret mode they run on arrays of any shape and
are tested without a GPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.simt import lane_math, lanes
from pallas_kernels.simt.formats import E2M1_MAX, E4M3_MAX, F32_MAX, F32_TINY, GLOBAL_SCALE_RANGE

_SIGN = np.uint32(1 << 31)

# Adding 2^23 to a small positive f32 rounds it to an integer (nearest, ties to even). The bits of the sum are then
# _MAGIC_BITS + integer.
_MAGIC = 2.0**23
_MAGIC_BITS = 0x4B000000


class EncodeScales(NamedTuple):
    """A global scale, prepared to encode blocks: scale, gs = 1 / scale and inverse = 1 / gs, both correctly rounded."""

    gs: jax.Array
    inverse: jax.Array
    scale: lanes.Value


class Encoded(NamedTuple):
    """An encoded block.

    words: the 16 codes. scale_byte: the e4m3 block scale, in a u32. codes_f32: 2^23 + magnitude, for each of the 16
    codes. scale: the value of the block scale, f32.
    """

    words: tuple[jax.Array, jax.Array]
    scale_byte: jax.Array
    codes_f32: list[jax.Array]
    scale: jax.Array


def encode_scales(global_scale: lanes.Value) -> EncodeScales:
    """Prepares a global scale, f32, the factor that decodes."""
    gs = lane_math.div_rn(1.0, global_scale)
    return EncodeScales(gs, lane_math.div_rn(1.0, gs), global_scale)


def computed_scale(amax: jax.Array, divisor: float) -> jax.Array:
    """Global scale for an amax: amax / divisor, clipped to [2^-100, 2^100], and 1 where amax is 0."""
    smallest, largest = (np.float32(limit) for limit in GLOBAL_SCALE_RANGE)
    scale = jnp.clip(lane_math.div_rn(amax, divisor), smallest, largest)
    return jnp.where(amax == 0, np.float32(1), scale)


def block_amax(values: Sequence[jax.Array]) -> jax.Array:
    """Largest magnitude of a block. It is 0 if below 2^-126, and NaN if a value is NaN or Inf."""
    amax = jnp.abs(values[0])
    for v in values[1:]:
        amax = jnp.maximum(amax, jnp.abs(v))  # lowers to max.NaN: the maximum with a NaN is NaN
    amax = jnp.where(amax <= F32_MAX, amax, np.float32(np.nan))
    return jnp.where(amax < F32_TINY, np.float32(0), amax)


def encode_block(values: Sequence[jax.Array], amax: jax.Array, scales: EncodeScales, four_over_six: bool) -> Encoded:
    """Encodes a block as dialect "exact" of `fp4jax.nvfp4.quantize` does, where the formulas come from:

        block scale = e4m3(min(amax * (gs * (1/6)), 448))
        code = e2m1(x * min(1 / (block scale * inverse), F32_MAX))

    With four_over_six the block is also encoded with 1/4 in place of 1/6, and the encoding with the smaller squared
    error is taken; on a tie that with 1/6.
    """
    six = _encode_candidate(values, amax, scales, 1 / E2M1_MAX)
    if not four_over_six:
        return six
    four = _encode_candidate(values, amax, scales, 1 / 4)
    wins = _squared_error(values, four, scales.scale) < _squared_error(values, six, scales.scale)
    return jax.tree.map(lambda a, b: jnp.where(wins, a, b), four, six)


def _encode_candidate(values, amax, scales, factor):
    raw = lane_math.mul_rn(amax, lane_math.mul_rn(scales.gs, np.float32(factor)))
    scale_byte, scale = round_to_e4m3(raw)
    multiplier = jnp.minimum(lane_math.div_rn(1.0, lane_math.mul_rn(scale, scales.inverse)), F32_MAX)
    multiplier = jnp.where(amax == 0, np.float32(0), multiplier)
    codes = [round_to_e2m1(lane_math.abs_mul_flush(v, multiplier)) for v in values]
    # The scale of a block with a NaN or Inf is NaN. All implementations store zero codes for such a block.
    kept = jnp.where(scale == scale, np.uint32(0xFFFFFFFF), np.uint32(0))
    return Encoded((_pack(codes[:8], values[:8]) & kept, _pack(codes[8:], values[8:]) & kept), scale_byte, codes, scale)


def round_to_e4m3(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds f32 >= 0 to e4m3: nearest even, saturating at 448, NaN stays NaN. Returns byte (u32) and value (f32)."""
    x = jnp.where(x > E4M3_MAX, np.float32(E4M3_MAX), x)
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # Normal numbers keep 3 bits of the mantissa. The exponent bias changes from 127 to 7.
    kept = (bits + np.uint32(0x7FFFF) + ((bits >> 20) & 1)) >> 20
    # Below 2^-6 e4m3 values are 2^-9 apart, as f32 values are at 2^14.
    shifted = lane_math.add_rn(x, np.float32(2.0**14))
    small = x < 2.0**-6
    byte = jnp.where(small, lax.bitcast_convert_type(shifted, jnp.uint32) - _bits(2.0**14), kept - np.uint32(120 << 3))
    value = jnp.where(small, shifted - np.float32(2.0**14), lax.bitcast_convert_type(kept << 20, jnp.float32))
    nan = x != x
    return jnp.where(nan, np.uint32(0x7F), byte), jnp.where(nan, x, value)


def round_to_e2m1(magnitude: jax.Array) -> jax.Array:
    """Rounds f32 >= 0 to e2m1: nearest, ties to the even code, saturating. Returns 2^23 + code (0..7) as f32.

    A value v of the format has the code min(2v, v + 2, v/2 + 4), and the midpoint of two values is mapped to the
    midpoint of their codes. Rounding is monotone, so the three terms may be rounded before the minimum is taken: the
    addition of 2^23 rounds each of them once.
    """
    lines = (
        magnitude * np.float32(2) + np.float32(_MAGIC),
        magnitude + np.float32(_MAGIC + 2),
        magnitude * np.float32(0.5) + np.float32(_MAGIC + 4),
    )
    # Positive floats are ordered as their bits are. The minimum of integers also turns a NaN into the largest code.
    code = np.uint32(_MAGIC_BITS + 7)
    for line in lines:
        code = jnp.minimum(lax.bitcast_convert_type(line, jnp.uint32), code)
    return lax.bitcast_convert_type(code, jnp.float32)


def code_value(code_f32: jax.Array) -> jax.Array:
    """Inverse of `round_to_e2m1`: 2^23 + code c to the magnitude max(c/2, c - 2, 2c - 8)."""
    c = code_f32 - np.float32(_MAGIC)
    lower = jnp.maximum(c * np.float32(0.5), c - np.float32(2))
    return jnp.maximum(lower, c * np.float32(2) - np.float32(8))


def decoded_bf16(encoded: Encoded, values: Sequence[jax.Array]) -> list[jax.Array]:
    """The decoded block, code * block scale, as u32 words of two bf16 each. The products are exact.

    `values` are those that were encoded; the signs come from them. The three bits of a code's magnitude, put at bits
    8..6 of a bf16, are the magnitude * 2^-126 (subnormal for code 1). Products with scale * 2^119 and with 2^7, both
    exact, undo that factor.
    """
    scale = encoded.scale * np.float32(2.0**119)
    scale = lane_math.pack_bf16(scale, scale)
    words = []
    for i in range(0, len(values), 2):
        low, high = (lax.bitcast_convert_type(c, jnp.uint32) for c in encoded.codes_f32[i : i + 2])
        # _MAGIC_BITS shifted left by 22 is 0 modulo 2^32; shifted by 6 it has to be subtracted.
        magnitudes = (high << 22) + (low << 6) - np.uint32(_MAGIC_BITS << 6 & 0xFFFFFFFF)
        signs = lane_math.high_halves(*values[i : i + 2]) & np.uint32(0x80008000)
        words.append(lane_math.decode_bf16x2(magnitudes | signs, scale))
    return words


def decode_word(word: jax.Array, scale: jax.Array) -> list[jax.Array]:
    """Decodes the 8 codes of a word to f32 lane arrays code * block scale. Exact: a product has 6 significant bits."""
    values = []
    for at in range(0, 32, 4):
        magnitude = code_value(lax.bitcast_convert_type(word >> at & 7 | np.uint32(_MAGIC_BITS), jnp.float32))
        sign = word << (28 - at) & _SIGN
        signed = lax.bitcast_convert_type(lax.bitcast_convert_type(magnitude, jnp.uint32) | sign, jnp.float32)
        values.append(lane_math.mul_rn(signed, scale))
    return values


def e4m3_value(byte: jax.Array) -> jax.Array:
    """f32 value of an e4m3 byte in a u32; 0x7F and 0xFF are NaN. Uses no subnormal f32, which a CPU would flush."""
    magnitude = byte & 0x7F
    normal = lax.bitcast_convert_type((magnitude << 20) + np.uint32(120 << 23), jnp.float32)
    integer = lax.bitcast_convert_type(magnitude | np.uint32(_MAGIC_BITS), jnp.float32) - np.float32(_MAGIC)
    value = jnp.where(magnitude < 8, integer * np.float32(2.0**-9), normal)
    value = jnp.where(magnitude == 0x7F, np.float32(np.nan), value)
    sign = (byte & 0x80) << 24
    return lax.bitcast_convert_type(lax.bitcast_convert_type(value, jnp.uint32) | sign, jnp.float32)


def unpack_bf16(words: Sequence[jax.Array]) -> list[jax.Array]:
    """Unpacks u32 lane arrays of two bf16 each to f32 lane arrays, in order."""
    halves = []
    for w in words:
        halves += [w << 16, w & np.uint32(0xFFFF0000)]
    return [lax.bitcast_convert_type(h, jnp.float32) for h in halves]


def pack_exact_bf16(values: Sequence[jax.Array]) -> list[jax.Array]:
    """Packs f32 lane arrays, whose values bf16 can represent, into u32 words of two bf16 each."""
    bits = [lax.bitcast_convert_type(v, jnp.uint32) for v in values]
    return [(low >> 16) | (high & np.uint32(0xFFFF0000)) for low, high in zip(bits[::2], bits[1::2], strict=True)]


def with_sign_of(magnitude: jax.Array, x: jax.Array) -> jax.Array:
    """`magnitude`, which is not negative, with the sign bit of x."""
    sign = lax.bitcast_convert_type(x, jnp.uint32) & _SIGN
    return lax.bitcast_convert_type(lax.bitcast_convert_type(magnitude, jnp.uint32) | sign, jnp.float32)


def _pack(codes, values):
    """One word of 8 codes, from 2^23 + magnitude of each and from the values that give the signs."""
    # Shifted left by 8 or more, _MAGIC_BITS is 0 modulo 2^32, so only those of the first two codes are subtracted.
    word: Any = np.uint32(-(_MAGIC_BITS + (_MAGIC_BITS << 4)) % 2**32)
    for i, code in enumerate(codes):
        word = word + (lax.bitcast_convert_type(code, jnp.uint32) << (4 * i))
    for i, value in enumerate(values):
        sign = lax.bitcast_convert_type(value, jnp.uint32) >> (28 - 4 * i)
        word = word | (sign & np.uint32(8 << (4 * i)))
    return word


def _squared_error(values, encoded, scale):
    """Sum over the block of (x - decoded value)^2 in f32.

    The second half of the terms is added to the first until one is left. Errors and squares below 2^-126 count as zero.
    """
    squares = []
    for v, code in zip(values, encoded.codes_f32, strict=True):
        value = lane_math.mul_rn(lane_math.mul_rn(code_value(code), encoded.scale), scale)
        error = _flush(lane_math.add_rn(_flush(v), -with_sign_of(value, v)))
        squares.append(_flush(lane_math.mul_rn(error, error)))
    while len(squares) > 1:
        half = len(squares) // 2
        squares = [lane_math.add_rn(a, b) for a, b in zip(squares[:half], squares[half:], strict=True)]
    return squares[0]


def _flush(x):
    return jnp.where(jnp.abs(x) < F32_TINY, np.float32(0), x)


def _bits(value):
    return np.float32(value).view(np.uint32)
