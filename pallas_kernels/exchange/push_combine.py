"""Combine of a decode step in one kernel: partial sums over experts go to the tokens' devices and are summed there.

    partial(r) = sum over slots j of row_weights[r, j] * y[row_map[r, j]]            on the device that received row r
    out[t] = sum over columns s of weights[t, s] * partial(row send_map[t, s])       on the device of token t
             (+ residual[t])

The kernel does the work of depermute.py and of combine.py. It rounds each product and sum where they do, so its bits
are theirs. But it does not store partial sums on the device that computes them, and no meeting comes before it. It runs
inside `jax.shard_map` over one mesh axis, on devices of one process that reach each other's memory (NVLink), with
arrays that outlive the kernel (fp4jax.expert_parallel.low_latency).

The grid is persistent. First a lane takes 16 bytes of a received row at a time: it computes the partial sum and stores
it to the device that the row came from. Then all thread blocks of all devices meet. Last, a lane takes 16 bytes of a
token at a time and adds the partial sums that arrived for it.

The launch and the meeting bound the time, with many tokens the links.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.combine import TuningConfig, check_config as check_combine
from pallas_kernels.exchange.meeting import CommonMeeting
from pallas_kernels.rows.depermute import check_depermute, sum_of_routes
from pallas_kernels.rows.permute import Access, row_access
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS
from pallas_kernels.simt.lane_math import unsigned_div
from pallas_kernels.simt.schedule import PersistentLanes

_FREE = 12  # multiprocessors that stay free, see `default_config`


def default_config(rows: int, row_bytes: int, multiprocessors: int) -> TuningConfig:
    """One thread block per multiprocessor, fewer for few bytes, as each signals every peer. Measured on two H100.

    Some multiprocessors stay free for a collective that runs at the same time: all thread blocks wait for each other,
    so a collective must not keep the last of them from starting.
    """
    most = max(1, min(H100_SMS, multiprocessors) - _FREE)
    return TuningConfig(most if rows * row_bytes > 2**19 else max(1, min(H100_SMS, multiprocessors) // 2))


def check_config(y: Any, row_map: Any, send_map: Any, devices: int, config: TuningConfig) -> str | None:
    """None if `push_combine` accepts these (arrays or ShapeDtypeStructs), else what does not fit."""
    if problem := check_depermute(y, row_map):
        return problem
    received = jax.ShapeDtypeStruct((row_map.shape[0], y.shape[1]), y.dtype)
    return check_combine(received, send_map, devices, config)


class Received(NamedTuple):
    """Rows that this device received, C from each device, and where the results of its experts are.

    row_map: i32 [devices * C, k], the row of y for each slot, -1 = none.
    weights: f32 [devices * C, k], by which those rows of y are multiplied.
    local_ids: i32 [devices * C, k]. A row whose ids are all -1 is a pad; the kernel stores nothing for it.
    """

    row_map: Any
    weights: Any
    local_ids: Any


class Home(NamedTuple):
    """The places of the rows of this device's tokens, and what is added to their sums.

    send_map: i32 [T, S], device * C + row there, or -1.
    weights: f32 [T, S], by which the partial sums are multiplied.
    residual: [T, H] of y's dtype; None adds nothing.
    """

    send_map: Any
    weights: Any
    residual: Any = None


class Buffers(NamedTuple):
    """References to arrays that outlive the kernel.

    sums: [devices, C, H] in y's dtype. The peers store partial sums to it.
    kept: references that the kernel does not touch, and last the counters of the meeting, i32 [blocks, 32].
    first: whether XLA lets the devices meet before the kernel, see `dispatch.Kernel.run_into`.
    """

    sums: Any
    kept: list[Any]
    first: bool


def push_combine(
    y: jax.Array, received: Received, home: Home, buffers: Buffers, *, devices: int, axis_name: str,
    config: TuningConfig,
) -> jax.Array:  # fmt: skip
    """Sums up the experts' results for each token of this device, [T, H] of y's dtype (formulas at the top).

    Both sums run in order and in f32, and are rounded to y's dtype.

    Args:
      y: results of this device's experts, bf16 or f32 [rows, H].
      received: the rows that this device received, with `row_weights` of the formulas in received.weights.
      home: the rows of this device's tokens.
      buffers: the arrays that outlive the kernel.
      devices: number of devices on the mesh axis.
      axis_name: the mesh axis.
      config: see `default_config`.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_config`.
    """
    if problem := check_config(y, received.row_map, home.send_map, devices, config):
        raise NotImplementedError(f"push_combine kernel: {problem}")
    (rows, _), (tokens, _), hidden = received.row_map.shape, home.send_map.shape, y.shape[1]
    sizes = _Sizes(rows, tokens, rows // devices, devices, row_access(hidden * y.dtype.itemsize), y.dtype)

    residual = [] if home.residual is None else [home.residual]
    inputs = [y, *received, home.send_map, home.weights, *residual, buffers.sums]

    def body(*refs):
        *_, counters_ref = refs[len(inputs) : len(inputs) + len(buffers.kept)]
        out_ref, *barriers = refs[len(inputs) + len(buffers.kept) :]
        meeting = CommonMeeting(counters_ref, config.blocks, *barriers)
        shared: list[Any] = [*refs[:6], list(refs[6 : 6 + len(residual)]), refs[len(inputs) - 1], out_ref]
        block = _Block(sizes, _Refs(*shared), axis_name, config)
        block.push()
        meeting.meet(devices, config.warpgroups)
        block.add()

    return launch.kernel(
        body, jax.ShapeDtypeStruct((tokens, hidden), y.dtype), grid=config.blocks, warpgroups=config.warpgroups,
        scratch_types=CommonMeeting.scratch(config.warpgroups), device_barrier=buffers.first,
    )(*inputs, *buffers.kept)  # fmt: skip


class _Refs(NamedTuple):
    """References to the arguments of `push_combine` and to its result, all in global memory.

    residual: a list of one or no reference.
    """

    y: Any
    row_map: Any
    row_weights: Any
    local_ids: Any
    send_map: Any
    weights: Any
    residual: Any
    sums: Any
    out: Any


class _Sizes(NamedTuple):
    """Static sizes. rows: received rows with pads. capacity: rows per sender and receiver. cut: of a row of y."""

    rows: int
    tokens: int
    capacity: int
    devices: int
    cut: Access
    dtype: Any


class _Block:
    """The two stages of one thread block."""

    def __init__(self, sizes: _Sizes, refs: _Refs, axis_name: str, config: TuningConfig):
        self.sizes, self.refs, self.me = sizes, refs, lax.axis_index(axis_name)
        self.peers = [plgpu.remote_ref(refs.sums, jnp.int32(d)) for d in range(sizes.devices)]
        self.lanes = PersistentLanes(config.blocks, config.warpgroups)

    def push(self) -> None:
        """Computes the partial sum of each received row and stores it to the device that the row came from."""
        s, r = self.sizes, self.refs

        def load(row, column, where):  # a row number beyond the last row reads the last row, as XLA's gather does
            position = jnp.minimum(row, r.y.shape[0] - 1) * s.cut.items + column
            return lanes.gather(r.y, position, s.cut.count, where=where)

        def send(item):
            row, column, inside = self._access(item, s.rows)
            ids = lanes.gather(r.local_ids, row, r.local_ids.shape[1], where=inside)
            received = inside & (sum((i.astype(jnp.int32) >= 0).astype(jnp.int32) for i in ids) > 0)
            words = sum_of_routes(row, column, received, load, r.row_map, r.row_weights, s.dtype)
            home = unsigned_div(row, s.capacity)
            there = (self.me - home) * s.capacity + row
            lanes.scatter(self.peers, there * s.cut.items + column, words, where=received, which=home)

        self.lanes.for_each(s.rows * s.cut.items, send)

    def add(self) -> None:
        """Computes each token's sum over the partial sums that arrived."""
        s, r = self.sizes, self.refs

        def load(row, column, where):
            return lanes.gather(r.sums, row * s.cut.items + column, s.cut.count, where=where)

        def add(item):
            token, column, inside = self._access(item, s.tokens)
            position = token * s.cut.items + column
            added = [lanes.gather(ref, position, s.cut.count, where=inside) for ref in r.residual]
            words = sum_of_routes(token, column, inside, load, r.send_map, r.weights, s.dtype, *added)
            lanes.scatter(r.out, position, words, where=inside)

        self.lanes.for_each(s.tokens * s.cut.items, add)

    def _access(self, item, number):
        """Row of a lane's item, index of the access in that row, and whether the row exists."""
        row = unsigned_div(item, self.sizes.cut.items)
        return row, item - row * self.sizes.cut.items, row < number
