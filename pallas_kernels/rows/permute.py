"""Moves rows and scales from token order to expert order, by the row maps of route_metadata.py.

    scatter_rows           out[row_map[t, j]] = x[t]                    a lane moves 16 bytes of a token to all its rows
    scatter_decoded_rows   out[row_map[t, j]] = code * block_scale      a lane decodes half a block of 16 values
    arrange_scales         scales of expert rows, m_major or swizzled   a lane gathers 32 scales of one row

Device memory bounds the time of each of them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.rows.nvfp4_codec import decode_word, e4m3_value, pack_exact_bf16
from pallas_kernels.simt import lanes, launch, tuning
from pallas_kernels.simt.formats import BLOCK_SIZE, SWIZZLE_COLUMNS, SWIZZLE_ROWS, swizzled_shape
from pallas_kernels.simt.hardware import PIECE_BYTES
from pallas_kernels.simt.lane_math import unsigned_div


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """items_per_lane: accesses of up to 16 bytes that a lane has in flight."""

    items_per_lane: int = 2


DEFAULT_CONFIG = TuningConfig()


def check_config(rows: Sequence[Any], num_rows: int, config: TuningConfig = DEFAULT_CONFIG) -> str | None:
    """None if arrays `rows` [T, n] can be moved to `num_rows` rows, else what does not fit.

    Entries of `rows` that are None are skipped.
    """
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


def _bits(dtype):
    """Bits of an element of a numeric type; 0 for other types (GPU memory holds bool in a form that varies)."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.floating) else 0


class Access(NamedTuple):
    """How a row is cut into accesses: each is `count` elements of `dtype`, and a row has `items` of them."""

    count: int
    dtype: Any
    items: int


def row_access(row_bytes: int) -> Access:
    """Cuts rows of `row_bytes` bytes into the widest accesses that divide them, of at most 16 bytes."""
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
    """Copies row t of each array [T, n] to the rows row_map[t, :] of a new array [num_rows, n].

    row_map: i32 [T, k], -1 for a route that has no row. Rows of the results that no route names hold anything.
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
                    work.append((values, load_routes(map_ref, token, k, valid), item - token * cut.items, valid))
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
    """`scatter_rows` of decoded NVFP4 rows: codes u8 [T, H/2] and scales e4m3 [T, H/16] give bf16 [num_rows, H].

    A value of the result is code * block scale, without the global scale. bf16 represents it exactly.
    """
    tokens, k = row_map.shape
    halves = block_scale.shape[1] * 2  # a lane takes half a block: it reads 4 bytes and stores 16 to each row
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
            work.append((word, scale, load_routes(map_ref, token, k, valid), item - token * halves, valid))
        for word, scale, routes, column, valid in work:
            values = pack_exact_bf16(decode_word(word, e4m3_value(scale)))
            for row in routes:
                lanes.scatter(out_ref, row * halves + column, values, where=valid & (row >= 0))

    out = jax.ShapeDtypeStruct((num_rows, halves * BLOCK_SIZE // 2), jnp.bfloat16)
    grid = -(-tokens * halves // per_block)
    return launch.kernel(body, out, grid=grid, interpret=interpret)(row_map, qdata, block_scale)


def load_routes(map_ref: Any, token: jax.Array, k: int, valid: jax.Array) -> list[jax.Array]:
    """The k entries of the row map [T, k] of a token per lane, as i32 lane arrays; nothing where `valid` is False."""
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
    """Gathers the one-byte scales [T, S] of tokens into expert order, in a layout other than linear.

    Row r of expert e gets the scales of token source[e * m + r] if r < counts[e], otherwise zeros. The kernel writes
    each byte of the result once, in order.

    Args:
      scales: any type of one byte, [T, S].
      source: i32 [E * m], see `route_metadata.Metadata`.
      counts: i32 [E], valid rows of each expert.
      m: rows per expert.
      layout: "m_major" gives [E, S, m], "swizzled" gives [E, ceil(m/128), ceil(S/4), 32, 4, 4].
    """
    experts, columns = counts.shape[0], scales.shape[1]
    m_tiles, groups = -(-m // SWIZZLE_ROWS), -(-columns // SWIZZLE_COLUMNS)
    swizzled = layout == "swizzled"
    shape = swizzled_shape((experts,), m, columns) if swizzled else (experts, columns, m)
    # A lane loads up to 8 * 4 = 32 bytes of its row, one sector of memory.
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
