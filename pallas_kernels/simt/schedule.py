"""Walking over the valid rows of every expert: units of work, built on the device from `masked_m`, by a fixed grid.

Expert e has ceil(rows * per_row / per_unit) units. Every block of threads sums them up for itself (a prefix sum over
its lanes, kept in shared memory), takes units round robin and finds a unit's expert by bisection. Nothing is read back
to the host, no other kernel runs first, and experts without rows cost nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt import lanes


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How workers share tasks 0, 1, ..: of every `workers` successive tasks each worker takes one.

    workers: blocks, clusters or warpgroups, all at work at once; a method's `worker` is the index of one, by default of
      this block or cluster.
    rotation: how many places further a worker takes its task each time. With 0 worker w takes w, w + workers, ...
    """

    workers: int
    rotation: int = 0

    def task(self, number: Any, worker: Any = None) -> jax.Array:
        """Index of the worker's task of that number."""
        if self.rotation == 0:
            return self._index(worker) + number * self.workers
        return number * self.workers + lax.rem(self._index(worker) + number * self.rotation, jnp.int32(self.workers))

    def following(self, task: jax.Array) -> jax.Array:
        """Index of the same worker's next task, for a schedule that does not rotate."""
        assert self.rotation == 0
        return task + self.workers

    def count(self, total: int, worker: Any = None) -> jax.Array:
        """How many of `total` tasks the worker takes."""
        return lax.div(total - self._index(worker) + (self.workers - 1), jnp.int32(self.workers))

    def _index(self, worker):
        return lanes.block_index() if worker is None else worker


class PersistentLanes:
    """All lanes of a grid of persistent blocks, which take items one each."""

    def __init__(self, blocks: int, warpgroups: int):
        self._schedule = Schedule(blocks * warpgroups)
        warpgroup = lanes.warpgroup_index() if warpgroups > 1 else 0
        self._worker = lanes.block_index() * warpgroups + warpgroup

    def for_each(self, items: int, body: Callable[[jax.Array], None]) -> None:
        """body(item) until all are done; item is an i32 lane array, and may lie beyond the last one."""

        def step(i, _):
            body(self._schedule.task(i, self._worker) * lanes.LANES + lanes.lane_index())

        lax.fori_loop(0, -(-items // (self._schedule.workers * lanes.LANES)), step, None)


@dataclasses.dataclass(frozen=True)
class ExpertUnits:
    """experts: their number. rows: per expert at most. per_row: items of a row. per_unit: items of a unit."""

    experts: int
    rows: int
    per_row: int
    per_unit: int

    @property
    def tiles(self) -> int:
        """Groups of 128 experts."""
        return -(-self.experts // lanes.LANES)

    def scratch(self) -> Any:
        """Shared memory for the prefix sums, and for making them."""
        return plgpu.SMEM(((self.tiles + 1) * lanes.LANES,), jnp.int32)

    def rows_of(self, counts_ref: Any, expert: jax.Array) -> jax.Array:
        """Valid rows of an expert: its count, within 0..rows."""
        return jnp.clip(counts_ref[expert], 0, self.rows)

    def for_each(
        self, counts_ref: Any, ends_ref: Any, grid: int, body: Callable[[jax.Array, jax.Array, jax.Array], None]
    ) -> None:
        """body(expert, unit within the expert, valid rows of the expert) for this block's share of all units."""
        schedule = Schedule(grid)
        total = self._sum_up(counts_ref, ends_ref)
        steps = max(1, (self.experts - 1).bit_length())

        def run(unit: jax.Array) -> jax.Array:
            def halve(_, bounds):
                low, high = bounds  # the expert lies in low..high
                middle = (low + high) // 2
                here = ends_ref[middle] > unit
                return jnp.where(here, low, middle + 1), jnp.where(here, middle, high)

            expert, _ = lax.fori_loop(0, steps, halve, (jnp.int32(0), jnp.int32(self.experts - 1)))
            start = jnp.where(expert > 0, ends_ref[jnp.maximum(expert - 1, 0)], 0)
            body(expert, unit - start, self.rows_of(counts_ref, expert))
            return schedule.following(unit)

        lax.while_loop(lambda unit: unit < total, run, lanes.block_index())

    def _sum_up(self, counts_ref, ends_ref):
        """Fills ends_ref with the units of experts 0..e together; -> all units."""
        before = jnp.int32(0)
        for tile in range(self.tiles):
            expert = tile * lanes.LANES + lanes.lane_index()
            (count,) = lanes.gather(counts_ref, expert, where=expert < self.experts)
            items = jnp.clip(count.astype(jnp.int32), 0, self.rows) * self.per_row
            units = (items + (self.per_unit - 1)) // self.per_unit
            ends, total = lanes.prefix_sum(units, ends_ref, self.tiles * lanes.LANES)
            ends_ref[tile * lanes.LANES : (tile + 1) * lanes.LANES] = before + ends
            before = before + total
        lanes.sync()
        return before
