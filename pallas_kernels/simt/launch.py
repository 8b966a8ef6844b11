"""Launching a kernel that is written with lanes.py: grids, warpgroups, clusters, vmap and interpret mode."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.simt import lanes
from pallas_kernels.simt.hardware import MAX_GRID_AXIS


def kernel(
    body: Callable[..., None],
    out_type: Any,
    *,
    grid: int,
    scratch_types: Any = (),
    warpgroups: int = 1,
    cluster: int = 1,
    device_barrier: bool = True,
    approx_math: bool = False,
    interpret: Any = None,
) -> Callable[..., Any]:
    """Returns a function of the operands that runs `body(*inputs, *outputs, *scratch)` on a grid of thread blocks.

    Args:
      body: the kernel; it runs once per warpgroup.
      out_type: a pytree of ShapeDtypeStructs, the results.
      grid: number of thread blocks. In the body `lanes.block_index()` is the index of the running one.
      scratch_types: shared memory, barriers and semaphores.
      warpgroups: warpgroups (of 128 threads) per thread block. `lanes.warpgroup_index()` is the index of the running
        one. Each warpgroup has its own lanes and its own `lanes.sync`.
      cluster: thread blocks per cluster. Above 1, `grid` and `lanes.block_index()` count clusters, and
        `lax.axis_index("cluster")` is the thread block's index in its cluster.
      device_barrier: whether XLA lets all devices meet before a kernel that accesses the memory of other devices.
      approx_math: whether exponentials and the like may use the fast instructions of the GPU, which are not exact.
      interpret: `plgpu.InterpretGPUParams()` runs the kernel on the CPU.
    """

    def traced(*refs: Any) -> None:
        with lanes.interpreting(interpret is not None):
            body(*refs)

    traced.__name__ = _name_of(body)
    threads: dict[str, Any] = {} if warpgroups == 1 else dict(num_threads=warpgroups, thread_name="warpgroup")
    if cluster > 1:
        threads |= dict(cluster=(cluster,), cluster_names=("cluster",))
    traced_call = plgpu.kernel(
        traced,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(grid,),
        grid_names=("block",),
        **threads,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,
            approx_math=approx_math,
            skip_device_barrier=not device_barrier,
        ),
    )

    def call(*operands: Any) -> Any:
        # Kernels compute with 32-bit indices, also where the caller has set jax_enable_x64.
        with jax.enable_x64(False):
            return traced_call(*operands)

    batchable = _batchable(call, persistent=warpgroups > 1)

    def run(*operands: Any) -> Any:
        if any(isinstance(a, jax.Ref) for a in operands):  # custom_vmap does not take references
            return call(*operands)
        # Inside shard_map a result varies over the same mesh axes as the operands. pallas does not say so by itself.
        axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
        return jax.tree.map(lambda a: lax.pcast(a, tuple(axes), to="varying") if axes else a, batchable(*operands))

    return run


def _batchable(call, persistent):
    """`call`, with a rule for vmap: a batch becomes an axis of the grid where CUDA's limit on its size allows it."""

    @jax.custom_batching.custom_vmap
    def within_grid_limit(*operands: jax.Array) -> Any:
        return call(*operands)

    @within_grid_limit.def_vmap
    def batched(axis_size: int, in_batched: Sequence[bool], *operands: jax.Array) -> Any:
        if axis_size <= MAX_GRID_AXIS and not persistent:
            results = jax.vmap(call, in_axes=tuple(0 if b else None for b in in_batched))(*operands)
            return results, jax.tree.map(lambda _: True, results)
        split = [o for o, b in zip(operands, in_batched, strict=True) if b]

        def one(mapped: list[jax.Array]) -> Any:
            rest = iter(mapped)
            return call(*(next(rest) if b else o for o, b in zip(operands, in_batched, strict=True)))

        # One persistent kernel fills the device, so the kernels of a batch run one after the other.
        results = lax.map(one, split, batch_size=None if persistent else MAX_GRID_AXIS)
        return results, jax.tree.map(lambda _: True, results)

    return within_grid_limit


def _name_of(body):
    """Name of a kernel in profiles: module and enclosing functions of `body`, without repetitions."""
    parts = [body.__module__.rpartition(".")[2], *body.__qualname__.split(".")]
    return "_".join(dict.fromkeys(part for part in parts if part not in ("<locals>", "body")))
