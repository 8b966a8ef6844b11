"""Causal attention of a chunk of queries that starts anywhere in a sequence, over pages of keys and values.

**How the work is divided.** A thread block takes 64 queries of one head per consumer, and all keys that they see. The
query tiles that see most keys come first, so that the last thread blocks to start are the short ones.

    loader      copies queries, then keys and values, page by page, into a ring of stages
    consumers   a warpgroup each: scores, softmax, weighted sum of values (softmax.py). Two consumers take turns: while
                one computes exponentials, the tensor cores work for the other one (arXiv:2407.08608, section 3.1)

Only tiles that a query of the block does not see whole are masked. No scores are written to memory, and no place
beyond the last valid key is read into a result: values there may be NaN.

**Bits.** Keys are added in order of their positions, in tiles that begin at multiples of `tile`, so the bits of a query
depend on itself and the keys that it sees. They do not depend on where its chunk starts, nor on the page table.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import softmax
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import WGMMA_ROWS

_CONSUMERS = 2  # warpgroups of 64 queries; the barrier by which they take turns is for two
_REGISTERS = 40, 232  # per thread of the loader and of a consumer


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the kernel runs.

    Attributes:
      tile: keys of a stage.
      num_stages: stages of the ring.
    """

    tile: int = 128
    num_stages: int = 2


def attend(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    table: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    *,
    scale: float,
    config: TuningConfig = TuningConfig(),
) -> jax.Array:
    """Causal attention, bf16 [B, S, heads, V]. Rows of queries that are not valid hold anything finite or not.

    Args:
      q: bf16 [B, S, heads, D].
      keys: bf16 [pages, kv_heads, page, D].
      values: bf16 [pages, kv_heads, page, V], with V <= D.
      table: i32 [B, n], the pages of each request.
      starts: i32 [B], the position of the first query. The query i sees the keys 0 .. start + i.
      counts: i32 [B], the valid queries; they come first.
      scale: the factor of the scores.
      config: see `TuningConfig`.
    """
    if unaligned := -q.shape[1] % 8:  # the swizzle has spans of 8 rows
        padded = jnp.pad(q, ((0, 0), (0, unaligned), (0, 0), (0, 0)))
        found = attend(padded, keys, values, table, starts, counts, scale=scale, config=config)
        return found[:, : q.shape[1]]
    batch, length, heads, dim = q.shape
    _, kv_heads, page, value_dim = values.shape
    c = config
    rows = _CONSUMERS * WGMMA_ROWS
    q_tiles = -(-length // rows)
    run = math.gcd(c.tile, page)  # keys that one copy brings
    copies = c.tile // run

    def body(q_gmem, k_gmem, v_gmem, table_gmem, starts_gmem, counts_gmem, out_gmem, *scratch):
        q_smem, k_smem, v_smem, q_full, k_full, v_full, k_empty, v_empty, turn, *out_smem = scratch
        block, warpgroup = lanes.block_index(), lanes.warpgroup_index()
        head, rest = lax.rem(block, jnp.int32(heads)), lax.div(block, jnp.int32(heads))
        request = lax.rem(rest, jnp.int32(batch))
        first = (q_tiles - 1 - lax.div(rest, jnp.int32(batch))) * rows  # the block's first query
        count = counts_gmem[request]
        start = starts_gmem[request]
        end = start + count  # keys that exist
        seen = jnp.minimum(start + first + rows, end)  # keys that some query of the block sees
        steps = jnp.where(first < count, lax.div(seen + (c.tile - 1), jnp.int32(c.tile)), 0)
        slot_of = lambda step: lax.rem(step, jnp.int32(c.num_stages))  # noqa: E731

        @pl.when((warpgroup == _CONSUMERS) & (steps > 0))
        def _():
            plgpu.set_max_registers(_REGISTERS[0], action="decrease")
            for w in range(_CONSUMERS):
                plgpu.copy_gmem_to_smem(
                    q_gmem.at[request, pl.ds(first + w * WGMMA_ROWS, WGMMA_ROWS), head], q_smem.at[w], q_full.at[w]
                )
            kv_head = lax.div(head, jnp.int32(heads // kv_heads))

            def stage(step, _):
                slot = slot_of(step)
                for gmem, smem, full, empty in ((k_gmem, k_smem, k_full, k_empty), (v_gmem, v_smem, v_full, v_empty)):

                    @pl.when(step >= c.num_stages)
                    def _(empty=empty):
                        plgpu.barrier_wait(empty.at[slot])

                    for i in range(copies):
                        place = step * c.tile + i * run
                        # The last tile may reach beyond the table: its last entry stands for what nobody sees.
                        entry = jnp.minimum(lax.div(place, jnp.int32(page)), table.shape[1] - 1)
                        here = pl.ds(lax.rem(place, jnp.int32(page)), run)
                        plgpu.copy_gmem_to_smem(
                            gmem.at[table_gmem[request, entry], kv_head, here],
                            smem.at[slot, pl.ds(i * run, run)],
                            full.at[slot],
                        )

            lax.fori_loop(0, steps, stage, None)

        @pl.when((warpgroup < _CONSUMERS) & (steps > 0))
        def _():
            plgpu.set_max_registers(_REGISTERS[1], action="increase")
            mine = first + warpgroup * WGMMA_ROWS  # this consumer's first query

            def change_turns():
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

            def stage(step, running, masked):
                slot = slot_of(step)
                plgpu.barrier_wait(k_full.at[slot])
                s = softmax.scores(q_smem.at[warpgroup], k_smem.at[slot], change_turns)
                plgpu.barrier_arrive(k_empty.at[slot])
                if masked:
                    shape = (WGMMA_ROWS, c.tile)
                    row, key = (
                        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
                    )
                    s = jnp.where(key - row <= start + mine - step * c.tile, s, -jnp.inf)

                def before_values():
                    plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(v_full.at[slot])
                    if masked:
                        left = end - step * c.tile

                        @pl.when(left < c.tile)
                        def _():
                            softmax.clear_rows(v_smem.at[slot], left)

                    plgpu.barrier_wait(turn)

                running = softmax.add(softmax.Running(*running), s, v_smem.at[slot], scale, before_values)
                plgpu.barrier_arrive(v_empty.at[slot])
                return tuple(running)

            plgpu.barrier_wait(q_full.at[warpgroup])
            pl.when(warpgroup == 1)(change_turns)
            whole = jnp.minimum(lax.div(start + first + 1, jnp.int32(c.tile)), steps)  # tiles that all queries see
            running = lax.fori_loop(0, whole, lambda step, r: stage(step, r, False), tuple(softmax.start(value_dim)))
            found = softmax.Running(*lax.fori_loop(whole, steps, lambda step, r: stage(step, r, True), running))
            pl.when(warpgroup == 0)(change_turns)
            inverse = lax.broadcast_in_dim(1 / found.weight, found.total.shape, (0,))
            result_smem = (out_smem[0] if out_smem else q_smem).at[warpgroup]  # the queries are used up
            result_smem[...] = (found.total * inverse).astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result_smem, out_gmem.at[request, pl.ds(mine, WGMMA_ROWS), head])
            plgpu.wait_smem_to_gmem(0)

    barrier = lambda arrivals, barriers: plgpu.Barrier(num_arrivals=arrivals, num_barriers=barriers)  # noqa: E731
    return launch.kernel(
        body,
        jax.ShapeDtypeStruct((batch, length, heads, value_dim), jnp.bfloat16),
        grid=heads * q_tiles * batch,
        scratch_types=[
            softmax.tiles(_CONSUMERS, WGMMA_ROWS, dim),
            softmax.tiles(c.num_stages, c.tile, dim),
            softmax.tiles(c.num_stages, c.tile, value_dim),
            barrier(1, _CONSUMERS),
            barrier(copies, c.num_stages),
            barrier(copies, c.num_stages),
            barrier(_CONSUMERS, c.num_stages),
            barrier(_CONSUMERS, c.num_stages),
            barrier(_CONSUMERS, 1),
            *([] if value_dim == dim else [softmax.tiles(_CONSUMERS, WGMMA_ROWS, value_dim)]),
        ],
        warpgroups=_CONSUMERS + 1,
        approx_math=True,
    )(q, keys, values, table, starts, counts)
