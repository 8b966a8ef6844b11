"""Dispatch sends tokens to the devices that hold their experts; combine brings the results home. Both run in shard_map.

On GPUs of one process with NVLink between them, kernels store rows straight into the buffers of the receivers, and read
the results from there (pallas_kernels/exchange). Elsewhere an all_to_all moves rows of bytes: the token in its wire
format and its expert ids, and in the form per_peer its weights. Both ways deliver the same bits in the same order.

There are two forms of a dispatch and its combine:

* per_peer: a token goes once to every device that hosts one of its experts. That device weights and sums the outputs of
  its experts and returns one partial row. Home adds the partial rows in rank order.
* per_slot: a token goes once to each of its experts, so there is one row per route. The rows return unweighted, and
  home weights and adds them in slot order. The result has the same bits for every number of devices.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.expert_parallel import low_latency
from fp4jax.expert_parallel.all_to_all import combine_all_to_all, dispatch_all_to_all
from fp4jax.expert_parallel.checks import Form, check_dispatch
from fp4jax.expert_parallel.low_latency import ReceiveBuffers
from fp4jax.expert_parallel.ways import check_combine_into_buffers, combine_way, dispatch_way
from fp4jax.expert_parallel.wire_formats import Received, WireFormat, from_wire, kernel_encode, to_wire
from fp4jax.implementations import Call, Implementation, multiprocessors, run_by_platform, run_kernel
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.operands import axis_size, check_array, check_type
from pallas_kernels.exchange import combine as combine_kernels, dispatch as dispatch_kernels, push_combine
from pallas_kernels.exchange.dispatch import Routes


class Dispatched(NamedTuple):
    """What one device holds after a dispatch: R*C received rows, C from each of the R devices in rank order.

    Attributes:
      x: the rows in wire format "nvfp4": NVFP4Tensor [R*C, H]; "fp8": the pair (e4m3 [R*C, H], f32 scales
        [R*C, ceil(H/128)]), see `from_fp8`; "bf16": bf16 [R*C, H].
      local_ids: i32 [R*C, k], or [R*C, 1] per_slot: the experts of a row, numbered within this device; -1 = an expert
        of another device, or none. A pad has only -1.
      local_weights: f32 of the same shape, the weights of these experts; per_slot: ones. Those of pads mean nothing.
      send_map: i32 [T, R], or [T, k] per_slot: where this device's tokens went. An entry is receiver * C + row, which
        is also the index of the returned row at home, or -1 if nothing was sent.
      dropped: i32 (), the number of routes of this device's tokens lost to a bad id or to `pair_capacity`.
      buffers: the receive buffers, which `combine_into_buffers` takes from here; None if the dispatch was given none.
    """

    x: Received
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
    """Sends each token of this device to the devices that host its experts. Expert e lives on device e // (E / R).

    Args:
      x: bf16 or f32 [T, H], which is put into `wire_format` here; or an NVFP4Tensor [T, H], which crosses as it is. Its
        global scale is () and the same on every device, or [T, 1]; then it travels with the rows (4 bytes each).
      topk_ids: i32 or i64 [T, k], global ids, 0 <= id < num_experts; -1 = no expert. Other ids are dropped and counted.
      topk_weights: floating-point [T, k].
      axis_name: the mesh axis that tokens and experts are split over; it has R devices.
      num_experts: the number of experts on all devices together (E), a multiple of R.
      form: "per_peer" or "per_slot", see the module.
      wire_format: "nvfp4", "fp8" or "bf16".
      pair_capacity: rows per sender and receiver (C). None: the worst case, T per_peer and T*k per_slot. Routes beyond
        it are dropped and counted.
      global_scale: the scale of a plain x in wire format "nvfp4": f32 (), the same on every device; "per_token": one
        per token; None: one for all devices, computed from their common amax.
      buffers: receive buffers that the program keeps, so that only the first dispatch waits for a barrier; see
        `low_latency`. They need what implementation "mosaic_gpu" needs. None: new buffers.
      implementation: "xla": XLA packs rows for an all_to_all. "mosaic_gpu": a kernel stores rows into the peers'
        memory. None: that kernel where it can serve the call (`ways.dispatch_way`), else an all_to_all.

    Returns:
      What this device received, `Dispatched`.

    Raises:
      ValueError, TypeError: shapes, dtypes or options do not fit, or there is no shard_map with this axis.
      NotImplementedError: "mosaic_gpu" was named or buffers were given, and the kernel cannot serve the call; the
        message says why.
    """
    devices = axis_size("dispatch", axis_name)
    check_dispatch(x, topk_ids, topk_weights, num_experts, devices, form, wire_format, pair_capacity, global_scale)
    valid = (topk_ids >= 0) & (topk_ids < num_experts)
    # A 64-bit id out of range could become a valid id when it is cast to 32 bits.
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
    """Moves the tokens the given way (`ways.DispatchWay`).

    Returns the received parts, local ids, local weights, the send map and the buffers (None unless they are kept).
    """
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
    """Counts the routes of this device's tokens that have a bad id, other than -1, or found no room at the receiver."""
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
    residual: Float[Array, "t h"] | None = None,
    *,
    topk_weights: Float[Array, "t k"] | None = None,
    axis_name: str = "ep",
    implementation: Implementation | None = None,
) -> Float[Array, "t h"]:
    """Brings rows back to the home devices of their tokens and sums them there.

    In the form per_peer, y holds one partial sum per received row, and home adds them in rank order. In the form
    per_slot, y holds unweighted expert outputs, and home adds their products with `topk_weights` in slot order. Sums
    are f32. Each product is rounded before it is added, a residual is added last, and the sum is rounded once, to y's
    dtype.

    Args:
      y: floating-point [R*C, H], one row per received row.
      dispatched: what `dispatch` returned.
      residual: [T, H] in y's dtype, one row per token of this device, added to the sums; None: nothing is added.
      topk_weights: floating-point [T, k] in the form per_slot; None in the form per_peer.
      axis_name: as in `dispatch`.
      implementation: "xla": an all_to_all. "mosaic_gpu": a kernel reads the rows from the peers' memory. None: that
        kernel where it can serve the call (`ways.combine_way`), else an all_to_all.

    Returns:
      This device's tokens [T, H] in y's dtype.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit, or weights are missing (per_slot) or given (per_peer).
      NotImplementedError: "mosaic_gpu" was named and cannot serve the call; the message says why.
    """
    devices = axis_size("combine", axis_name)
    check_array("combine: y", y, jnp.floating)
    check_type("combine: dispatched", dispatched, Dispatched, "`dispatch` returns one")
    send_map, rows = dispatched.send_map, dispatched.local_ids.shape[0]
    if y.ndim != 2 or y.shape[0] != rows:
        raise ValueError(f"combine: y must be [{rows}, H], one row per received row, got {y.shape}")
    _check_residual("combine", residual, y, send_map)
    operands = y, send_map, _home_weights("combine", dispatched, topk_weights, devices), residual
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
    residual: Float[Array, "t h"] | None = None,
    *,
    topk_weights: Float[Array, "t s"] | None = None,
    axis_name: str = "ep",
) -> tuple[Float[Array, "t h"], ReceiveBuffers]:
    """Does `permute.depermute_combine` and `combine` in one kernel, with the same bits, after a dispatch with buffers.

    Args:
      y: bf16 or f32 [L, M, H] or [rows, H], the outputs of this device's experts.
      row_map: integer [R*C, k] ([R*C, 1] per_slot), the row of y.reshape(-1, H) for each route of each received row, or
        -1, as `permute_to_masked` or `permute_to_contiguous` returned it.
      dispatched: what `dispatch` returned; it was given buffers.
      residual: as in `combine`.
      topk_weights: as in `combine`.
      axis_name: as in `dispatch`.

    Returns:
      This device's tokens [T, H] in y's dtype, and the buffers for the program's next dispatch.

    Raises:
      ValueError, TypeError: there are no buffers, weights are missing (per_slot) or given (per_peer), or shapes or
        dtypes do not fit.
      NotImplementedError: the kernel cannot serve the call; the message says why.
    """
    op = "combine_into_buffers"
    check_array(f"{op}: y", y, jnp.floating)
    devices, y = axis_size(op, axis_name), y.reshape(-1, y.shape[-1])
    if dispatched.buffers is None:
        raise ValueError(f"{op}: the dispatch had no buffers")
    if row_map.shape != dispatched.local_ids.shape:
        raise ValueError(f"{op}: row_map must be {dispatched.local_ids.shape}, got {row_map.shape}")
    _check_residual(op, residual, y, dispatched.send_map)
    topk_weights = _home_weights(op, dispatched, topk_weights, devices)
    row_map = row_map.astype(jnp.int32)
    config = push_combine.default_config(row_map.shape[0], y.shape[1] * y.dtype.itemsize, multiprocessors())
    check_combine_into_buffers(y, row_map, dispatched.send_map, devices=devices, axis_name=axis_name, config=config)
    return low_latency.run_back(y, row_map, dispatched, topk_weights, residual, axis_name=axis_name, config=config)


def _check_residual(op, residual, y, send_map):
    if residual is None:
        return
    check_array(f"{op}: residual", residual)
    wanted = send_map.shape[0], y.shape[-1]
    if residual.shape != wanted or residual.dtype != y.dtype:
        raise ValueError(f"{op}: residual must be {y.dtype} {wanted}, got {residual.dtype} {residual.shape}")


def _home_weights(op, dispatched, topk_weights, devices):
    """Returns f32 weights for the entries of the send map: the given ones per_slot, ones per_peer."""
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
    """Returns one global scale for a whole mesh axis, f32 (): the maximum over the given scales of all devices.

    Args:
      scale: f32 of any shape, the scales of this device.
      axis_name: the mesh axis of the surrounding shard_map; None: this device alone.

    Raises:
      ValueError: there is no shard_map with this axis.
    """
    if axis_name is not None:
        axis_size("agree_global_scale", axis_name)
    agreed = jnp.max(jnp.asarray(scale, jnp.float32))
    return agreed if axis_name is None else lax.pmax(agreed, axis_name)
