"""Latent attention of one query per request: all heads share one key, and its first part is also the value.

This is decode of multi-head latent attention with its projections absorbed (arXiv:2405.04434, section 2.1). A key is
[latent, rotated] and the value is the latent, so a tile of latents is read once and used twice.

**How the work is divided.** Parts of keys, their plan and their sum are those of decode.py. A task is one part, for up
to 64 query heads.

    loader      fills a ring of stages with latents and rotated keys, and does not stop at the end of a task
    consumers   two warpgroups. Both compute the scores of all 64 heads. Each holds the sum of one half of the values'
                columns: the registers of one warpgroup do not hold all of them

Blocks of threads that are neighbours take the same part for different heads at about the same time. So most latents
come from memory once.

**Bits.** As in decode.py, they depend on the request's own queries and cache only.

**What bounds the time.** With 128 heads the products, of which the scores are computed twice, and the copies of
latents: shared memory has room for two stages only, so few bytes are on their way at a time.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import softmax
from pallas_kernels.attention.decode import Plan
from pallas_kernels.attention.store_rows import store_rows
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS, WGMMA_ROWS
from pallas_kernels.simt.schedule import Schedule

_CONSUMERS = 2
_REGISTERS = 40, 232  # per thread of the loader and of a consumer


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """tile: keys of a stage. num_stages: of the ring."""

    tile: int = 64
    num_stages: int = 2


def attend(
    q_latent: jax.Array,
    q_rotated: jax.Array,
    latents: jax.Array,
    rotated: jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    parts: Plan,
    sizes: jax.Array,
    *,
    scale: float,
    config: TuningConfig = TuningConfig(),
) -> tuple[jax.Array, jax.Array]:
    """Attention of every part that exists.

    NaN in a latent or in a rotated key makes the results of its request NaN. Places behind the keys of a request may
    hold anything.

    Args:
      q_latent: bf16 [B, heads, R], with R = 512.
      q_rotated: bf16 [B, heads, r], with r = 64.
      latents: bf16 [pages, 1, page, R].
      rotated: bf16 [pages, 1, page, r].
      table: i32 [B, n], the pages of each request.
      lengths: i32 [B], the keys that the query of a request sees.
      parts: see `parts.plan`.
      sizes: i32 [B], the keys of a part of each request: multiples of `config.tile`, as the places of a page are.
      scale: the factor of the scores.
      config: see `TuningConfig`.

    Returns:
      f32 [tasks, heads, R], the attention of each part; and f32 [tasks, heads], the logarithm to the base 2 of its sum
      of weights. `parts.merge` adds them up.
    """
    batch, heads, rank = q_latent.shape
    page, tasks = latents.shape[2], parts.request.shape[0]
    blocks = -(-heads // WGMMA_ROWS)
    rows = -(-heads // (blocks * 8)) * 8  # heads of a block; the swizzle has spans of 8 rows
    q_latent, q_rotated = (
        jnp.pad(q, ((0, 0), (0, blocks * rows - heads), (0, 0))).reshape(batch, blocks, rows, q.shape[2])
        for q in (q_latent, q_rotated)
    )
    half = rank // _CONSUMERS
    c = config
    schedule = Schedule(H100_SMS)

    def body(*refs):
        ql_gmem, qr_gmem, k_gmem, r_gmem, table_gmem, lengths_gmem, sizes_gmem, *rest = refs
        request_gmem, part_gmem, ends_gmem, out_gmem, weight_gmem, *rest = rest
        ql_smem, qr_smem, k_smem, r_smem, full, empty, q_full, q_empty = rest
        total = ends_gmem[batch - 1] * blocks
        warpgroup = lanes.warpgroup_index()

        def for_each(run):
            """Calls run(task, block of heads, request, first key, keys, steps, tasks before, stages used before)."""

            def step(carry):
                task, number, used = carry
                index, block = lax.div(task, jnp.int32(blocks)), lax.rem(task, jnp.int32(blocks))
                request = request_gmem[index]
                first = part_gmem[index] * sizes_gmem[request]
                count = jnp.minimum(lengths_gmem[request] - first, sizes_gmem[request])
                steps = lax.div(count + (c.tile - 1), jnp.int32(c.tile))
                run(index, block, request, first, count, steps, number, used)
                return schedule.following(task), number + 1, used + steps

            lax.while_loop(lambda carry: carry[0] < total, step, (lanes.block_index(), jnp.int32(0), jnp.int32(0)))

        @pl.when(warpgroup == _CONSUMERS)
        def _():
            plgpu.set_max_registers(_REGISTERS[0], action="decrease")

            def load(index, block, request, first, count, steps, number, used):
                def stage(i, _):
                    used_now = used + i
                    slot = lax.rem(used_now, jnp.int32(c.num_stages))

                    @pl.when(used_now >= c.num_stages)
                    def _():
                        plgpu.barrier_wait(empty.at[slot])

                    place = first + i * c.tile
                    at = table_gmem[request, lax.div(place, jnp.int32(page))]
                    here = pl.ds(lax.rem(place, jnp.int32(page)), c.tile)
                    plgpu.copy_gmem_to_smem(k_gmem.at[at, 0, here], k_smem.at[slot], full.at[slot])
                    plgpu.copy_gmem_to_smem(r_gmem.at[at, 0, here], r_smem.at[slot], full.at[slot])

                    # The first keys do not wait until the queries of the task before are used up.
                    @pl.when(i == 0)
                    def _():
                        pl.when(number > 0)(lambda: plgpu.barrier_wait(q_empty))
                        there = pl.ds(0, rows)
                        plgpu.copy_gmem_to_smem(ql_gmem.at[request, block], ql_smem.at[there], q_full)
                        plgpu.copy_gmem_to_smem(qr_gmem.at[request, block], qr_smem.at[there], q_full)

                lax.fori_loop(0, steps, stage, None)

            for_each(load)

        @pl.when(warpgroup < _CONSUMERS)
        def _():
            plgpu.set_max_registers(_REGISTERS[1], action="increase")
            key = plgpu.broadcasted_iota(jnp.int32, (WGMMA_ROWS, c.tile), 1, layout=plgpu.Layout.WGMMA)

            def multiply(index, block, request, first, count, steps, number, used):
                plgpu.barrier_wait(q_full)

                def stage(i, running):
                    slot = lax.rem(used + i, jnp.int32(c.num_stages))
                    plgpu.barrier_wait(full.at[slot])
                    left = count - i * c.tile
                    v_smem = k_smem.at[slot, :, pl.ds(warpgroup * half, half)]
                    s = _scores((ql_smem, k_smem.at[slot]), (qr_smem, r_smem.at[slot]))
                    pl.when(i == steps - 1)(lambda: plgpu.barrier_arrive(q_empty))
                    s = jnp.where(key < left, s, -jnp.inf)

                    # The other warpgroup may still multiply the cleared rows as keys: it masks those scores.
                    @pl.when(left < c.tile)
                    def _():
                        softmax.clear_rows(v_smem, left)

                    running = softmax.add(softmax.Running(*running), s, v_smem, scale)
                    plgpu.barrier_arrive(empty.at[slot])
                    return tuple(running)

                found = softmax.Running(*lax.fori_loop(0, steps, stage, tuple(softmax.start(half))))
                inverse = lax.broadcast_in_dim(1 / found.weight, found.total.shape, (0,))
                store_rows(found.total * inverse, out_gmem.at[index, block, :, warpgroup], rows, pitch=rank)

                @pl.when(warpgroup == 0)
                def _():
                    logarithm = lax.broadcast_in_dim(found.largest + jnp.log2(found.weight), (WGMMA_ROWS, 8), (0,))
                    store_rows(logarithm, weight_gmem.at[index, block], rows, columns=1)

            for_each(multiply)

    barrier = lambda arrivals, barriers=1: plgpu.Barrier(num_arrivals=arrivals, num_barriers=barriers)  # noqa: E731
    out, weight = launch.kernel(
        body,
        [
            jax.ShapeDtypeStruct((tasks, blocks, rows, _CONSUMERS, half), jnp.float32),
            jax.ShapeDtypeStruct((tasks, blocks, rows, 1), jnp.float32),
        ],
        grid=schedule.workers,
        scratch_types=[
            softmax.tiles(WGMMA_ROWS, rank),
            softmax.tiles(WGMMA_ROWS, q_rotated.shape[3]),
            softmax.tiles(c.num_stages, c.tile, rank),
            softmax.tiles(c.num_stages, c.tile, q_rotated.shape[3]),
            barrier(2, c.num_stages),
            barrier(_CONSUMERS, c.num_stages),
            barrier(2),
            barrier(_CONSUMERS),
        ],
        warpgroups=_CONSUMERS + 1,
        approx_math=True,
    )(q_latent, q_rotated, latents, rotated, table, lengths, sizes, *parts)
    return out.reshape(tasks, -1, rank)[:, :heads], weight.reshape(tasks, -1)[:, :heads]


def _scores(*pairs: tuple[Any, Any]) -> jax.Array:
    """The sum of q k^T over pairs of queries and keys in shared memory: f32 [64, keys]."""

    def product(accumulator: Any) -> jax.Array:
        for q_smem, k_smem in pairs:
            plgpu.wgmma(accumulator, q_smem, k_smem.transpose((1, 0)))
        return accumulator[...]

    return pl.run_scoped(product, plgpu.ACC((WGMMA_ROWS, pairs[0][1].shape[0]), jnp.float32))
