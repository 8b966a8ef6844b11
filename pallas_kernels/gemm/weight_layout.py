"""The layout in which the grouped GEMM's kernel reads NVFP4 weights: tiles of 64 x 64 that decode in few instructions.

One tile is u32 [9, 64], 2304 contiguous bytes. Rows 0..7 of it hold codes. Thread t = 32 warp + 4 g + q of a warpgroup
reads four words at the flat positions 4 t + i, one for each slice i of 16 along K. A word has the thread's 8 codes of
the slice: those at row n = 16 warp + g + 8 h and column k = 16 i + 8 j + 2 q + b, for h, j, b in 0..1. These are the
values of its A fragment of a wgmma. Row 8 of the tile holds one word per row n, its four block scales: that of slice i
in byte i.

A code has a sign bit s and three bits eem of magnitude. The code of (h, j, b) sits in half b of the word, where a shift
and a mask make it the bf16 value * 2^-126 (sign at bit 15, eem at bits 8..6). The bits depend on r = 2 j + h, the
register of the fragment that the code goes to:

    r   sign  eem        r = 0: w & 0x81C081C0            r = 2: (w << 6 & 0x01C001C0) | (w << 2 & 0x80008000)
    0   15    8..6       r = 1: (w << 3) & 0x81C081C0     r = 3: (w >> 3 & 0x01C001C0) | (w << 1 & 0x80008000)
    1   12    5..3
    2   13    2..0       A scale is stored as E * 8 + M = 2^(E - 10) (1 + M / 8), unsigned, E = 1..18 for the finite
    3   14    11..9      e4m3 values: 16 * byte + 0x7600 are the bits of scale * 2^119 in bf16.

The product of the two, value * scale * 2^-7, is exact in bf16. A block with scale zero is stored as zero codes and byte
0. A negative scale is stored as a positive one, and its sign flips those of the codes. A NaN scale is stored as the
byte that decodes to a bf16 NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.simt.formats import BLOCK_SIZE

TILE = 64  # rows and columns of a tile of weights; a wgmma takes 64 rows
WORDS = 9  # rows of a packed tile: 8 of codes, 1 of scales
_SIGN_AT = (15, 12, 13, 14)  # bit of the sign, by register r
_MAGNITUDE_AT = (6, 3, 0, 9)  # lowest bit of the magnitude, by register r
_NAN_BYTE = 19 * 8 + 1  # decodes to exponent 255 with a mantissa that is not zero, a bf16 NaN


def check_shape(shape: tuple[int, ...]) -> str | None:
    """None if weights of this shape can have the layout, else what does not fit."""
    if len(shape) != 3 or shape[1] % TILE or shape[2] % TILE or 0 in shape:
        return f"weights must be [E, N, K], not empty, N and K multiples of {TILE}, got {shape}"
    return None


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the packed words of weights with shape [E, N, K]."""
    experts, n, k = shape
    return experts, n // TILE, k // TILE, WORDS, TILE


def pack(codes: jax.Array, scale_bytes: jax.Array) -> jax.Array:
    """Packs codes u8 [E, N, K] (one per byte) and e4m3 bytes u8 [E, N, K/16] into words u32 [E, N/64, K/64, 9, 64]."""
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
    """Inverse of `pack`: words u32 [.., N/64, K/64, 9, 64] to codes u8 [.., N, K] and e4m3 bytes u8 [.., N, K/16]."""
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
    """Stored byte of each scale, whether the codes of its block become zero, and 1 where their signs flip."""
    magnitude = scale_bytes & 0x7F
    return jnp.asarray(_STORED)[magnitude], magnitude == 0, (scale_bytes >> 7).astype(jnp.uint8)


def _decode_scales(encoded):
    return jnp.asarray(_E4M3)[encoded]


def _tables():
    """Tables: e4m3 byte without sign -> stored byte, and stored byte -> e4m3 byte."""
    stored, back = np.zeros(128, np.uint8), np.zeros(256, np.uint8)
    for byte in range(1, 127):
        exponent, mantissa = byte >> 3, byte & 7
        if exponent == 0:  # a subnormal, mantissa * 2^-9, is normalized
            shift = mantissa.bit_length() - 1
            exponent, mantissa = shift - 2, (mantissa << (3 - shift)) & 7
        stored[byte] = (exponent + 3) * 8 + mantissa
    stored[127] = _NAN_BYTE
    for byte in range(1, 128):
        back[stored[byte]] = byte
    return stored, back


_STORED, _E4M3 = _tables()
