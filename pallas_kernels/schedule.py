"""Which block of threads works on which rows: a flat grid, or units of an expert's valid rows built on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import lanes

H100_SMS = 132


def unit_ends(masked_m: jax.Array, rows_or_items: int, per_row: int, per_unit: int) -> jax.Array:
    """i32 [E]: units of experts 0..e together, where expert e has ceil(rows * per_row / per_unit) of them.

    rows = masked_m[e], at most `rows_or_items`. A sum over a triangle, not a cumsum: one small kernel instead of
    several.
    """
    experts = masked_m.shape[0]
    items = jnp.clip(masked_m, 0, rows_or_items) * per_row
    units = (items + per_unit - 1) // per_unit
    before = jnp.arange(experts)[None, :] <= jnp.arange(experts)[:, None]
    return jnp.sum(jnp.where(before, units[None, :], 0), axis=1, dtype=jnp.int32)


def for_each_unit(ends_ref: jax.Ref, num_experts: int, grid: int, body: Callable[[jax.Array, jax.Array], None]) -> None:
    """Calls body(expert, unit within the expert) for this block's share of all units, round robin over `grid` blocks.

    `ends_ref` holds `unit_ends`; the expert is found by bisection, so experts without units cost nothing.
    """
    steps = max(1, (num_experts - 1).bit_length())

    def run(unit: jax.Array) -> jax.Array:
        def halve(_, bounds):
            low, high = bounds  # the expert lies in low..high
            middle = (low + high) // 2
            here = ends_ref[middle] > unit
            return jnp.where(here, low, middle + 1), jnp.where(here, middle, high)

        expert, _ = lax.fori_loop(0, steps, halve, (jnp.int32(0), jnp.int32(num_experts - 1)))
        start = jnp.where(expert > 0, ends_ref[jnp.maximum(expert - 1, 0)], 0)
        body(expert, unit - start)
        return unit + grid

    lax.while_loop(lambda unit: unit < ends_ref[num_experts - 1], run, lanes.block_index())
