"""Expert dispatch without a collective: rows are made in shared memory and stored straight into the peers' buffers.

For the devices of one process that reach each other's memory (NVLink). Inside `jax.shard_map` over one mesh axis.

A block of threads owns a run of consecutive tokens. Every warpgroup works out for itself to which row of which peer
they go (`RowPlan`: counts of all earlier tokens, then a prefix sum over its own), makes one token's row after the other
in one of two buffers of shared memory, quantizing where that is asked for, and lets the copy engine send it to all of
its destinations while it makes the next one. Ids and weights, a few words, are stored by the lanes themselves. At the
end it waits for its stores, signals every peer and waits for the signals of all of them: block b of one device meets
block b of the others. XLA puts a barrier between the devices in front of such a kernel, so that nobody's buffers are
written while they still hold something else.

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

from pallas_kernels import lanes
from pallas_kernels.nvfp4_codec import BLOCK_SIZE, block_amax, computed_scale, encode_block, encode_scales
from pallas_kernels.quantize import AMAX_DIVISOR, MAX_INDEX, as_u32, finite_amax, load_values, unsigned_div
from pallas_kernels.row_plan import MAX_DEVICES, MAX_SLOTS, Routes, RowPlan, TuningConfig, counts_of_blocks
from pallas_kernels.schedule import H100_SMS

_STAGES = 2
_PIECE = 16  # bytes the copy engine moves at least
_MAX_SHARED_BYTES = 220 * 1024
_BLOCKS_AT_A_TIME = 4  # NVFP4 blocks per lane whose values are in registers together
# From here on a kernel of its own counts the routes; below, every warpgroup reads the ids of all tokens.
_COUNT_APART = 2048


def default_config(tokens: int) -> TuningConfig:
    """One token per warpgroup as long as there are few."""
    return TuningConfig(max(1, min(H100_SMS, -(-tokens // 2))))


def check_config(
    parts: Sequence[Any], routes: Routes, *, quantize_scale: Any = None, config: TuningConfig | None = None
) -> str | None:
    """None if `dispatch` accepts these (arrays or structs), else what does not fit."""
    config = config or default_config(routes.tokens)
    if not 2 <= routes.devices <= MAX_DEVICES:
        return f"needs 2 to {MAX_DEVICES} devices, got {routes.devices}"
    if routes.tokens < 1 or not 1 <= routes.k <= MAX_SLOTS:
        return f"needs tokens, and 1 to {MAX_SLOTS} slots, got {routes.tokens} tokens and {routes.k} slots"
    if quantize_scale is not None and (problem := _Quantized.check(parts[0])):
        return problem
    sent = _sender(parts, quantize_scale).sent
    for p in sent:
        row_bytes = p.shape[1] * p.dtype.itemsize
        if not _is_single(p) and (row_bytes % _PIECE or not row_bytes):
            return f"what is sent of a row must be a multiple of {_PIECE} bytes, got {p.dtype} {p.shape}"
        if routes.devices * routes.capacity * max(p.shape[1], routes.k) >= MAX_INDEX:
            return f"{routes.devices * routes.capacity} rows of {p.shape[1]} exceed the kernel's 32-bit indices"
    if not (1 <= config.blocks <= H100_SMS and 1 <= config.warpgroups <= 8):
        return f"blocks must be 1..{H100_SMS} and warpgroups 1..8, got {config}"
    shared = _STAGES * sum(p.shape[1] * p.dtype.itemsize for p in sent) + 4 * RowPlan(routes, config).words
    if config.warpgroups * shared > _MAX_SHARED_BYTES:
        return f"{config.warpgroups} warpgroups need {shared} bytes of shared memory each"
    return None


def _is_single(part):
    """One 32-bit value per row: the lanes store it, not the copy engine."""
    return part.shape[1] == 1 and part.dtype.itemsize == 4


def dispatch(
    parts: Sequence[jax.Array],
    topk_ids: jax.Array,
    topk_weights: jax.Array,
    routes: Routes,
    *,
    axis_name: str,
    quantize_scale: Any = None,
    config: TuningConfig | None = None,
) -> tuple[list[jax.Array], jax.Array, jax.Array | None, jax.Array]:
    """Rows of the parts [T, n] -> every device's [devices, capacity, n], in rank order of the senders.

    Args:
      parts: what a row consists of; 16 bytes or a multiple per row, or one 32-bit value.
      topk_ids, topk_weights: [T, k] global ids; others than 0..devices * local_experts - 1 go nowhere.
      quantize_scale: parts is one bf16 or f32 array [T, H] to be sent as NVFP4: f32 of one element, or "per_token".

    -> received parts (quantized: codes u8 [.., H/2], scales e4m3 [.., H/16] and, "per_token", f32 [.., 1]); local ids
    i32 [devices, capacity, k] (per_slot: 1), -1 where it is not here or no row; weights f32 like them, None per_slot;
    the map i32 [T, columns] of rows that this device sent: receiver * capacity + place, or -1.

    Raises:
      NotImplementedError: what `check_config` returns.
    """
    config = config or default_config(routes.tokens)
    if problem := check_config(parts, routes, quantize_scale=quantize_scale, config=config):
        raise NotImplementedError(f"dispatch kernel: {problem}")
    sender = _sender(parts, quantize_scale)
    r, plan = routes, RowPlan(routes, config)
    ids = jnp.clip(topk_ids, -1, r.devices * r.local_experts).astype(jnp.int32)
    operands = [*sender.operands, ids]
    with_weights, counted = r.form == "per_peer", r.tokens > _COUNT_APART
    if with_weights:
        operands.append(topk_weights.astype(jnp.float32))
    if counted:
        operands.append(counts_of_blocks(ids, plan))
    ids_per_row = r.k if with_weights else 1
    received = [jax.ShapeDtypeStruct((r.devices, r.capacity, p.shape[1]), p.dtype) for p in sender.sent]
    routing = [jax.ShapeDtypeStruct((r.devices, r.capacity, ids_per_row), t) for t in (jnp.int32, jnp.float32)]
    out_type = [*received, *routing[: 1 + with_weights], jax.ShapeDtypeStruct((r.tokens, r.columns), jnp.int32)]
    whole_rows = [p for p in sender.sent if not _is_single(p)]

    def body(*refs):
        refs = list(refs)
        take = lambda n: [refs.pop(0) for _ in range(n)]  # noqa: E731
        sources, (ids_ref,) = take(len(sender.operands)), take(1)
        weights_ref, counts_ref = take(with_weights), take(counted)
        targets, (ids_out,), weights_out, (map_ref,) = take(len(received)), take(1), take(with_weights), take(1)
        buffers, (plan_smem, semaphore) = take(len(whole_rows)), take(2)
        me, warpgroup = lax.axis_index(axis_name), lanes.warpgroup_index() if config.warpgroups > 1 else jnp.int32(0)
        rows, reduction = plan_smem.at[warpgroup], plan_smem.at[warpgroup, plan.table : plan.words]
        totals = plan.fill(ids_ref, counts_ref[0] if counted else None, rows, map_ref, warpgroup == 0)
        peers = lambda ref: [plgpu.remote_ref(ref, jnp.int32(d)) for d in range(r.devices)]  # noqa: E731
        first, number = plan.tokens_of_block()
        lane = lanes.lane_index()

        def send(i, _):
            local = warpgroup + i * config.warpgroups
            token, stage = first + local, warpgroup * _STAGES + lax.rem(i, _STAGES)
            plgpu.wait_smem_to_gmem(_STAGES - 1, wait_read_only=True)
            singles = sender.make(sources, buffers, token, stage, reduction)
            plgpu.commit_smem()
            big = [t for t, p in zip(targets, sender.sent, strict=True) if not _is_single(p)]
            small = [t for t, p in zip(targets, sender.sent, strict=True) if _is_single(p)]
            for j in range(r.columns):
                row = rows[local * r.columns + j]
                device = lax.div(jnp.maximum(row, 0), jnp.int32(r.capacity))
                place = jnp.maximum(row, 0) - device * r.capacity
                for buffer, target in zip(buffers, big, strict=True):
                    plgpu.copy_smem_to_gmem(
                        buffer.at[stage], plgpu.remote_ref(target, device).at[me, place], predicate=row >= 0,
                        commit_group=False,
                    )  # fmt: skip
            plgpu.commit_smem_to_gmem_group()
            # Lane (column, id): what the receiver needs to know of the row.
            for start in range(0, r.columns * ids_per_row, lanes.LANES):
                column = unsigned_div(start + lane, ids_per_row)
                slot = start + lane - column * ids_per_row
                (row,) = lanes.gather(rows, local * r.columns + column, where=column < r.columns)
                row = row.astype(jnp.int32)
                sends = (column < r.columns) & (row >= 0)
                device = unsigned_div(jnp.maximum(row, 0), r.capacity)
                position = me * r.capacity + row - device * r.capacity
                source = token * r.k + (slot if with_weights else column)
                (expert,) = lanes.gather(ids_ref, source, where=sends)
                expert = expert.astype(jnp.int32) - device * r.local_experts
                expert = jnp.where((expert >= 0) & (expert < r.local_experts), expert, -1).astype(jnp.uint32)
                options = dict(where=sends, which=device)
                lanes.scatter(peers(ids_out), position * ids_per_row + slot, [expert], **options)
                for given, target in zip(weights_ref, weights_out, strict=True):
                    lanes.scatter(peers(target), position * ids_per_row + slot, lanes.gather(given, source), **options)
                for value, target in zip(singles, small, strict=True):
                    lanes.scatter(peers(target), position, [value], where=sends & (slot == 0), which=device)

        mine = lax.div(jnp.maximum(number - warpgroup + config.warpgroups - 1, 0), jnp.int32(config.warpgroups))
        lax.fori_loop(0, mine, send, None)
        # Rows that nobody fills: no ids.
        worker, workers = lanes.block_index() * config.warpgroups + warpgroup, config.blocks * config.warpgroups
        for d, total in enumerate(totals):
            begin = jnp.minimum(total, r.capacity) * ids_per_row
            words = r.capacity * ids_per_row

            def blank(i, _, d=d, begin=begin, words=words):
                word = begin + (worker + i * workers) * lanes.LANES + lane
                target = plgpu.remote_ref(ids_out, jnp.int32(d))
                lanes.scatter(target, me * words + word, [lanes.splat(0xFFFFFFFF, jnp.uint32)], where=word < words)

            left = jnp.maximum(words - begin - worker * lanes.LANES, 0)
            lax.fori_loop(0, lax.div(left + workers * lanes.LANES - 1, jnp.int32(workers * lanes.LANES)), blank, None)
        plgpu.wait_smem_to_gmem(0)
        meet(semaphore, r.devices, config.warpgroups)

    scratch: list[Any] = [plgpu.SMEM((config.warpgroups * _STAGES, p.shape[1]), p.dtype) for p in whole_rows]
    scratch += [plan.scratch(), plgpu.SemaphoreType.REGULAR]
    results = lanes.kernel(
        body, tuple(out_type), grid=config.blocks, scratch_types=scratch, warpgroups=config.warpgroups
    )(*operands)
    *got, send_map = results
    got, weights = (got[:-1], got[-1]) if with_weights else (got, None)
    return list(got[:-1]), got[-1], weights, send_map


def meet(semaphore: Any, devices: int, warpgroups: int) -> None:
    """Waits until this block's warpgroups on all devices are here, their stores before it visible everywhere."""
    lanes.sync()  # one thread signals for all
    for d in range(devices):
        pl.semaphore_signal(semaphore, device_id=jnp.int32(d))
    pl.semaphore_wait(semaphore, devices * warpgroups, decrement=False)


def _sender(parts, quantize_scale):
    return _Copied(parts) if quantize_scale is None else _Quantized(parts[0], quantize_scale)


class _Copied:
    """Rows that are sent as they are."""

    def __init__(self, parts: Sequence[Any]):
        self.sent = self.operands = list(parts)

    def make(self, sources: Any, buffers: Any, token: jax.Array, stage: jax.Array, scratch: Any) -> list[jax.Array]:
        """Puts the token's row into the buffers; -> its single values, u32. scratch: 4 words."""
        lane, singles, buffers = lanes.lane_index(), [], list(buffers)
        for source, part in zip(sources, self.sent, strict=True):
            if _is_single(part):
                singles += lanes.gather(source, lanes.splat(token, jnp.int32))
                continue
            buffer, pieces = buffers.pop(0), part.shape[1] * part.dtype.itemsize // _PIECE
            for start in range(0, pieces, lanes.LANES):
                valid = start + lane < pieces
                words = lanes.gather(source, token * pieces + start + lane, _PIECE // 4, where=valid)
                lanes.scatter(buffer, stage * pieces + start + lane, words, where=valid)
        return singles


class _Quantized:
    """bf16 or f32 rows that are sent as NVFP4, the exact form bit for bit."""

    @staticmethod
    def check(x: Any) -> str | None:
        """None if x (array or struct) can be quantized, else why not."""
        if x.dtype not in (jnp.bfloat16, jnp.float32) or x.shape[1] % BLOCK_SIZE:
            return f"x must be bfloat16 or float32 [T, H], H a multiple of {BLOCK_SIZE}, got {x.dtype} {x.shape}"
        return None

    def __init__(self, x: Any, scale: Any):
        tokens, hidden = x.shape
        self.x, self.blocks, self.per_token = x, hidden // BLOCK_SIZE, isinstance(scale, str)
        self.sent = [
            jax.ShapeDtypeStruct((tokens, hidden // 2), jnp.uint8),
            jax.ShapeDtypeStruct((tokens, self.blocks), jnp.float8_e4m3fn),
        ]
        self.operands = [x]
        if self.per_token:
            self.sent.append(jax.ShapeDtypeStruct((tokens, 1), jnp.float32))
        else:
            self.operands.append(jnp.asarray(scale, jnp.float32).reshape(1))

    def make(self, sources: Any, buffers: Any, token: jax.Array, stage: jax.Array, scratch: Any) -> list[jax.Array]:
        """Quantizes the token's row into the buffers; -> its global scale, if each has its own. scratch: 4 words."""
        codes, scale_bytes = buffers
        columns = [
            start + lanes.lane_index() for start in range(0, -(-self.blocks // lanes.LANES) * lanes.LANES, lanes.LANES)
        ]
        load = lambda c: load_values(sources[0], self.x.dtype, token * self.blocks + c, c < self.blocks)  # noqa: E731
        singles = []
        if self.per_token:
            amax = lax.bitcast_convert_type(finite_amax([load(c) for c in columns]), jnp.int32)
            amax = lax.bitcast_convert_type(lanes.largest(amax, scratch, 0), jnp.float32)  # ordered like their bits
            global_scale = computed_scale(amax, AMAX_DIVISOR)
            singles = [as_u32(global_scale)]
        else:
            global_scale = lanes.splat(sources[1][0], jnp.float32)
        scales = encode_scales(global_scale)
        for start in range(0, len(columns), _BLOCKS_AT_A_TIME):
            some = columns[start : start + _BLOCKS_AT_A_TIME]
            for column, values in zip(some, [load(c) for c in some], strict=True):
                encoded = encode_block(values, block_amax(values), scales, False)
                at, valid = stage * self.blocks + column, column < self.blocks
                lanes.scatter(codes, at, encoded.words, where=valid)
                lanes.scatter(scale_bytes, at, [encoded.scale_byte], dtype=jnp.uint8, where=valid)
        return singles
