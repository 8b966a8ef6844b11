"""Quantizes bf16 or f32 to NVFP4 in one pass over memory, bit for bit as dialect "exact" of `fp4jax.nvfp4.quantize`.

    block_scale = e4m3(amax of 16 values / (6 global_scale))        code = e2m1(x / (block_scale * global_scale))

(nvfp4_codec.py has the order of roundings.)

A lane takes one block of 16 values at a time: it loads them with 16-byte accesses, finds their amax in registers, and
stores 8 bytes of codes and one scale byte. Without `masked_m` the thread blocks cover the flat list of NVFP4 blocks.
With `masked_m` a persistent grid goes through the valid rows only (`schedule.ExpertUnits`). With a global scale per
token, a thread block takes one row: its lanes find the amax of the row together, then they read the row again from the
L1 cache. The row need not stay in registers between, so that more rows are in flight.

Device memory bounds the time. 16 bf16 values are 32 bytes in and 9 bytes out; the arithmetic, about 8 integer and 5
float instructions per value, takes less time than that.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.rows.nvfp4_codec import (
    Encoded,
    EncodeScales,
    block_amax,
    computed_scale,
    encode_block,
    encode_scales,
    unpack_bf16,
)
from pallas_kernels.simt import lanes, launch, tuning
from pallas_kernels.simt.formats import (
    AMAX_DIVISOR,
    AMAX_DIVISOR_FOUR_OVER_SIX,
    BLOCK_SIZE,
    F32_MAX,
    SWIZZLE_COLUMNS,
    SWIZZLE_ROWS,
    swizzled_shape,
)
from pallas_kernels.simt.hardware import H100_SMS
from pallas_kernels.simt.lane_math import as_u32, unsigned_div
from pallas_kernels.simt.schedule import ExpertUnits

_LAYOUTS = ("linear", "swizzled")  # of scales, which this kernel writes
MAX_BLOCKS_PER_LANE = 8  # the loop over a lane's blocks is unrolled


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """Tuning of a kernel that takes NVFP4 blocks.

    blocks_per_lane: NVFP4 blocks that a lane has in flight. blocks_per_sm: thread blocks of a persistent grid per SM.
    """

    blocks_per_lane: int = 4
    blocks_per_sm: int = 8


DEFAULT_CONFIG = TuningConfig()


def check_config(
    x: Any, global_scale: Any, masked_m: Any, scale_layout: str = "linear", config: TuningConfig = DEFAULT_CONFIG
) -> str | None:
    """None if `quantize` accepts these operands (arrays or ShapeDtypeStructs), else what does not fit."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x must be bfloat16 or float32, got {x.dtype}"
    if x.ndim < 1 or x.shape[-1] % BLOCK_SIZE or 0 in x.shape:
        return f"x must not be empty and its last axis must be a multiple of {BLOCK_SIZE}, got shape {x.shape}"
    if scale_layout not in _LAYOUTS:
        return f"scale_layout must be one of {_LAYOUTS}, got {scale_layout!r}"
    if scale_layout == "swizzled" and (x.ndim < 2 or isinstance(global_scale, str)):
        return f"swizzled scales need x [.., M, K] and given global scales, got shape {x.shape} and {global_scale}"
    if isinstance(global_scale, str):
        if global_scale != "per_token":
            return f"global_scale must be an array or 'per_token', got {global_scale!r}"
        if x.shape[-1] > BLOCK_SIZE * lanes.LANES * MAX_BLOCKS_PER_LANE:
            return f"a per-token scale needs rows of at most {BLOCK_SIZE * lanes.LANES * MAX_BLOCKS_PER_LANE} values"
    if masked_m is not None and x.ndim != 3:
        return f"masked_m needs x [E, M, K], got shape {x.shape}"
    m = x.shape[-2] if x.ndim > 1 else 1
    padded = x.size // x.shape[-1]
    if scale_layout == "swizzled":
        padded = padded // m * (-(-m // SWIZZLE_ROWS) * SWIZZLE_ROWS)
    if padded * (x.shape[-1] // BLOCK_SIZE + 3) >= lanes.MAX_INDEX:
        return f"x {x.shape} exceeds the kernel's 32-bit block indices"
    return check_tuning(config)


def check_tuning(config: TuningConfig) -> str | None:
    """None if the configuration is valid, else what is wrong with it."""
    if not 1 <= config.blocks_per_lane <= MAX_BLOCKS_PER_LANE:
        return f"blocks_per_lane must be 1..{MAX_BLOCKS_PER_LANE}, got {config.blocks_per_lane}"
    if not 1 <= config.blocks_per_sm <= 16:
        return f"blocks_per_sm must be 1..16, got {config.blocks_per_sm}"
    return None


def quantize(
    x: jax.Array,
    global_scale: Any,
    masked_m: jax.Array | None = None,
    *,
    scale_layout: str = "linear",
    four_over_six: bool = False,
    config: TuningConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Quantizes x to NVFP4.

    Args:
      x: bf16 or f32 [.., K], K a multiple of 16.
      global_scale: f32 of one element; or f32 that broadcasts to [.., 1]; or "per_token", one per row from its amax.
      masked_m: valid rows of each expert, [E], for x [E, M, K]. The other rows are neither read nor written.
      scale_layout: "linear" or "swizzled", of the block scales.
      four_over_six: whether a block may take 4 for its top code in place of 6, if that has the smaller squared error.
      config: None takes the tuned one.
      interpret: see `launch.kernel`.

    Returns:
      codes u8 [.., K/2]; block scales e4m3, [.., K/16] or swizzled [.., ceil(M/128), ceil(K/64), 32, 4, 4]; global
      scales f32 [.., 1] for "per_token", otherwise None.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_config`.
    """
    config = config or tuning.tuned("quantize", x.size // BLOCK_SIZE, TuningConfig)
    if problem := check_config(x, global_scale, masked_m, scale_layout, config):
        raise NotImplementedError(f"quantize kernel: {problem}")
    *lead, k = x.shape
    rows, blocks = int(np.prod(lead, dtype=np.int64)), k // BLOCK_SIZE
    m = lead[-1] if lead else 1
    per_token = isinstance(global_scale, str)
    operands, scale_stride = [x.reshape(rows, k)], None
    if not per_token:
        flat, scale_stride = rows_scale(global_scale, lead)
        operands.append(flat)
    if scale_layout == "swizzled":
        work = SwizzledWork(rows // m, m, blocks, config)
    else:
        work = RowWork(rows, blocks, m if masked_m is not None else rows, config, per_token)
    work.add_schedule(operands, masked_m)
    encoder = _Encoder(x.dtype, four_over_six, scale_stride)

    def body(*refs):
        x_ref, *refs = refs
        g_ref, refs = (None, refs) if per_token else (refs[0], refs[1:])
        counts_ref, results, ends_ref = work.schedule_refs(refs)
        work.run(counts_ref, ends_ref, functools.partial(encoder.unit, x_ref, g_ref, results))

    scale_shape = (*lead, blocks) if scale_layout == "linear" else swizzled_shape(lead[:-1], m, blocks)
    out_type = [jax.ShapeDtypeStruct((rows, k // 2), jnp.uint8), jax.ShapeDtypeStruct(scale_shape, jnp.float8_e4m3fn)]
    if per_token:
        out_type.append(jax.ShapeDtypeStruct((rows, 1), jnp.float32))
    qdata, block_scale, *row_scale = launch.kernel(
        body, tuple(out_type), grid=work.grid, scratch_types=work.scratch_types, interpret=interpret
    )(*operands)
    return qdata.reshape(*lead, k // 2), block_scale, row_scale[0].reshape(*lead, 1) if per_token else None


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """What a thread block does with its items. scale_stride: as in `rows_scale`; None means a scale per token."""

    dtype: Any
    four_over_six: bool
    scale_stride: int | None

    def unit(self, x_ref: Any, g_ref: Any, results: list[Any], items: "list[Item]") -> None:
        """Quantizes the NVFP4 blocks `items`. With a scale per token they are one whole row."""
        if self.scale_stride is None:
            divisor = AMAX_DIVISOR_FOUR_OVER_SIX if self.four_over_six else AMAX_DIVISOR
            scale = scale_of_row([self._load(x_ref, item) for item in items], divisor)
            store_row_scale(results[2], items[0], scale)
            scales = encode_scales(scale)
            for item in items:
                self._store(results, item, self._load(x_ref, item), scales)
            return
        values = [self._load(x_ref, item) for item in items]  # before any arithmetic, so that all loads are in flight
        for item, v in zip(items, values, strict=True):
            self._store(results, item, v, row_encode_scales(g_ref, item, self.scale_stride))

    def _load(self, x_ref, item):
        return load_values(x_ref, self.dtype, item.block, item.valid)

    def _store(self, results, item, values, scales):
        encoded = encode_block(values, block_amax(values), scales, self.four_over_six)
        store_block(results[0], results[1], item, encoded)


# --- shared with other kernels: which NVFP4 blocks a lane takes, loads and stores of one block ---


@dataclasses.dataclass(frozen=True)
class Item:
    """One NVFP4 block per lane; all fields are lane arrays.

    block: index of the block in the flat array. row, column: its row, and its index in the row.
    valid: whether the block exists. Other lanes have nothing to do.
    scale_position: index of the block's scale byte, which lanes without a block set to 0. None means index `block`,
      and lanes without a block write no scale.
    """

    block: jax.Array
    row: jax.Array
    column: jax.Array
    valid: jax.Array
    scale_position: jax.Array | None = None


class RowWork:
    """NVFP4 blocks in row order, of an array [rows, blocks], cut into units that a thread block takes at once.

    m: rows per expert if the array is masked, else `rows`. row_per_unit: whether a unit is one whole row; otherwise it
    is 128 * config.blocks_per_lane NVFP4 blocks.
    """

    def __init__(self, rows: int, blocks: int, m: int, config: TuningConfig, row_per_unit: bool):
        self.rows, self.blocks, self.m, self.row_per_unit = rows, blocks, m, row_per_unit
        per_lane = -(-blocks // lanes.LANES) if row_per_unit else config.blocks_per_lane
        self.per_lane = per_lane
        self.per_unit = blocks if row_per_unit else per_lane * lanes.LANES
        self.persistent = H100_SMS * config.blocks_per_sm
        self.grid = -(-rows * blocks // self.per_unit)
        self.units: ExpertUnits | None = None
        self.scratch_types: list[Any] = []

    def add_schedule(self, operands: list[jax.Array], masked_m: jax.Array | None) -> None:
        """If `masked_m` is given, appends it to the operands and makes the grid persistent."""
        if masked_m is None:
            return
        self.units = ExpertUnits(masked_m.shape[0], self.m, self.blocks, self.per_unit)
        self.grid = min(self.grid, self.persistent)
        self.scratch_types = [self.units.scratch()]
        operands.append(counts_of_32_bits(masked_m, self.m))

    def schedule_refs(self, refs: list[Any]) -> tuple[Any, list[Any], Any]:
        """Splits the kernel's references behind x and scale: (counts or None, results, scratch or None)."""
        return (refs[0], refs[1:-1], refs[-1]) if self.units else (None, refs, None)

    def run(self, counts_ref: Any, ends_ref: Any, unit: Any) -> None:
        """Calls unit(items) for each unit of this thread block."""
        if self.units is None:
            unit(self._items(jnp.int32(0), lanes.block_index(), jnp.int32(self.rows)))
            return
        self.units.for_each(
            counts_ref, ends_ref, self.grid, lambda expert, index, rows: unit(self._items(expert, index, rows))
        )

    def _items(self, expert, index, valid_rows):
        items = []
        for j in range(self.per_lane):
            within = index * self.per_unit + j * lanes.LANES + lanes.lane_index()
            row = unsigned_div(within, self.blocks)
            column = within - row * self.blocks
            valid = row < valid_rows
            if self.row_per_unit:
                valid = valid & (row == index)  # False in lanes beyond the end of the row
            items.append(Item(expert * (self.m * self.blocks) + within, expert * self.m + row, column, valid))
        return items


class SwizzledWork:
    """NVFP4 blocks of an array [experts, m, blocks], in the order that their scale bytes have in the swizzled layout.

    The order includes pads, whose scale bytes become 0. A warp covers 8 rows x 4 columns: 128 contiguous bytes of x in
    each row, and one full 32-byte sector of scale bytes. In row order a warp would write 8 partial sectors. A tile has
    512 scale bytes, a multiple of what a thread block takes.
    """

    def __init__(self, experts: int, m: int, blocks: int, config: TuningConfig):
        self.m, self.blocks, self.per_lane = m, blocks, min(4, 1 << (config.blocks_per_lane.bit_length() - 1))
        self.m_tiles, self.k_tiles = -(-m // SWIZZLE_ROWS), -(-blocks // SWIZZLE_COLUMNS)
        self.masked = False
        self.scratch_types: list[Any] = []
        self.grid = experts * self.m_tiles * self.k_tiles * 4 // self.per_lane

    def add_schedule(self, operands: list[jax.Array], masked_m: jax.Array | None) -> None:
        """If `masked_m` is given, appends it to the operands."""
        if masked_m is not None:
            self.masked = True
            operands.append(counts_of_32_bits(masked_m, self.m))

    def schedule_refs(self, refs: list[Any]) -> tuple[Any, list[Any], Any]:
        """Splits the kernel's references behind x and scale: (counts or None, results, None)."""
        return (refs[0], refs[1:], None) if self.masked else (None, refs, None)

    def run(self, counts_ref: Any, ends_ref: Any, unit: Any) -> None:
        """Calls unit(items) with the NVFP4 blocks of this thread block."""
        del ends_ref
        tile = lanes.block_index() // (4 // self.per_lane)
        expert = tile // (self.m_tiles * self.k_tiles)
        m_tile, k_tile = tile // self.k_tiles % self.m_tiles, tile % self.k_tiles
        rows = jnp.clip(counts_ref[expert], 0, self.m) if self.masked else jnp.int32(self.m)
        items = []
        for j in range(self.per_lane):
            position = (lanes.block_index() * self.per_lane + j) * lanes.LANES + lanes.lane_index()
            row = m_tile * SWIZZLE_ROWS + ((position >> 2) & 3) * 32 + ((position >> 4) & 31)
            column = k_tile * SWIZZLE_COLUMNS + (position & 3)
            valid = (row < rows) & (column < self.blocks)
            block = (expert * self.m + row) * self.blocks + column
            items.append(Item(block, expert * self.m + row, column, valid, position))
        unit(items)


def counts_of_32_bits(counts: jax.Array, most: int) -> jax.Array:
    """Counts of valid rows as i32. Counts of 64 bits are clipped to 0..most first, so that none wraps."""
    if counts.dtype.itemsize > 4:
        counts = jnp.clip(counts, 0, most)
    return counts.astype(jnp.int32)


def load_values(ref: Any, dtype: Any, block: jax.Array, valid: jax.Array) -> list[jax.Array]:
    """The 16 values of a lane's NVFP4 block as f32; zeros in lanes where `valid` is False."""
    if dtype == jnp.bfloat16:
        return unpack_bf16(lanes.gather(ref, block, 8, where=valid))
    return [lax.bitcast_convert_type(w, jnp.float32) for w in lanes.gather(ref, block, 16, where=valid)]


def finite_amax(values: list[list[jax.Array]]) -> jax.Array:
    """Largest finite magnitude among the values that a lane holds."""
    return block_amax([jnp.where(jnp.abs(v) <= F32_MAX, v, np.float32(0)) for block in values for v in block])


def scale_of_row(values: list[list[jax.Array]], divisor: float) -> jax.Array:
    """Global scale of a row whose values the lanes hold: amax of the finite ones / divisor, the same in all lanes."""
    return computed_scale(lanes.splat(jnp.max(finite_amax(values)), jnp.float32), divisor)


def rows_scale(global_scale: jax.Array, lead: list[int]) -> tuple[jax.Array, int]:
    """Flat f32 global scales and their stride: 0 for one scale, 1 for one per row, M for one per expert of M rows."""
    g = jnp.asarray(global_scale, jnp.float32)
    if g.size == 1:
        return g.reshape(1), 0
    if g.ndim == 3 and g.shape == (lead[0], 1, 1):
        return g.reshape(-1), lead[1]
    return jnp.broadcast_to(g, (*lead, 1)).reshape(-1), 1


def store_row_scale(ref: Any, first: Item, scale: jax.Array) -> None:
    """Stores a row's global scale; the lane that has the first NVFP4 block of the row does it."""
    is_first = first.valid & (first.column == 0)
    lanes.scatter(ref, first.row, [as_u32(scale)], where=is_first)


def row_encode_scales(g_ref: Any, item: Item, stride: int) -> EncodeScales:
    """Global scale of each lane's item, prepared to encode. stride: as in `rows_scale`."""
    if stride == 0:
        return encode_scales(lanes.splat(g_ref[0], jnp.float32))
    index = item.row if stride == 1 else unsigned_div(item.row, stride)
    (bits,) = lanes.gather(g_ref, index, 1, where=item.valid)
    scale = jnp.where(item.valid, lax.bitcast_convert_type(bits, jnp.float32), np.float32(1))
    return encode_scales(scale)


def store_block(qdata_ref: Any, scale_ref: Any, item: Item, encoded: Encoded) -> None:
    """Stores 8 bytes of codes and the scale byte of each lane's NVFP4 block."""
    lanes.scatter(qdata_ref, item.block, encoded.words, where=item.valid)
    if item.scale_position is None:
        lanes.scatter(scale_ref, item.block, [encoded.scale_byte], dtype=jnp.uint8, where=item.valid)
    else:
        byte = jnp.where(item.valid, encoded.scale_byte, np.uint32(0))
        lanes.scatter(scale_ref, item.scale_position, [byte], dtype=jnp.uint8)
