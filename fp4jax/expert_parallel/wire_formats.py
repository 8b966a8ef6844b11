"""Tokens in the formats in which they cross the network, and rows of several arrays as bytes.

Floats never cross as floats (some backends widen bf16 and f8 collectives), so that the bytes of the program are the
bytes on the wire.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.rounding import E4M3_MAX, div_rn, largest_magnitude, round_to_e4m3
from pallas_kernels.exchange.makers import FP8_GROUP
from pallas_kernels.fp8.quantize import power_of_two

WIRE_FORMATS = ("nvfp4", "fp8", "bf16")


def from_fp8(x: Float[Array, "rows h"], scales: Float[Array, "rows groups"]) -> Float[Array, "rows h"]:
    """fp8 wire format -> bf16: e4m3 value x f32 scale of its group of 128, rounded once."""
    wide = jnp.repeat(scales, FP8_GROUP, axis=-1)[:, : x.shape[-1]]
    # Without the barrier XLA:GPU leaves out the rounding where f32 arithmetic follows in the same program.
    return lax.optimization_barrier((x.astype(jnp.float32) * wide).astype(jnp.bfloat16))


def to_fp8(
    x: Float[Array, "t h"], *, power_of_two_scales: bool = False
) -> tuple[Float[Array, "t h"], Float[Array, "t groups"]]:
    """x [T, H] -> e4m3 [T, H], f32 [T, ceil(H/128)]: scale = amax of the group / 448, 1 for a group of zeros.

    power_of_two_scales: scale = 2^ceil(log2(amax / 448)), what checkpoints call `scale_fmt: ue8m0`. A NaN or Inf makes
    its whole group NaN once decoded.
    """
    tokens, hidden = x.shape
    groups = -(-hidden // FP8_GROUP)
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, groups * FP8_GROUP - hidden))).reshape(tokens, groups, FP8_GROUP)
    amax = largest_magnitude(wide, axis=-1)
    # Below, amax / 448 would be subnormal, which CPUs flush to zero; such a group is zero to e4m3 with scale 1.
    scales = jnp.where(amax < E4M3_MAX * 2.0**-126, np.float32(1), div_rn(amax, np.float32(E4M3_MAX)))
    if power_of_two_scales:
        scales = power_of_two(scales)
    values = round_to_e4m3(div_rn(wide, scales[..., None]))
    return values.reshape(tokens, groups * FP8_GROUP)[:, :hidden], scales


def wire_arrays(x: Any, wire_format: str) -> list[Array]:
    """What a row consists of on the wire, [T, n] each; of an NVFP4Tensor its global scales too if tokens have own."""
    if wire_format == "fp8":
        return list(to_fp8(x))
    if wire_format == "bf16":
        return [x.astype(jnp.bfloat16)]
    travels = [] if x.global_scale.ndim == 0 else [jnp.broadcast_to(x.global_scale, (x.shape[0], 1))]
    return [x.qdata, x.block_scale, *travels]


def from_wire(arrays: list[Array], x: Any, wire_format: str) -> Any:
    """Received parts as the value that `dispatch` returns; x: what was sent, for the global scale that did not."""
    if wire_format == "fp8":
        return tuple(arrays)
    if wire_format == "bf16":
        return arrays[0]
    qdata, block_scale, *travels = arrays
    return NVFP4Tensor(qdata, block_scale, travels[0] if travels else x.global_scale)


def to_bytes(arrays: list[Array]) -> UInt8[Array, "t n"]:
    """[T, ..] arrays of any dtypes side by side as u8 [T, bytes]."""
    rows = arrays[0].shape[0]
    columns = [lax.bitcast_convert_type(a, jnp.uint8).reshape(rows, a.shape[1] * a.dtype.itemsize) for a in arrays]
    return jnp.concatenate(columns, axis=1)


def from_bytes(payload: UInt8[Array, "t n"], like: list[Any]) -> list[Array]:
    """Inverse of `to_bytes` for any number of rows; `like` gives widths and dtypes."""
    arrays, start = [], 0
    for a in like:
        size = a.dtype.itemsize
        column = payload[:, start : start + a.shape[1] * size]
        start += a.shape[1] * size
        shape = (column.shape[0], a.shape[1]) if size == 1 else (column.shape[0], a.shape[1], size)
        arrays.append(lax.bitcast_convert_type(column.reshape(shape), a.dtype))
    return arrays
