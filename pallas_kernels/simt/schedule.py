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
            return unit + grid

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
