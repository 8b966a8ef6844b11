"""The roles of the warpgroups in a thread block of the grouped GEMM's kernel: loader, consumers, storer.

grouped_gemm.py says what they compute. With two consumers and a storer, over three tasks:

    time        ------------------------------------------------------------------------------->
    loader      |  load task 0  |  load task 1  |  load task 2  |
    consumer 0     |   multiply 0   |   multiply 1   |   multiply 2   | help to store 2 |
    consumer 1     |   multiply 0   |   multiply 1   |   multiply 2   | help to store 2 |
    storer                          | store 0 |      | store 1 |      |     store 2     |

The loader is ahead of the consumers by up to `num_stages` stages. Within a task, with in_flight=1, a consumer does

    decode      | tile 0 | tile 1 | tile 2 | tile 3 |
    wgmma                | tile 0 | tile 1 | tile 2 | tile 3 |

and with in_flight=0 it waits for each wgmma; then one consumer decodes while the wgmma of another one runs.

The warpgroups wait for each other at these barriers:

    plan_barrier            loader -> all              the plan of the tasks is in shared memory
    full_barrier[stage]     copy engine -> consumers   the stage holds weights and x
    empty_barrier[stage]    consumers -> loader        every consumer has read the stage
    result_full_barrier     consumers -> storer        the result of a task is in shared memory
    result_empty_barrier    storer -> consumers        that result is stored, so the next one may be written
    last_barrier            among consumers            the last result is in shared memory, so they may help to store it
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gemm.fragments import DECODE_FACTOR, decode_weights, piece_index, store_transposed
from pallas_kernels.gemm.layout import Layout, Refs
from pallas_kernels.gemm.tasks import Task
from pallas_kernels.gemm.weight_layout import TILE, WORDS
from pallas_kernels.rows.nvfp4_codec import encode_scales
from pallas_kernels.rows.quantize import Item
from pallas_kernels.rows.swiglu_quantize import store_products, swiglu
from pallas_kernels.simt import lanes
from pallas_kernels.simt.formats import BLOCK_SIZE
from pallas_kernels.simt.lane_math import unsigned_div

_PIECES = TILE // 8  # 16-byte pieces of a row of 64 bf16
_COLUMNS_AT_A_TIME = 32  # columns of an accumulator that are scaled and rounded together


@dataclasses.dataclass(frozen=True)
class Gemm(Layout):
    """One kernel, whose three roles are methods."""

    def run(self, r: Refs) -> None:
        """The kernel: each warpgroup does the work of its role."""
        c, warpgroup = self.config, lanes.warpgroup_index()

        @pl.when(warpgroup == c.warpgroups)
        def _():
            self.plan.fill(r.counts_gmem, r.plan_smem)
            plgpu.barrier_arrive(r.plan_barrier)

        @pl.when(warpgroup != c.warpgroups)
        def _():
            plgpu.barrier_wait(r.plan_barrier)

        load, multiply, store = c.registers

        @pl.when(warpgroup < c.warpgroups)
        def _():
            plgpu.set_max_registers(multiply, action="increase")
            if not c.own_store:
                plgpu.barrier_arrive(r.result_empty_barrier)
            self.plan.for_each(r.plan_smem, self.column_tiles, functools.partial(self.multiply, r, warpgroup))

        @pl.when(warpgroup == c.warpgroups)
        def _():
            plgpu.set_max_registers(load, action="decrease")
            self.plan.for_each(r.plan_smem, self.column_tiles, functools.partial(self.load, r))

        if c.own_store:

            @pl.when(warpgroup == c.warpgroups + 1)
            def _():
                plgpu.set_max_registers(store, action="decrease")
                plgpu.barrier_arrive(r.result_empty_barrier)
                self.plan.for_each(r.plan_smem, self.column_tiles, functools.partial(self.store_alone, r))

    def slot(self, step: jax.Array) -> jax.Array:
        """The pipeline stage of a step; steps count the stages that this thread block has used."""
        return lax.rem(step, jnp.int32(self.config.num_stages))

    def load(self, r: Refs, task: Task) -> None:
        """The loader: copies weights and tokens of a task into the pipeline stages, in order of K."""
        c = self.config

        def stage(i, _):
            step = task.number * self.steps + i
            slot = self.slot(step)

            @pl.when(step >= c.num_stages)
            def _():
                plgpu.barrier_wait(r.empty_barrier.at[slot])

            for first, count, source in self.weight_runs(task.column):
                plgpu.copy_gmem_to_smem(
                    r.w_gmem.at[task.expert, pl.ds(source, count), pl.ds(i * (c.k_tiles * WORDS), c.k_tiles * WORDS)],
                    r.w_smem.at[slot, pl.ds(first, count)],
                    r.full_barrier.at[slot],
                )

            def copy_rows(size):
                for j in range(c.k_tiles):
                    plgpu.copy_gmem_to_smem(
                        r.x_gmem.at[pl.ds(task.row, size), pl.ds((i * c.k_tiles + j) * TILE, TILE)],
                        r.x_rows_smem.at[slot, pl.ds(j * size, size)],
                        r.full_barrier.at[slot],
                    )

            self.by_size(task.rows, copy_rows)

        lax.fori_loop(0, self.steps, stage, None)

    def multiply(self, r: Refs, warpgroup: jax.Array, task: Task) -> None:
        """A consumer: multiplies its weight tiles with the tokens of a task. A product is [64 weight rows, tile_m]."""
        c = self.config
        tiles = [warpgroup * c.row_tiles + j for j in range(c.row_tiles)]
        first_step = task.number * self.steps
        # The scales are read before the loop over K and used after it, so that nothing waits for memory.
        scales = [self._load_scales(r, task, tile) for tile in tiles]
        tokens = self._load_token_scales(r, task)

        def run(size):
            def product(*accumulators):
                def stage(i, first_of_iteration):
                    slot = self.slot(first_step + i)
                    plgpu.barrier_wait(r.full_barrier.at[slot])
                    issued = 0
                    for j in range(c.k_tiles):
                        x = r.x_tiles_smem.at[slot, pl.ds(j * size, size)].transpose((1, 0))
                        for tile, accumulator in zip(tiles, accumulators, strict=True):
                            w = decode_weights(r.w_smem.at[slot, tile, pl.ds(j * WORDS, WORDS)])
                            plgpu.wgmma(accumulator, w, x)
                            plgpu.wgmma_wait(c.in_flight)
                            issued += 1
                            if issued == c.in_flight:  # the wgmmas on the stage before are done
                                before = self.slot(first_step + i + c.num_stages - 1)
                                if first_of_iteration:
                                    # The first stage has none before it and arrives at the extra barrier. A branch
                                    # here would make ptxas serialize the wgmmas (its warning C7513).
                                    before = jnp.where(i > 0, before, c.num_stages)
                                plgpu.barrier_arrive(r.empty_barrier.at[before])
                    if c.in_flight == 0:
                        plgpu.barrier_arrive(r.empty_barrier.at[slot])

                def iteration(i, _):
                    for u in range(c.unroll):
                        stage(i * c.unroll + u, u == 0)

                lax.fori_loop(0, self.steps // c.unroll, iteration, None)
                if c.in_flight:
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(r.empty_barrier.at[self.slot(first_step + self.steps - 1)])
                return [accumulator[...] for accumulator in accumulators]

            products = pl.run_scoped(product, *[plgpu.ACC((TILE, size))] * c.row_tiles)
            self._stage_result(r, size, tiles, products, scales, tokens, warpgroup)

        self.by_size(task.rows, run)
        if not c.own_store:
            move = self.mover(r, task)
            plgpu.barrier_wait(r.result_full_barrier)
            self.store(task, move, warpgroup, c.warpgroups)
            plgpu.barrier_arrive(r.result_empty_barrier)
            return

        @pl.when(task.is_last)  # the consumers have nothing else to do and help to store
        def _():
            plgpu.barrier_arrive(r.last_barrier)
            move = self.mover(r, task)
            plgpu.barrier_wait(r.last_barrier)
            self.store(task, move, 1 + warpgroup, 1 + c.warpgroups)

    def _load_scales(self, r, task, tile):
        """Scale of the weights (one, or one per row of the tile), and scale of x (None if each row has its own)."""
        x_scale = None if self.x_scale_per_row else r.x_scale_gmem[task.expert]
        if not self.w_scale_per_row:
            return r.w_scale_gmem[task.expert, 0], x_scale
        row = jnp.minimum(self.weight_tile(task.column, tile), self.n // TILE - 1) * TILE
        rows = r.w_scale_gmem.at[task.expert, pl.ds(row, TILE)]
        return plgpu.load(rows, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False), x_scale

    def _load_token_scales(self, r, task):
        """Scales of the task's rows of x, one or two per lane; an empty list if an expert has one scale."""
        if not self.x_scale_per_row:
            return []
        found = []
        for first in range(0, self.tile_m, lanes.LANES):
            row = first + lanes.lane_index()
            (bits,) = lanes.gather(r.x_scale_gmem, task.row + row, where=row < task.rows)
            found.append(bits)
        return found

    def _stage_result(self, r, size, tiles, products, scales, tokens, warpgroup):
        """Scales the products, rounds them to bf16 and writes them transposed to shared memory, for the storer."""
        factors = []
        for w_scale, x_scale in scales:
            scale = w_scale if x_scale is None else x_scale * w_scale
            factors.append(scale * np.float32(DECODE_FACTOR))
        plgpu.barrier_wait(r.result_empty_barrier)
        # After that barrier no lane of this warpgroup reads the token scales of the previous task any more.
        for i, bits in enumerate(tokens):
            lanes.scatter(r.token_scale_smem.at[warpgroup], i * lanes.LANES + lanes.lane_index(), [bits])
        if tokens:
            lanes.sync()
        for start in range(0, size, _COLUMNS_AT_A_TIME):
            width = min(_COLUMNS_AT_A_TIME, size - start)
            for tile, product, scale in zip(tiles, products, factors, strict=True):
                part = product if width == size else product[:, start : start + width]
                factor = lax.broadcast_in_dim(scale, part.shape, (0,)) if self.w_scale_per_row else scale
                if tokens:
                    token_scale = plgpu.load(
                        r.token_scale_smem.at[warpgroup, pl.ds(start, width)],
                        layout=plgpu.Layout.WGMMA.reduce(0),
                        optimized=False,
                    )
                    factor = lax.broadcast_in_dim(token_scale, part.shape, (1,)) * factor
                rounded = (part * factor).astype(jnp.bfloat16)
                store_transposed(rounded, r.result_smem.at[tile, pl.ds(start, width)])
        plgpu.barrier_arrive(r.result_full_barrier)

    def store_alone(self, r: Refs, task: Task) -> None:
        """The storer: stores the result of a task. The consumers help with the last one."""
        move = self.mover(r, task)
        plgpu.barrier_wait(r.result_full_barrier)
        self.store(task, move, jnp.int32(0), jnp.where(task.is_last, 1 + self.config.warpgroups, 1))
        plgpu.barrier_arrive(r.result_empty_barrier)

    def mover(self, r: Refs, task: Task) -> Callable[..., None]:
        """A function move(row, item, where) by which each lane stores one item of a row in shared memory.

        An item is 16 bytes, or with SwiGLU 16 columns of the result.
        """
        return functools.partial(self._store_pieces, r, task) if self.out is None else self._store_swiglu(r, task)

    def store(self, task: Task, move: Callable[..., None], index: jax.Array, storing: Any) -> None:
        """Stores this warpgroup's share of the task's items, as number `index` of `storing` warpgroups."""
        tiles = self.config.tiles
        per_row = tiles * _PIECES if self.out is None else tiles // 2 * (TILE // BLOCK_SIZE)
        unroll = 4 if self.out is None else 1
        items, at_a_time = task.rows * per_row, lanes.LANES * unroll * storing

        def several(i, _):
            for j in range(unroll):
                item = i * at_a_time + (index * unroll + j) * lanes.LANES + lanes.lane_index()
                row = unsigned_div(item, per_row)
                move(row, item - row * per_row, item < items)

        lax.fori_loop(0, lax.div(items + (at_a_time - 1), jnp.int32(at_a_time)), several, None)

    def _store_pieces(self, r, task, row, piece, valid):
        """Each lane stores one 16-byte piece of a row."""
        tile, within = piece >> 3, piece & 7
        words = self._read_pieces(r, tile, row, [within], valid)
        column_piece = (task.column * self.config.tiles + tile) * _PIECES + within
        to = (task.row + row) * (self.columns // 8) + column_piece
        lanes.scatter(r.out_gmem[0], to, words, where=valid & (column_piece < self.columns // 8))

    def _store_swiglu(self, r, task):
        """A function by which each lane computes and stores 16 columns of SwiGLU's result."""
        scale_of_task = None
        if self.act_scale_by in ("all", "expert"):
            index = task.expert if self.act_scale_by == "expert" else 0
            scale_of_task = encode_scales(lanes.splat(r.act_scale_gmem[index], jnp.float32))
        blocks, out = self.columns // BLOCK_SIZE, self.out
        assert out is not None

        def move(row, block, valid):
            tile, pieces = block >> 2, [(block & 3) * 2, (block & 3) * 2 + 1]
            half = self.config.tiles // 2
            gate, up = (self._read_pieces(r, t, row, pieces, valid) for t in (tile, tile + half))
            column = task.column * (half * 4) + block
            scales = scale_of_task
            if self.act_scale_by == "row":
                (bits,) = lanes.gather(r.act_scale_gmem, task.row + row, where=valid)
                scales = encode_scales(jnp.where(valid, lax.bitcast_convert_type(bits, jnp.float32), np.float32(1)))
            out_row = task.row + row
            item = Item(out_row * blocks + column, out_row, column, valid & (column < blocks))
            store_products(r.out_gmem, item, *swiglu(gate, up), scales, out)

        return move

    def _read_pieces(self, r, tile, row, pieces, valid):
        """Reads pieces of a row of a tile in shared memory, 4 words each."""
        words = []
        for piece in pieces:
            at = tile * (self.tile_m * _PIECES) + piece_index(row, piece)
            words += lanes.gather(r.result_smem, at, 4, where=valid)
        return words
