"""The plan of a dispatch: which rows of which devices the tokens of a thread block go to.

    place of a token's row on device d = number of rows that earlier tokens need on d

Rows on a receiver are thus in token order, then slot order. The tokens of a device are cut into one run per thread
block. A thread block needs the rows of all tokens before its run: with few tokens it counts them itself, from all ids,
a lane per token. With many tokens a kernel counts each run first (`counts_of_blocks`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.hardware import H100_SMS
from pallas_kernels.simt.lane_math import unsigned_div

MAX_DEVICES = 8
MAX_SLOTS = 15  # slots per token: routes of a token to one device are counted in 4 bits
_FEW_TILES = 8  # up to so many groups of 128 tokens, their ids are all loaded at once


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """Thread blocks of a dispatch, and their warpgroups.

    blocks: thread blocks, which all run at the same time.
    warpgroups: warpgroups of a thread block that make rows. One more makes the plan.
    """

    blocks: int = H100_SMS
    warpgroups: int = 2


@dataclasses.dataclass(frozen=True)
class Routes:
    """Sizes that decide where rows go.

    tokens: T of this device. k: slots per token. devices: on the mesh axis. local_experts: experts per device.
    capacity: rows per sender and receiver. form: "per_peer" sends a token once to each device that has one of its
    experts; "per_slot" sends it once for each slot.
    """

    tokens: int
    k: int
    devices: int
    local_experts: int
    capacity: int
    form: str

    @property
    def columns(self) -> int:
        """Rows that a token may have: one per device (per_peer) or one per slot (per_slot)."""
        return self.devices if self.form == "per_peer" else self.k


class RowPlan:
    """The plan of a thread block in shared memory, [tokens of its run, columns]: device * capacity + place, or -1."""

    def __init__(self, routes: Routes, config: TuningConfig):
        self.routes, self.config = routes, config
        self.per_block = -(-routes.tokens // config.blocks)
        self.tiles = -(-self.per_block // lanes.LANES)
        self.table = self.tiles * lanes.LANES * routes.columns
        self.words = self.table + 2 * lanes.WARPS * routes.devices  # and words for prefix sums

    def scratch(self, more: int = 0) -> Any:
        """Shared memory for the plan and for computing it, and `more` words."""
        return plgpu.SMEM((self.words + more,), jnp.int32)

    def tokens_of_block(self) -> tuple[jax.Array, jax.Array]:
        """First token of this thread block, and how many tokens it has."""
        first = lanes.block_index() * self.per_block
        return first, jnp.clip(self.routes.tokens - first, 0, self.per_block)

    def load(self, ids_ref: Any, token: jax.Array, valid: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """Loads the ids of one token per lane.

        Returns the device of each slot (-1 for none), and how many rows the token needs on each device.
        """
        r = self.routes
        ids = [i.astype(jnp.int32) for i in lanes.gather(ids_ref, token, r.k, where=valid)]
        owners, fields = [], lanes.splat(0, jnp.uint32)
        for i in ids:
            here = valid & (i >= 0) & (i < r.devices * r.local_experts)
            owner = jnp.where(here, unsigned_div(jnp.maximum(i, 0), r.local_experts), -1)
            bit = jnp.where(here, jnp.uint32(1) << (4 * jnp.maximum(owner, 0)).astype(jnp.uint32), jnp.uint32(0))
            fields = fields | bit if r.form == "per_peer" else fields + bit
            owners.append(owner)
        return owners, [((fields >> (4 * d)) & 15).astype(jnp.int32) for d in range(r.devices)]

    def count(self, ids_ref: Any, scratch: Any, at: int) -> list[jax.Array]:
        """How many rows this thread block's tokens need on each device, scalars."""
        first, number = self.tokens_of_block()
        totals = [lanes.splat(0, jnp.int32)] * self.routes.devices
        for tile in range(self.tiles):
            index = tile * lanes.LANES + lanes.lane_index()
            _, needed = self.load(ids_ref, first + index, index < number)
            totals = [t + n for t, n in zip(totals, needed, strict=True)]
        return [total for _, total in lanes.prefix_sums(totals, scratch, at)]

    def fill(self, ids_ref: Any, counts_ref: Any, scratch: Any, map_ref: Any) -> list[jax.Array]:
        """Writes the plan of this thread block's tokens to `scratch` and `map_ref`.

        counts_ref: what `counts_of_blocks` returned, or None if the thread block shall count by itself.

        Returns how many rows all tokens of this device need on each device, scalars.
        """
        r, at = self.routes, self.table
        first, number = self.tokens_of_block()
        zero = [lanes.splat(0, jnp.int32)] * r.devices

        def add(carry, needed, is_before):
            before, all_ = carry
            before = [b + jnp.where(is_before, n, 0) for b, n in zip(before, needed, strict=True)]
            return before, [a + n for a, n in zip(all_, needed, strict=True)]

        if counts_ref is None:

            def step(i, carry):
                token = i * lanes.LANES + lanes.lane_index()
                return add(carry, self.load(ids_ref, token, token < r.tokens)[1], token < first)

            before, all_ = zero, zero
            tiles = -(-r.tokens // lanes.LANES)
            if tiles <= _FEW_TILES:  # all loads at once
                for i in range(tiles):
                    before, all_ = step(i, (before, all_))
            else:
                before, all_ = lax.fori_loop(0, tiles, step, (before, all_))
        else:
            before, all_ = zero, zero
            for tile in range(-(-self.config.blocks // lanes.LANES)):
                block = tile * lanes.LANES + lanes.lane_index()
                here = block < self.config.blocks
                needed = [
                    lanes.gather(counts_ref, block * r.devices + d, where=here)[0].astype(jnp.int32)
                    for d in range(r.devices)
                ]
                before, all_ = add((before, all_), needed, block < lanes.block_index())
        sums = [total for _, total in lanes.prefix_sums([*before, *all_], scratch, at)]
        start, totals = sums[: r.devices], sums[r.devices :]

        for tile in range(self.tiles):
            index = tile * lanes.LANES + lanes.lane_index()
            valid = index < number
            owners, needed = self.load(ids_ref, first + index, valid)
            ends = lanes.prefix_sums(needed, scratch, at)
            place = [s + end - n for s, (end, _), n in zip(start, ends, needed, strict=True)]
            start = [s + total for s, (_, total) in zip(start, ends, strict=True)]
            rows = self._rows(owners, needed, place)
            for j, row in enumerate(rows):
                lanes.scatter(scratch, index * r.columns + j, [row.astype(jnp.uint32)])
                lanes.scatter(map_ref, (first + index) * r.columns + j, [row.astype(jnp.uint32)], where=valid)
        lanes.sync()
        return totals

    def _rows(self, owners, needed, place):
        r, rows = self.routes, []
        if r.form == "per_peer":
            for d in range(r.devices):
                fits = (needed[d] > 0) & (place[d] < r.capacity)
                rows.append(jnp.where(fits, d * r.capacity + place[d], -1))
            return rows
        place = list(place)
        for owner in owners:
            row = lanes.splat(-1, jnp.int32)
            for d in range(r.devices):
                mine = owner == d
                row = jnp.where(mine & (place[d] < r.capacity), d * r.capacity + place[d], row)
                place[d] = place[d] + mine.astype(jnp.int32)
            rows.append(row)
        return rows


def counts_of_blocks(ids: jax.Array, plan: RowPlan, *, interpret: Any = None) -> jax.Array:
    """How many rows the tokens of each thread block need on each device, i32 [blocks, devices]."""
    devices = plan.routes.devices

    def body(ids_ref, counts_ref, scratch):
        lane = lanes.lane_index()
        mine = lanes.splat(0, jnp.int32)
        for d, total in enumerate(plan.count(ids_ref, scratch, 0)):
            mine = jnp.where(lane == d, total, mine)
        lanes.scatter(counts_ref, lanes.block_index() * devices + lane, [mine.astype(jnp.uint32)], where=lane < devices)

    out = jax.ShapeDtypeStruct((plan.config.blocks, devices), jnp.int32)
    scratch = [plgpu.SMEM((lanes.WARPS * devices,), jnp.int32)]
    return launch.kernel(body, out, grid=plan.config.blocks, scratch_types=scratch, interpret=interpret)(ids)
