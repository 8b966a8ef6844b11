"""The layout in which the grouped GEMM's kernel reads NVFP4 weights: tiles of 64 x 64 that decode in few instructions.

One tile is [9, 64] u32, 2304 contiguous bytes. Rows 0..7 hold codes: thread t = 32 warp + 4 g + q of the warpgroup
finds the words of its wgmma A fragments for the four k16 slices i at the flat positions 4 t + i, its 8 codes being rows
n = 16 warp + g + 8 h and columns k = 16 i + 8 j + 2 q + b. Row 8 holds one word per row n: its four block scales,
slice i in byte i.

A code s eem of (h, j, b) sits in half b of the word so that a shift and a mask make it the bf16 value * 2^-126 (sign at
bit 15, eem at bits 8..6), for register r = 2 j + h of the fragment:

    r   sign  eem        r = 0: w & 0x81C081C0            r = 2: (w << 6 & 0x01C001C0) | (w << 2 & 0x80008000)
    0   15    8..6       r = 1: (w << 3) & 0x81C081C0     r = 3: (w >> 3 & 0x01C001C0) | (w << 1 & 0x80008000)
    1   12    5..3
    2   13    2..0       A scale is stored as E * 8 + M = 2^(E - 10) (1 + M / 8), unsigned, E = 1..18 for the finite
    3   14    11..9      e4m3 values: 16 * byte + 0x7600 are the bits of scale * 2^119 in bf16.

code * scale * 2^-7 is then one exact bf16 product. Zero scales become zero codes with byte 0, negative ones move their
sign to the codes, and NaN is the byte that decodes to a bf16 NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.simt.formats import BLOCK_SIZE

TILE = 64
WORDS = 9  # rows of a tile: 8 of codes, 1 of scales
_SIGN_AT = (15, 12, 13, 14)  # of register r
_MAGNITUDE_AT = (6, 3, 0, 9)
_NAN_BYTE = 19 * 8 + 1  # exponent 255 and a mantissa in bf16


def check_shape(shape: tuple[int, ...]) -> str | None:
    """None if weights [E, N, K] of this shape have the layout, else what does not fit."""
    if len(shape) != 3 or shape[1] % TILE or shape[2] % TILE or 0 in shape:
        return f"weights must be [E, N, K], not empty, N and K multiples of {TILE}, got {shape}"
    return None


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the words of weights [E, N, K]."""
    experts, n, k = shape
    return experts, n // TILE, k // TILE, WORDS, TILE


def pack(codes: jax.Array, scale_bytes: jax.Array) -> jax.Array:
    """Codes u8 [E, N, K] (one a byte), e4m3 bytes u8 [E, N, K/16] -> u32 [E, N/64, K/64, 9, 64]."""
    experts, n, k = codes.shape
    encoded, clear, flip = _encode_scales(scale_bytes)
    codes = codes.reshape(experts, n, -1, BLOCK_SIZE) ^ (flip[..., None] << 3)
    codes = jnp.where(clear[..., None], jnp.uint8(0), codes)
    tiles = codes.reshape(experts, n // TILE, 4, 2, 8, k // TILE, 4, 2, 4, 2).transpose(0, 1, 5, 2, 3, 4, 6, 7, 8, 9)
    tiles = tiles.astype(jnp.uint32)  # [E, nt, kt, warp, h, g, i, j, q, b]
    words = jnp.zeros((*tiles.shape[:4], 8, 4, 4), jnp.uint32)  # [E, nt, kt, warp, g, i, q]
    for h, j, b in np.ndindex(2, 2, 2):
        code, register = tiles[:, :, :, :, h, :, :, j, :, b], 2 * j + h
        sign, magnitude = (code >> 3) << _SIGN_AT[register], (code & 7) << _MAGNITUDE_AT[register]
        words = words | (sign | magnitude) << (16 * b)
    words = words.swapaxes(-1, -2).reshape(*words.shape[:3], WORDS - 1, TILE)  # [.., warp, g, q, i] in this order
    scales = encoded.reshape(experts, n // TILE, TILE, k // TILE, 4).transpose(0, 1, 3, 2, 4).astype(jnp.uint32)
    scale_word = scales[..., 0] | scales[..., 1] << 8 | scales[..., 2] << 16 | scales[..., 3] << 24
    return jnp.concatenate([words, scale_word[..., None, :]], axis=-2)


def unpack(packed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """u32 [.., N/64, K/64, 9, 64] -> codes u8 [.., N, K], e4m3 bytes u8 [.., N, K/16]: the inverse of `pack`."""
    *lead, n_tiles, k_tiles, _, _ = packed.shape
    words = packed[..., : WORDS - 1, :].reshape(*lead, n_tiles, k_tiles, 4, 8, 4, 4).swapaxes(-1, -2)
    tiles = []
    for h, j, b in np.ndindex(2, 2, 2):
        half, register = words >> (16 * b), 2 * j + h
        tiles.append((half >> _SIGN_AT[register] & 1) << 3 | (half >> _MAGNITUDE_AT[register] & 7))
    codes = jnp.stack(tiles, axis=-1).astype(jnp.uint8).reshape(*words.shape, 2, 2, 2)  # [.., warp, g, i, q, h, j, b]
    d = len(lead)
    # -> [.., nt, warp, h, g, kt, i, j, q, b]
    order = (*range(d), d, d + 2, d + 6, d + 3, d + 1, d + 4, d + 7, d + 5, d + 8)
    codes = codes.transpose(order).reshape(*lead, n_tiles * TILE, k_tiles * TILE)
    scale_word = packed[..., WORDS - 1, :]
    encoded = jnp.stack([scale_word >> s & 0xFF for s in (0, 8, 16, 24)], axis=-1).astype(jnp.uint8)
    encoded = encoded.swapaxes(-3, -2).reshape(*lead, n_tiles * TILE, k_tiles * 4)
    return codes, _decode_scales(encoded)


def _encode_scales(scale_bytes):
    """-> stored bytes, blocks whose codes become zero, 1 where the sign moves to the codes."""
    magnitude = scale_bytes & 0x7F
    return jnp.asarray(_STORED)[magnitude], magnitude == 0, (scale_bytes >> 7).astype(jnp.uint8)


def _decode_scales(encoded):
    return jnp.asarray(_E4M3)[encoded]


def _tables():
    """e4m3 magnitude byte -> stored byte, and back."""
    stored, back = np.zeros(128, np.uint8), np.zeros(256, np.uint8)
    for byte in range(1, 127):
        exponent, mantissa = byte >> 3, byte & 7
        if exponent == 0:  # subnormal: mantissa * 2^-9, normalized
            shift = mantissa.bit_length() - 1
            exponent, mantissa = shift - 2, (mantissa << (3 - shift)) & 7
        stored[byte] = (exponent + 3) * 8 + mantissa
    stored[127] = _NAN_BYTE
    for byte in range(1, 128):
        back[stored[byte]] = byte
    return stored, back


_STORED, _E4M3 = _tables()
