"""Expert dispatch without a collective: rows are made in shared memory and stored straight into the peers' buffers.

For the devices of one process that reach each other's memory (NVLink). Inside `jax.shard_map` over one mesh axis.

A block of threads owns a run of consecutive tokens. One of its warpgroups works out to which row of which peer they go
(`RowPlan`: counts of all earlier tokens, then a prefix sum over its own) and stores ids and weights there. The others,
meanwhile, make one token's row after the other in one of two buffers of shared memory each, quantizing where that is
asked for, and let the copy engine send it to all of its destinations while they make the next one. At the end a block
waits for its stores, signals every peer and waits for the signals of all of them: block b of one device meets block b
of the others. XLA puts a barrier between the devices in front of such a kernel, so that nobody's buffers are written
while they still hold something else.

Rows of one sender are in token order, then slot order, as `route_metadata` would place them. What limits it: the links
from some thousand tokens on, below that the barrier, the signals and the launch, about 15 us together.
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

_STAGES = 2
_MAX_SHARED_BYTES = SMEM_BYTES - 7 * 1024  # the rest is for barriers, a semaphore and the alignment of buffers
# From here on a kernel of its own counts the routes; below, every block reads the ids of all tokens.
_COUNT_APART = 2048


def default_config(routes: Routes, row_bytes: int) -> TuningConfig:
    """Few tokens take fewer blocks: every block signals every peer. Two warpgroups where their rows fit.

    Measured on two and four H100, like `TuningConfig`.
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
    """None if `dispatch` accepts these (arrays or structs), else what does not fit."""
    if not 2 <= routes.devices <= MAX_DEVICES:
        return f"needs 2 to {MAX_DEVICES} devices, got {routes.devices}"
    return check_pack(parts, routes, encode=encode, config=config)


def check_pack(
    parts: Sequence[Any], routes: Routes, *, encode: Any = None, config: TuningConfig | None = None
) -> str | None:
    """None if `pack` accepts these (arrays or structs), else what does not fit."""
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
    """Rows of the parts [T, n] -> every device's [devices, capacity, n], in rank order of the senders.

    Args:
      parts: what a row consists of; 16 bytes or a multiple per row, or one 32-bit value.
      topk_ids: i32 [T, k], global; others than 0..devices * local_experts - 1 go nowhere. topk_weights: f32 [T, k].
      encode: parts is one bf16 or f32 array [T, H] to be sent as NVFP4: its scale, f32 of one element, or "per_token";
        or as "fp8".

    -> received parts (NVFP4: codes u8 [.., H/2], scales e4m3 [.., H/16] and, "per_token", f32 [.., 1]; fp8: e4m3
    [.., H], f32 [.., ceil(H/128)]); local ids i32 [devices, capacity, k] (per_slot: 1), -1 where it is not here or no
    row; weights f32 like them, None per_slot; the map i32 [T, columns] of rows that this device sent: receiver *
    capacity + place, or -1.

    Raises:
      NotImplementedError: what `check_config` returns.
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
    """The same rows in buffers of this device, for an all_to_all -> ([u8 [devices, capacity, bytes]], map).

    A row: its parts, k global ids i32 (per_slot: 1), per_peer k weights f32, and up to 12 bytes more: a multiple of 16
    in all. apart: the first part has an array of its own, [devices, capacity, n] of its dtype, before that of the rest.
    Ids of rows that nobody fills are -1. Arguments, map and errors as in `dispatch`; any number of devices up to 8.
    """
    if problem := check_pack(parts, routes, encode=encode, config=config):
        raise NotImplementedError(f"pack kernel: {problem}")
    *payload, send_map = Kernel(parts, routes, encode, config, None, apart).run(topk_ids, topk_weights)
    return payload, send_map


class Kernel:
    """The kernel of both: to the peers of a mesh axis, or (axis_name None) into one or two buffers of this device."""

    def __init__(self, parts, routes, encode, config, axis_name, apart=False):
        self.routes, self.axis_name, self.apart = routes, axis_name, int(apart)
        self.maker = row_maker(parts, encode)
        self.config = config or default_config(routes, _bytes_of(self.maker.sent))
        self.plan = RowPlan(routes, self.config)
        self.with_weights = routes.form == "per_peer"
        self.ids_per_row = routes.k if self.with_weights else 1
        # A row: what is copied as a whole, then what lanes store: single values, ids, weights.
        self.big = [p for p in self.maker.sent if not is_single(p)]
        self.singles = [p for p in self.maker.sent if is_single(p)]
        self.big_bytes = [p.shape[1] * p.dtype.itemsize for p in self.big]
        self.widths = [1] * len(self.singles) + [self.ids_per_row] * (1 + self.with_weights)
        self.row_bytes = -(-(sum(self.big_bytes[self.apart :]) + 4 * sum(self.widths)) // PIECE_BYTES) * PIECE_BYTES

    def targets(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays that rows are sent to, of every receiver or of this device."""
        r = self.routes
        if self.axis_name is None:
            apart = [(p.shape[1], p.dtype) for p in self.big[: self.apart]]
            types = [*apart, (self.row_bytes, jnp.uint8)]
        else:
            types = [(p.shape[1], p.dtype) for p in self.maker.sent]
            types += [(self.ids_per_row, t) for t in (jnp.int32, jnp.float32)[: 1 + self.with_weights]]
        return [jax.ShapeDtypeStruct((r.devices, r.capacity, n), t) for n, t in types]

    def unpacked(self, received: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
        """What is in arrays like `targets`: parts, local ids, weights (None per slot)."""
        *received, last = received
        if not self.with_weights:
            return received, last, None
        return received[:-1], received[-1], last

    def run(self, topk_ids: jax.Array, topk_weights: jax.Array) -> tuple[jax.Array, ...]:
        """-> new arrays like `targets`, and the map."""
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
        """Into references to arrays like `targets` -> the map. kept: references that nothing happens to, and counters.

        first: XLA lets the devices meet before; else they met in the call before, with the same counters.
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
        """Rows, ids, weights where they are sent, counts where they are made apart."""
        operands = [*self.maker.operands, topk_ids]
        if self.with_weights:
            operands.append(topk_weights)
        if self.routes.tokens > _COUNT_APART:
            operands.append(counts_of_blocks(topk_ids, self.plan))
        return operands

    def _scratch(self):
        """Buffers for rows, the plan, and a barrier for it."""
        if self.axis_name is None:
            types = [(p.shape[1], p.dtype) for p in self.big[: self.apart]]
            types += [(n, jnp.uint8) for n in self.big_bytes[self.apart :]]
        else:
            types = [(p.shape[1], p.dtype) for p in self.big]
        buffers = [plgpu.SMEM((self.config.warpgroups * _STAGES, n), t) for n, t in types]
        return [*buffers, self.plan.scratch(lanes.WARPS * self.config.warpgroups), plgpu.Barrier(num_arrivals=1)]

    @property
    def _own(self):
        """Number of `_scratch`."""
        return len(self.big) + 2

    def _send_all(self, inputs, targets, map_ref, scratch, meeting):
        """One warpgroup plans and sends what the plan alone says; the others make rows and send them."""
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
        """Of rows of the plan: whether they exist, device, place there; lane arrays."""
        row = row.astype(jnp.int32)
        device = unsigned_div(jnp.maximum(row, 0), self.routes.capacity)
        return where & (row >= 0), device, row - device * self.routes.capacity

    def _send_words(self, rows, ids_ref, weights_ref, target):
        """Lane (token, column, slot): an id and a weight of the row that goes there."""
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
        """Ids of -1 into the rows that nobody fills."""
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
    """Runs of these sizes, and the rest."""
    runs, start = [], 0
    for size in sizes:
        runs.append(list(refs[start : start + size]))
        start += size
    return [*runs, list(refs[start:])]
