"""Combine without a collective: each device reads the rows of its tokens from the peers' memory and sums them.

    out[t] = sum over columns s of weights[t, s] * (row send_map[t, s], on the device that has it) (+ residual[t])

The kernel runs inside `jax.shard_map` over one mesh axis, on devices of one process that reach each other's memory
(NVLink). A persistent grid goes over the accesses of the result, and a lane takes 16 bytes of a token at a time: it
loads these bytes of each of the token's rows from whichever device has the row, and adds them in f32. It adds in the
order of the columns of send_map and rounds where `depermute.depermute_combine` does. No copy of the rows is written at
home.

At the end all devices meet (meeting.py), so that no device overwrites rows which others still read. The bandwidth of
the links between the GPUs bounds the time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.exchange.meeting import Meeting
from pallas_kernels.exchange.plan import MAX_DEVICES
from pallas_kernels.rows.depermute import check_depermute, sum_of_routes
from pallas_kernels.rows.permute import row_access
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS
from pallas_kernels.simt.lane_math import unsigned_div
from pallas_kernels.simt.schedule import PersistentLanes


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """blocks: thread blocks, which all run at the same time. warpgroups: of a thread block."""

    blocks: int = H100_SMS
    warpgroups: int = 4


def default_config(tokens: int) -> TuningConfig:
    """Half as many thread blocks for up to 256 tokens, as each of them signals every peer. Measured on four H100."""
    return TuningConfig(H100_SMS if tokens > 256 else H100_SMS // 2)


def check_config(y: Any, send_map: Any, devices: int, config: TuningConfig | None = None) -> str | None:
    """None if `combine` accepts these (arrays or ShapeDtypeStructs), else what does not fit."""
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
    residual: jax.Array | None = None,
    *,
    devices: int,
    axis_name: str,
    config: TuningConfig | None = None,
) -> jax.Array:
    """out[t] = sum over columns s of weights[t, s] * (row send_map[t, s]) (+ residual[t]), [T, H] of y's dtype.

    The sum runs in f32, in the order of the columns, the residual last, and is rounded once to y's dtype.

    Args:
      y: bf16 or f32 [devices * C, H]. Rows d * C to d * C + C - 1 are results for the tokens of device d.
      send_map: i32 [T, S], where S is the number of rows that a token may have. The entry d * C + c means row c of
        those that device d has for this device. -1 adds nothing.
      weights: f32 [T, S].
      residual: [T, H] of y's dtype; None adds nothing.
      devices: number of devices on the mesh axis.
      axis_name: the mesh axis.
      config: None takes `default_config`.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_config`.
    """
    config = config or default_config(send_map.shape[0])
    if problem := check_config(y, send_map, devices, config):
        raise NotImplementedError(f"combine kernel: {problem}")
    tokens, capacity = send_map.shape[0], y.shape[0] // devices
    cut = row_access(y.shape[1] * y.dtype.itemsize)

    operands = [send_map.astype(jnp.int32), weights.astype(jnp.float32), y, *([] if residual is None else [residual])]

    def body(map_ref, weight_ref, y_ref, *refs):
        *residual_ref, out_ref = refs[: len(operands) - 2]
        me = lax.axis_index(axis_name)
        peers = [plgpu.remote_ref(y_ref, jnp.int32(d)) for d in range(devices)]

        def load(row, column, where):
            device = unsigned_div(jnp.maximum(row, 0), capacity)
            position = (me * capacity + row - device * capacity) * cut.items + column
            return lanes.gather(peers, position, cut.count, where=where, which=device)

        def add(item):
            token = unsigned_div(item, cut.items)
            valid = token < tokens
            added = [lanes.gather(ref, item, cut.count, where=valid) for ref in residual_ref]
            words = sum_of_routes(token, item - token * cut.items, valid, load, map_ref, weight_ref, y.dtype, *added)
            lanes.scatter(out_ref, item, words, where=valid)

        PersistentLanes(config.blocks, config.warpgroups).for_each(tokens * cut.items, add)
        Meeting(*refs[len(operands) - 2 :]).meet(devices, config.warpgroups)

    return launch.kernel(
        body,
        jax.ShapeDtypeStruct((tokens, y.shape[1]), y.dtype),
        grid=config.blocks,
        scratch_types=Meeting.scratch(config.warpgroups),
        warpgroups=config.warpgroups,
    )(*operands)
