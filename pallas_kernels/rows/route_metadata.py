"""The row of every route among the rows of its expert, counts per expert, and bad ids, all from the ids alone.

    row_map[t, j] = first row of expert ids[t, j] + number of earlier routes to that expert, or -1 where it has no row

"Earlier" is in token order, then slot order. Routes are cut into chunks, one per thread block, and lane e stands for
expert e. A first kernel goes through each chunk in order and counts each expert's routes in it. A second kernel adds
the counts of all earlier chunks, goes through the chunk again and hands out the rows. The order needs neither atomics
nor a sort. Few routes, those of a decode step, take the one kernel of few_routes.py.

Instruction issue bounds the time: about 3 instructions per route and 128 experts in the first kernel, 7 in the second.
With many chunks the sum over earlier chunks adds to that.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.rows import few_routes
from pallas_kernels.simt import lanes, launch, tuning

MAX_TOP_K = 32  # slots per token
_MAX_EXPERTS = 1024
_MAX_CHUNKS = 2048  # a thread block adds up the counts of all chunks before its own
_LOADS_IN_FLIGHT = 32  # per lane, while counts of chunks are added up
_UNROLL = 32  # routes whose ids are loaded together


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """chunk: routes per thread block."""

    chunk: int = 256


DEFAULT_CONFIG = TuningConfig()


class Metadata(NamedTuple):
    """Rows of the routes of a batch.

    row_map: i32 [T, k], the row of each route, -1 if it has none.
    counts: i32 [E], routes of each expert, those without a row included.
    filled: i32 [E], rows of each expert that routes fill.
    bad: i32 [], number of ids that are neither -1 nor an expert.
    source: i32 [rows], the token of each filled row; other rows hold anything. None if not asked for.
    """

    row_map: jax.Array
    counts: jax.Array
    filled: jax.Array
    bad: jax.Array
    source: jax.Array | None


def check_config(topk_ids: Any, num_experts: int, config: TuningConfig = DEFAULT_CONFIG) -> str | None:
    """None if `route_metadata` accepts these ids (array or ShapeDtypeStruct), else what does not fit."""
    if topk_ids.ndim != 2 or topk_ids.size == 0 or topk_ids.shape[1] > MAX_TOP_K:
        return f"topk_ids must be [T, k], not empty, k at most {MAX_TOP_K}, got {topk_ids.shape}"
    if num_experts > _MAX_EXPERTS:
        return f"at most {_MAX_EXPERTS} experts per device, got {num_experts}"
    if config.chunk < 1 or config.chunk % _UNROLL:
        return f"chunk must be a positive multiple of {_UNROLL}, got {config.chunk}"
    return None


def tuning_items(routes: int) -> int:
    """Items by which the tuning table classifies these kernels: a route takes about as long as 16 copied items."""
    return 16 * routes


def route_metadata(
    topk_ids: jax.Array,
    num_experts: int,
    *,
    capacity: int | None = None,
    num_rows: int,
    with_source: bool = False,
    config: TuningConfig | None = None,
    interpret: Any = None,
) -> Metadata:
    """Gives each route its row, in token order, then slot order.

    Args:
      topk_ids: integer [T, k]. Routes with id -1 are skipped. Other ids outside [0, num_experts) count as bad. Neither
        kind has a row.
      num_experts: number of experts E.
      capacity: rows per expert: route number r of expert e has row e * capacity + r if r < capacity, else -1. None puts
        the rows of all experts back to back: the row is (routes of earlier experts) + r if that is below `num_rows`,
        else -1.
      num_rows: number of rows in all.
      with_source: whether `source` is computed too.
      config: None takes the tuned one.
      interpret: see `launch.kernel`.
    """
    tokens, k = topk_ids.shape
    routes = tokens * k
    if topk_ids.dtype != jnp.int32:  # cast to 32 bits, an id of 64 bits could become that of an expert
        here = (topk_ids >= -1) & (topk_ids < num_experts)
        topk_ids = jnp.where(here, topk_ids, -2).astype(jnp.int32)
    if routes <= few_routes.MAX_ROUTES and not with_source and config is None:
        found = few_routes.metadata(topk_ids, num_experts, capacity=capacity, num_rows=num_rows, interpret=interpret)
        return Metadata(*found, None)
    config = config or tuning.tuned("route_metadata", tuning_items(routes), TuningConfig)
    if routes > config.chunk * _MAX_CHUNKS:
        per_chunk_wanted = -(-routes // _MAX_CHUNKS)
        config = dataclasses.replace(config, chunk=-(-per_chunk_wanted // _UNROLL) * _UNROLL)
    chunks = Chunks(num_experts, config.chunk, -(-routes // config.chunk))
    ids = chunks.columns_of(topk_ids.reshape(-1))
    per_chunk = count(ids, chunks, interpret)
    counts = jnp.sum(per_chunk, axis=0, dtype=jnp.int32)
    start, limit = _row_ranges(counts, num_experts, capacity, num_rows)
    source_of = (num_rows, k) if with_source else None
    row_map, source = assign(ids, per_chunk, start, limit, chunks, source_of, interpret)
    filled = jnp.clip(limit - start, 0, counts)
    return Metadata(
        row_map[:routes].reshape(tokens, k), counts[:num_experts], filled[:num_experts], counts[chunks.bad_column],
        source if with_source else None,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Routes cut into `number` chunks of `size`. Each lane counts the routes of one column, or of one per 128 columns.

    The first columns are the experts. Two more make sure that each route belongs to a column: one for bad ids, and one
    for ids of -1 and the padding of the last chunk.
    """

    num_experts: int
    size: int
    number: int

    @property
    def bad_column(self) -> int:
        """The column of bad ids."""
        return self.num_experts

    @property
    def tiles(self) -> int:
        """Groups of 128 columns. A lane has one column of each group."""
        return -(-(self.num_experts + 2) // lanes.LANES)

    @property
    def columns(self) -> int:
        """Number of columns, rounded up to whole groups."""
        return self.tiles * lanes.LANES

    def columns_of(self, ids: jax.Array) -> jax.Array:
        """The column of each route, padded to whole chunks."""
        here = (ids >= 0) & (ids < self.num_experts)
        absent_column = self.num_experts + 1
        ids = jnp.where(here, ids, jnp.where(ids == -1, absent_column, self.bad_column))
        return jnp.pad(ids, (0, self.number * self.size - ids.size), constant_values=absent_column)

    def mine(self) -> list[jax.Array]:
        """The columns of this lane, one lane array per group."""
        return [lanes.lane_index() + t * lanes.LANES for t in range(self.tiles)]

    def load(self, ids_ref: Any, chunk: jax.Array, i: jax.Array) -> list[jax.Array]:
        """The columns of _UNROLL successive routes of a chunk (run number i), the same in all lanes."""
        return _load_ids(ids_ref, chunk * (self.size // _UNROLL) + i)


def count(ids: jax.Array, chunks: Chunks, interpret: Any) -> jax.Array:
    """The first kernel: number of routes of each column in each chunk, i32 [chunks, columns]. ids: of `columns_of`."""

    def body(ids_ref, counts_ref):
        chunk, mine = lanes.block_index(), chunks.mine()
        _touch(ids_ref, chunk, chunks.size)

        def step(i, totals):
            for route_id in chunks.load(ids_ref, chunk, i):
                totals = [total + (route_id == m).astype(jnp.int32) for total, m in zip(totals, mine, strict=True)]
            return tuple(totals)

        totals = lax.fori_loop(0, chunks.size // _UNROLL, step, tuple(lanes.splat(0, jnp.int32) for _ in mine))
        for m, total in zip(mine, totals, strict=True):
            lanes.scatter(counts_ref, chunk * chunks.columns + m, [total.astype(jnp.uint32)])

    out = jax.ShapeDtypeStruct((chunks.number, chunks.columns), jnp.int32)
    return launch.kernel(body, out, grid=chunks.number, interpret=interpret)(ids)


def assign(
    ids: jax.Array,
    per_chunk: jax.Array,
    start: jax.Array,
    limit: jax.Array,
    chunks: Chunks,
    source_of: tuple[int, int] | None,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """The second kernel: the row of each route, i32 [chunks * size], and the token of each row.

    Args:
      ids: what `Chunks.columns_of` returns.
      per_chunk: what `count` returns.
      start: i32 [columns], the first row of each column.
      limit: i32 [columns]; rows of a column from here on do not exist.
      chunks: how routes are cut.
      source_of: (number of rows, k) if the tokens of rows are wanted, else None; then the second result is not filled.
      interpret: see `launch.kernel`.
    """
    num_rows, k = source_of or (1, 1)

    def body(ids_ref, per_chunk_ref, start_ref, limit_ref, row_map_ref, source_ref):
        chunk, mine = lanes.block_index(), chunks.mine()
        _touch(ids_ref, chunk, chunks.size)

        def add(c, rows):
            found = [lanes.gather(per_chunk_ref, c * chunks.columns + m)[0].astype(jnp.int32) for m in mine]
            return tuple(r + f for r, f in zip(rows, found, strict=True))

        rows = tuple(lanes.gather(start_ref, m)[0].astype(jnp.int32) for m in mine)
        rows = _fori_unrolled(chunk, add, rows, max(4, _LOADS_IN_FLIGHT // chunks.tiles))
        limits = [lanes.gather(limit_ref, m)[0].astype(jnp.int32) for m in mine]

        def step(i, rows):
            base = chunk * chunks.size + i * _UNROLL
            for j, route_id in enumerate(chunks.load(ids_ref, chunk, i)):
                position = base + j
                next_rows = []
                for row, limit, m in zip(rows, limits, mine, strict=True):
                    is_mine = route_id == m
                    fits = row < limit
                    value = jnp.where(fits, row, -1).astype(jnp.uint32)
                    lanes.scatter(row_map_ref, position, [value], where=is_mine)
                    if source_of:
                        lanes.scatter(source_ref, row, [lanes.splat(position // k, jnp.uint32)], where=is_mine & fits)
                    next_rows.append(row + is_mine.astype(jnp.int32))
                rows = tuple(next_rows)
            return rows

        lax.fori_loop(0, chunks.size // _UNROLL, step, rows)

    out = tuple(jax.ShapeDtypeStruct((n,), jnp.int32) for n in (chunks.number * chunks.size, num_rows))
    return launch.kernel(body, out, grid=chunks.number, interpret=interpret)(ids, per_chunk, start, limit)


def _row_ranges(counts, num_experts, capacity, num_rows):
    """First row of each column, and the limit that its rows stay below. Columns without an expert have no rows."""
    columns = np.arange(counts.shape[0])
    if capacity is not None:  # then both are constants of the program
        # A column without an expert starts beyond its limit, so it has no rows.
        start = np.where(columns < num_experts, columns * capacity, 1)
        limit = np.where(columns < num_experts, start + capacity, 0)
        return jnp.asarray(start, jnp.int32), jnp.asarray(limit, jnp.int32)
    before = columns[None, :] < columns[:, None]
    start = jnp.sum(jnp.where(before, counts[None, :], 0), axis=1, dtype=jnp.int32)
    return start, jnp.asarray(np.where(columns < num_experts, num_rows, 0), jnp.int32)


def _load_ids(ids_ref, group):
    """_UNROLL successive ids (run number `group`), the same in all lanes."""
    loaded = []
    for j in range(_UNROLL // 4):
        loaded += lanes.gather(ids_ref, group * (_UNROLL // 4) + j, 4)
    return [i.astype(jnp.int32) for i in loaded]


def _touch(ids_ref, chunk, size):
    """Reads a whole chunk of ids into the L1 cache at once, so that the walk over it waits for L1 only."""
    for j in range(-(-size // (4 * lanes.LANES))):
        line = j * lanes.LANES + lanes.lane_index()
        lanes.gather(ids_ref, chunk * (size // 4) + line, 4, where=line < size // 4)


def _fori_unrolled(count, body, init, unroll):
    """fori_loop over 0..count-1. It runs `unroll` iterations at a time, so that their loads are in flight together."""

    def several(i, carry):
        for j in range(unroll):
            carry = body(i * unroll + j, carry)
        return carry

    whole = count // unroll
    carry = lax.fori_loop(0, whole, several, init)
    return lax.fori_loop(whole * unroll, count, body, carry)
