"""Which tasks each thread block of a persistent kernel takes.

A persistent kernel starts as many thread blocks as the GPU runs at once, and each of them takes one task after the
other. `Schedule` says which ones. Three kinds of kernels build their tasks on top of it:

* `PersistentLanes`: single items, one per lane (combine, push_combine);
* `ExpertUnits`: units of the valid rows of every expert (quantize, swiglu_quantize);
* tiles of a GEMM: `gemm/tasks.py` for grouped ones, `fp8/gemm.py` for the dense one.
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
    """How workers share the tasks 0, 1, 2, ...: each worker takes one of every `workers` successive tasks.

    workers: number of workers. They are thread blocks, clusters or warpgroups, and all run at the same time.
    rotation: with 0, worker w takes the tasks w, w + workers, w + 2 workers and so on. In general its n-th task is
      number (w + n * rotation) mod workers of the n-th group of `workers` tasks.
    """

    workers: int
    rotation: int = 0

    def task(self, number: Any, worker: Any = None) -> jax.Array:
        """Index of the n-th task (n = `number`) of a worker, by default of this thread block or cluster."""
        if self.rotation == 0:
            return self._index(worker) + number * self.workers
        return number * self.workers + lax.rem(self._index(worker) + number * self.rotation, jnp.int32(self.workers))

    def following(self, task: jax.Array) -> jax.Array:
        """Index of the task that the worker of `task` takes next. Only for rotation 0."""
        assert self.rotation == 0
        return task + self.workers

    def count(self, total: int) -> jax.Array:
        """How many of `total` tasks this thread block or cluster takes."""
        return lax.div(total - lanes.block_index() + (self.workers - 1), jnp.int32(self.workers))

    def _index(self, worker):
        return lanes.block_index() if worker is None else worker


class PersistentLanes:
    """The lanes of all thread blocks of a persistent kernel, as workers that take one item each at a time."""

    def __init__(self, blocks: int, warpgroups: int):
        self._schedule = Schedule(blocks * warpgroups)
        warpgroup = lanes.warpgroup_index() if warpgroups > 1 else 0
        self._worker = lanes.block_index() * warpgroups + warpgroup

    def for_each(self, items: int, body: Callable[[jax.Array], None]) -> None:
        """Calls body(item), item an i32 lane array, until all items are taken. The body must ignore item >= items."""

        def step(i, _):
            body(self._schedule.task(i, self._worker) * lanes.LANES + lanes.lane_index())

        lax.fori_loop(0, -(-items // (self._schedule.workers * lanes.LANES)), step, None)


@dataclasses.dataclass(frozen=True)
class ExpertUnits:
    """Units of work over the valid rows of every expert, laid out on the device from the experts' counts.

    An expert with r valid rows has ceil(r * per_row / per_unit) units. Every thread block computes the prefix sum of
    these numbers for itself, keeps it in shared memory, and finds the expert of a unit by bisection. The host reads
    nothing back, no other kernel runs before, and an expert without rows costs nothing.

    experts: number of experts.
    rows: the most rows that an expert may have.
    per_row: items in a row.
    per_unit: items in a unit.
    """

    experts: int
    rows: int
    per_row: int
    per_unit: int

    @property
    def tiles(self) -> int:
        """Groups of 128 experts; each lane handles one expert of a group."""
        return -(-self.experts // lanes.LANES)

    def scratch(self) -> Any:
        """Shared memory: the prefix sums, and 128 words to compute them in."""
        return plgpu.SMEM(((self.tiles + 1) * lanes.LANES,), jnp.int32)

    def rows_of(self, counts_ref: Any, expert: jax.Array) -> jax.Array:
        """Valid rows of an expert: its count, clipped to 0..rows."""
        return jnp.clip(counts_ref[expert], 0, self.rows)

    def for_each(
        self, counts_ref: Any, ends_ref: Any, grid: int, body: Callable[[jax.Array, jax.Array, jax.Array], None]
    ) -> None:
        """Calls body(expert, unit within the expert, valid rows of the expert) for each unit of this thread block."""
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
        """Writes to ends_ref[e] how many units the experts 0..e have together; returns the number of all units."""
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
