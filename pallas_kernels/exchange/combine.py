"""The way back without a collective: every device reads its tokens' rows from the peers' memory and sums them.

For the devices of one process that reach each other's memory (NVLink), inside `jax.shard_map` over one mesh axis. A
lane owns 16 bytes of a token: it loads them from every row of the token, wherever that is, and adds in f32 in the order
of the columns of the map, rounding where `permute.depermute_combine` rounds. No copy of the rows is written at home.

At the end all devices meet (meeting.py), so that nobody overwrites rows that others still read. What limits it: the
links.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.meeting import Meeting
from pallas_kernels.exchange.plan import MAX_DEVICES
from pallas_kernels.rows.permute import check_depermute, row_access, sum_of_routes
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS
from pallas_kernels.simt.lane_math import unsigned_div
from pallas_kernels.simt.schedule import PersistentLanes


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """blocks: of threads, all at work at once. warpgroups: of a block."""

    blocks: int = H100_SMS
    warpgroups: int = 4


def default_config(tokens: int) -> TuningConfig:
    """Few tokens take fewer blocks: every block signals every peer. Measured on four H100."""
    return TuningConfig(H100_SMS if tokens > 256 else H100_SMS // 2)


def check_config(y: Any, send_map: Any, devices: int, config: TuningConfig | None = None) -> str | None:
    """None if `combine` accepts these (arrays or structs), else what does not fit."""
    config = config or default_config(send_map.shape[0])
    if not 2 <= devices <= MAX_DEVICES:
        return f"needs 2 to {MAX_DEVICES} devices, got {devices}"
    if y.ndim == 2 and y.shape[0] % devices:
        return f"y must hold as many rows for each of the {devices} devices, got {y.shape}"
    if not (1 <= config.blocks <= H100_SMS and 1 <= config.warpgroups <= 8):
        return f"blocks must be 1..{H100_SMS} and warpgroups 1..8, got {config}"
    if problem := check_depermute(y, send_map):
        return problem
    lanes_in_all = config.blocks * config.warpgroups * lanes.LANES
    if send_map.shape[0] * row_access(y.shape[1] * y.dtype.itemsize).items + lanes_in_all >= lanes.MAX_INDEX:
        return f"{send_map.shape[0]} rows of {y.shape[1]} exceed the kernel's 32-bit indices"
    return None


def combine(
    y: jax.Array,
    send_map: jax.Array,
    weights: jax.Array,
    *,
    devices: int,
    axis_name: str,
    config: TuningConfig | None = None,
) -> jax.Array:
    """out[t] = cast(sum over columns j in order of weights[t, j] * f32(row send_map[t, j])) -> [T, H].

    y: bf16 or f32 [devices * C, H], rows of the tokens of every device in turn. send_map i32 [T, S]: device * C + row
    of that device's y among those for this one, or -1, which adds nothing.

    Raises:
      NotImplementedError: what `check_config` returns.
    """
    config = config or default_config(send_map.shape[0])
    if problem := check_config(y, send_map, devices, config):
        raise NotImplementedError(f"combine kernel: {problem}")
    tokens, capacity = send_map.shape[0], y.shape[0] // devices
    cut = row_access(y.shape[1] * y.dtype.itemsize)

    def body(map_ref, weight_ref, y_ref, out_ref, *meeting):
        me = lax.axis_index(axis_name)
        peers = [plgpu.remote_ref(y_ref, jnp.int32(d)) for d in range(devices)]

        def load(row, column, where):
            device = unsigned_div(jnp.maximum(row, 0), capacity)
            position = (me * capacity + row - device * capacity) * cut.items + column
            return lanes.gather(peers, position, cut.count, where=where, which=device)

        def add(item):
            token = unsigned_div(item, cut.items)
            valid = token < tokens
            words = sum_of_routes(token, item - token * cut.items, valid, load, map_ref, weight_ref, y.dtype)
            lanes.scatter(out_ref, item, words, where=valid)

        PersistentLanes(config.blocks, config.warpgroups).for_each(tokens * cut.items, add)
        Meeting(*meeting).meet(devices, config.warpgroups)

    return launch.kernel(
        body,
        jax.ShapeDtypeStruct((tokens, y.shape[1]), y.dtype),
        grid=config.blocks,
        scratch_types=Meeting.scratch(config.warpgroups),
        warpgroups=config.warpgroups,
    )(send_map.astype(jnp.int32), weights.astype(jnp.float32), y)
