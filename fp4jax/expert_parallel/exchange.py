"""Dispatch of tokens to the devices that hold their experts, and the way back, inside `jax.shard_map`.

On GPUs of one process with NVLink between them kernels store rows straight into the receivers' buffers and read results
from there (pallas_kernels/exchange). Elsewhere a dense all_to_all moves one packed u8 payload per row: the token in its
wire format, its expert ids and its weights. Same rows, same order, same bits.

Two forms. *per_peer* sends one copy of a token to every device that hosts one of its experts; the experts' outputs are
weighted and summed there and one partial row returns. *per_slot* sends one row per (token, slot), unweighted rows
return and the weights are applied at home in slot order: the same bits for every number of devices.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.expert_parallel import low_latency
from fp4jax.expert_parallel.all_to_all import combine_all_to_all, dispatch_all_to_all
from fp4jax.expert_parallel.low_latency import ReceiveBuffers
from fp4jax.expert_parallel.ways import check_combine_into_buffers, combine_way, dispatch_way
from fp4jax.expert_parallel.wire_formats import WIRE_FORMATS, WireFormat, from_wire, kernel_encode, to_wire
from fp4jax.implementations import Call, Implementation, multiprocessors, run_by_platform, run_kernel
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.operands import axis_size, check_array, check_routes, check_type
from pallas_kernels.exchange import combine as combine_kernels, dispatch as dispatch_kernels, push_combine
from pallas_kernels.exchange.dispatch import Routes

Form = Literal["per_peer", "per_slot"]
FORMS: tuple[str, ...] = get_args(Form)


class Dispatched(NamedTuple):
    """What a device received: R*C rows, C from each of the R devices in rank order.

    x: NVFP4Tensor, (e4m3 [R*C, H], f32 scales [R*C, ceil(H/128)]) or bf16 [R*C, H]. local_ids i32 [R*C, k], per_slot
    [R*C, 1]: experts of this device, -1 = not here or pad. local_weights f32, same shape (per_slot: ones).
    send_map i32 [T, R], per_slot [T, k]: row of the returned buffer [R*C] that belongs to this token, or -1.
    dropped i32 []: routes of this device's tokens lost to a bad id or to `pair_capacity`. buffers: for the program's
    next dispatch, where this one was given some.
    """

    x: Any
    local_ids: Int[Array, "rows k"]
    local_weights: Float[Array, "rows k"]
    send_map: Int[Array, "t s"]
    dropped: Int[Array, ""]
    buffers: ReceiveBuffers | None = None


def dispatch(
    x: Float[Array, "t h"] | NVFP4Tensor,
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    *,
    axis_name: str = "ep",
    num_experts: int,
    form: Form = "per_peer",
    wire_format: WireFormat = "nvfp4",
    pair_capacity: int | None = None,
    global_scale: Any = None,
    buffers: ReceiveBuffers | None = None,
    implementation: Implementation | None = None,
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
      buffers: receive into arrays that the program keeps, without a barrier before it but for the first time; see
        `low_latency`. Needs what implementation "mosaic_gpu" needs.

    implementation None stores straight to the peers where `peers_problem` and the kernel have no objection, and goes
    through one all_to_all elsewhere.

    Raises:
      ValueError, TypeError: shapes, dtypes or options that do not fit, or no shard_map with this axis.
      NotImplementedError: "mosaic_gpu" was named and cannot serve the call; the message says why.
    """
    devices = axis_size("dispatch", axis_name)
    _check_dispatch_args(
        x, topk_ids, topk_weights, num_experts, devices, form, wire_format, pair_capacity, global_scale
    )
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    # In 64 bits an id that is no expert could become one when it is cast.
    ids = topk_ids if topk_ids.dtype == jnp.int32 else jnp.where(valid, topk_ids, -1).astype(jnp.int32)
    tokens, k = ids.shape
    capacity = max(1, tokens * (1 if form == "per_peer" else k)) if pair_capacity is None else pair_capacity
    routes = Routes(tokens, k, devices, num_experts // devices, capacity, form)
    sent = to_wire(x, wire_format, global_scale, axis_name)
    way = dispatch_way(
        sent.parts, routes, encode=kernel_encode(sent.encode, sent.global_scale), axis_name=axis_name,
        keeps_buffers=buffers is not None, implementation=implementation,
    )  # fmt: skip
    results: Any = _move(way, sent, ids, topk_weights.astype(jnp.float32), routes, axis_name, buffers, implementation)
    received, local_ids, local_weights, send_map, buffers = results
    dropped = _count_dropped(topk_ids, ids, valid, send_map, routes)
    rows = from_wire(received, wire_format, sent.global_scale)
    return Dispatched(rows, local_ids, local_weights, send_map, dropped, buffers)


def _move(way, sent, ids, topk_weights, routes, axis_name, buffers, implementation):
    """Tokens cross the axis in a way of `ways` -> received parts, local ids and weights, send map, buffers."""
    scale = sent.global_scale if sent.encode == "nvfp4" else None
    operands = sent.parts, scale, ids, topk_weights
    options = dict(routes=routes, axis_name=axis_name, encode=sent.encode)
    if way == "kept_buffers":
        return _dispatch_kernel(*operands, **options, buffers=buffers)
    all_to_all = Call.of(dispatch_all_to_all, **options, packed=way == "packed_all_to_all")
    if way != "direct_stores":
        return *all_to_all(*operands), None
    run = run_by_platform if implementation is None else run_kernel
    return *run(operands, xla=all_to_all, mosaic_gpu=Call.of(_dispatch_kernel, **options)), None


def _count_dropped(topk_ids, ids, valid, send_map, routes):
    """Routes of this device's tokens that name no expert, though their id is not -1, or found no room."""
    row_of_route = send_map
    if routes.form == "per_peer":
        peer = jnp.where(valid, ids // routes.local_experts, 0)
        row_of_route = jnp.take_along_axis(send_map, peer, axis=1)
    return jnp.sum(topk_ids != -1, dtype=jnp.int32) - jnp.sum(valid & (row_of_route >= 0), dtype=jnp.int32)


def _dispatch_kernel(parts, global_scale, ids, topk_weights, *, routes, axis_name, encode, buffers=None):
    options = dict(axis_name=axis_name, encode=kernel_encode(encode, global_scale))
    if buffers is None:
        received, local_ids, weights, *rest = dispatch_kernels.dispatch(parts, ids, topk_weights, routes, **options)
    else:
        received, local_ids, weights, *rest = low_latency.run(
            parts, ids, topk_weights, buffers, routes=routes, **options
        )
    received, local_ids = ([a.reshape(-1, a.shape[-1]) for a in arrays] for arrays in (received, [local_ids]))
    if weights is None:
        weights = jnp.ones(local_ids[0].shape, jnp.float32)
    return received, local_ids[0], weights.reshape(local_ids[0].shape), *rest


def combine(
    y: Float[Array, "rows h"],
    dispatched: Dispatched,
    *,
    topk_weights: Float[Array, "t k"] | None = None,
    axis_name: str = "ep",
    implementation: Implementation | None = None,
) -> Float[Array, "t h"]:
    """Returns rows to the tokens' home devices and sums them in f32, one rounding: -> [T, H] in y's dtype.

    per_peer (`topk_weights` None): y holds partial sums, one per received row; added in rank order. per_slot: y holds
    unweighted expert outputs; weights are applied here in slot order. Each product is rounded before it is added.

    implementation as in `dispatch`.

    Raises:
      NotImplementedError: "mosaic_gpu" was named and cannot serve the call; the message says why.
      ValueError: weights missing for the per-slot form, given for the per-peer form, or shapes that do not fit.
    """
    devices = axis_size("combine", axis_name)
    check_array("combine: y", y, jnp.floating)
    check_type("combine: dispatched", dispatched, Dispatched, "`dispatch` returns one")
    send_map, rows = dispatched.send_map, dispatched.local_ids.shape[0]
    if y.ndim != 2 or y.shape[0] != rows:
        raise ValueError(f"combine: y must be [{rows}, H], one row per received row, got {y.shape}")
    operands = y, send_map, _home_weights("combine", dispatched, topk_weights, devices)
    options = dict(devices=devices, axis_name=axis_name)
    all_to_all = Call.of(combine_all_to_all, **options, implementation=implementation)
    if combine_way(y, send_map, **options, implementation=implementation) == "all_to_all":
        return all_to_all(*operands)
    run = run_by_platform if implementation is None else run_kernel
    return run(operands, xla=all_to_all, mosaic_gpu=Call.of(combine_kernels.combine, **options))


def combine_into_buffers(
    y: Float[Array, "..."],
    row_map: Int[Array, "rows k"],
    dispatched: Dispatched,
    *,
    topk_weights: Float[Array, "t s"] | None = None,
    axis_name: str = "ep",
) -> tuple[Float[Array, "t h"], ReceiveBuffers]:
    """`permute.depermute_combine` and `combine` in one kernel, after a dispatch with buffers: the same bits.

    Args:
      y: bf16 or f32, [E, M, H] or [rows, H]: what this device's experts made of the rows that they were given.
      row_map: row of y for each route of each received row, or -1: what permuting returned.
      topk_weights: as in `combine`.

    -> the tokens [T, H] in y's dtype, and the buffers for the next dispatch.

    Raises:
      NotImplementedError: the kernel cannot serve the call; the message says why.
      ValueError: no buffers, weights missing or too many, or shapes that do not fit.
    """
    op = "combine_into_buffers"
    check_array(f"{op}: y", y, jnp.floating)
    devices, y = axis_size(op, axis_name), y.reshape(-1, y.shape[-1])
    if dispatched.buffers is None:
        raise ValueError(f"{op}: the dispatch had no buffers")
    if row_map.shape != dispatched.local_ids.shape:
        raise ValueError(f"{op}: row_map must be {dispatched.local_ids.shape}, got {row_map.shape}")
    topk_weights = _home_weights(op, dispatched, topk_weights, devices)
    row_map = row_map.astype(jnp.int32)
    config = push_combine.default_config(row_map.shape[0], y.shape[1] * y.dtype.itemsize, multiprocessors())
    check_combine_into_buffers(y, row_map, dispatched.send_map, devices=devices, axis_name=axis_name, config=config)
    return low_latency.run_back(y, row_map, dispatched, topk_weights, axis_name=axis_name, config=config)


def _home_weights(op, dispatched, topk_weights, devices):
    """Weights of the columns of the map, f32: given for the per-slot form, ones for the per-peer form."""
    send_map, ids = dispatched.send_map, dispatched.local_ids
    if topk_weights is None:
        if send_map.shape[1] != devices:
            raise ValueError(f"{op}: the per-slot form needs topk_weights {send_map.shape}")
        return jnp.ones(send_map.shape, jnp.float32)
    check_array(f"{op}: topk_weights", topk_weights, jnp.floating)
    if topk_weights.shape != send_map.shape or ids.shape[1] != 1:
        raise ValueError(
            f"{op}: topk_weights {topk_weights.shape} belong to the per-slot form with send_map of the same shape, "
            f"got send_map {send_map.shape} and local_ids {ids.shape}"
        )
    return topk_weights.astype(jnp.float32)


def agree_global_scale(scale: Float[Array, "..."], axis_name: str | None = None) -> Float[Array, ""]:
    """One global scale for the whole mesh axis: the maximum over all given scales of all devices, f32 ()."""
    if axis_name is not None:
        axis_size("agree_global_scale", axis_name)
    agreed = jnp.max(jnp.asarray(scale, jnp.float32))
    return agreed if axis_name is None else lax.pmax(agreed, axis_name)


def _check_dispatch_args(
    x, topk_ids, topk_weights, num_experts, devices, form, wire_format, pair_capacity, global_scale
):
    if form not in FORMS:
        raise ValueError(f"dispatch: form={form!r} is unknown; choose one of {FORMS}")
    if wire_format not in WIRE_FORMATS:
        raise ValueError(f"dispatch: wire_format={wire_format!r} is unknown; choose one of {WIRE_FORMATS}")
    if num_experts < 1 or num_experts % devices:
        raise ValueError(f"dispatch: num_experts={num_experts} must be a positive multiple of the {devices} devices")
    if not isinstance(x, NVFP4Tensor):
        check_array("dispatch: x", x, jnp.floating)
    if len(x.shape) != 2:
        raise ValueError(f"dispatch: x must be [T, H], one row per token, got {x.shape}")
    check_routes("dispatch", x.shape[0], topk_ids, topk_weights)
    if pair_capacity is not None and pair_capacity < 1:
        raise ValueError(f"dispatch: pair_capacity must be at least 1, got {pair_capacity}")
    if isinstance(x, NVFP4Tensor):
        x.validate()
        if wire_format != "nvfp4":
            raise ValueError(f"dispatch: x is an NVFP4Tensor, so wire_format must be 'nvfp4', got {wire_format!r}")
    if global_scale is not None and (wire_format != "nvfp4" or isinstance(x, NVFP4Tensor)):
        raise ValueError("dispatch: global_scale is only for a plain x sent with wire_format='nvfp4'")
    if isinstance(global_scale, str) and global_scale != "per_token":
        raise ValueError(f"dispatch: global_scale={global_scale!r} is unknown; give a number, 'per_token' or None")
    if not isinstance(global_scale, str | None) and jnp.ndim(global_scale):
        raise ValueError(f"dispatch: global_scale must be a scalar, got shape {jnp.shape(global_scale)}")
