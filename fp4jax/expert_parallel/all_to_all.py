"""Dispatch and combine by an all_to_all of rows of bytes, for devices that kernels cannot reach, on other hosts say.

On Hopper a kernel quantizes the tokens and packs the rows to be sent, in one pass. Elsewhere XLA does both.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.expert_parallel.wire_formats import encoded, from_bytes, kernel_encode, to_bytes
from fp4jax.implementations import Call, Implementation, run_by_platform
from fp4jax.nvfp4 import valid_rows
from fp4jax.permute import depermute_combine, permute_to_masked
from pallas_kernels.exchange import dispatch as dispatch_kernels
from pallas_kernels.exchange.plan import Routes

# The first part of a row holds its codes or values. If the first parts of all rows together have at least this many
# bytes (16 MiB: 1170 tokens of 7168 values in NVFP4 for each of 4 devices), they cross in an all_to_all of their own:
# that costs less than cutting them out of the received rows.
_APART_BYTES = 2**24


def dispatch_all_to_all(
    parts: list[Array],
    global_scale: Float[Array, ""] | None,
    ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    *,
    routes: Routes,
    axis_name: str,
    encode: str | None,
    packed: bool,
) -> tuple[list[Array], Int[Array, "rows s"], Float[Array, "rows s"], Int[Array, "t c"]]:
    """Dispatches tokens by one all_to_all of u8 rows, or by two if the first parts of the rows are large.

    Args:
      parts: as in `wire_formats.WireTokens`.
      global_scale: as in `wire_formats.WireTokens`.
      ids: i32 [T, k], global ids of experts; ids out of range go nowhere.
      topk_weights: f32 [T, k].
      routes: the sizes of the exchange and its form.
      axis_name: the mesh axis that tokens cross.
      encode: as in `wire_formats.WireTokens`.
      packed: whether a kernel packs the rows if the program runs on a GPU; else XLA does. The caller makes sure that
        the kernel can serve the call (`ways.dispatch_way`).

    Returns:
      The received parts [R*C, n], and local_ids, local_weights and send_map as in `exchange.Dispatched`.
    """
    row = _row_of(parts, global_scale, routes, encode)
    apart = routes.devices * routes.capacity * row[0].shape[1] * row[0].dtype.itemsize >= _APART_BYTES
    split = [row[:1], row[1:]] if apart else [row]
    widths = [sum(p.shape[1] * p.dtype.itemsize for p in group) for group in split]
    if packed:
        widths[-1] = -(-widths[-1] // 16) * 16  # the kernel writes rows of a multiple of 16 bytes
    operands = parts, global_scale, ids, topk_weights
    pack = Call.of(_pack_xla, routes=routes, encode=encode, widths=tuple(widths))
    if packed:
        kernel = Call.of(_pack_kernel, routes=routes, encode=encode, apart=apart)
        payloads, send_map = run_by_platform(operands, xla=pack, mosaic_gpu=kernel)
    else:
        payloads, send_map = pack(*operands)
    received = [_exchange(payload, axis_name) for payload in payloads]
    arrays = received[:-1] + from_bytes(received[-1], split[-1])
    local_weights = arrays.pop() if routes.form == "per_peer" else None
    local_ids = _localize(arrays.pop(), routes.local_experts, axis_name)
    if local_weights is None:
        local_weights = jnp.ones(local_ids.shape, jnp.float32)
    return arrays, local_ids, local_weights, send_map


def _row_of(parts, global_scale, routes, encode):
    """Returns structs [T, n] of what a row consists of: encoded parts, expert ids and, per_peer, weights."""
    tokens = parts[0].shape[0]
    row = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in parts]
    if encode is not None:
        row = jax.eval_shape(lambda x: encoded(x, encode, global_scale), row[0])
    ids = jax.ShapeDtypeStruct((tokens, routes.k if routes.form == "per_peer" else 1), jnp.int32)
    weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    return [*row, ids, weights] if routes.form == "per_peer" else [*row, ids]


def _pack_xla(parts, global_scale, ids, topk_weights, *, routes, encode, widths):
    """Packs the rows for every device.

    Returns the payloads and the send map. The last payload is u8 [R, C, width]; a first part that crosses on its own
    comes before it, [R, C, n] in its own dtype.
    """
    if encode is not None:
        with jax.named_scope("quantize"):
            parts = encoded(parts[0], encode, global_scale)
    valid = (ids >= 0) & (ids < routes.devices * routes.local_experts)
    peer = jnp.where(valid, ids // routes.local_experts, -1)
    rows = [*parts, ids]
    if routes.form == "per_peer":
        ranks = jnp.arange(routes.devices, dtype=jnp.int32)[None, :]
        destination = jnp.where(jnp.any(peer[:, :, None] == ranks[None], axis=1), ranks, -1)
        rows.append(topk_weights)
    else:  # every route is a row, and its weight stays at home
        destination = peer.reshape(-1, 1)
        rows = [*(jnp.repeat(a, routes.k, axis=0) for a in parts), ids.reshape(-1, 1)]
    payload = to_bytes(rows)
    payload = jnp.pad(payload, ((0, 0), (0, sum(widths) - payload.shape[1])))
    sent: Any = permute_to_masked(
        payload, None, destination, num_experts=routes.devices, capacity=routes.capacity, implementation="xla"
    )
    # Every pad is filled with 0xFF: its ids are then -1 and its floats NaN, so that no use of a pad goes unnoticed.
    filled = valid_rows(sent.masked_m, routes.capacity)[..., None]
    payload = jnp.where(filled, sent.x, jnp.uint8(0xFF))
    send_map = sent.row_map.reshape(ids.shape[0], routes.columns)
    if len(widths) == 1:
        return [payload], send_map
    (first,) = from_bytes(payload[..., : widths[0]].reshape(-1, widths[0]), rows[:1])
    return [first.reshape(*payload.shape[:2], -1), payload[..., widths[0] :]], send_map


def _pack_kernel(parts, global_scale, ids, topk_weights, *, routes, encode, apart):
    encode = kernel_encode(encode, global_scale)
    return dispatch_kernels.pack(parts, ids, topk_weights, routes, encode=encode, apart=apart)


def combine_all_to_all(
    y: Float[Array, "rows h"],
    send_map: Int[Array, "t s"],
    weights: Float[Array, "t s"],
    residual: Float[Array, "t h"] | None = None,
    *,
    devices: int,
    axis_name: str,
    implementation: Implementation | None,
) -> Float[Array, "t h"]:
    """Brings rows back by one all_to_all and sums them at home.

    Args:
      y: floating-point [R*C, H], one row per received row.
      send_map: i32 [T, S] as in `exchange.Dispatched`; S is R per_peer and k per_slot.
      weights: f32 [T, S]: the top-k weights per_slot, ones per_peer.
      residual: [T, H] in y's dtype, added last; None adds nothing.
      devices: R.
      axis_name: the mesh axis that rows cross.
      implementation: of the sum, `permute.depermute_combine`.
    """
    home = _exchange(y.reshape(devices, y.shape[0] // devices, -1), axis_name)
    return depermute_combine(home, send_map, weights, residual, implementation=implementation)


def _exchange(payload, axis_name):
    """Sends block r of [R, C, n] to device r -> [R*C, n], where block r came from device r.

    Values cross as integers, because some backends widen floats.
    """
    integers = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[payload.dtype.itemsize]
    received = lax.all_to_all(lax.bitcast_convert_type(payload, integers), axis_name, split_axis=0, concat_axis=0)
    return lax.bitcast_convert_type(received.reshape(-1, payload.shape[-1]), payload.dtype)


def _localize(ids, local_experts, axis_name):
    local = ids - lax.axis_index(axis_name) * local_experts
    return jnp.where((ids >= 0) & (local >= 0) & (local < local_experts), local, -1)
