"""`route_metadata` for few routes, such as a decode step has, in one kernel.

Every block of threads reads the ids of all routes and counts in shared memory, which costs less than a kernel that
counts before: how many routes of each expert come before its own chunk and, where rows are back to back, how many there
are in all. Then lane e stands for expert e and hands out its rows while the block walks over the chunk in order.

What limits it: the launch, a trip to memory, and the walk.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt import lanes, launch

MAX_ROUTES = 16384  # each block reads all of them; measured on an H100
_CHUNK = 64  # routes whose rows a block hands out
_UNROLL = 8  # loads in flight


def metadata(
    topk_ids: jax.Array, num_experts: int, *, capacity: int | None, num_rows: int, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """-> row_map i32 [T, k], counts i32 [E], filled i32 [E], bad i32 []: see `route_metadata.Metadata`."""
    (tokens, k), routes = topk_ids.shape, topk_ids.size
    blocks, reads = -(-routes // _CHUNK), -(-routes // lanes.LANES)
    tiles = -(-num_experts // lanes.LANES)

    def body(ids_ref, map_ref, counts_ref, filled_ref, bad_ref, chunk_smem, before_smem, all_smem, scratch):
        block, lane = lanes.block_index(), lanes.lane_index()
        first, is_last = block * _CHUNK, block == blocks - 1
        mine = [lane + t * lanes.LANES for t in range(tiles)]
        for m in mine:
            for smem in (before_smem, all_smem):
                lanes.scatter(smem, m, [lanes.splat(0, jnp.uint32)])
        lanes.sync()

        def read(i, bad):
            positions = [(i * _UNROLL + j) * lanes.LANES + lane for j in range(_UNROLL)]
            loaded = [lanes.gather(ids_ref, p, where=p < routes)[0].astype(jnp.int32) for p in positions]
            for position, route_id in zip(positions, loaded, strict=True):
                inside = position < routes
                here = inside & (route_id >= 0) & (route_id < num_experts)
                lanes.add_to(before_smem, route_id, where=here & (position < first))
                lanes.add_to(all_smem, route_id, where=here & (is_last | (capacity is None)))
                in_chunk = (position >= first) & (position < first + _CHUNK)
                kept = jnp.where(here, route_id, -1).astype(jnp.uint32)
                lanes.scatter(chunk_smem, position - first, [kept], where=in_chunk)
                lanes.scatter(map_ref, position, [kept], where=in_chunk & inside & ~here)  # -1
                bad = bad + (inside & ~here & (route_id != -1)).astype(jnp.int32)
            return bad

        bad = lax.fori_loop(0, -(-reads // _UNROLL), read, lanes.splat(0, jnp.int32))
        lanes.sync()
        before, totals = (
            [lanes.gather(smem, m)[0].astype(jnp.int32) for m in mine] for smem in (before_smem, all_smem)
        )
        if capacity is None:
            starts, earlier = [], jnp.int32(0)
            for (ends, total), count in zip(lanes.prefix_sums(totals, scratch, 0), totals, strict=True):
                starts.append(earlier + ends - count)
                earlier = earlier + total
            limits = [jnp.full_like(m, num_rows) for m in mine]
        else:
            starts = [m * capacity for m in mine]
            limits = [start + capacity for start in starts]

        def step(i, rows):
            for j, word in enumerate(lanes.gather(chunk_smem, i, 4)):
                next_rows = []
                for row, limit, m in zip(rows, limits, mine, strict=True):
                    is_mine = word.astype(jnp.int32) == m
                    value = jnp.where(row < limit, row, -1).astype(jnp.uint32)
                    lanes.scatter(map_ref, first + i * 4 + j, [value], where=is_mine)
                    next_rows.append(row + is_mine.astype(jnp.int32))
                rows = tuple(next_rows)
            return rows

        rows = tuple(start + b for start, b in zip(starts, before, strict=True))
        lax.fori_loop(0, lax.div(jnp.minimum(routes - first, _CHUNK) + 3, jnp.int32(4)), step, rows)

        @lanes.when(is_last)
        def _():
            for m, start, limit, total in zip(mine, starts, limits, totals, strict=True):
                filled = jnp.clip(limit - start, 0, total)
                for ref, value in ((counts_ref, total), (filled_ref, filled)):
                    lanes.scatter(ref, m, [value.astype(jnp.uint32)], where=m < num_experts)
            _, all_bad = lanes.prefix_sum(bad, scratch, 0)
            lanes.scatter(bad_ref, lane, [lanes.splat(all_bad, jnp.uint32)], where=lane == 0)

    columns = tiles * lanes.LANES
    row_map, counts, filled, bad = launch.kernel(
        body,
        tuple(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (routes, num_experts, num_experts, 1)),
        grid=blocks,
        scratch_types=[plgpu.SMEM((n,), jnp.int32) for n in (_CHUNK, columns, columns, lanes.WARPS * tiles)],
        interpret=interpret,
    )(topk_ids.reshape(-1))
    return row_map.reshape(tokens, k), counts, filled, bad[0]
