"""The wire formats of tokens, and the conversion of rows of several arrays to bytes and back.

Floats cross the network as integers, because some backends widen bf16 and f8 in collectives. The bytes in the program
are then the bytes on the wire.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from fp4jax.block_fp8 import to_fp8
from fp4jax.global_scale import as_scale, tensor_scale
from fp4jax.nvfp4 import NVFP4Tensor, quantize

WireFormat = Literal["nvfp4", "fp8", "bf16"]
WIRE_FORMATS: tuple[str, ...] = get_args(WireFormat)


class WireTokens(NamedTuple):
    """Tokens as a dispatch sends them.

    Attributes:
      parts: the arrays [T, n] whose rows cross, or with `encode` one array [T, H] of plain tokens.
      encode: "fp8" or "nvfp4" if plain tokens are to be encoded when rows are packed; None if the parts cross as they
        are.
      global_scale: f32 (), the NVFP4 scale that all tokens share. It does not cross, because every device knows it.
        None in other formats, and also if every token has its own scale: that one crosses with its row.
    """

    parts: list[Any]
    encode: Literal["fp8", "nvfp4"] | None
    global_scale: Float[Array, ""] | None


def to_wire(x: Any, wire_format: str, global_scale: Any, axis_name: str) -> WireTokens:
    """Prepares tokens [T, H], plain or NVFP4, for the wire. The arguments are those of `exchange.dispatch`."""
    if isinstance(x, NVFP4Tensor):
        return WireTokens(nvfp4_parts(x), None, x.global_scale if x.global_scale.ndim == 0 else None)
    if wire_format == "bf16":
        return WireTokens([x.astype(jnp.bfloat16)], None, None)
    if wire_format == "fp8":
        return WireTokens([x], "fp8", None)
    if global_scale is None:
        return WireTokens([x], "nvfp4", tensor_scale(x, axis_name))
    per_token = isinstance(global_scale, str)
    return WireTokens([x], "nvfp4", None if per_token else as_scale(global_scale, x.shape))


def kernel_encode(encode: str | None, global_scale: Any) -> Any:
    """Returns the argument `encode` of the kernels: None, "fp8", or for NVFP4 the global scale or "per_token"."""
    return ("per_token" if global_scale is None else global_scale) if encode == "nvfp4" else encode


def encoded(x: Float[Array, "t h"], encode: str, global_scale: Any) -> list[Array]:
    """Encodes plain tokens [T, H] in plain JAX; returns the arrays [T, n] whose rows cross."""
    if encode == "fp8":
        return list(to_fp8(x))
    return nvfp4_parts(quantize(x, global_scale=kernel_encode(encode, global_scale), implementation="xla"))


def nvfp4_parts(x: NVFP4Tensor) -> list[Array]:
    """Returns the arrays whose rows cross: codes, block scales and, if there is one per token, global scales [T, 1]."""
    own_scales = [] if x.global_scale.ndim == 0 else [jnp.broadcast_to(x.global_scale, (x.shape[0], 1))]
    return [x.qdata, x.block_scale, *own_scales]


def from_wire(parts: list[Array], wire_format: str, global_scale: Float[Array, ""] | None) -> Any:
    """Returns received parts in the form of `exchange.Dispatched.x`.

    Args:
      parts: the received arrays [R*C, n].
      wire_format: their format.
      global_scale: the NVFP4 scale that did not cross, or None, as in `WireTokens`.
    """
    if wire_format == "fp8":
        return tuple(parts)
    if wire_format == "bf16":
        return parts[0]
    qdata, block_scale, *own_scales = parts
    return NVFP4Tensor(qdata, block_scale, own_scales[0] if own_scales else global_scale)


def to_bytes(arrays: list[Array]) -> UInt8[Array, "t n"]:
    """Concatenates the rows of arrays [T, n] of any dtypes, as bytes: u8 [T, bytes]."""
    rows = arrays[0].shape[0]
    columns = [lax.bitcast_convert_type(a, jnp.uint8).reshape(rows, a.shape[1] * a.dtype.itemsize) for a in arrays]
    return jnp.concatenate(columns, axis=1)


def from_bytes(payload: UInt8[Array, "t n"], like: list[Any]) -> list[Array]:
    """Inverse of `to_bytes`, for any number of rows; `like` are arrays or structs with the widths and dtypes."""
    arrays, start = [], 0
    for a in like:
        size = a.dtype.itemsize
        column = payload[:, start : start + a.shape[1] * size]
        start += a.shape[1] * size
        shape = (column.shape[0], a.shape[1]) if size == 1 else (column.shape[0], a.shape[1], size)
        arrays.append(lax.bitcast_convert_type(column.reshape(shape), a.dtype))
    return arrays
