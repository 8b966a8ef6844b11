"""Attention of one query per request, over pages of keys and values.

**How the work is divided.** The keys of a request are cut into parts of `part` keys. A task is one part, for one key
head and the query heads that share it: they are rows of one matrix, so each key and value is read once. The grid is
persistent. A list of the parts that exist (`plan`) is made from the lengths before the kernel, once for all layers, so
that empty places of the cache cost nothing.

    loader      fills a ring of stages with keys and values, and does not stop at the end of a task
    consumer    one warpgroup: scores, softmax, weighted sum of values (softmax.py); it writes the sum and the logarithm
                of the sum of weights of its part

`merge` adds up the parts of a request.

**Bits.** A part is the same keys whatever else runs, and parts are added in order. So the bits of a request depend on
its own queries, keys and values only.

**What bounds the time.** Reading keys and values. A wgmma has 64 rows, of which as many are used as query heads share a
key head; the tensor cores have time for that.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import softmax
from pallas_kernels.attention.store_rows import store_rows
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS, LANES, WGMMA_ROWS
from pallas_kernels.simt.lane_math import unsigned_div
from pallas_kernels.simt.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """tile: keys of a stage. num_stages: of the ring."""

    tile: int = 64
    num_stages: int = 4


class Plan(NamedTuple):
    """The parts of all requests, in the order of the requests.

    Attributes:
      request: i32 [tasks], the request of each part.
      part: i32 [tasks], the index of the part in its request.
      ends: i32 [B], the number of parts of the requests 0..b together. The last one counts the parts that exist; the
        others of `request` and `part` are ignored.
    """

    request: jax.Array
    part: jax.Array
    ends: jax.Array


def plan(lengths: jax.Array, max_length: int, part: int | jax.Array, most: int | None = None) -> Plan:
    """Lists the parts of requests with `lengths` keys, i32 [B], at most `max_length` each.

    part: the keys of a part; or i32 [B], those of each request. Then a request has at most `most` parts.
    """
    if most is None:
        assert isinstance(part, int)
        most = -(-max_length // part)
    parts = (jnp.clip(lengths, 0, max_length) + (part - 1)) // part
    ends = jnp.cumsum(parts).astype(jnp.int32)
    task = jnp.arange(lengths.shape[0] * most, dtype=jnp.int32)
    request = jnp.sum((ends[None, :] <= task[:, None]).astype(jnp.int32), axis=1, dtype=jnp.int32)
    request = jnp.minimum(request, lengths.shape[0] - 1)
    return Plan(request, task - (ends - parts)[request], ends)


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    parts: Plan,
    *,
    part: int,
    scale: float,
    config: TuningConfig = TuningConfig(),
) -> tuple[jax.Array, jax.Array]:
    """Attention of every part that exists.

    Args:
      q: bf16 [B, heads, D].
      keys: bf16 [pages, kv_heads, page, D].
      values: bf16 [pages, kv_heads, page, V].
      table: i32 [B, n], the pages of each request.
      lengths: i32 [B], the keys that the query of a request sees.
      parts: see `plan`.
      part: keys of a part, a multiple of `config.tile`, as the places of a page are.
      scale: the factor of the scores.
      config: see `TuningConfig`.

    Returns:
      f32 [tasks, heads, V], the attention of each part; and f32 [tasks, heads], the logarithm to the base 2 of its sum
      of weights.
    """
    batch, heads, dim = q.shape
    _, kv_heads, page, value_dim = values.shape
    group, tasks = heads // kv_heads, parts.request.shape[0]
    rows = -(-group // 8) * 8  # the swizzle has spans of 8 rows
    q = q.reshape(batch, kv_heads, group, dim)
    if rows != group:
        q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    c = config
    schedule = Schedule(H100_SMS)

    def body(q_gmem, k_gmem, v_gmem, table_gmem, lengths_gmem, request_gmem, part_gmem, ends_gmem, *rest):
        out_gmem, weight_gmem, q_smem, k_smem, v_smem, full, empty, q_full, q_empty = rest
        total = ends_gmem[batch - 1] * kv_heads

        def for_each(run):
            """Calls run(task, head, request, first key, keys, index of the block's task, stages used before)."""

            def step(carry):
                task, number, used = carry
                index, head = lax.div(task, jnp.int32(kv_heads)), lax.rem(task, jnp.int32(kv_heads))
                request = request_gmem[index]
                first = part_gmem[index] * part
                count = jnp.minimum(lengths_gmem[request] - first, part)
                steps = lax.div(count + (c.tile - 1), jnp.int32(c.tile))
                run(index, head, request, first, count, steps, number, used)
                return schedule.following(task), number + 1, used + steps

            lax.while_loop(lambda carry: carry[0] < total, step, (lanes.block_index(), jnp.int32(0), jnp.int32(0)))

        @pl.when(lanes.warpgroup_index() == 1)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def load(index, head, request, first, count, steps, number, used):
                slot = lax.rem(number, jnp.int32(2))

                @pl.when(number >= 2)
                def _():
                    plgpu.barrier_wait(q_empty.at[slot])

                plgpu.copy_gmem_to_smem(q_gmem.at[request, head], q_smem.at[slot, pl.ds(0, rows)], q_full.at[slot])

                def stage(i, _):
                    used_now = used + i
                    stage_slot = lax.rem(used_now, jnp.int32(c.num_stages))

                    @pl.when(used_now >= c.num_stages)
                    def _():
                        plgpu.barrier_wait(empty.at[stage_slot])

                    place = first + i * c.tile
                    at = table_gmem[request, lax.div(place, jnp.int32(page))]
                    here = pl.ds(lax.rem(place, jnp.int32(page)), c.tile)
                    plgpu.copy_gmem_to_smem(k_gmem.at[at, head, here], k_smem.at[stage_slot], full.at[stage_slot])
                    plgpu.copy_gmem_to_smem(v_gmem.at[at, head, here], v_smem.at[stage_slot], full.at[stage_slot])

                lax.fori_loop(0, steps, stage, None)

            for_each(load)

        @pl.when(lanes.warpgroup_index() == 0)
        def _():
            plgpu.set_max_registers(208, action="increase")

            def multiply(index, head, request, first, count, steps, number, used):
                slot = lax.rem(number, jnp.int32(2))
                plgpu.barrier_wait(q_full.at[slot])
                key = plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS, c.tile), 1, layout=plgpu.Layout.WGMMA)

                def stage(i, running):
                    stage_slot = lax.rem(used + i, jnp.int32(c.num_stages))
                    plgpu.barrier_wait(full.at[stage_slot])
                    left = count - i * c.tile
                    s = softmax.scores(q_smem.at[slot], k_smem.at[stage_slot])
                    s = jnp.where(key < left, s, -jnp.inf)

                    @pl.when(left < c.tile)
                    def _():
                        softmax.clear_rows(v_smem.at[stage_slot], left)

                    running = softmax.add(softmax.Running(*running), s, v_smem.at[stage_slot], scale)
                    plgpu.barrier_arrive(empty.at[stage_slot])
                    return tuple(running)

                found = softmax.Running(*lax.fori_loop(0, steps, stage, tuple(softmax.start(value_dim))))
                plgpu.barrier_arrive(q_empty.at[slot])
                inverse = lax.broadcast_in_dim(1 / found.weight, found.total.shape, (0,))
                store_rows(found.total * inverse, out_gmem.at[index, head], group)
                logarithm = lax.broadcast_in_dim(found.largest + jnp.log2(found.weight), (WGMMA_ROWS, 8), (0,))
                store_rows(logarithm, weight_gmem.at[index, head], group, columns=1)

            for_each(multiply)

    out, weight = launch.kernel(
        body,
        [
            jax.ShapeDtypeStruct((tasks, kv_heads, group, value_dim), jnp.float32),
            jax.ShapeDtypeStruct((tasks, kv_heads, group, 1), jnp.float32),
        ],
        grid=schedule.workers,
        scratch_types=[
            softmax.tiles(2, WGMMA_ROWS, dim),
            softmax.tiles(c.num_stages, c.tile, dim),
            softmax.tiles(c.num_stages, c.tile, value_dim),
            plgpu.Barrier(num_arrivals=2, num_barriers=c.num_stages),
            plgpu.Barrier(num_barriers=c.num_stages),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
        ],
        warpgroups=2,
        approx_math=True,
    )(q, keys, values, table, lengths, *parts)
    return out.reshape(tasks, heads, value_dim), weight.reshape(tasks, heads)


_UNROLL = 4  # parts whose loads are in flight together


def merge(out: jax.Array, weight: jax.Array, parts: Plan) -> jax.Array:
    """Adds up the parts of every request, in order: bf16 [B, heads, V]; zeros for a request without keys.

    A lane takes 8 values of one head.

    Args:
      out: f32 [tasks, heads, V], see `attend`.
      weight: f32 [tasks, heads].
      parts: see `plan`.
    """
    _, heads, value_dim = out.shape
    batch, per_row = parts.ends.shape[0], value_dim // 8
    blocks = -(-heads * per_row // LANES)  # thread blocks of a request

    def body(out_gmem, weight_gmem, ends_gmem, result_gmem):
        request = lax.div(lanes.block_index(), jnp.int32(blocks))
        item = lax.rem(lanes.block_index(), jnp.int32(blocks)) * LANES + lanes.lane_index()
        head = unsigned_div(item, per_row)
        valid = head < heads
        end = ends_gmem[request]
        begin = jnp.where(request > 0, ends_gmem[jnp.maximum(request - 1, 0)], 0)
        steps = lax.div(end - begin + (_UNROLL - 1), jnp.int32(_UNROLL))

        def weights_of(i):
            """The parts i * _UNROLL + 0, 1, ...: the lane's row of each, whether it exists, its logarithm."""
            for u in range(_UNROLL):
                part = begin + i * _UNROLL + u
                exists = valid & (lanes.splat(part, jnp.int32) < end)
                (bits,) = lanes.gather(weight_gmem, part * heads + head, where=exists)
                yield part * heads + head, exists, lax.bitcast_convert_type(bits, jnp.float32)

        def largest_of(i, largest):
            for _, exists, found in weights_of(i):
                # The largest finite logarithm. A NaN needs none: its power of two is NaN too.
                largest = jnp.where(exists & (found > largest), found, largest)
            return largest

        largest = lax.fori_loop(0, steps, largest_of, lanes.splat(-jnp.inf, jnp.float32))

        def add(i, carry):
            sums, total = carry
            for row, exists, found in weights_of(i):
                words = lanes.gather(out_gmem, row * per_row + (item - head * per_row), 8, where=exists)
                factor = jnp.where(exists, jnp.exp2(found - largest), 0.0)
                sums = tuple(
                    s + factor * lax.bitcast_convert_type(w, jnp.float32) for s, w in zip(sums, words, strict=True)
                )
                total = total + factor
            return sums, total

        zero = lanes.splat(0, jnp.float32)
        sums, total = lax.fori_loop(0, steps, add, ((zero,) * 8, zero))
        scale = jnp.where(lanes.splat(end, jnp.int32) > begin, 1 / total, 0.0)
        rounded = [
            lax.bitcast_convert_type((s * scale).astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32) for s in sums
        ]
        words = [low | (high << 16) for low, high in zip(rounded[::2], rounded[1::2], strict=True)]
        lanes.scatter(result_gmem, request * (heads * per_row) + item, words, where=valid)

    return launch.kernel(
        body, jax.ShapeDtypeStruct((batch, heads, value_dim), jnp.bfloat16), grid=batch * blocks, approx_math=True
    )(out, weight, parts.ends)
