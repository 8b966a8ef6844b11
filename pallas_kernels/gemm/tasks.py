"""The tasks of a grouped GEMM, laid out on the device: tiles of `tile_m` rows of every expert, times tiles of columns.

Expert e has ceil(rows_e / tile_m) row tiles, so an expert without rows has none. One warpgroup of each thread block
computes the prefix sum of these numbers into shared memory, the plan. Then the thread block takes its tasks by
`schedule.Schedule`. Task number row tile * column tiles + column tile comes in this order, so that tasks which run at
the same time share the weights of an expert and the tokens of a row tile in the L2 cache.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt import lanes
from pallas_kernels.simt.schedule import Schedule

_ROTATION = 37  # coprime to the number of thread blocks


class Task(NamedTuple):
    """One task of a thread block; all fields are scalars on the device.

    expert: index of the expert.
    column: index of the column tile.
    row: first row of the task, in x and in the result.
    rows: number of valid rows from there on.
    number: how many tasks the thread block has done before.
    is_last: whether it is the thread block's last task.
    """

    expert: jax.Array
    column: jax.Array
    row: jax.Array
    rows: jax.Array
    number: jax.Array
    is_last: jax.Array


@dataclasses.dataclass(frozen=True)
class GroupTiles:
    """The tasks of one kernel.

    experts: number of experts.
    max_rows: rows per expert in the masked layout, rows in all in the contiguous layout.
    tile_m: rows of a tile.
    contiguous: whether the rows are in the contiguous layout.
    blocks: thread blocks of the grid.
    """

    experts: int
    max_rows: int
    tile_m: int
    contiguous: bool
    blocks: int

    def scratch(self) -> Any:
        """Shared memory for the plan: the experts' tile ends, first rows and row counts, and words for prefix sums."""
        return plgpu.SMEM((3 * self._stride + lanes.LANES,), jnp.int32)

    @property
    def _stride(self):
        return -(-self.experts // lanes.LANES) * lanes.LANES

    def fill(self, counts_ref: Any, plan_ref: Any) -> None:
        """Computes the plan from the counts, clipped to the rows that exist. One warpgroup calls it."""
        tiles_before, rows_before = jnp.int32(0), jnp.int32(0)
        for first in range(0, self.experts, lanes.LANES):
            expert = first + lanes.lane_index()
            (count,) = lanes.gather(counts_ref, expert, where=expert < self.experts)
            rows = jnp.clip(count.astype(jnp.int32), 0, self.max_rows)
            if self.contiguous:
                ends, total = lanes.prefix_sum(rows, plan_ref, 3 * self._stride)
                ends, rows_before = rows_before + ends, rows_before + total
                starts = jnp.minimum(ends - rows, self.max_rows)
                rows = jnp.minimum(ends, self.max_rows) - starts
            else:
                starts = expert * self.max_rows
            tiles = (rows + (self.tile_m - 1)) // self.tile_m
            tile_ends, total = lanes.prefix_sum(tiles, plan_ref, 3 * self._stride)
            for i, values in enumerate((tiles_before + tile_ends, starts, rows)):
                start = i * self._stride + first
                plan_ref[start : start + lanes.LANES] = values
            tiles_before = tiles_before + total
        lanes.sync()

    def for_each(self, plan_ref: Any, column_tiles: int, body: Callable[[Task], None]) -> None:
        """Calls body(task) for each task of this thread block.

        The schedule rotates: if a thread block took every `blocks`-th task, that could be in step with the row tiles,
        and some thread blocks would get all the small ones.
        """
        total = plan_ref[self.experts - 1] * column_tiles
        schedule = Schedule(self.blocks, _ROTATION)

        def run(state):
            index, expert, number = state
            following = schedule.task(number + 1)
            tile = lax.div(index, jnp.int32(column_tiles))
            expert = lax.while_loop(lambda e: plan_ref[e] <= tile, lambda e: e + 1, expert)
            before = jnp.where(expert > 0, plan_ref[jnp.maximum(expert - 1, 0)], 0)
            offset = (tile - before) * self.tile_m
            rows = jnp.minimum(plan_ref[2 * self._stride + expert] - offset, self.tile_m)
            row = plan_ref[self._stride + expert] + offset
            body(Task(expert, index - tile * column_tiles, row, rows, number, following >= total))
            return following, expert, number + 1

        lax.while_loop(lambda state: state[0] < total, run, (lanes.block_index(), jnp.int32(0), jnp.int32(0)))
