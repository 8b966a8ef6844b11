"""What the grouped GEMM's kernel works on: its tiles, its results, and the shared memory of a thread block."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm.config import TuningConfig
from pallas_kernels.gemm.fragments import ROW_WORDS
from pallas_kernels.gemm.tasks import GroupTiles
from pallas_kernels.gemm.weight_layout import TILE, WORDS
from pallas_kernels.simt import lanes
from pallas_kernels.simt.formats import BLOCK_SIZE
from pallas_kernels.simt.hardware import SWIZZLE_BYTES


class Refs(NamedTuple):
    """References that the roles of a thread block share: global memory, shared memory, barriers."""

    x_gmem: Any
    w_gmem: Any
    w_scale_gmem: Any
    counts_gmem: Any
    x_scale_gmem: Any
    act_scale_gmem: Any
    out_gmem: tuple[Any, ...]
    x_rows_smem: Any  # one view of the buffer of x: rows, as the copy engine writes them
    x_tiles_smem: Any  # another view of the same buffer: tiles, as wgmma reads them
    w_smem: Any
    result_smem: Any
    token_scale_smem: Any
    plan_smem: Any
    full_barrier: Any
    empty_barrier: Any
    result_full_barrier: Any
    result_empty_barrier: Any
    last_barrier: Any
    plan_barrier: Any


@dataclasses.dataclass(frozen=True)
class Layout:
    """The static numbers of one kernel, and what follows from them: tiles, results, shared memory.

    config: the tuning. n, k: shape [N, K] of an expert's weights. plan: the tasks.
    w_scale_per_row, x_scale_per_row: whether each row of the weights or of x has a scale; else each expert has one.
    out: None, or the form of the result of the fused SwiGLU.
    act_scale_by: "all", "expert" or "row" share one global scale of that result. None if it needs none.
    """

    config: TuningConfig
    n: int
    k: int
    plan: GroupTiles
    w_scale_per_row: bool
    x_scale_per_row: bool
    out: str | None
    act_scale_by: str | None

    @property
    def tile_m(self) -> int:
        """The most rows of a task."""
        return max(self.config.tile_m)

    @property
    def columns(self) -> int:
        """Columns of the result, after SwiGLU if that is fused."""
        return self.n if self.out is None else self.n // 2

    def out_type(self, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Types of the results: bf16, or codes and block scales."""
        if self.out != "nvfp4":
            return (jax.ShapeDtypeStruct((rows, self.columns), jnp.bfloat16),)
        return (
            jax.ShapeDtypeStruct((rows, self.columns // 2), jnp.uint8),
            jax.ShapeDtypeStruct((rows, self.columns // BLOCK_SIZE), jnp.float8_e4m3fn),
        )

    @property
    def column_tiles(self) -> int:
        """Column tiles, which are the tasks per row tile."""
        per_task = self.config.tiles if self.out is None else self.config.tiles // 2
        return -(-self.columns // (TILE * per_task))

    @property
    def steps(self) -> int:
        """Stages per task. The copy engine fills the part beyond K with zeros, which add nothing."""
        per_iteration = self.config.k_tiles * self.config.unroll
        return -(-self.k // (TILE * per_iteration)) * self.config.unroll

    def scratch_types(self) -> list[Any]:
        """Shared memory and barriers, in the order of the fields of `Refs`."""
        c, tile_m = self.config, self.tile_m
        x_shape = (c.num_stages, c.k_tiles * tile_m, TILE)
        swizzle = plgpu.SwizzleTransform(SWIZZLE_BYTES)
        return [
            plgpu.RefUnion(
                plgpu.SMEM(x_shape, jnp.bfloat16, transforms=(swizzle,)),
                plgpu.SMEM(x_shape, jnp.bfloat16, transforms=(plgpu.TilingTransform((8, TILE)), swizzle)),
            ),
            plgpu.SMEM((c.num_stages, c.tiles, c.k_tiles * WORDS, TILE), jnp.uint32),
            plgpu.SMEM((c.tiles, tile_m, ROW_WORDS), jnp.uint32),
            plgpu.SMEM((c.warpgroups, -(-tile_m // lanes.LANES) * lanes.LANES), jnp.float32),
            self.plan.scratch(),
            plgpu.Barrier(num_arrivals=c.k_tiles + len(self.weight_runs(jnp.int32(0))), num_barriers=c.num_stages),
            # One more than stages: nobody waits for the last one (see `multiply`).
            plgpu.Barrier(num_arrivals=c.warpgroups, num_barriers=c.num_stages + 1),
            plgpu.Barrier(num_arrivals=c.warpgroups),
            plgpu.Barrier(num_arrivals=1 if c.own_store else c.warpgroups),
            plgpu.Barrier(num_arrivals=c.warpgroups),
            plgpu.Barrier(num_arrivals=1),
        ]

    def weight_runs(self, column: jax.Array) -> list[tuple[int, int, jax.Array]]:
        """The weight tiles of a task as runs that are adjacent in the weights: one, or with SwiGLU gates and ups.

        A run is (index of its first tile in the task, number of tiles, index of its first tile in the weights).
        """
        tiles = self.config.tiles
        if self.out is None:
            return [(0, tiles, column * tiles)]
        half = tiles // 2
        return [(0, half, column * half), (half, half, column * half + self.n // (2 * TILE))]

    def weight_tile(self, column: jax.Array, tile: jax.Array) -> jax.Array:
        """Index in the weights of a tile of the task."""
        if self.out is None:
            return column * self.config.tiles + tile
        half = self.config.tiles // 2
        up = (tile >= half).astype(jnp.int32)
        return column * half + tile + up * (self.n // (2 * TILE) - half)

    def by_size(self, rows: jax.Array, body: Callable[[int], None]) -> None:
        """Calls body(tile_m) with the smallest tile_m that holds the rows."""
        sizes = self.config.tile_m
        for lower, size in zip((0, *sizes), sizes, strict=False):
            if len(sizes) == 1:
                body(size)
            else:
                pl.when((rows > lower) & (rows <= size))(functools.partial(body, size))
