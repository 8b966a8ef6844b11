"""Row numbers for the routes of one decode step, in one kernel: what `route_metadata` computes, for few routes.

    row_map[t, j] = first row of expert ids[t, j] + number of earlier routes to that expert, or -1 where it has no row

A thread block hands out the rows of one chunk of 64 successive routes. First it reads the ids of *all* routes, a
lane per route, and counts in shared memory how many routes each expert has before the chunk and, where the experts'
rows are back to back, how many it has in all. Reading everything costs less than a kernel that counts first. Then lane
e stands for expert e and hands out that expert's rows while the block walks over its chunk in order.

The time goes into the launch, one trip to memory and the walk.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt import lanes, launch

MAX_ROUTES = 16384  # more routes take less time in two kernels (measured on an H100)
_CHUNK = 64  # routes whose rows a thread block hands out
_UNROLL = 8  # loads in flight


class _Refs(NamedTuple):
    """Ids, results, and shared memory: the chunk's ids, two counts per expert, words for prefix sums."""

    ids: Any
    row_map: Any
    counts: Any
    filled: Any
    bad: Any
    chunk_smem: Any
    before_smem: Any
    all_smem: Any
    scratch_smem: Any


def metadata(
    topk_ids: jax.Array, num_experts: int, *, capacity: int | None, num_rows: int, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """row_map i32 [T, k], counts i32 [E], filled i32 [E] and bad i32 [], as `route_metadata.Metadata` describes them.

    The arguments are those of `route_metadata.route_metadata`; topk_ids is i32 [T, k].
    """
    (tokens, k), routes = topk_ids.shape, topk_ids.size
    sizes = _Sizes(routes, num_experts, capacity, num_rows)
    columns = sizes.tiles * lanes.LANES

    def body(*refs):
        block = _Block(sizes, _Refs(*refs))
        block.clear()
        bad = block.count()
        before, totals = block.counts()
        starts, limits = block.row_ranges(totals)
        block.hand_out(starts, limits, before)
        block.report(starts, limits, totals, bad)

    row_map, counts, filled, bad = launch.kernel(
        body,
        tuple(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (routes, num_experts, num_experts, 1)),
        grid=sizes.blocks,
        scratch_types=[plgpu.SMEM((n,), jnp.int32) for n in (_CHUNK, columns, columns, lanes.WARPS * sizes.tiles)],
        interpret=interpret,
    )(topk_ids.reshape(-1))
    return row_map.reshape(tokens, k), counts, filled, bad[0]


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Static sizes. The fields are arguments of `metadata`; routes = T * k."""

    routes: int
    num_experts: int
    capacity: int | None
    num_rows: int

    @property
    def blocks(self) -> int:
        """Number of thread blocks, one per chunk."""
        return -(-self.routes // _CHUNK)

    @property
    def tiles(self) -> int:
        """Groups of 128 experts. A lane stands for one expert of each group."""
        return -(-self.num_experts // lanes.LANES)


class _Block:
    """The stages of one thread block."""

    def __init__(self, sizes: _Sizes, refs: _Refs):
        self.sizes, self.refs = sizes, refs
        block, self.lane = lanes.block_index(), lanes.lane_index()
        self.first, self.is_last = block * _CHUNK, block == sizes.blocks - 1
        self.mine = [self.lane + t * lanes.LANES for t in range(sizes.tiles)]  # the experts of this lane

    def clear(self) -> None:
        """Sets both counts of each expert to 0."""
        for m in self.mine:
            for smem in (self.refs.before_smem, self.refs.all_smem):
                lanes.scatter(smem, m, [lanes.splat(0, jnp.uint32)])
        lanes.sync()

    def count(self) -> jax.Array:
        """Reads all ids, counts them and keeps those of the chunk. Returns how many bad ids this lane saw."""
        r, routes, capacity = self.refs, self.sizes.routes, self.sizes.capacity

        def read(i, bad):
            positions = [(i * _UNROLL + j) * lanes.LANES + self.lane for j in range(_UNROLL)]
            loaded = [lanes.gather(r.ids, p, where=p < routes)[0].astype(jnp.int32) for p in positions]
            for position, route_id in zip(positions, loaded, strict=True):
                inside = position < routes
                here = inside & (route_id >= 0) & (route_id < self.sizes.num_experts)
                lanes.add_to(r.before_smem, route_id, where=here & (position < self.first))
                lanes.add_to(r.all_smem, route_id, where=here & (self.is_last | (capacity is None)))
                in_chunk = (position >= self.first) & (position < self.first + _CHUNK)
                kept = jnp.where(here, route_id, -1).astype(jnp.uint32)
                lanes.scatter(r.chunk_smem, position - self.first, [kept], where=in_chunk)
                lanes.scatter(r.row_map, position, [kept], where=in_chunk & inside & ~here)  # -1
                bad = bad + (inside & ~here & (route_id != -1)).astype(jnp.int32)
            return bad

        reads = -(-routes // lanes.LANES)
        bad = lax.fori_loop(0, -(-reads // _UNROLL), read, lanes.splat(0, jnp.int32))
        lanes.sync()
        return bad

    def counts(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """How many routes each of the lane's experts has before the chunk, and how many in all."""
        before, totals = (
            [lanes.gather(smem, m)[0].astype(jnp.int32) for m in self.mine]
            for smem in (self.refs.before_smem, self.refs.all_smem)
        )
        return before, totals

    def row_ranges(self, totals: list[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """First row of each of the lane's experts, and the limit that its rows stay below."""
        if self.sizes.capacity is not None:
            starts = [m * self.sizes.capacity for m in self.mine]
            return starts, [start + self.sizes.capacity for start in starts]
        starts, earlier = [], jnp.int32(0)
        for (ends, total), count in zip(lanes.prefix_sums(totals, self.refs.scratch_smem, 0), totals, strict=True):
            starts.append(earlier + ends - count)
            earlier = earlier + total
        return starts, [jnp.full_like(m, self.sizes.num_rows) for m in self.mine]

    def hand_out(self, starts: list[jax.Array], limits: list[jax.Array], before: list[jax.Array]) -> None:
        """Goes through the chunk in order: each route gets the next row of its expert."""

        def step(i, rows):
            for j, word in enumerate(lanes.gather(self.refs.chunk_smem, i, 4)):
                next_rows = []
                for row, limit, m in zip(rows, limits, self.mine, strict=True):
                    is_mine = word.astype(jnp.int32) == m
                    value = jnp.where(row < limit, row, -1).astype(jnp.uint32)
                    lanes.scatter(self.refs.row_map, self.first + i * 4 + j, [value], where=is_mine)
                    next_rows.append(row + is_mine.astype(jnp.int32))
                rows = tuple(next_rows)
            return rows

        rows = tuple(start + b for start, b in zip(starts, before, strict=True))
        in_chunk = jnp.minimum(self.sizes.routes - self.first, _CHUNK)
        lax.fori_loop(0, lax.div(in_chunk + 3, jnp.int32(4)), step, rows)

    def report(self, starts: list[jax.Array], limits: list[jax.Array], totals: list[jax.Array], bad: jax.Array) -> None:
        """The last thread block writes the experts' counts and the number of bad ids."""
        r = self.refs

        @lanes.when(self.is_last)
        def _():
            for m, start, limit, total in zip(self.mine, starts, limits, totals, strict=True):
                filled = jnp.clip(limit - start, 0, total)
                for ref, value in ((r.counts, total), (r.filled, filled)):
                    lanes.scatter(ref, m, [value.astype(jnp.uint32)], where=m < self.sizes.num_experts)
            _, all_bad = lanes.prefix_sum(bad, r.scratch_smem, 0)
            lanes.scatter(r.bad, self.lane, [lanes.splat(all_bad, jnp.uint32)], where=self.lane == 0)
