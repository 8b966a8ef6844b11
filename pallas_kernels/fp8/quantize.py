"""Quantizes rows to e4m3 with one f32 scale per 128 values, bit for bit as `fp4jax.block_fp8.to_fp8`.

    scale = amax of 128 values / 448 (1 for zeros)        value = e4m3(x / scale)

A lane takes 16 values at a time. Eight neighbouring lanes have a group of 128 values and find its amax together, by
shuffles within the warp. The scales are written as [groups, rows], the order in which the dense GEMM reads them. Device
memory bounds the time: 3 bytes move for a bf16 value.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.fp8.config import scale_columns
from pallas_kernels.rows.quantize import load_values
from pallas_kernels.simt import lane_math, lanes, launch
from pallas_kernels.simt.formats import BLOCK_SIZE, E4M3_MAX, F32_TINY, FP8_BLOCK
from pallas_kernels.simt.hardware import H100_SMS
from pallas_kernels.simt.lane_math import as_u32, unsigned_div

LANES_OF_GROUP = FP8_BLOCK // BLOCK_SIZE
_MANTISSA = np.int32(2**23 - 1)  # mask of the mantissa's bits in f32
_BLOCKS_PER_LANE = 4  # blocks of 16 values in flight per lane, if there are enough for all SMs


def check_config(x: Any) -> str | None:
    """None if `quantize` accepts x (an array or ShapeDtypeStruct), else what does not fit."""
    if x.dtype not in (jnp.bfloat16, jnp.float32) or x.ndim != 2 or 0 in x.shape or x.shape[1] % BLOCK_SIZE:
        return f"x must be bfloat16 or float32 [T, K], not empty, K a multiple of {BLOCK_SIZE}, got {x.dtype} {x.shape}"
    if x.shape[0] * (x.shape[1] + FP8_BLOCK) // BLOCK_SIZE >= lanes.MAX_INDEX:
        return f"x {x.shape} exceeds the kernel's 32-bit indices"
    return None


def quantize(x: jax.Array, *, power_of_two_scales: bool = False, interpret: Any = None) -> tuple[jax.Array, jax.Array]:
    """Quantizes x, bf16 or f32 [T, K], K a multiple of 16.

    power_of_two_scales: whether each scale is rounded up to a power of two.

    Returns:
      e4m3 [T, K], and scales f32 [ceil(K / 128), T rounded up to 4]. Columns of the scales beyond T are not written.

    Raises:
      NotImplementedError: the kernel does not accept x; the message is that of `check_config`.
    """
    if problem := check_config(x):
        raise NotImplementedError(f"FP8 quantize kernel: {problem}")
    rows, k = x.shape
    blocks, groups, columns = k // BLOCK_SIZE, -(-k // FP8_BLOCK), scale_columns(rows)
    slots = groups * LANES_OF_GROUP  # blocks of 16 values in a row, rounded up to whole groups
    per_lane = _BLOCKS_PER_LANE if rows * slots >= H100_SMS * lanes.LANES * _BLOCKS_PER_LANE else 1
    per_block_of_threads = lanes.LANES * per_lane

    def body(x_ref, values_ref, scales_ref):
        items = []
        for j in range(per_lane):
            position = lanes.block_index() * per_block_of_threads + j * lanes.LANES + lanes.lane_index()
            row = unsigned_div(position, slots)
            column = position - row * slots
            items.append((row, column, (row < rows) & (column < blocks)))
        loaded = [load_values(x_ref, x.dtype, row * blocks + column, valid) for row, column, valid in items]
        for (row, column, valid), values in zip(items, loaded, strict=True):
            words, scale = encode(values, LANES_OF_GROUP, power_of_two_scales)
            lanes.scatter(values_ref, row * blocks + column, words, where=valid)
            at = (column >> LANES_OF_GROUP.bit_length() - 1) * columns + row
            lanes.scatter(scales_ref, at, [as_u32(scale)], where=valid & ((column & (LANES_OF_GROUP - 1)) == 0))

    out_type = (
        jax.ShapeDtypeStruct((rows, k), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((groups, columns), jnp.float32),
    )
    grid = -(-rows * slots // per_block_of_threads)
    return launch.kernel(body, out_type, grid=grid, interpret=interpret)(x)


def encode(
    values: Sequence[jax.Array], lanes_of_group: int, power_of_two_scales: bool = False
) -> tuple[list[jax.Array], jax.Array]:
    """Encodes 16 f32 per lane: 4 words of e4m3, and the scale of the group of `lanes_of_group` neighbouring lanes."""
    # The bits of magnitudes are ordered as the magnitudes are, with Inf and then NaN on top.
    bits = [lax.bitcast_convert_type(v, jnp.int32) & np.int32(0x7FFFFFFF) for v in values]
    amax = lanes.largest_of_neighbours(functools.reduce(jnp.maximum, bits), lanes_of_group)
    amax = lax.bitcast_convert_type(amax, jnp.float32)
    scale = jnp.where(amax < E4M3_MAX * F32_TINY, np.float32(1), lane_math.div_rn(amax, E4M3_MAX))
    if power_of_two_scales:
        scale = power_of_two(scale)
    quotients = [lane_math.div_rn(v, scale) for v in values]
    return [lane_math.pack_e4m3(quotients[j : j + 4]) for j in range(0, BLOCK_SIZE, 4)], scale


def power_of_two(scale: jax.Array) -> jax.Array:
    """Rounds a positive normal f32 up to a power of two, by its bits. NaN and Inf stay.

    For the correctly rounded quotient amax / 448 that is exactly 2^ceil(log2(amax / 448)), because the division rounds
    no other quotient to a power of two: 448 = 1.75 * 2^8, and the f32 next to 1.75 * 2^n, divided by 1.75, is more than
    half an ulp away from 2^n.
    """
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    # A mantissa that is not zero carries into the exponent.
    above = lax.bitcast_convert_type((bits + _MANTISSA) & ~_MANTISSA, jnp.float32)
    return jnp.where(scale != scale, scale, above)
