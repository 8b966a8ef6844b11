"""Token-major rows to expert-major rows and back: routing metadata, scatter, layouts of scales, weighted gather.

* `route_metadata`: where every route goes. Routes are cut into chunks. Lane e of a thread block stands for expert e and
  counts its own routes while the block walks over a chunk in order; a second kernel adds the counts of earlier chunks
  and hands out rows while it walks again. Order is token order by construction, without atomics or a sort.
* `scatter_rows`: reads every token once, 16 bytes per lane, and writes it to each of its rows.
* `scatter_decoded_rows`: the same, NVFP4 in and bf16 code x scale out.
* `arrange_scales`: gathers scales into the M-major or 128x4 layout; every output byte is written once, in order.
* `depermute_combine`: gathers k rows per token; each product and each sum rounded to f32, one final rounding.

All but the metadata are limited by device memory; the metadata by instruction issue of one compare and one predicated
store per route and 128 experts.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import lanes, tuning
from pallas_kernels.nvfp4_codec import BLOCK_SIZE, decode_word, e4m3_value, pack_exact_bf16, unpack_bf16
from pallas_kernels.quantize import as_u32, unsigned_div

_MAX_EXPERTS = 1024
_MAX_TOP_K = 32
_MAX_INDEX = 2**31 - 2**16  # room for the lanes beyond the last item
_MAX_CHUNKS = 2048  # every block adds up the counts of all chunks before its own
_LOADS_IN_FLIGHT = 32
_UNROLL = 32  # routes whose ids are loaded together


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """chunk: routes per thread block of the metadata kernels. items_per_lane: accesses in flight per lane."""

    chunk: int = 1024
    items_per_lane: int = 2


DEFAULT_CONFIG = TuningConfig()


class Metadata(NamedTuple):
    """Where every route goes.

    row_map i32 [T, k]: row or -1. counts i32 [E]: routes per expert, before any limit. bad i32 []. source i32 [rows]:
    token of each filled row; other rows hold anything.
    """

    row_map: jax.Array
    counts: jax.Array
    bad: jax.Array
    source: jax.Array


def check_config(
    topk_ids: Any, num_experts: int, rows: Sequence[Any], num_rows: int, config: TuningConfig = DEFAULT_CONFIG
) -> str | None:
    """None if the permute kernels accept these ids and row arrays [T, ..] (None entries are skipped), else what not."""
    if topk_ids.ndim != 2 or topk_ids.size == 0 or topk_ids.shape[1] > _MAX_TOP_K:
        return f"topk_ids must be [T, k], not empty, k at most {_MAX_TOP_K}, got {topk_ids.shape}"
    if num_experts > _MAX_EXPERTS:
        return f"at most {_MAX_EXPERTS} experts per device, got {num_experts}"
    for r in rows:
        if r is None:
            continue
        if r.ndim != 2 or 0 in r.shape or _bits(r.dtype) not in (8, 16, 32):
            return f"rows must be [T, n], not empty, of 8, 16 or 32 bit elements, got {r.dtype} {r.shape}"
        if max(num_rows, r.shape[0]) * r.shape[1] >= _MAX_INDEX:
            return f"{max(num_rows, r.shape[0])} rows of {r.shape[1]} elements exceed the kernel's 32-bit indices"
    if config.chunk < 1 or config.chunk % _UNROLL or not 1 <= config.items_per_lane <= 8:
        return f"chunk must be a multiple of {_UNROLL} and items_per_lane 1..8, got {config}"
    return None


def check_depermute(y: Any, row_map: Any) -> str | None:
    """None if `depermute_combine` accepts these, else what does not fit."""
    if y.dtype not in (jnp.bfloat16, jnp.float32) or y.ndim != 2 or 0 in y.shape:
        return f"y must be bfloat16 or float32 [rows, H], not empty, got {y.dtype} {y.shape}"
    if y.dtype == jnp.bfloat16 and y.shape[1] % 2:
        return f"a bfloat16 y needs an even H, got {y.shape}"
    if max(y.shape[0], row_map.shape[0]) * _access(y.shape[1] * y.dtype.itemsize).items >= _MAX_INDEX:
        return f"y {y.shape} with row_map {row_map.shape} exceeds the kernel's 32-bit indices"
    if row_map.size == 0 or row_map.shape[1] > _MAX_TOP_K:
        return f"row_map must be [T, k], not empty, k at most {_MAX_TOP_K}, got {row_map.shape}"
    return None


def _bits(dtype):
    """Bits of an element; 0 for types that are no plain numbers (bool is stored in ways of its own)."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 0


# --- metadata ---


def metadata_items(routes: int) -> int:
    """What stands for the size of the metadata kernels in the tuning table: a route costs about 16 copied items."""
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
    """Stable rows for routes [T, k]: expert e's r-th route goes to row e * capacity + r if r < capacity.

    capacity None: to row (routes of earlier experts) + r if that is below `num_rows`. Ids of -1 are skipped, other ids
    outside [0, num_experts) counted as bad; both map to -1. `source` is filled only if asked for.
    """
    tokens, k = topk_ids.shape
    routes = tokens * k
    config = config or tuning.tuned("route_metadata", metadata_items(routes), TuningConfig)
    if routes > config.chunk * _MAX_CHUNKS:
        per_chunk_wanted = -(-routes // _MAX_CHUNKS)
        config = dataclasses.replace(config, chunk=-(-per_chunk_wanted // _UNROLL) * _UNROLL)
    chunks = -(-routes // config.chunk)
    ids = topk_ids.reshape(-1)
    here = (ids >= 0) & (ids < num_experts)
    # Two more columns take what goes nowhere, so that every route has its lane: bad ids, and ids of -1 (and padding).
    bad_column, absent_column = num_experts, num_experts + 1
    ids = jnp.where(here, ids, jnp.where(ids == -1, absent_column, bad_column)).astype(jnp.int32)
    ids = jnp.pad(ids, (0, chunks * config.chunk - routes), constant_values=absent_column)
    tiles = -(-(num_experts + 2) // lanes.LANES)
    columns = tiles * lanes.LANES

    def count(ids_ref, counts_ref):
        chunk = lanes.block_index()
        mine = [lanes.lane_index() + t * lanes.LANES for t in range(tiles)]
        _touch(ids_ref, chunk, config.chunk)

        def step(i, totals):
            for route_id in _load_ids(ids_ref, chunk * (config.chunk // _UNROLL) + i):
                totals = [total + (route_id == m).astype(jnp.int32) for total, m in zip(totals, mine, strict=True)]
            return tuple(totals)

        totals = lax.fori_loop(0, config.chunk // _UNROLL, step, tuple(lanes.splat(0, jnp.int32) for _ in mine))
        for m, total in zip(mine, totals, strict=True):
            lanes.scatter(counts_ref, chunk * columns + m, [total.astype(jnp.uint32)])

    per_chunk = lanes.kernel(
        count, jax.ShapeDtypeStruct((chunks, columns), jnp.int32), grid=chunks, interpret=interpret
    )(ids)
    counts = jnp.sum(per_chunk, axis=0, dtype=jnp.int32)
    start, limit = _row_ranges(counts, num_experts, capacity, num_rows)

    def assign(ids_ref, per_chunk_ref, start_ref, limit_ref, row_map_ref, source_ref):
        chunk = lanes.block_index()
        mine = [lanes.lane_index() + t * lanes.LANES for t in range(tiles)]
        _touch(ids_ref, chunk, config.chunk)

        def add(c, rows):
            found = [lanes.gather(per_chunk_ref, c * columns + m)[0].astype(jnp.int32) for m in mine]
            return tuple(r + f for r, f in zip(rows, found, strict=True))

        rows = tuple(lanes.gather(start_ref, m)[0].astype(jnp.int32) for m in mine)
        rows = _fori_unrolled(chunk, add, rows, max(4, _LOADS_IN_FLIGHT // tiles))
        limits = [lanes.gather(limit_ref, m)[0].astype(jnp.int32) for m in mine]

        def step(i, rows):
            base = chunk * config.chunk + i * _UNROLL
            for j, route_id in enumerate(_load_ids(ids_ref, chunk * (config.chunk // _UNROLL) + i)):
                position = base + j
                next_rows = []
                for row, limit, m in zip(rows, limits, mine, strict=True):
                    is_mine = route_id == m
                    fits = row < limit
                    value = jnp.where(fits, row, -1).astype(jnp.uint32)
                    lanes.scatter(row_map_ref, position, [value], where=is_mine)
                    if with_source:
                        lanes.scatter(source_ref, row, [lanes.splat(position // k, jnp.uint32)], where=is_mine & fits)
                    next_rows.append(row + is_mine.astype(jnp.int32))
                rows = tuple(next_rows)
            return rows

        lax.fori_loop(0, config.chunk // _UNROLL, step, rows)

    row_map, source = lanes.kernel(
        assign,
        (
            jax.ShapeDtypeStruct((chunks * config.chunk,), jnp.int32),
            jax.ShapeDtypeStruct((num_rows if with_source else 1,), jnp.int32),
        ),
        grid=chunks,
        interpret=interpret,
    )(ids, per_chunk, start, limit)
    return Metadata(row_map[:routes].reshape(tokens, k), counts[:num_experts], counts[bad_column], source)


def _row_ranges(counts, num_experts, capacity, num_rows):
    """First row and first row too many of every column; columns that are no experts have no rows."""
    columns = np.arange(counts.shape[0])
    if capacity is not None:  # constants: no kernel computes them
        # What is no expert starts beyond its limit of 0 rows.
        start = np.where(columns < num_experts, columns * capacity, 1)
        limit = np.where(columns < num_experts, start + capacity, 0)
        return jnp.asarray(start, jnp.int32), jnp.asarray(limit, jnp.int32)
    before = columns[None, :] < columns[:, None]
    start = jnp.sum(jnp.where(before, counts[None, :], 0), axis=1, dtype=jnp.int32)
    return start, jnp.asarray(np.where(columns < num_experts, num_rows, 0), jnp.int32)


def _load_ids(ids_ref, group):
    """_UNROLL consecutive ids, the same for all lanes."""
    loaded = []
    for j in range(_UNROLL // 4):
        loaded += lanes.gather(ids_ref, group * (_UNROLL // 4) + j, 4)
    return [i.astype(jnp.int32) for i in loaded]


def _touch(ids_ref, chunk, size):
    """Brings a chunk of ids into the L1 cache, all lines at once: the walk then waits for L1 only."""
    for j in range(-(-size // (4 * lanes.LANES))):
        line = j * lanes.LANES + lanes.lane_index()
        lanes.gather(ids_ref, chunk * (size // 4) + line, 4, where=line < size // 4)


def _fori_unrolled(count, body, init, unroll):
    """fori_loop over 0..count-1, `unroll` iterations at a time, so that their loads are in flight together."""

    def several(i, carry):
        for j in range(unroll):
            carry = body(i * unroll + j, carry)
        return carry

    whole = count // unroll
    carry = lax.fori_loop(0, whole, several, init)
    return lax.fori_loop(whole * unroll, count, body, carry)


# --- rows ---


class _Access(NamedTuple):
    """How rows of some bytes are cut: `count` elements of `dtype` per item, `items` per row."""

    count: int
    dtype: Any
    items: int


def _access(row_bytes):
    size = math.gcd(row_bytes, 16)
    if size >= 4:
        return _Access(size // 4, jnp.uint32, row_bytes // size)
    return _Access(1, jnp.uint16 if size == 2 else jnp.uint8, row_bytes // size)


def scatter_rows(
    rows: Sequence[jax.Array],
    row_map: jax.Array,
    num_rows: int,
    *,
    config: TuningConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Each array [T, n] -> [num_rows, n]: token t's row copied to rows row_map[t, :] (i32 [T, k], -1 = nowhere).

    Rows that no route names hold anything.
    """
    tokens, k = row_map.shape
    cuts = [_access(r.shape[1] * r.dtype.itemsize) for r in rows]
    config = config or tuning.tuned("scatter_rows", tokens * sum(cut.items for cut in cuts), TuningConfig)
    per_block = lanes.LANES * config.items_per_lane
    blocks = [-(-tokens * cut.items // per_block) for cut in cuts]

    def body(map_ref, *refs):
        sources, targets = refs[: len(rows)], refs[len(rows) :]
        first = 0
        for source, target, cut, count in zip(sources, targets, cuts, blocks, strict=True):
            index = lanes.block_index() - first

            @lanes.when((index >= 0) & (index < count))
            def _(source=source, target=target, cut=cut, index=index):
                work = []
                for j in range(config.items_per_lane):
                    item = index * per_block + j * lanes.LANES + lanes.lane_index()
                    token = unsigned_div(item, cut.items)
                    valid = token < tokens
                    values = lanes.gather(source, item, cut.count, dtype=cut.dtype, where=valid)
                    work.append((values, _load_routes(map_ref, token, k, valid), item - token * cut.items, valid))
                for values, routes, column, valid in work:
                    for row in routes:
                        position = row * cut.items + column
                        lanes.scatter(target, position, values, dtype=cut.dtype, where=valid & (row >= 0))

            first += count

    out = tuple(jax.ShapeDtypeStruct((num_rows, r.shape[1]), r.dtype) for r in rows)
    return lanes.kernel(body, out, grid=sum(blocks), interpret=interpret)(row_map, *rows)


def scatter_decoded_rows(
    qdata: jax.Array,
    block_scale: jax.Array,
    row_map: jax.Array,
    num_rows: int,
    *,
    config: TuningConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """NVFP4 rows u8 [T, H/2] and e4m3 [T, H/16] -> bf16 code x block scale [num_rows, H] (exact), as `scatter_rows`."""
    tokens, k = row_map.shape
    halves = block_scale.shape[1] * 2  # a lane takes half a block: 4 bytes in, one 16-byte store per row out
    config = config or tuning.tuned("scatter_decoded_rows", tokens * halves, TuningConfig)
    per_block = lanes.LANES * config.items_per_lane

    def body(map_ref, qdata_ref, scale_ref, out_ref):
        work = []
        for j in range(config.items_per_lane):
            item = lanes.block_index() * per_block + j * lanes.LANES + lanes.lane_index()
            token = unsigned_div(item, halves)
            valid = token < tokens
            (word,) = lanes.gather(qdata_ref, item, where=valid)
            (scale,) = lanes.gather(scale_ref, item >> 1, dtype=jnp.uint8, where=valid)
            work.append((word, scale, _load_routes(map_ref, token, k, valid), item - token * halves, valid))
        for word, scale, routes, column, valid in work:
            values = pack_exact_bf16(decode_word(word, e4m3_value(scale)))
            for row in routes:
                lanes.scatter(out_ref, row * halves + column, values, where=valid & (row >= 0))

    out = jax.ShapeDtypeStruct((num_rows, halves * BLOCK_SIZE // 2), jnp.bfloat16)
    grid = -(-tokens * halves // per_block)
    return lanes.kernel(body, out, grid=grid, interpret=interpret)(row_map, qdata, block_scale)


def _load_routes(map_ref, token, k, valid):
    return [r.astype(jnp.int32) for r in lanes.gather(map_ref, token, k, where=valid)]


def arrange_scales(
    scales: jax.Array,
    source: jax.Array,
    counts: jax.Array,
    m: int,
    layout: str,
    *,
    interpret: Any = None,
) -> jax.Array:
    """One-byte scales [T, S] -> [E, S, m] ("m_major") or [E, ceil(m/128), ceil(S/4), 32, 4, 4] ("swizzled").

    Row r of expert e takes the scales of token source[e * m + r] if r < counts[e]; other rows are zero.
    """
    experts, columns = counts.shape[0], scales.shape[1]
    m_tiles, groups = -(-m // lanes.LANES), -(-columns // 4)
    swizzled = layout == "swizzled"
    shape = (experts, m_tiles, groups, 32, 4, 4) if swizzled else (experts, columns, m)
    # A lane loads up to 32 bytes (one sector) of its row and writes them to as many places.
    per_lane = 8

    def body(scales_ref, source_ref, counts_ref, out_ref):
        block = lanes.block_index()
        strips = -(-groups // per_lane)
        tile, strip = block // strips, block % strips
        expert, m_tile = tile // m_tiles, tile % m_tiles
        lane = lanes.lane_index()
        # In a swizzled tile lane p writes word p of 128, so that stores are contiguous: row p // 4 + 32 (p % 4).
        local = (lane >> 2) + 32 * (lane & 3) if swizzled else lane
        row = m_tile * lanes.LANES + local
        filled = row < jnp.minimum(counts_ref[expert], m)
        (token,) = lanes.gather(source_ref, expert * m + row, where=filled)
        token = token.astype(jnp.int32)
        for j in range(per_lane):
            group = strip * per_lane + j
            if columns % 4 == 0:
                (word,) = lanes.gather(scales_ref, token * groups + group, where=filled & (group < groups))
            else:
                word = lanes.splat(0, jnp.uint32)
                for b in range(4):
                    column = group * 4 + b
                    inside = filled & (column < columns)
                    (byte,) = lanes.gather(scales_ref, token * columns + column, dtype=jnp.uint8, where=inside)
                    word = word | (byte << (8 * b))
            if swizzled:
                position = ((tile * groups + group) * lanes.LANES) + lane
                lanes.scatter(out_ref, position, [word], where=group < groups)
                continue
            for b in range(4):
                column = group * 4 + b
                position = (expert * columns + column) * m + row
                inside = (row < m) & (column < columns)
                lanes.scatter(out_ref, position, [word >> (8 * b)], dtype=jnp.uint8, where=inside)

    grid = experts * m_tiles * -(-groups // per_lane)
    out = jax.ShapeDtypeStruct(shape, scales.dtype)
    return lanes.kernel(body, out, grid=grid, interpret=interpret)(scales, source, counts)


def depermute_combine(
    y: jax.Array,
    row_map: jax.Array,
    topk_weights: jax.Array,
    *,
    interpret: Any = None,
) -> jax.Array:
    """out[t] = cast(sum over j in order, row_map[t, j] >= 0, of f32(y[row_map[t, j]]) * topk_weights[t, j]) -> [T, H].

    Raises:
      NotImplementedError: what `check_depermute` returns.
    """
    if problem := check_depermute(y, row_map):
        raise NotImplementedError(f"depermute_combine kernel: {problem}")
    tokens, k = row_map.shape
    cut = _access(y.shape[1] * y.dtype.itemsize)
    is_bf16 = y.dtype == jnp.bfloat16

    def body(map_ref, weight_ref, y_ref, out_ref):
        item = lanes.block_index() * lanes.LANES + lanes.lane_index()
        token = unsigned_div(item, cut.items)
        valid = token < tokens
        column = item - token * cut.items
        routes = _load_routes(map_ref, token, k, valid)
        weights = [lax.bitcast_convert_type(w, jnp.float32) for w in lanes.gather(weight_ref, token, k, where=valid)]
        loaded = []
        for row in routes:  # a row beyond the last one reads the last, as in XLA
            position = jnp.minimum(row, y.shape[0] - 1) * cut.items + column
            loaded.append(lanes.gather(y_ref, position, cut.count, where=valid & (row >= 0)))
        totals = [lanes.splat(0, jnp.float32)] * (2 * cut.count if is_bf16 else cut.count)
        for row, weight, words in zip(routes, weights, loaded, strict=True):
            values = unpack_bf16(words) if is_bf16 else [lax.bitcast_convert_type(w, jnp.float32) for w in words]
            added = [lanes.add_rn(t, lanes.mul_rn(v, weight)) for t, v in zip(totals, values, strict=True)]
            totals = [jnp.where(row >= 0, a, t) for a, t in zip(added, totals, strict=True)]
        if is_bf16:
            words = [lanes.pack_bf16(low, high) for low, high in zip(totals[::2], totals[1::2], strict=True)]
        else:
            words = [as_u32(t) for t in totals]
        lanes.scatter(out_ref, item, words, where=valid)

    grid = -(-tokens * cut.items // lanes.LANES)
    out = jax.ShapeDtypeStruct((tokens, y.shape[1]), y.dtype)
    weights = topk_weights.astype(jnp.float32)
    return lanes.kernel(body, out, grid=grid, interpret=interpret)(row_map.astype(jnp.int32), weights, y)
