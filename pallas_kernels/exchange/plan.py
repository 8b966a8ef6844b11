"""To which rows of which peers the tokens of a block of threads go, worked out by the block itself.

A device's tokens are cut into one run per block. Rows at a receiver are in token order, then slot order: the place of a
token's row is the number of rows that earlier tokens need there. For few tokens every block counts them itself, from
all ids; for many a kernel counts each run first.
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
MAX_SLOTS = 15  # a token's routes to one device are counted in 4 bits
_FEW_TILES = 8  # of 128 tokens, whose ids are loaded all at once


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """blocks: of threads, all at work at once. warpgroups: of a block that make rows; one more plans."""

    blocks: int = H100_SMS
    warpgroups: int = 2


@dataclasses.dataclass(frozen=True)
class Routes:
    """What decides where rows go. form: "per_peer" or "per_slot"; capacity: rows per sender and receiver."""

    tokens: int
    k: int
    devices: int
    local_experts: int
    capacity: int
    form: str

    @property
    def columns(self) -> int:
        """Destinations that a token may have: one per device, or one per slot."""
        return self.devices if self.form == "per_peer" else self.k


class RowPlan:
    """Which rows the tokens of a block go to; in shared memory."""

    def __init__(self, routes: Routes, config: TuningConfig):
        self.routes, self.config = routes, config
        self.per_block = -(-routes.tokens // config.blocks)
        self.tiles = -(-self.per_block // lanes.LANES)
        self.table = self.tiles * lanes.LANES * routes.columns
        self.words = self.table + 2 * lanes.WARPS * routes.devices  # and what prefix sums need

    def scratch(self, more: int = 0) -> Any:
        """Shared memory for the rows and for making them, and some words more."""
        return plgpu.SMEM((self.words + more,), jnp.int32)

    def tokens_of_block(self) -> tuple[jax.Array, jax.Array]:
        """First token of this block and their number."""
        first = lanes.block_index() * self.per_block
        return first, jnp.clip(self.routes.tokens - first, 0, self.per_block)

    def load(self, ids_ref: Any, token: jax.Array, valid: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
        """-> per slot, the device of lane `token` (-1: none); per device, how many rows of it the token needs."""
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
        """Rows that this block's tokens need on every device, scalars."""
        first, number = self.tokens_of_block()
        totals = [lanes.splat(0, jnp.int32)] * self.routes.devices
        for tile in range(self.tiles):
            index = tile * lanes.LANES + lanes.lane_index()
            _, needed = self.load(ids_ref, first + index, index < number)
            totals = [t + n for t, n in zip(totals, needed, strict=True)]
        return [total for _, total in lanes.prefix_sums(totals, scratch, at)]

    def fill(self, ids_ref: Any, counts_ref: Any, scratch: Any, map_ref: Any) -> list[jax.Array]:
        """Puts the rows of this block's tokens into `scratch` and `map_ref`; -> rows that all tokens need, per device.

        A row is device * capacity + its place there, or -1. counts_ref: what `count` gave every block, or None.
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
    """i32 [blocks, devices]: rows that the tokens of every block need on every device."""
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
