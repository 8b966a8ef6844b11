"""The way back of a decode step: experts' rows are weighted and summed, stored into their home devices, summed there.

For the devices of one process that reach each other's memory (NVLink), inside `jax.shard_map` over one mesh axis, with
arrays that outlive the kernel (fp4jax.expert_parallel.low_latency). `permute.depermute_combine` and combine.py in one:
no partial sums are written here first, and no barrier comes before it. A lane owns 16 bytes of a received row: it adds
up what the experts made of it and stores the result where the row came from. Then all blocks of all devices meet, and a
lane owns 16 bytes of a token, of which it adds the partial sums of all devices.

Every product and sum is rounded where those two round, so the bits are theirs. What limits it: the launch and the
meeting, with many tokens the links.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.combine import TuningConfig, check_config as check_combine
from pallas_kernels.exchange.meeting import CommonMeeting
from pallas_kernels.rows.permute import check_depermute, row_access, sum_of_routes
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


def push_combine(
    y: jax.Array,
    row_map: jax.Array,
    row_weights: jax.Array,
    local_ids: jax.Array,
    send_map: jax.Array,
    weights: jax.Array,
    sums: Any,
    kept: list[Any],
    *,
    devices: int,
    axis_name: str,
    first: bool,
    config: TuningConfig,
) -> jax.Array:
    """out[t] = sum over columns s of weights[t, s] * partial(row send_map[t, s]) -> [T, H].

    partial(r) = sum over j of row_weights[r, j] * y[row_map[r, j]], on the device that received row r. Both sums are in
    order and cast to y's dtype.

    y: bf16 or f32 [rows, H] of this device's experts. row_map i32 [devices * C, k], -1 adds nothing; row_weights f32
    and local_ids i32 like it: a row whose ids are all -1 is a pad and stays here. send_map i32 and weights f32 [T, S].
    sums: reference to [devices, C, H] in y's dtype, where partial sums arrive. kept: references that nothing happens
    to, and counters i32 [blocks, 32]. first: as in `dispatch.Kernel.run_into`.

    Raises:
      NotImplementedError: what `check_config` returns.
    """
    rows, tokens, hidden = row_map.shape[0], send_map.shape[0], y.shape[1]
    if problem := check_config(y, row_map, send_map, devices, config):
        raise NotImplementedError(f"push_combine kernel: {problem}")
    cut, capacity = row_access(hidden * y.dtype.itemsize), rows // devices

    def body(y_ref, map_ref, weight_ref, ids_ref, send_ref, home_weight_ref, *rest):
        sums_ref, *_, counters_ref, out_ref = rest[: len(kept) + 2]
        meeting = CommonMeeting(counters_ref, config.blocks, *rest[len(kept) + 2 :])
        me = lax.axis_index(axis_name)
        peers = [plgpu.remote_ref(sums_ref, jnp.int32(d)) for d in range(devices)]
        workers = PersistentLanes(config.blocks, config.warpgroups)

        def of_experts(row, column, where):  # a row beyond the last one reads the last, as in XLA
            return lanes.gather(y_ref, jnp.minimum(row, y.shape[0] - 1) * cut.items + column, cut.count, where=where)

        def of_devices(row, column, where):
            return lanes.gather(sums_ref, row * cut.items + column, cut.count, where=where)

        def send(item):
            row, column, inside = access_of(item, rows)
            ids = lanes.gather(ids_ref, row, local_ids.shape[1], where=inside)
            received = inside & (sum((i.astype(jnp.int32) >= 0).astype(jnp.int32) for i in ids) > 0)
            words = sum_of_routes(row, column, received, of_experts, map_ref, weight_ref, y.dtype)
            home = unsigned_div(row, capacity)
            there = (me - home) * capacity + row
            lanes.scatter(peers, there * cut.items + column, words, where=received, which=home)

        def add(item):
            token, column, inside = access_of(item, tokens)
            words = sum_of_routes(token, column, inside, of_devices, send_ref, home_weight_ref, y.dtype)
            lanes.scatter(out_ref, token * cut.items + column, words, where=inside)

        def access_of(item, number):
            row = unsigned_div(item, cut.items)
            return row, item - row * cut.items, row < number

        workers.for_each(rows * cut.items, send)
        meeting.meet(devices, config.warpgroups)
        workers.for_each(tokens * cut.items, add)

    return launch.kernel(
        body, jax.ShapeDtypeStruct((tokens, hidden), y.dtype), grid=config.blocks, warpgroups=config.warpgroups,
        scratch_types=CommonMeeting.scratch(config.warpgroups), device_barrier=first,
    )(y, row_map, row_weights, local_ids, send_map, weights, sums, *kept)  # fmt: skip
