"""Tokens in the formats in which they cross the network, and rows of several arrays as bytes.

Floats never cross as floats (some backends widen bf16 and f8 collectives), so that the bytes of the program are the
bytes on the wire.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8

from fp4jax.block_fp8 import to_fp8
from fp4jax.nvfp4 import NVFP4Tensor

WIRE_FORMATS = ("nvfp4", "fp8", "bf16")


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
