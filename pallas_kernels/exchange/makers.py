"""Makes the rows that dispatch sends: a warpgroup loads a token, may quantize it, and writes it to shared memory."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fp8.quantize import LANES_OF_GROUP, encode as encode_fp8
from pallas_kernels.rows.nvfp4_codec import (
    block_amax,
    computed_scale,
    encode_block,
    encode_scales,
    unpack_bf16,
)
from pallas_kernels.rows.quantize import finite_amax
from pallas_kernels.simt import lanes
from pallas_kernels.simt.formats import AMAX_DIVISOR, BLOCK_SIZE, FP8_BLOCK
from pallas_kernels.simt.hardware import PIECE_BYTES, WARP
from pallas_kernels.simt.lane_math import as_u32

# A warpgroup has two rows in registers: one that it makes, and the next one, which is being loaded.
_MAX_ROW_BYTES = 2**15


def is_single(part: Any) -> bool:
    """Whether a part is one 32-bit value per row. The lanes store such a part, not the copy engine."""
    return part.shape[1] == 1 and part.dtype.itemsize == 4


def row_maker(parts: Sequence[Any], encode: Any) -> "CopiedRows | NVFP4Rows | FP8Rows":
    """The maker of rows for these arguments of `dispatch`."""
    if encode is None:
        return CopiedRows(parts)
    return FP8Rows(parts[0]) if isinstance(encode, str) and encode == "fp8" else NVFP4Rows(parts[0], encode)


def check_parts(parts: Sequence[Any], encode: Any) -> str | None:
    """None if rows can be made of these (arrays or ShapeDtypeStructs), else what does not fit."""
    if encode is not None:
        x = parts[0]
        if x.dtype not in (jnp.bfloat16, jnp.float32) or x.shape[1] % BLOCK_SIZE:
            return f"x must be bfloat16 or float32 [T, H], H a multiple of {BLOCK_SIZE}, got {x.dtype} {x.shape}"
        if x.shape[1] * x.dtype.itemsize > _MAX_ROW_BYTES:
            return f"rows of x must be at most {_MAX_ROW_BYTES} bytes, got {x.dtype} {x.shape}"
    sent = row_maker(parts, encode).sent
    if [is_single(p) for p in sent] != sorted(is_single(p) for p in sent):
        return "single values must come last"
    for p in sent:
        row_bytes = p.shape[1] * p.dtype.itemsize
        if not is_single(p) and (row_bytes % PIECE_BYTES or not row_bytes):
            return f"what is sent of a row must be a multiple of {PIECE_BYTES} bytes, got {p.dtype} {p.shape}"
    return None


class CopiedRows:
    """Rows that are sent as they are.

    Every maker has two attributes: `sent`, the parts of a row that is sent, and `operands`, the arrays that it reads.
    """

    def __init__(self, parts: Sequence[Any]):
        self.sent = self.operands = list(parts)

    def _pieces(self, part):
        """Number of 16-byte pieces of a row, and for each step of the loop over them the piece that each lane takes."""
        pieces = part.shape[1] * part.dtype.itemsize // PIECE_BYTES
        return pieces, [start + lanes.lane_index() for start in range(0, pieces, lanes.LANES)]

    def load(self, sources: Any, token: jax.Array, valid: jax.Array) -> list[jax.Array]:
        """Loads the token's row as u32 lane arrays. Nothing is read if `valid` is False."""
        words = []
        for source, part in zip(sources, self.sent, strict=True):
            if is_single(part):
                words += lanes.gather(source, lanes.splat(token, jnp.int32), where=valid)
                continue
            pieces, steps = self._pieces(part)
            for piece in steps:
                words += lanes.gather(source, token * pieces + piece, PIECE_BYTES // 4, where=valid & (piece < pieces))
        return words

    def store(
        self, sources: Any, loaded: Sequence[jax.Array], buffers: Any, stage: jax.Array, scratch: Any
    ) -> list[jax.Array]:
        """Writes a loaded row to buffer number `stage` of each large part. Returns the single values."""
        del sources, scratch
        words, buffers, singles = list(loaded), list(buffers), []
        for part in self.sent:
            if is_single(part):
                singles.append(words.pop(0))
                continue
            buffer = buffers.pop(0)
            pieces, steps = self._pieces(part)
            for piece in steps:
                four, words = words[: PIECE_BYTES // 4], words[PIECE_BYTES // 4 :]
                lanes.scatter(buffer, stage * pieces + piece, four, where=piece < pieces)
        return singles


class _EncodedRows:
    """bf16 or f32 rows [T, H] that are quantized before they are sent. A lane takes 16 values at a time."""

    def __init__(self, x: Any):
        self.is_bf16, self.blocks = x.dtype == jnp.bfloat16, x.shape[1] // BLOCK_SIZE
        self.words = BLOCK_SIZE * x.dtype.itemsize // 4  # of 16 values
        self.operands = [x]

    def _columns(self):
        return [start + lanes.lane_index() for start in range(0, self.blocks, lanes.LANES)]

    def load(self, sources: Any, token: jax.Array, valid: jax.Array) -> list[jax.Array]:
        """Loads the token's row as u32 lane arrays, zeros beyond its end. Nothing is read if `valid` is False."""
        words = []
        for column in self._columns():
            where = valid & (column < self.blocks)
            words += lanes.gather(sources[0], token * self.blocks + column, self.words, where=where)
        return words

    def _values(self, loaded, i):
        """The 16 f32 values that each lane takes in step i of the loop over the row."""
        words = loaded[i * self.words : (i + 1) * self.words]
        return unpack_bf16(words) if self.is_bf16 else [lax.bitcast_convert_type(w, jnp.float32) for w in words]


class NVFP4Rows(_EncodedRows):
    """Rows that are sent as NVFP4, with the bits of `rows/quantize.py`. scale: f32 of one element or "per_token"."""

    def __init__(self, x: Any, scale: Any):
        super().__init__(x)
        tokens, hidden = x.shape
        self.per_token = isinstance(scale, str)
        self.sent = [
            jax.ShapeDtypeStruct((tokens, hidden // 2), jnp.uint8),
            jax.ShapeDtypeStruct((tokens, self.blocks), jnp.float8_e4m3fn),
        ]
        if self.per_token:
            self.sent.append(jax.ShapeDtypeStruct((tokens, 1), jnp.float32))
        else:
            self.operands.append(jnp.asarray(scale, jnp.float32).reshape(1))

    def store(
        self, sources: Any, loaded: Sequence[jax.Array], buffers: Any, stage: jax.Array, scratch: Any
    ) -> list[jax.Array]:
        """Writes codes and block scales to the buffers number `stage`.

        Returns the global scale as the single value, if each token has its own. scratch: 4 words of shared memory.
        """
        codes, scale_bytes = buffers
        columns, singles = self._columns(), []
        if self.per_token:
            amax = finite_amax([self._values(loaded, i) for i in range(len(columns))])
            # Floats >= 0 are ordered as their bits are.
            amax = lanes.largest(lax.bitcast_convert_type(amax, jnp.int32), scratch, 0)
            global_scale = computed_scale(lax.bitcast_convert_type(amax, jnp.float32), AMAX_DIVISOR)
            singles = [as_u32(global_scale)]
        else:
            global_scale = lanes.splat(sources[1][0], jnp.float32)
        scales = encode_scales(global_scale)
        for i, column in enumerate(columns):
            values = self._values(loaded, i)
            encoded = encode_block(values, block_amax(values), scales, False)
            at, valid = stage * self.blocks + column, column < self.blocks
            lanes.scatter(codes, at, encoded.words, where=valid)
            lanes.scatter(scale_bytes, at, [encoded.scale_byte], dtype=jnp.uint8, where=valid)
        return singles


class FP8Rows(_EncodedRows):
    """Rows that are sent as e4m3 with one f32 scale per 128 values, with the bits of `fp4jax.block_fp8.to_fp8`."""

    def __init__(self, x: Any):
        super().__init__(x)
        tokens, hidden = x.shape
        self.groups = -(-hidden // FP8_BLOCK)
        self.sent = [
            jax.ShapeDtypeStruct((tokens, hidden), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((tokens, self.groups), jnp.float32),
        ]

    def store(
        self, sources: Any, loaded: Sequence[jax.Array], buffers: Any, stage: jax.Array, scratch: Any
    ) -> list[jax.Array]:
        """Writes values and scales to the buffers number `stage`. Returns the scale of a row that has only one."""
        del sources, scratch
        values_ref, *scales_ref = buffers
        lanes_of_group = LANES_OF_GROUP if self.groups > 1 else WARP  # all lanes that may store the single value
        singles = []
        for i, column in enumerate(self._columns()):
            words, scale = encode_fp8(self._values(loaded, i), lanes_of_group)
            lanes.scatter(values_ref, stage * self.blocks + column, words, where=column < self.blocks)
            if not scales_ref:
                singles = [as_u32(scale)]
                continue
            group = column // lanes_of_group
            first = (column & (lanes_of_group - 1)) == 0
            lanes.scatter(
                scales_ref[0], stage * self.groups + group, [as_u32(scale)], where=first & (column < self.blocks)
            )
        return singles
