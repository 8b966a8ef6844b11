"""Dense GEMM with block-wise scales on Hopper's FP8 tensor cores: y = x w^T, x and w in e4m3.

    y[t, n] = sum over blocks g of K:  (x[t, g] . w[n, g]) * (x_scale[g, t] * w_scale[n / 128, g])

**How the work is divided.** A task is 64 rows per consumer and `tile_n` columns of the result. The grid is persistent,
one thread block per SM. In a thread block, one warpgroup fills a ring of pipeline stages through the copy engine: a
stage holds blocks of 128 along K of x and w, and the scales of x. It does not stop at the end of a task. The other
warpgroups, the consumers, multiply a block of K with four wgmmas into registers of its own. Then they add it, scaled,
to the f32 sums with one FMA per value, while the wgmmas of another consumer run.

**Bits.** Tensor cores sum with fewer bits than f32. Here such a sum ends after the 128 products of a block, and f32
does the rest. Blocks of K are added in order, so with every configuration the bits of a row depend on that row and the
weights only.

**Clusters.** The two thread blocks of a cluster take neighbouring columns, which need the same rows of x. Each loads
half of these rows and sends it to the shared memory of both. That halves the traffic of x from L2.

**Edges.** Rows and columns beyond the end are read as zeros and not written, so M, N and K need not be multiples of a
tile.

**What bounds the time** (H100; experiments/results/dense_log.md). For many rows: the power limit of the tensor cores,
and the 64 FMAs per thread and stage. For few rows: reading w.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import math as mlir_math

from pallas_kernels.fp8.config import TuningConfig, check_config, choose
from pallas_kernels.simt import lanes, launch
from pallas_kernels.simt.formats import FP8_BLOCK
from pallas_kernels.simt.hardware import H100_SMS, SWIZZLE_BYTES, WGMMA_ROWS
from pallas_kernels.simt.schedule import Schedule

_WGMMA = plgpu.Layout.WGMMA
_GROUP = 8  # row tiles whose tasks are neighbours, so that they find the same columns of w in the L2 cache
# Number of consumers -> registers per thread of the warpgroup that loads, and of a consumer.
_REGISTERS = {1: (40, 240), 2: (40, 232), 3: (32, 160)}


class _Refs(NamedTuple):
    """Operands, result, shared memory and barriers. x_smem, w_smem and out_smem are two views of one buffer each."""

    x_gmem: Any
    w_gmem: Any
    x_scale_gmem: Any
    w_scale_gmem: Any
    out_gmem: Any
    x_smem: Any
    w_smem: Any
    scale_smem: Any
    out_smem: Any
    full: Any
    empty: Any


def gemm(
    x: jax.Array,
    w: jax.Array,
    x_scale: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: Any = jnp.bfloat16,
    config: TuningConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """y = x w^T with block-wise scales, [M, N] of out_dtype.

    Args:
      x: e4m3 [M, K].
      w: e4m3 [N, K].
      x_scale: f32 [ceil(K / 128), M rounded up to 4]. Columns beyond M are ignored.
      w_scale: f32 [ceil(N / 128), ceil(K / 128)].
      out_dtype: bf16 or f32.
      config: None takes that of `config.choose`.
      interpret: see `launch.kernel`.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_config`.
    """
    if problem := check_config(x, w, x_scale, w_scale, out_dtype):
        raise NotImplementedError(f"block FP8 kernel: {problem}")
    (m, k), n = x.shape, w.shape[0]
    c = config or choose(m, n, k, out_dtype)
    sms = H100_SMS if interpret is None else 2 * c.cluster
    plan = _Plan(c, m, n, k, sms // c.cluster, np.dtype(out_dtype))
    barrier: dict[str, Any] = dict(num_arrivals=c.warpgroups, num_barriers=c.num_stages)
    scratch_types = [
        _two_views((c.num_stages, c.k_blocks, c.tile_m, FP8_BLOCK), x.dtype, interpret),
        _two_views((c.num_stages, c.k_blocks, c.tile_n, FP8_BLOCK), w.dtype, interpret),
        plgpu.SMEM((c.num_stages, c.k_blocks, c.tile_m), jnp.float32),
        _two_views((c.warpgroups, c.tile_n // plan.piece, WGMMA_ROWS, plan.piece), out_dtype, interpret),
        plgpu.Barrier(num_arrivals=3 * c.k_blocks, num_barriers=c.num_stages),
        plgpu.Barrier(**barrier) if c.cluster == 1 else plgpu.ClusterBarrier(collective_axes=("cluster",), **barrier),
    ]

    def body(*all_refs):
        refs = _Refs(*all_refs)
        if interpret is not None:
            refs = refs._replace(**{name: [getattr(refs, name)] * 2 for name in ("x_smem", "w_smem", "out_smem")})
        warpgroup = lanes.warpgroup_index()
        load, multiply = _REGISTERS[c.warpgroups]

        @pl.when(warpgroup == c.warpgroups)
        def _():
            plgpu.set_max_registers(load, action="decrease")
            _load(plan, refs)

        @pl.when(warpgroup < c.warpgroups)
        def _():
            plgpu.set_max_registers(multiply, action="increase")
            _multiply(plan, refs, warpgroup)

    return launch.kernel(
        body, jax.ShapeDtypeStruct((m, n), out_dtype), grid=plan.clusters, scratch_types=scratch_types,
        warpgroups=c.warpgroups + 1, cluster=c.cluster, interpret=interpret,
    )(x, w, x_scale, w_scale)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static numbers of one kernel, and the place of each task. m, n, k: shapes. clusters: of the grid."""

    config: TuningConfig
    m: int
    n: int
    k: int
    clusters: int
    out_dtype: np.dtype

    @property
    def piece(self) -> int:
        """Columns of the result that are adjacent in shared memory, at most one span of the swizzle."""
        return min(SWIZZLE_BYTES // self.out_dtype.itemsize, self.config.tile_n)

    @property
    def groups(self) -> int:
        """Blocks of 128 along K."""
        return -(-self.k // FP8_BLOCK)

    @property
    def steps(self) -> int:
        """Pipeline stages that a task uses."""
        return -(-self.k // (FP8_BLOCK * self.config.k_blocks))

    @property
    def schedule(self) -> Schedule:
        """Which tasks each cluster takes."""
        return Schedule(self.clusters)

    def mine(self) -> jax.Array:
        """How many tasks this cluster takes."""
        return self.schedule.count(self._rows * self._columns)

    def place(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and first column that this thread block computes in the cluster's task of that number."""
        c = self.config
        task = self.schedule.task(number)
        group = lax.div(task, jnp.int32(_GROUP * self._columns))
        within = task - group * (_GROUP * self._columns)
        height = jnp.minimum(self._rows - group * _GROUP, _GROUP)
        column = lax.div(within, height)
        row = group * _GROUP + within - column * height
        if c.cluster > 1:
            column = column * c.cluster + lax.axis_index("cluster")
        return row * c.tile_m, column * c.tile_n

    def slot(self, step: jax.Array) -> jax.Array:
        """The pipeline stage of a step; steps count the stages that this thread block has used."""
        return lax.rem(step, jnp.int32(self.config.num_stages))

    @property
    def _rows(self):
        return -(-self.m // self.config.tile_m)

    @property
    def _columns(self):
        return -(-self.n // (self.config.tile_n * self.config.cluster))


def _two_views(shape, dtype, interpret):
    """One swizzled buffer in shared memory with two views: rows for the copy engine, and tiles for wgmma.

    The copy engine could also move tiles, but not of an array that ends within one. Interpret mode has no views, so
    there the buffer has one type.
    """
    if interpret is not None:
        return plgpu.SMEM(shape, dtype)
    swizzle = plgpu.SwizzleTransform(shape[-1] * np.dtype(dtype).itemsize)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(swizzle,)),
        plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, shape[-1])), swizzle)),
    )


def _load(plan, r):
    """The loader: copies the operands of all tasks into the pipeline stages, in order."""
    c = plan.config
    shared_by = None if c.cluster == 1 else "cluster"
    (x_smem, _), (w_smem, _) = r.x_smem, r.w_smem

    def task(number, _):
        row, column = plan.place(number)
        rows = pl.ds(row, c.tile_m)

        def stage(i, _):
            step = number * plan.steps + i
            slot = plan.slot(step)
            full = r.full.at[slot]

            @pl.when(step >= c.num_stages)
            def _():
                plgpu.barrier_wait(r.empty.at[slot])

            for j in range(c.k_blocks):
                number_of_block = i * c.k_blocks + j
                block = pl.ds(number_of_block * FP8_BLOCK, FP8_BLOCK)
                plgpu.copy_gmem_to_smem(r.x_gmem.at[rows, block], x_smem.at[slot, j], full, collective_axes=shared_by)
                plgpu.copy_gmem_to_smem(r.w_gmem.at[pl.ds(column, c.tile_n), block], w_smem.at[slot, j], full)
                # Beyond the last block any scale will do, as it multiplies zeros: the last one is loaded again.
                at = jnp.minimum(number_of_block, plan.groups - 1)
                plgpu.copy_gmem_to_smem(r.x_scale_gmem.at[at, rows], r.scale_smem.at[slot, j], full)

        lax.fori_loop(0, plan.steps, stage, None)

    lax.fori_loop(0, plan.mine(), task, None)
    # A thread block must not end while the other one of its cluster still arrives at its barriers.
    steps = plan.mine() * plan.steps
    drain = lambda step, _: plgpu.barrier_wait(r.empty.at[plan.slot(step)])  # noqa: E731
    lax.fori_loop(jnp.maximum(steps - c.num_stages, 0), steps, drain, None)


def _multiply(plan, r, warpgroup):
    """A consumer: multiplies and stores 64 rows of each task."""
    c = plan.config
    mine = pl.ds(warpgroup * WGMMA_ROWS, WGMMA_ROWS)
    width = math.gcd(c.tile_n, FP8_BLOCK)  # columns with one scale of w
    starts = range(0, c.tile_n, width)
    (_, x_smem), (_, w_smem), (out_rows_smem, out_tiles_smem) = r.x_smem, r.w_smem, r.out_smem

    def task(number, _):
        row, column = plan.place(number)
        # Columns beyond N have no scale. They use the last one.
        last = -(-plan.n // FP8_BLOCK) - 1
        scale_rows = [jnp.minimum(lax.div(column + start, jnp.int32(FP8_BLOCK)), last) for start in starts]

        def stage(i, totals):
            slot = plan.slot(number * plan.steps + i)
            blocks = [jnp.minimum(i * c.k_blocks + j, plan.groups - 1) for j in range(c.k_blocks)]
            # These loads are issued before the wait, so that they run meanwhile.
            w_scales = [[r.w_scale_gmem[s, b] for s in scale_rows] for b in blocks]
            plgpu.barrier_wait(r.full.at[slot])
            x_scales = [
                plgpu.load(r.scale_smem.at[slot, j, mine], layout=_WGMMA.reduce(1), optimized=False)
                for j in range(c.k_blocks)
            ]

            def product(*accumulators):
                for j, accumulator in enumerate(accumulators):
                    plgpu.wgmma(accumulator, x_smem.at[slot, j, mine], w_smem.at[slot, j].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                return [accumulator[...] for accumulator in accumulators]

            products = pl.run_scoped(product, *[plgpu.ACC((WGMMA_ROWS, c.tile_n))] * c.k_blocks)
            plgpu.barrier_arrive(r.empty.at[slot])
            for product_of_block, x_scale, w_scales_of_block in zip(products, x_scales, w_scales, strict=True):
                added = []
                for start, w_scale, total in zip(starts, w_scales_of_block, totals, strict=True):
                    scales = lax.broadcast_in_dim(x_scale * w_scale, (WGMMA_ROWS, width), (0,))
                    part = product_of_block if width == c.tile_n else product_of_block[:, start : start + width]
                    added.append(_fma(part, scales, total))
                totals = added
            return totals

        zeros = plgpu.layout_cast(jnp.zeros((WGMMA_ROWS, width), jnp.float32), _WGMMA)
        totals = lax.fori_loop(0, plan.steps, stage, [zeros for _ in starts])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the result of the task before has left shared memory
        pieces = range(c.tile_n // plan.piece)
        for p in pieces:
            start = p * plan.piece % width
            total = totals[p * plan.piece // width].astype(plan.out_dtype)
            out_tiles_smem.at[warpgroup, p][...] = (
                total if plan.piece == width else total[:, start : start + plan.piece]
            )
        plgpu.commit_smem()
        rows = pl.ds(row + warpgroup * WGMMA_ROWS, WGMMA_ROWS)
        for p in pieces:
            columns = pl.ds(column + p * plan.piece, plan.piece)
            plgpu.copy_smem_to_gmem(out_rows_smem.at[warpgroup, p], r.out_gmem.at[rows, columns])

    lax.fori_loop(0, plan.mine(), task, None)
    plgpu.wait_smem_to_gmem(0)


def _fma(a, b, c):
    """a * b + c for arrays in the wgmma layout: one instruction and one rounding per value."""
    if lanes.is_interpreting():
        return a * b + c

    @plgpu.inline_mgpu(
        arg_types=(_WGMMA,) * 3, return_type=plgpu.ShapeDtypeStruct(a.shape, jnp.dtype(jnp.float32), layout=_WGMMA)
    )
    def inline(_, a, b, c):
        registers = np.empty_like(a.registers)
        for i in np.ndindex(registers.shape):
            registers[i] = mlir_math.fma(a.registers[i], b.registers[i], c.registers[i])
        return type(a)(_registers=registers, _layout=a.layout, _is_signed=None)

    return inline(a, b, c)
