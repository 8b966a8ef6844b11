"""Attention of one query per request, over pages of keys and values.

**How the work is divided.** The keys of a request are cut into parts of `part` keys. A task is one part, for one key
head and the query heads that share it: they are rows of one matrix, so each key and value is read once. The grid is
persistent. A list of the parts that exist (`parts.plan`) is made from the lengths before the kernel, once for all
layers, so that empty places of the cache cost nothing.

    loader      fills a ring of stages with keys and values, and does not stop at the end of a task
    consumer    one warpgroup: scores, softmax, weighted sum of values (softmax.py); it writes the sum and the logarithm
                of the sum of weights of its part

`parts.merge` adds up the parts of a request.

**Bits.** A part is the same keys whatever else runs, and parts are added in order. So the bits of a request depend on
its own queries, keys and values only.

**What bounds the time.** Reading keys and values. A wgmma has 64 rows, of which as many are used as query heads share a
key head; the tensor cores have time for that.

Keys and values may be e4m3 codes with a scale for each of the two. Then a third warpgroup turns the stages that the
loader fills into bf16, in a ring of their own (codes.py), while the consumer multiplies an earlier one. The scales
multiply scores and results. This halves the bytes and not the time: turning and multiplying bound it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import codes, softmax
from pallas_kernels.attention.parts import Plan
from pallas_kernels.attention.store_rows import store_rows
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS, WGMMA_ROWS
from pallas_kernels.simt.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """tile: keys of a stage. num_stages: of the ring that the loader fills. wide_stages: of that of codes in bf16."""

    tile: int = 64
    num_stages: int = 4
    wide_stages: int = 2


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    parts: Plan,
    scales: jax.Array | None = None,
    *,
    part: int,
    scale: float,
    config: TuningConfig = TuningConfig(),
) -> tuple[jax.Array, jax.Array]:
    """Attention of every part that exists.

    Args:
      q: bf16 [B, heads, D].
      keys: bf16 or e4m3 [pages, kv_heads, page, D]. Of a key in e4m3 that is NaN, all codes are.
      values: of the same type, [pages, kv_heads, page, V].
      table: i32 [B, n], the pages of each request.
      lengths: i32 [B], the keys that the query of a request sees.
      parts: see `parts.plan`.
      scales: f32 [2], those of keys and of values in e4m3; None for bf16.
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
    c, coded = config, scales is not None
    schedule = Schedule(H100_SMS)

    def body(q_gmem, k_gmem, v_gmem, table_gmem, lengths_gmem, request_gmem, part_gmem, ends_gmem, *rest):
        scales_gmem, *rest = rest if coded else (None, *rest)
        out_gmem, weight_gmem, q_smem, k_smem, v_smem, full, empty, q_full, q_empty, *wide = rest
        # The ring that the consumer reads: the loader's, or that of the codes in bf16.
        k_ring, v_ring, filled, used_up = wide if coded else (k_smem, v_smem, full, empty)
        ring_stages = c.wide_stages if coded else c.num_stages
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

        def turn_into_bf16():
            plgpu.set_max_registers(112, action="decrease")

            def turn(index, head, request, first, count, steps, number, used):
                def stage(i, _):
                    used_now = used + i
                    stage_slot = lax.rem(used_now, jnp.int32(c.num_stages))
                    wide_slot = lax.rem(used_now, jnp.int32(c.wide_stages))

                    @pl.when(used_now >= c.wide_stages)
                    def _():
                        plgpu.barrier_wait(used_up.at[wide_slot])

                    plgpu.barrier_wait(full.at[stage_slot])
                    codes.widen(k_smem.at[stage_slot], k_ring.at[wide_slot], may_be_nan=True)
                    # A NaN is always in the key: `KeyValuePages.write`.
                    codes.widen(v_smem.at[stage_slot], v_ring.at[wide_slot], may_be_nan=False)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(empty.at[stage_slot])
                    plgpu.barrier_arrive(filled.at[wide_slot])

                lax.fori_loop(0, steps, stage, None)

            for_each(turn)

        if coded:
            pl.when(lanes.warpgroup_index() == 2)(turn_into_bf16)

        @pl.when(lanes.warpgroup_index() == 0)
        def _():
            plgpu.set_max_registers(208, action="increase")
            key_scale, value_scale = (scale, 1) if scales_gmem is None else (scale * scales_gmem[0], scales_gmem[1])

            def multiply(index, head, request, first, count, steps, number, used):
                slot = lax.rem(number, jnp.int32(2))
                plgpu.barrier_wait(q_full.at[slot])
                key = plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS, c.tile), 1, layout=plgpu.Layout.WGMMA)

                def stage(i, running):
                    stage_slot = lax.rem(used + i, jnp.int32(ring_stages))
                    plgpu.barrier_wait(filled.at[stage_slot])
                    left = count - i * c.tile
                    s = softmax.scores(q_smem.at[slot], k_ring.at[stage_slot])
                    s = jnp.where(key < left, s, -jnp.inf)

                    @pl.when(left < c.tile)
                    def _():
                        softmax.clear_rows(v_ring.at[stage_slot], left)

                    running = softmax.add(softmax.Running(*running), s, v_ring.at[stage_slot], key_scale)
                    plgpu.barrier_arrive(used_up.at[stage_slot])
                    return tuple(running)

                found = softmax.Running(*lax.fori_loop(0, steps, stage, tuple(softmax.start(value_dim))))
                plgpu.barrier_arrive(q_empty.at[slot])
                inverse = lax.broadcast_in_dim(value_scale / found.weight, found.total.shape, (0,))
                store_rows(found.total * inverse, out_gmem.at[index, head], group)
                logarithm = lax.broadcast_in_dim(found.largest + jnp.log2(found.weight), (WGMMA_ROWS, 8), (0,))
                store_rows(logarithm, weight_gmem.at[index, head], group, columns=1)

            for_each(multiply)

    tiles, barrier = codes.tiles if coded else softmax.tiles, plgpu.Barrier
    wide = [
        softmax.tiles(c.wide_stages, c.tile, dim),
        softmax.tiles(c.wide_stages, c.tile, value_dim),
        barrier(num_barriers=c.wide_stages),
        barrier(num_barriers=c.wide_stages),
    ]
    out, weight = launch.kernel(
        body,
        [
            jax.ShapeDtypeStruct((tasks, kv_heads, group, value_dim), jnp.float32),
            jax.ShapeDtypeStruct((tasks, kv_heads, group, 1), jnp.float32),
        ],
        grid=schedule.workers,
        scratch_types=[
            softmax.tiles(2, WGMMA_ROWS, dim),
            tiles(c.num_stages, c.tile, dim),
            tiles(c.num_stages, c.tile, value_dim),
            barrier(num_arrivals=2, num_barriers=c.num_stages),
            barrier(num_barriers=c.num_stages),
            barrier(num_barriers=2),
            barrier(num_barriers=2),
            *(wide if coded else []),
        ],
        warpgroups=3 if coded else 2,
        approx_math=True,
    )(q, keys, values, table, lengths, *parts, *([scales] if coded else []))
    return out.reshape(tasks, heads, value_dim), weight.reshape(tasks, heads)
