"""The way back of a decode step: experts' rows are weighted and summed, stored into their home devices, summed there.

For the devices of one process that reach each other's memory (NVLink), inside `jax.shard_map` over one mesh axis, with
arrays that outlive the kernel (fp4jax.expert_parallel.low_latency). `permute.depermute_combine` and combine.py in one:
no partial sums are written here first, and no barrier comes before it. A lane owns 16 bytes of a received row: it adds
up what the experts made of it and stores the result where the row came from. Then all blocks of all devices meet, and a
lane owns 16 bytes of a token, of which it adds the partial sums of all devices.

Every product and sum is rounded where those two round, so the bits are theirs. What limits it: the launch and the
meeting, with many tokens the links.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.combine import TuningConfig, check_config as check_combine
from pallas_kernels.exchange.meeting import CommonMeeting
from pallas_kernels.rows.permute import Access, check_depermute, row_access, sum_of_routes
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS
from pallas_kernels.simt.lane_math import unsigned_div
from pallas_kernels.simt.schedule import PersistentLanes

_FREE = 12  # multiprocessors


def default_config(rows: int, row_bytes: int, multiprocessors: int) -> TuningConfig:
    """Few bytes take fewer blocks: every block signals every peer. Measured on two H100, with all multiprocessors.

    Some stay free: all blocks wait for all, and a collective that runs beside must not keep the last one out.
    """
    most = max(1, min(H100_SMS, multiprocessors) - _FREE)
    return TuningConfig(most if rows * row_bytes > 2**19 else max(1, min(H100_SMS, multiprocessors) // 2))


def check_config(y: Any, row_map: Any, send_map: Any, devices: int, config: TuningConfig) -> str | None:
    """None if `push_combine` accepts these (arrays or structs), else what does not fit."""
    if problem := check_depermute(y, row_map):
        return problem
    received = jax.ShapeDtypeStruct((row_map.shape[0], y.shape[1]), y.dtype)
    return check_combine(received, send_map, devices, config)


class Received(NamedTuple):
    """Rows that this device received, C from each device, and what its experts made of them.

    row_map: i32 [devices * C, k], the row of y for each slot, -1 = none.
    weights: f32 [devices * C, k], by which those rows of y are multiplied.
    local_ids: i32 [devices * C, k]. A row whose ids are all -1 is a pad: nothing is sent home for it.
    """

    row_map: Any
    weights: Any
    local_ids: Any


class Home(NamedTuple):
    """Where the tokens of this device went.

    send_map: i32 [T, S], device * C + row there, -1 = nowhere.
    weights: f32 [T, S], by which the partial sums are multiplied.
    """

    send_map: Any
    weights: Any


class Buffers(NamedTuple):
    """References to arrays that outlive the kernel.

    sums: [devices, C, H] in y's dtype; partial sums arrive there.
    kept: references that the kernel does not touch, and last the counters of the meeting, i32 [blocks, 32].
    first: whether XLA lets the devices meet before this kernel, as in `dispatch.Kernel.run_into`.
    """

    sums: Any
    kept: list[Any]
    first: bool


def push_combine(
    y: jax.Array, received: Received, home: Home, buffers: Buffers, *, devices: int, axis_name: str,
    config: TuningConfig,
) -> jax.Array:  # fmt: skip
    """out[t] = sum over columns s of home.weights[t, s] * partial(row home.send_map[t, s]) -> [T, H].

    partial(r) = sum over j of received.weights[r, j] * y[received.row_map[r, j]], on the device that received row r.
    Both sums are in order and cast to y's dtype. y: bf16 or f32 [rows, H] of this device's experts.

    Raises:
      NotImplementedError: what `check_config` returns.
    """
    if problem := check_config(y, received.row_map, home.send_map, devices, config):
        raise NotImplementedError(f"push_combine kernel: {problem}")
    (rows, _), (tokens, _), hidden = received.row_map.shape, home.send_map.shape, y.shape[1]
    sizes = _Sizes(rows, tokens, rows // devices, devices, row_access(hidden * y.dtype.itemsize), y.dtype)

    def body(*refs):
        inputs, (*_, counters_ref) = refs[:7], refs[7 : 7 + len(buffers.kept)]
        out_ref, *barriers = refs[7 + len(buffers.kept) :]
        meeting = CommonMeeting(counters_ref, config.blocks, *barriers)
        shared: list[Any] = [*inputs, out_ref]
        block = _Block(sizes, _Refs(*shared), axis_name, config)
        block.push()
        meeting.meet(devices, config.warpgroups)
        block.add()

    return launch.kernel(
        body, jax.ShapeDtypeStruct((tokens, hidden), y.dtype), grid=config.blocks, warpgroups=config.warpgroups,
        scratch_types=CommonMeeting.scratch(config.warpgroups), device_barrier=buffers.first,
    )(y, *received, *home, buffers.sums, *buffers.kept)  # fmt: skip


class _Refs(NamedTuple):
    """Arguments of `push_combine` and its result, in global memory."""

    y: Any
    row_map: Any
    row_weights: Any
    local_ids: Any
    send_map: Any
    weights: Any
    sums: Any
    out: Any


class _Sizes(NamedTuple):
    """What is known when the kernel is traced. capacity: rows per sender and receiver; cut: how rows are cut."""

    rows: int
    tokens: int
    capacity: int
    devices: int
    cut: Access
    dtype: Any


class _Block:
    """The two stages of one block of threads; every lane takes 16 bytes of a row at a time."""

    def __init__(self, sizes: _Sizes, refs: _Refs, axis_name: str, config: TuningConfig):
        self.sizes, self.refs, self.me = sizes, refs, lax.axis_index(axis_name)
        self.peers = [plgpu.remote_ref(refs.sums, jnp.int32(d)) for d in range(sizes.devices)]
        self.lanes = PersistentLanes(config.blocks, config.warpgroups)

    def push(self) -> None:
        """What the experts made of each received row, weighted and added up, into the row's home."""
        s, r = self.sizes, self.refs

        def load(row, column, where):  # a row beyond the last one reads the last, as in XLA
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
        """What arrived for each token, weighted and added up."""
        s, r = self.sizes, self.refs

        def load(row, column, where):
            return lanes.gather(r.sums, row * s.cut.items + column, s.cut.count, where=where)

        def add(item):
            token, column, inside = self._access(item, s.tokens)
            words = sum_of_routes(token, column, inside, load, r.send_map, r.weights, s.dtype)
            lanes.scatter(r.out, token * s.cut.items + column, words, where=inside)

        self.lanes.for_each(s.tokens * s.cut.items, add)

    def _access(self, item, number):
        """Row, 16-byte column and whether the row exists, of a lane's item."""
        row = unsigned_div(item, self.sizes.cut.items)
        return row, item - row * self.sizes.cut.items, row < number
