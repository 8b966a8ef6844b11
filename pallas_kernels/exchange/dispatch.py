"""Dispatch without a collective: each device quantizes its tokens and stores their rows into the peers' buffers.

    received[sender, place] on device d = row of a token of `sender` that has an expert on d

The kernel runs inside `jax.shard_map` over one mesh axis, on devices of one process that reach each other's memory
(NVLink). Rows of one sender are in token order, then slot order, as `route_metadata` would place them.

A thread block takes a run of successive tokens. One of its warpgroups finds the row of each token on each device
(`RowPlan`: it counts all earlier tokens, then computes a prefix sum over its own) and stores ids and weights there.
Meanwhile each of the other warpgroups makes the rows of the tokens, one after the other and quantized if that is asked
for, in one of two buffers in shared memory. The copy engine sends a row to all of its destinations while the warpgroup
makes the next one in the other buffer.

At the end a thread block waits for its stores, signals every peer and waits for the signals of all of them: thread
block b of a device meets thread block b of each other device. XLA lets the devices meet before such a kernel, so that
no buffer is written while it still holds other data.

From some thousand tokens on the links bound the time. Below that it is the meeting before the kernel, the signals and
the launch, about 15 us together.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.makers import check_parts, is_single, row_maker
from pallas_kernels.exchange.meeting import CountedMeeting, Meeting
from pallas_kernels.exchange.plan import MAX_DEVICES, MAX_SLOTS, Routes, RowPlan, TuningConfig, counts_of_blocks
from pallas_kernels.exchange.targets import Payload, Peers
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS, PIECE_BYTES, SMEM_BYTES
from pallas_kernels.simt.lane_math import unsigned_div

_STAGES = 2  # buffers per warpgroup: one is made while the other is sent
_MAX_SHARED_BYTES = SMEM_BYTES - 7 * 1024  # leaves room for barriers, semaphore and alignment
# With more tokens a kernel of its own counts the routes. With fewer each thread block reads the ids of all tokens.
_COUNT_APART = 2048


def default_config(routes: Routes, row_bytes: int) -> TuningConfig:
    """At most one thread block per two tokens, as each signals every peer; two warpgroups if their buffers fit.

    Measured on two and four H100, as the defaults of `TuningConfig` are.
    """
    blocks = max(1, min(H100_SMS, -(-routes.tokens // 2)))
    fits = _shared_bytes(routes, row_bytes, TuningConfig(blocks, 2)) <= _MAX_SHARED_BYTES
    return TuningConfig(blocks, 2 if fits else 1)


def _bytes_of(sent):
    return sum(p.shape[1] * p.dtype.itemsize for p in sent)


def _shared_bytes(routes, row_bytes, config):
    return config.warpgroups * _STAGES * row_bytes + 4 * RowPlan(routes, config).words


def check_config(
    parts: Sequence[Any], routes: Routes, *, encode: Any = None, config: TuningConfig | None = None
) -> str | None:
    """None if `dispatch` accepts these (arrays or ShapeDtypeStructs), else what does not fit."""
    if not 2 <= routes.devices <= MAX_DEVICES:
        return f"needs 2 to {MAX_DEVICES} devices, got {routes.devices}"
    return check_pack(parts, routes, encode=encode, config=config)


def check_pack(
    parts: Sequence[Any], routes: Routes, *, encode: Any = None, config: TuningConfig | None = None
) -> str | None:
    """None if `pack` accepts these (arrays or ShapeDtypeStructs), else what does not fit."""
    if routes.devices > MAX_DEVICES:
        return f"needs at most {MAX_DEVICES} devices, got {routes.devices}"
    if routes.tokens < 1 or not 1 <= routes.k <= MAX_SLOTS:
        return f"needs tokens, and 1 to {MAX_SLOTS} slots, got {routes.tokens} tokens and {routes.k} slots"
    if problem := check_parts(parts, encode):
        return problem
    sent = row_maker(parts, encode).sent
    row_bytes = _bytes_of(sent)
    config = config or default_config(routes, row_bytes)
    row_words = row_bytes // 4 + 2 * routes.k + 4
    if routes.devices * routes.capacity * max(row_words, *(p.shape[1] for p in sent)) >= lanes.MAX_INDEX:
        return f"{routes.devices * routes.capacity} rows exceed the kernel's 32-bit indices"
    if not (1 <= config.blocks <= H100_SMS and 1 <= config.warpgroups <= 7):
        return f"blocks must be 1..{H100_SMS} and warpgroups 1..7, got {config}"
    shared = _shared_bytes(routes, row_bytes, config)
    if shared > _MAX_SHARED_BYTES:
        return f"{config.warpgroups} warpgroups with rows of {row_bytes} bytes need {shared} bytes of shared memory"
    return None


def dispatch(
    parts: Sequence[jax.Array],
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    routes: Routes,
    *,
    axis_name: str,
    encode: Any = None,
    config: TuningConfig | None = None,
) -> tuple[list[jax.Array], jax.Array, jax.Array | None, jax.Array]:
    """Sends the row of each token to the devices that have its experts.

    Args:
      parts: arrays [T, n] that together are the tokens' rows. A part has a multiple of 16 bytes per row, or one 32-bit
        value, which must come last.
      topk_ids: global expert ids, i32 [T, k]. Ids outside 0..devices * local_experts - 1 go nowhere.
      topk_weights: f32 [T, k].
      routes: sizes, and the form "per_peer" or "per_slot".
      axis_name: the mesh axis.
      encode: None sends the parts as they are. Otherwise `parts` is one bf16 or f32 array [T, H]: "fp8" sends it as
        block-wise FP8, a global scale (f32 of one element) or "per_token" as NVFP4.
      config: None takes `default_config`.

    Returns:
      received: the parts of the received rows, [devices, capacity, n], first axis the sender. NVFP4 has codes u8
        [.., H/2], block scales e4m3 [.., H/16] and for "per_token" global scales f32 [.., 1]. FP8 has e4m3 [.., H] and
        scales f32 [.., ceil(H/128)].
      local ids: i32 [devices, capacity, k], per_slot [devices, capacity, 1]: expert on this device, -1 where the expert
        is on another device or no row was received.
      weights: f32 of the same shape, or None for per_slot.
      send_map: i32 [T, columns], rows that this device sent: receiver * capacity + place there, or -1.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_config`.
    """
    if problem := check_config(parts, routes, encode=encode, config=config):
        raise NotImplementedError(f"dispatch kernel: {problem}")
    kernel = Kernel(parts, routes, encode, config, axis_name)
    *received, send_map = kernel.run(topk_ids, topk_weights)
    return (*kernel.unpacked(received), send_map)


def pack(
    parts: Sequence[jax.Array],
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    routes: Routes,
    *,
    encode: Any = None,
    apart: bool = False,
    config: TuningConfig | None = None,
) -> tuple[list[jax.Array], jax.Array]:
    """Writes the rows that `dispatch` would send into buffers of this device, for an all_to_all.

    A packed row consists of its parts, k global ids i32 (per_slot: 1 id), for per_peer k weights f32, and padding to a
    multiple of 16 bytes. Rows that no token fills have ids of -1.

    Args:
      apart: whether the first part gets an array of its own, [devices, capacity, n] of its dtype.
      The other arguments are those of `dispatch`, for 1 to 8 devices.

    Returns:
      payload: [packed rows u8 [devices, capacity, bytes]], before them the array of the first part if `apart`.
      send_map: as in `dispatch`.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_pack`.
    """
    if problem := check_pack(parts, routes, encode=encode, config=config):
        raise NotImplementedError(f"pack kernel: {problem}")
    *payload, send_map = Kernel(parts, routes, encode, config, None, apart).run(topk_ids, topk_weights)
    return payload, send_map


class Kernel:
    """The kernel of `dispatch`, which stores to the peers of `axis_name`, and of `pack` (axis_name None).

    The other arguments are those of `dispatch` and `pack`.
    """

    def __init__(self, parts, routes, encode, config, axis_name, apart=False):
        self.routes, self.axis_name, self.apart = routes, axis_name, int(apart)
        self.maker = row_maker(parts, encode)
        self.config = config or default_config(routes, _bytes_of(self.maker.sent))
        self.plan = RowPlan(routes, self.config)
        self.with_weights = routes.form == "per_peer"
        self.ids_per_row = routes.k if self.with_weights else 1
        # The large parts of a row go through the copy engine. Lanes store the rest: single values, ids, weights.
        self.big = [p for p in self.maker.sent if not is_single(p)]
        self.singles = [p for p in self.maker.sent if is_single(p)]
        self.big_bytes = [p.shape[1] * p.dtype.itemsize for p in self.big]
        self.widths = [1] * len(self.singles) + [self.ids_per_row] * (1 + self.with_weights)
        self.row_bytes = -(-(sum(self.big_bytes[self.apart :]) + 4 * sum(self.widths)) // PIECE_BYTES) * PIECE_BYTES

    def targets(self) -> list[jax.ShapeDtypeStruct]:
        """Types of the arrays that rows are stored to: those of each receiver (dispatch), or of this device (pack)."""
        r = self.routes
        if self.axis_name is None:
            apart = [(p.shape[1], p.dtype) for p in self.big[: self.apart]]
            types = [*apart, (self.row_bytes, jnp.uint8)]
        else:
            types = [(p.shape[1], p.dtype) for p in self.maker.sent]
            types += [(self.ids_per_row, t) for t in (jnp.int32, jnp.float32)[: 1 + self.with_weights]]
        return [jax.ShapeDtypeStruct((r.devices, r.capacity, n), t) for n, t in types]

    def unpacked(self, received: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
        """Splits received arrays of the types `targets` into parts, local ids and weights (None for per_slot)."""
        *received, last = received
        if not self.with_weights:
            return received, last, None
        return received[:-1], received[-1], last

    def run(self, topk_ids: jax.Array, topk_weights: jax.Array) -> tuple[jax.Array, ...]:
        """Runs the kernel. Returns new arrays of the types `targets`, and send_map."""
        targets, send_map = self.targets(), self._map()
        operands = self._operands(topk_ids, topk_weights)
        meeting = [] if self.axis_name is None else Meeting.scratch(self.config.warpgroups + 1)

        def body(*refs):
            inputs, outputs, scratch = _cut(refs, len(operands), len(targets) + 1)
            end = Meeting(*scratch[self._own :]) if meeting else None
            self._send_all(inputs, outputs[:-1], outputs[-1], scratch[: self._own], end)

        return launch.kernel(
            body, (*targets, send_map), grid=self.config.blocks, warpgroups=self.config.warpgroups + 1,
            scratch_types=[*self._scratch(), *meeting],
        )(*operands)  # fmt: skip

    def run_into(
        self, topk_ids: jax.Array, topk_weights: jax.Array, targets: list[Any], kept: list[Any], *, first: bool
    ) -> jax.Array:
        """Runs the kernel on existing arrays. Returns send_map.

        Args:
          topk_ids, topk_weights: as in `dispatch`.
          targets: references to arrays of the types `targets`; the peers store to them.
          kept: references that the kernel does not touch, and last the counters of the meeting, i32 [blocks, 32].
          first: whether XLA lets the devices meet before the kernel. They need not if a call with the same counters ran
            before, at whose end they met.
        """
        operands = self._operands(topk_ids, topk_weights)
        inputs = [*operands, *targets, *kept]

        def body(*refs):
            inputs, targets_here, kept_here, (map_ref,), scratch = _cut(refs, len(operands), len(targets), len(kept), 1)
            end = CountedMeeting(kept_here[-1], *scratch[self._own :])
            self._send_all(inputs, targets_here, map_ref, scratch[: self._own], end)

        return launch.kernel(
            body, self._map(), grid=self.config.blocks, warpgroups=self.config.warpgroups + 1, device_barrier=first,
            scratch_types=[*self._scratch(), *CountedMeeting.scratch(self.config.warpgroups + 1)],
        )(*inputs)  # fmt: skip

    def _map(self):
        return jax.ShapeDtypeStruct((self.routes.tokens, self.routes.columns), jnp.int32)

    def _operands(self, topk_ids, topk_weights):
        """Operands of the kernel: rows, ids, for per_peer weights, and counts if another kernel computes them."""
        operands = [*self.maker.operands, topk_ids]
        if self.with_weights:
            operands.append(topk_weights)
        if self.routes.tokens > _COUNT_APART:
            operands.append(counts_of_blocks(topk_ids, self.plan))
        return operands

    def _scratch(self):
        """Scratch of the kernel, without that of the meeting: buffers for rows, the plan, and the plan's barrier."""
        if self.axis_name is None:
            types = [(p.shape[1], p.dtype) for p in self.big[: self.apart]]
            types += [(n, jnp.uint8) for n in self.big_bytes[self.apart :]]
        else:
            types = [(p.shape[1], p.dtype) for p in self.big]
        buffers = [plgpu.SMEM((self.config.warpgroups * _STAGES, n), t) for n, t in types]
        return [*buffers, self.plan.scratch(lanes.WARPS * self.config.warpgroups), plgpu.Barrier(num_arrivals=1)]

    @property
    def _own(self):
        """Number of entries of `_scratch`."""
        return len(self.big) + 2

    def _send_all(self, inputs, targets, map_ref, scratch, meeting):
        """The last warpgroup makes the plan and sends ids and weights. The others make the rows and send them."""
        sources, (ids_ref,), weights_ref, counts_ref = _cut(inputs, len(self.maker.operands), 1, self.with_weights)
        *buffers, plan_smem, planned = scratch
        target = (Payload if meeting is None else Peers)(self, targets)
        warpgroup = lanes.warpgroup_index()

        @pl.when(warpgroup == self.config.warpgroups)
        def _():
            totals = self.plan.fill(ids_ref, counts_ref[0] if counts_ref else None, plan_smem, map_ref)
            plgpu.barrier_arrive(planned)
            self._send_words(plan_smem, ids_ref, weights_ref, target)
            self._blank(totals, target)

        @pl.when(warpgroup < self.config.warpgroups)
        def _():
            self._send_rows(warpgroup, sources, buffers, plan_smem, planned, target)

        if meeting is not None:
            meeting.meet(self.routes.devices, self.config.warpgroups + 1)

    def _send_rows(self, mover, sources, buffers, rows, planned, target):
        r, movers = self.routes, self.config.warpgroups
        first, number = self.plan.tokens_of_block()
        scratch = rows.at[pl.ds(self.plan.words + lanes.WARPS * mover, lanes.WARPS)]

        def load(i):
            local = mover + i * movers
            return tuple(self.maker.load(sources, first + local, local < number))

        def send(i, loaded):
            local, stage = mover + i * movers, mover * _STAGES + lax.rem(i, jnp.int32(_STAGES))
            following = load(i + 1)
            plgpu.wait_smem_to_gmem(_STAGES - 1, wait_read_only=True)
            singles = self.maker.store(sources, loaded, buffers, stage, scratch)
            plgpu.commit_smem()

            @pl.when(i == 0)
            def _():
                plgpu.barrier_wait(planned)

            for j in range(r.columns):
                row = rows[local * r.columns + j]
                device = lax.div(jnp.maximum(row, 0), jnp.int32(r.capacity))
                place = jnp.maximum(row, 0) - device * r.capacity
                target.copy([b.at[stage] for b in buffers], device, place, row >= 0)
            plgpu.commit_smem_to_gmem_group()
            if singles:
                column = lanes.lane_index()
                (row,) = lanes.gather(rows, local * r.columns + column, where=column < r.columns)
                sends, device, place = self._destination(row, column < r.columns)
                for single, value in enumerate(singles):
                    target.store(single, device, place, jnp.int32(0), value, sends)
            return following

        mine = lax.div(jnp.maximum(number - mover + movers - 1, 0), jnp.int32(movers))
        lax.fori_loop(0, mine, send, load(0))
        plgpu.wait_smem_to_gmem(0)

    def _destination(self, row, where):
        """Entries of the plan as three lane arrays: whether there is a row, its device, and its place there."""
        row = row.astype(jnp.int32)
        device = unsigned_div(jnp.maximum(row, 0), self.routes.capacity)
        return where & (row >= 0), device, row - device * self.routes.capacity

    def _send_words(self, rows, ids_ref, weights_ref, target):
        """Stores ids and weights. A lane takes one (token, column of the plan, slot): that id and weight of the row."""
        r, per_row = self.routes, self.ids_per_row
        first, number = self.plan.tokens_of_block()

        def step(i, _):
            item = i * lanes.LANES + lanes.lane_index()
            place_in_plan = unsigned_div(item, per_row)
            slot = item - place_in_plan * per_row
            local = unsigned_div(place_in_plan, r.columns)
            (row,) = lanes.gather(rows, place_in_plan, where=local < number)
            sends, device, place = self._destination(row, local < number)
            column = place_in_plan - local * r.columns
            source = (first + local) * r.k + (slot if self.with_weights else column)
            words = [lanes.gather(ref, source, where=sends)[0] for ref in (ids_ref, *weights_ref)]
            words[0] = target.id_of(words[0].astype(jnp.int32), device).astype(jnp.uint32)
            for j, word in enumerate(words):
                target.store(len(self.singles) + j, device, place, slot, word, sends)

        lax.fori_loop(0, lax.div(number * r.columns * per_row + lanes.LANES - 1, jnp.int32(lanes.LANES)), step, None)

    def _blank(self, totals, target):
        """Stores ids of -1 to the rows that no token fills."""
        r, per_row = self.routes, self.ids_per_row
        stride = self.config.blocks * lanes.LANES
        for d, total in enumerate(totals):
            begin = jnp.minimum(total, r.capacity) * per_row + lanes.block_index() * lanes.LANES

            def blank(i, _, d=d, begin=begin):
                word = begin + i * stride + lanes.lane_index()
                place = unsigned_div(word, per_row)
                nothing = lanes.splat(0xFFFFFFFF, jnp.uint32)
                device = lanes.splat(d, jnp.int32)
                target.store(len(self.singles), device, place, word - place * per_row, nothing, place < r.capacity)

            left = jnp.maximum(r.capacity * per_row - begin, 0)
            lax.fori_loop(0, lax.div(left + stride - 1, jnp.int32(stride)), blank, None)


def _cut(refs: Sequence[Any], *sizes: int) -> list[list[Any]]:
    """Splits `refs` into lists of these sizes, and one more with the rest."""
    runs, start = [], 0
    for size in sizes:
        runs.append(list(refs[start : start + size]))
        start += size
    return [*runs, list(refs[start:])]
