"""Rows and scales from token-major to expert-major order and back, by the maps of route_metadata.py.

* `scatter_rows`: reads every token once, 16 bytes per lane, and writes it to each of its rows.
* `scatter_decoded_rows`: the same, NVFP4 in and bf16 code x scale out.
* `arrange_scales`: gathers scales into the M-major or 128x4 layout; every output byte is written once, in order.
* `depermute_combine`: gathers k rows per token; each product and each sum rounded to f32, one final rounding.

All are limited by device memory.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.rows.nvfp4_codec import decode_word, e4m3_value, pack_exact_bf16, unpack_bf16
from pallas_kernels.rows.route_metadata import MAX_TOP_K
from pallas_kernels.simt import lane_math, lanes, launch, tuning
from pallas_kernels.simt.formats import BLOCK_SIZE, SWIZZLE_COLUMNS, SWIZZLE_ROWS, swizzled_shape
from pallas_kernels.simt.hardware import PIECE_BYTES
from pallas_kernels.simt.lane_math import as_u32, unsigned_div


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """items_per_lane: accesses of up to 16 bytes in flight per lane."""

    items_per_lane: int = 2


DEFAULT_CONFIG = TuningConfig()


def check_config(rows: Sequence[Any], num_rows: int, config: TuningConfig = DEFAULT_CONFIG) -> str | None:
    """None if rows [T, ..] can be moved to `num_rows` rows (None entries are skipped), else what does not fit."""
    for r in rows:
        if r is None:
            continue
        if r.ndim != 2 or 0 in r.shape or _bits(r.dtype) not in (8, 16, 32):
            return f"rows must be [T, n], not empty, of 8, 16 or 32 bit elements, got {r.dtype} {r.shape}"
        if max(num_rows, r.shape[0]) * r.shape[1] >= lanes.MAX_INDEX:
            return f"{max(num_rows, r.shape[0])} rows of {r.shape[1]} elements exceed the kernel's 32-bit indices"
    if not 1 <= config.items_per_lane <= 8:
        return f"items_per_lane must be 1..8, got {config.items_per_lane}"
    return None


def check_depermute(y: Any, row_map: Any) -> str | None:
    """None if `depermute_combine` accepts these, else what does not fit."""
    if y.dtype not in (jnp.bfloat16, jnp.float32) or y.ndim != 2 or 0 in y.shape:
        return f"y must be bfloat16 or float32 [rows, H], not empty, got {y.dtype} {y.shape}"
    if y.dtype == jnp.bfloat16 and y.shape[1] % 2:
        return f"a bfloat16 y needs an even H, got {y.shape}"
    if max(y.shape[0], row_map.shape[0]) * row_access(y.shape[1] * y.dtype.itemsize).items >= lanes.MAX_INDEX:
        return f"y {y.shape} with row_map {row_map.shape} exceeds the kernel's 32-bit indices"
    if row_map.size == 0 or row_map.shape[1] > MAX_TOP_K:
        return f"row_map must be [T, k], not empty, k at most {MAX_TOP_K}, got {row_map.shape}"
    return None


def _bits(dtype):
    """Bits of an element; 0 for types that are no plain numbers (bool is stored in ways of its own)."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 0


class Access(NamedTuple):
    """How rows of some bytes are cut: `count` elements of `dtype` per item, `items` per row."""

    count: int
    dtype: Any
    items: int


def row_access(row_bytes: int) -> Access:
    """16 bytes at a time where rows are a multiple of that."""
    size = math.gcd(row_bytes, PIECE_BYTES)
    if size >= 4:
        return Access(size // 4, jnp.uint32, row_bytes // size)
    return Access(1, jnp.uint16 if size == 2 else jnp.uint8, row_bytes // size)


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
    cuts = [row_access(r.shape[1] * r.dtype.itemsize) for r in rows]
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
    return launch.kernel(body, out, grid=sum(blocks), interpret=interpret)(row_map, *rows)


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
    return launch.kernel(body, out, grid=grid, interpret=interpret)(row_map, qdata, block_scale)


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
    m_tiles, groups = -(-m // SWIZZLE_ROWS), -(-columns // SWIZZLE_COLUMNS)
    swizzled = layout == "swizzled"
    shape = swizzled_shape((experts,), m, columns) if swizzled else (experts, columns, m)
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
    return launch.kernel(body, out, grid=grid, interpret=interpret)(scales, source, counts)


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
    tokens, _ = row_map.shape
    cut = row_access(y.shape[1] * y.dtype.itemsize)

    def body(map_ref, weight_ref, y_ref, out_ref):
        def load(row, column, where):  # a row beyond the last one reads the last, as in XLA
            return lanes.gather(y_ref, jnp.minimum(row, y.shape[0] - 1) * cut.items + column, cut.count, where=where)

        item = lanes.block_index() * lanes.LANES + lanes.lane_index()
        token = unsigned_div(item, cut.items)
        valid = token < tokens
        words = sum_of_routes(token, item - token * cut.items, valid, load, map_ref, weight_ref, y.dtype)
        lanes.scatter(out_ref, item, words, where=valid)

    grid = -(-tokens * cut.items // lanes.LANES)
    out = jax.ShapeDtypeStruct((tokens, y.shape[1]), y.dtype)
    weights = topk_weights.astype(jnp.float32)
    return launch.kernel(body, out, grid=grid, interpret=interpret)(row_map.astype(jnp.int32), weights, y)


def sum_of_routes(
    token: jax.Array,
    column: jax.Array,
    valid: jax.Array,
    load: Callable[..., Any],
    map_ref: Any,
    weight_ref: Any,
    dtype: Any,
) -> list[jax.Array]:
    """One access of the result per lane: cast(sum over j in order of y[map[t, j]] * weight[t, j]), as u32 words.

    token, column: i32 lane arrays, which access of which row; nothing is read where `valid` is False. load(row, column,
    where): words of y, bf16 or f32, at lane arrays.
    """
    k = map_ref.shape[1]
    routes = _load_routes(map_ref, token, k, valid)
    weights = [lax.bitcast_convert_type(w, jnp.float32) for w in lanes.gather(weight_ref, token, k, where=valid)]
    loaded = [load(row, column, valid & (row >= 0)) for row in routes]
    is_bf16 = dtype == jnp.bfloat16
    totals = [lanes.splat(0, jnp.float32)] * (len(loaded[0]) * (2 if is_bf16 else 1))
    for row, weight, words in zip(routes, weights, loaded, strict=True):
        values = unpack_bf16(words) if is_bf16 else [lax.bitcast_convert_type(w, jnp.float32) for w in words]
        added = [lane_math.add_rn(t, lane_math.mul_rn(v, weight)) for t, v in zip(totals, values, strict=True)]
        totals = [jnp.where(row >= 0, a, t) for a, t in zip(added, totals, strict=True)]
    if is_bf16:
        return [lane_math.pack_bf16(low, high) for low, high in zip(totals[::2], totals[1::2], strict=True)]
    return [as_u32(t) for t in totals]
