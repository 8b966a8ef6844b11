"""Dispatch of tokens to the devices that hold their experts, and the way back, inside `jax.shard_map`.

A dense all_to_all moves one packed u8 payload per row: the token in its wire format, its expert ids and its weights.
Floats never cross as floats (some backends widen bf16 and f8 collectives), so the bytes of the program are the bytes on
the wire.

Two forms. *per_peer* sends one copy of a token to every device that hosts one of its experts; the experts' outputs are
weighted and summed there and one partial row returns. *per_slot* sends one row per (token, slot), unweighted rows
return and the weights are applied at home in slot order: the same bits for every number of devices.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.hlo_collectives import WireBytes, wire_bytes
from fp4jax.implementations import resolve_implementation
from fp4jax.nvfp4 import NVFP4Tensor, quantize
from fp4jax.permute import depermute_combine, permute_to_masked
from fp4jax.rounding import E4M3_MAX, div_rn, round_to_e4m3

__all__ = ["Dispatched", "WireBytes", "agree_global_scale", "combine", "dispatch", "from_fp8", "wire_bytes"]

WIRE_FORMATS = ("nvfp4", "fp8", "bf16")
FORMS = ("per_peer", "per_slot")
FP8_GROUP = 128  # values that share one f32 scale in the fp8 wire format


class Dispatched(NamedTuple):
    """What a device received: R*C rows, C from each of the R devices in rank order.

    x: NVFP4Tensor, (e4m3 [R*C, H], f32 scales [R*C, ceil(H/128)]) or bf16 [R*C, H]. local_ids i32 [R*C, k], per_slot
    [R*C, 1]: experts of this device, -1 = not here or pad. local_weights f32, same shape (per_slot: ones).
    send_map i32 [T, R], per_slot [T, k]: row of the returned buffer [R*C] that belongs to this token, or -1.
    dropped i32 []: routes of this device's tokens lost to a bad id or to `pair_capacity`.
    """

    x: Any
    local_ids: Int[Array, "rows k"]
    local_weights: Float[Array, "rows k"]
    send_map: Int[Array, "t s"]
    dropped: Int[Array, ""]


def dispatch(
    x: Float[Array, "t h"] | NVFP4Tensor,
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    *,
    axis_name: str = "ep",
    num_experts: int,
    form: str = "per_peer",
    wire_format: str = "nvfp4",
    pair_capacity: int | None = None,
    global_scale: Any = None,
    implementation: str | None = None,
) -> Dispatched:
    """Sends each token to the devices that host its experts: expert e lives on device e // (num_experts / R).

    Args:
      x: bf16 or f32 [T, H], put into `wire_format` here; or an NVFP4Tensor that crosses as it is: its global_scale is
        () and the same on every device, or [T, 1] and then travels with the row (4 bytes).
      topk_ids: global ids, 0 <= id < num_experts; -1 = no expert. Other ids are dropped and counted.
      num_experts: experts of all devices together, a multiple of R.
      pair_capacity: rows per (sender, receiver) (C); None = the worst case, T or T*k. Routes beyond it are dropped,
      counted.
      global_scale: for wire format nvfp4 and a plain x: f32 (), the same on every device; "per_token"; or None: from
        the maximum over all devices.

    Raises:
      ValueError, TypeError: shapes, dtypes or options that do not fit.
    """
    resolve_implementation("dispatch", implementation)
    devices = lax.axis_size(axis_name)
    _check_dispatch_args(
        x, topk_ids, topk_weights, num_experts, devices, form, wire_format, pair_capacity, global_scale
    )
    if wire_format == "nvfp4" and not isinstance(x, NVFP4Tensor):
        agree_over = axis_name if global_scale is None else None
        x = quantize(x, global_scale=global_scale, axis_name=agree_over, implementation=implementation)

    # Ids that are neither -1 nor an expert become num_experts, so that they survive the cast to int32 as what they are.
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    ids = jnp.where(valid, topk_ids, jnp.where(topk_ids == -1, -1, num_experts)).astype(jnp.int32)
    peer = jnp.where(valid, ids // (num_experts // devices), -1)
    rows = [*_wire_arrays(x, wire_format), ids]
    if form == "per_peer":
        ranks = jnp.arange(devices, dtype=jnp.int32)
        destination = jnp.where(jnp.any(peer[:, :, None] == ranks, axis=1), ranks, -1)
        rows.append(topk_weights.astype(jnp.float32))
    else:  # every route is a row of its own; its weight stays at home
        destination = peer.reshape(-1, 1)
        k = ids.shape[1]
        rows = [*(jnp.repeat(a, k, axis=0) for a in rows[:-1]), ids.reshape(-1, 1)]

    capacity = max(1, destination.shape[0]) if pair_capacity is None else pair_capacity
    sent = permute_to_masked(
        _to_bytes(rows), None, destination, num_experts=devices, capacity=capacity, implementation=implementation
    )
    # 0xFF in every pad: ids become -1 and floats NaN, so that nothing can come to depend on a pad unnoticed.
    filled = (jnp.arange(capacity) < sent.masked_m[:, None])[..., None]
    received = _exchange(jnp.where(filled, sent.x, jnp.uint8(0xFF)), axis_name)

    arrays = _from_bytes(received, rows)
    local_weights = arrays.pop() if form == "per_peer" else None
    local_ids = _localize(arrays.pop(), num_experts // devices, axis_name)
    if local_weights is None:
        local_weights = jnp.ones(local_ids.shape, jnp.float32)
    if form == "per_peer":
        send_map, row_of_route = sent.row_map, jnp.take_along_axis(sent.row_map, jnp.maximum(peer, 0), axis=1)
    else:
        send_map = row_of_route = sent.row_map.reshape(peer.shape)
    dropped = jnp.sum(topk_ids != -1, dtype=jnp.int32) - jnp.sum(valid & (row_of_route >= 0), dtype=jnp.int32)
    return Dispatched(_from_wire(arrays, x, wire_format), local_ids, local_weights, send_map, dropped)


def combine(
    y: Float[Array, "rows h"],
    dispatched: Dispatched,
    *,
    topk_weights: Float[Array, "t k"] | None = None,
    axis_name: str = "ep",
    implementation: str | None = None,
) -> Float[Array, "t h"]:
    """Returns rows to the tokens' home devices and sums them in f32, one rounding: -> [T, H] in y's dtype.

    per_peer (`topk_weights` None): y holds partial sums, one per received row; added in rank order. per_slot: y holds
    unweighted expert outputs; weights are applied here in slot order. Each product is rounded before it is added.

    Raises:
      ValueError: weights missing for the per-slot form, given for the per-peer form, or shapes that do not fit.
    """
    resolve_implementation("combine", implementation)
    devices = lax.axis_size(axis_name)
    send_map, rows = dispatched.send_map, dispatched.local_ids.shape[0]
    if y.ndim != 2 or y.shape[0] != rows:
        raise ValueError(f"combine: y must be [{rows}, H], one row per received row, got {y.shape}")
    if topk_weights is None:
        if send_map.shape[1] != devices:
            raise ValueError(f"combine: the per-slot form needs topk_weights {send_map.shape}")
        topk_weights = jnp.ones(send_map.shape, jnp.float32)
    elif topk_weights.shape != send_map.shape or dispatched.local_ids.shape[1] != 1:
        raise ValueError(
            f"combine: topk_weights {topk_weights.shape} belong to the per-slot form with send_map of the same shape, "
            f"got send_map {send_map.shape} and local_ids {dispatched.local_ids.shape}"
        )
    payload = _to_bytes([y]).reshape(devices, rows // devices, -1)
    (home,) = _from_bytes(_exchange(payload, axis_name), [y])
    return depermute_combine(home, send_map, topk_weights, implementation=implementation)


def agree_global_scale(scale: Float[Array, "..."], axis_name: str | None = None) -> Float[Array, ""]:
    """One global scale for the whole mesh axis: the maximum over all given scales of all devices, f32 ()."""
    agreed = jnp.max(jnp.asarray(scale, jnp.float32))
    return agreed if axis_name is None else lax.pmax(agreed, axis_name)


def from_fp8(x: Float[Array, "rows h"], scales: Float[Array, "rows groups"]) -> Float[Array, "rows h"]:
    """fp8 wire format -> bf16: e4m3 value x f32 scale of its group of 128, rounded once."""
    wide = jnp.repeat(scales, FP8_GROUP, axis=-1)[:, : x.shape[-1]]
    return (x.astype(jnp.float32) * wide).astype(jnp.bfloat16)


def _to_fp8(x):
    """x [T, H] -> e4m3 [T, H], f32 [T, ceil(H/128)]: scale = amax of the group / 448, 1 for a group of zeros."""
    tokens, hidden = x.shape
    groups = -(-hidden // FP8_GROUP)
    wide = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, groups * FP8_GROUP - hidden))).reshape(tokens, groups, FP8_GROUP)
    amax = jnp.max(jnp.abs(wide), axis=-1)
    # Below, amax / 448 would be subnormal, which CPUs flush to zero; such a group is zero to e4m3 with scale 1.
    scales = jnp.where(amax < E4M3_MAX * 2.0**-126, np.float32(1), div_rn(amax, np.float32(E4M3_MAX)))
    values = round_to_e4m3(div_rn(wide, scales[..., None]))
    return values.reshape(tokens, groups * FP8_GROUP)[:, :hidden], scales


def _wire_arrays(x, wire_format):
    if wire_format == "fp8":
        return list(_to_fp8(x))
    if wire_format == "bf16":
        return [x.astype(jnp.bfloat16)]
    travels = [] if x.global_scale.ndim == 0 else [jnp.broadcast_to(x.global_scale, (x.shape[0], 1))]
    return [x.qdata, x.block_scale, *travels]


def _from_wire(arrays, x, wire_format):
    if wire_format == "fp8":
        return tuple(arrays)
    if wire_format == "bf16":
        return arrays[0]
    qdata, block_scale, *travels = arrays
    return NVFP4Tensor(qdata, block_scale, travels[0] if travels else x.global_scale)


def _to_bytes(arrays):
    """[T, ..] arrays of any dtypes side by side as u8 [T, bytes]."""
    rows = arrays[0].shape[0]
    columns = [lax.bitcast_convert_type(a, jnp.uint8).reshape(rows, a.shape[1] * a.dtype.itemsize) for a in arrays]
    return jnp.concatenate(columns, axis=1)


def _from_bytes(payload, like):
    """Inverse of `_to_bytes` for any number of rows; `like` gives widths and dtypes."""
    arrays, start = [], 0
    for a in like:
        size = a.dtype.itemsize
        column = payload[:, start : start + a.shape[1] * size]
        start += a.shape[1] * size
        shape = (column.shape[0], a.shape[1]) if size == 1 else (column.shape[0], a.shape[1], size)
        arrays.append(lax.bitcast_convert_type(column.reshape(shape), a.dtype))
    return arrays


def _exchange(payload, axis_name):
    """u8 [R, C, bytes], block r for device r -> [R*C, bytes], block r from device r."""
    received = lax.all_to_all(payload, axis_name, split_axis=0, concat_axis=0)
    return received.reshape(-1, payload.shape[-1])


def _localize(ids, local_experts, axis_name):
    local = ids - lax.axis_index(axis_name) * local_experts
    return jnp.where((ids >= 0) & (local >= 0) & (local < local_experts), local, -1)


def _check_dispatch_args(
    x, topk_ids, topk_weights, num_experts, devices, form, wire_format, pair_capacity, global_scale
):
    if form not in FORMS:
        raise ValueError(f"dispatch: form={form!r} is unknown; choose one of {FORMS}")
    if wire_format not in WIRE_FORMATS:
        raise ValueError(f"dispatch: wire_format={wire_format!r} is unknown; choose one of {WIRE_FORMATS}")
    if num_experts < 1 or num_experts % devices:
        raise ValueError(f"dispatch: num_experts={num_experts} must be a positive multiple of the {devices} devices")
    if len(x.shape) != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[:1] != x.shape[:1]:
        raise ValueError(
            f"dispatch: x must be [T, H], topk_ids and topk_weights [T, k]; "
            f"got {x.shape}, {topk_ids.shape}, {topk_weights.shape}"
        )
    if topk_ids.dtype not in (jnp.int32, jnp.int64):
        raise TypeError(f"dispatch: topk_ids must be int32 or int64, got {topk_ids.dtype}")
    if pair_capacity is not None and pair_capacity < 1:
        raise ValueError(f"dispatch: pair_capacity must be at least 1, got {pair_capacity}")
    if isinstance(x, NVFP4Tensor):
        x.validate()
        if wire_format != "nvfp4":
            raise ValueError(f"dispatch: x is an NVFP4Tensor, so wire_format must be 'nvfp4', got {wire_format!r}")
    if global_scale is not None and (wire_format != "nvfp4" or isinstance(x, NVFP4Tensor)):
        raise ValueError("dispatch: global_scale is only for a plain x sent with wire_format='nvfp4'")
