"""Rows as they are sent: loaded by the lanes of a warpgroup, quantized if asked for, put together in shared memory."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import lanes
from pallas_kernels.nvfp4_codec import (
    BLOCK_SIZE,
    block_amax,
    computed_scale,
    encode_block,
    encode_scales,
    unpack_bf16,
)
from pallas_kernels.quantize import AMAX_DIVISOR, as_u32, finite_amax

# Two rows per warpgroup are in registers: one that is made, one on its way.
_MAX_ROW_BYTES = 2**15
PIECE = 16  # bytes the copy engine moves at least, and a lane at most


def is_single(part: Any) -> bool:
    """One 32-bit value per row: the lanes store it, not the copy engine."""
    return part.shape[1] == 1 and part.dtype.itemsize == 4


def row_maker(parts: Sequence[Any], quantize_scale: Any) -> "CopiedRows | QuantizedRows":
    """For parts [T, n] that are sent as they are (None), or one [T, H] that becomes NVFP4."""
    return CopiedRows(parts) if quantize_scale is None else QuantizedRows(parts[0], quantize_scale)


def check_parts(parts: Sequence[Any], quantize_scale: Any) -> str | None:
    """None if rows can be made of these (arrays or structs), else what does not fit."""
    if quantize_scale is not None:
        x = parts[0]
        if x.dtype not in (jnp.bfloat16, jnp.float32) or x.shape[1] % BLOCK_SIZE:
            return f"x must be bfloat16 or float32 [T, H], H a multiple of {BLOCK_SIZE}, got {x.dtype} {x.shape}"
        if x.shape[1] * x.dtype.itemsize > _MAX_ROW_BYTES:
            return f"rows of x must be at most {_MAX_ROW_BYTES} bytes, got {x.dtype} {x.shape}"
    sent = row_maker(parts, quantize_scale).sent
    if [is_single(p) for p in sent] != sorted(is_single(p) for p in sent):
        return "single values must come last"
    for p in sent:
        row_bytes = p.shape[1] * p.dtype.itemsize
        if not is_single(p) and (row_bytes % PIECE or not row_bytes):
            return f"what is sent of a row must be a multiple of {PIECE} bytes, got {p.dtype} {p.shape}"
    return None


class CopiedRows:
    """Rows that are sent as they are. sent: what a row consists of; operands: what the kernel reads."""

    def __init__(self, parts: Sequence[Any]):
        self.sent = self.operands = list(parts)

    def _pieces(self, part):
        """Pieces of a row, and for each step of the lanes which they take."""
        pieces = part.shape[1] * part.dtype.itemsize // PIECE
        return pieces, [start + lanes.lane_index() for start in range(0, pieces, lanes.LANES)]

    def load(self, sources: Any, token: jax.Array, valid: jax.Array) -> list[jax.Array]:
        """The token's row as u32 lane arrays; nothing is read where not `valid`."""
        words = []
        for source, part in zip(sources, self.sent, strict=True):
            if is_single(part):
                words += lanes.gather(source, lanes.splat(token, jnp.int32), where=valid)
                continue
            pieces, steps = self._pieces(part)
            for piece in steps:
                words += lanes.gather(source, token * pieces + piece, PIECE // 4, where=valid & (piece < pieces))
        return words

    def store(
        self, sources: Any, loaded: Sequence[jax.Array], buffers: Any, stage: jax.Array, scratch: Any
    ) -> list[jax.Array]:
        """Puts what was loaded into the buffers; -> the single values."""
        del sources, scratch
        words, buffers, singles = list(loaded), list(buffers), []
        for part in self.sent:
            if is_single(part):
                singles.append(words.pop(0))
                continue
            buffer = buffers.pop(0)
            pieces, steps = self._pieces(part)
            for piece in steps:
                four, words = words[: PIECE // 4], words[PIECE // 4 :]
                lanes.scatter(buffer, stage * pieces + piece, four, where=piece < pieces)
        return singles


class QuantizedRows:
    """bf16 or f32 rows that are sent as NVFP4, the exact form bit for bit; scale: f32 of one element or "per_token"."""

    def __init__(self, x: Any, scale: Any):
        tokens, hidden = x.shape
        self.is_bf16, self.blocks, self.per_token = (
            x.dtype == jnp.bfloat16,
            hidden // BLOCK_SIZE,
            isinstance(scale, str),
        )
        self.words = BLOCK_SIZE * x.dtype.itemsize // 4  # of a block
        self.sent = [
            jax.ShapeDtypeStruct((tokens, hidden // 2), jnp.uint8),
            jax.ShapeDtypeStruct((tokens, self.blocks), jnp.float8_e4m3fn),
        ]
        self.operands = [x]
        if self.per_token:
            self.sent.append(jax.ShapeDtypeStruct((tokens, 1), jnp.float32))
        else:
            self.operands.append(jnp.asarray(scale, jnp.float32).reshape(1))

    def _columns(self):
        return [start + lanes.lane_index() for start in range(0, self.blocks, lanes.LANES)]

    def load(self, sources: Any, token: jax.Array, valid: jax.Array) -> list[jax.Array]:
        """The token's row as u32 lane arrays; nothing is read where not `valid`."""
        words = []
        for column in self._columns():
            where = valid & (column < self.blocks)
            words += lanes.gather(sources[0], token * self.blocks + column, self.words, where=where)
        return words

    def store(
        self, sources: Any, loaded: Sequence[jax.Array], buffers: Any, stage: jax.Array, scratch: Any
    ) -> list[jax.Array]:
        """Puts codes and scales into the buffers; -> the global scale, if each token has its own. scratch: 4 words."""
        codes, scale_bytes = buffers

        def values(i):
            words = loaded[i * self.words : (i + 1) * self.words]
            return unpack_bf16(words) if self.is_bf16 else [lax.bitcast_convert_type(w, jnp.float32) for w in words]

        columns, singles = self._columns(), []
        if self.per_token:
            amax = lax.bitcast_convert_type(finite_amax([values(i) for i in range(len(columns))]), jnp.int32)
            amax = lax.bitcast_convert_type(lanes.largest(amax, scratch, 0), jnp.float32)  # ordered like their bits
            global_scale = computed_scale(amax, AMAX_DIVISOR)
            singles = [as_u32(global_scale)]
        else:
            global_scale = lanes.splat(sources[1][0], jnp.float32)
        scales = encode_scales(global_scale)
        for i, column in enumerate(columns):
            encoded = encode_block(values(i), block_amax(values(i)), scales, False)
            at, valid = stage * self.blocks + column, column < self.blocks
            lanes.scatter(codes, at, encoded.words, where=valid)
            lanes.scatter(scale_bytes, at, [encoded.scale_byte], dtype=jnp.uint8, where=valid)
        return singles
