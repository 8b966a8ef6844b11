"""Dispatch and combine through one all_to_all of rows of bytes: where kernels cannot store to peers, between hosts say.

On Hopper a kernel quantizes the tokens and puts the rows where they leave from, in one pass; elsewhere XLA does.
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

# From this many bytes of a first part on (16 MB: 1024 tokens of 7168 values in NVFP4 for each of 4 devices) cutting it
# out of the received rows costs more than an all_to_all of its own.
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
    """The exchange as one all_to_all of u8 rows -> (received parts, local ids, local weights, send map).

    Where the first parts of all rows are large together, they cross in an all_to_all of their own.

    parts, encode, global_scale: as in `wire_formats.WireTokens`.
    packed: whether the kernel packs the rows where the program runs on a Hopper GPU; else XLA does. The caller has
      made sure that the kernel takes them (`ways.dispatch_way`).
    """
    row = _row_of(parts, global_scale, routes, encode)
    apart = routes.devices * routes.capacity * row[0].shape[1] * row[0].dtype.itemsize >= _APART_BYTES
    split = [row[:1], row[1:]] if apart else [row]
    widths = [sum(p.shape[1] * p.dtype.itemsize for p in group) for group in split]
    if packed:
        widths[-1] = -(-widths[-1] // 16) * 16  # what the kernel writes
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
    """Structs of the parts of a payload's row."""
    tokens = parts[0].shape[0]
    row = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in parts]
    if encode is not None:
        row = jax.eval_shape(lambda x: encoded(x, encode, global_scale), row[0])
    ids = jax.ShapeDtypeStruct((tokens, routes.k if routes.form == "per_peer" else 1), jnp.int32)
    weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    return [*row, ids, weights] if routes.form == "per_peer" else [*row, ids]


def _pack_xla(parts, global_scale, ids, topk_weights, *, routes, encode, widths):
    """-> ([devices, capacity, width in bytes] each, map): the rows for every device; u8, but for a part of its own."""
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
    else:  # every route is a row of its own; its weight stays at home
        destination = peer.reshape(-1, 1)
        rows = [*(jnp.repeat(a, routes.k, axis=0) for a in parts), ids.reshape(-1, 1)]
    payload = to_bytes(rows)
    payload = jnp.pad(payload, ((0, 0), (0, sum(widths) - payload.shape[1])))
    sent: Any = permute_to_masked(
        payload, None, destination, num_experts=routes.devices, capacity=routes.capacity, implementation="xla"
    )
    # 0xFF in every pad: ids become -1 and floats NaN, so that nothing can come to depend on a pad unnoticed.
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
    *,
    devices: int,
    axis_name: str,
    implementation: Implementation | None,
) -> Float[Array, "t h"]:
    """The way back as one all_to_all of rows, summed at home."""
    home = _exchange(y.reshape(devices, y.shape[0] // devices, -1), axis_name)
    return depermute_combine(home, send_map, weights, implementation=implementation)


def _exchange(payload, axis_name):
    """[R, C, n], block r for device r -> [R*C, n], block r from device r; as integers: floats some backends widen."""
    integers = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[payload.dtype.itemsize]
    received = lax.all_to_all(lax.bitcast_convert_type(payload, integers), axis_name, split_axis=0, concat_axis=0)
    return lax.bitcast_convert_type(received.reshape(-1, payload.shape[-1]), payload.dtype)


def _localize(ids, local_experts, axis_name):
    local = ids - lax.axis_index(axis_name) * local_experts
    return jnp.where((ids >= 0) & (local >= 0) & (local < local_experts), local, -1)
