"""Launching a kernel of lanes: blocks of warpgroups, clusters, batches, interpret mode."""

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
    interpret: Any = None,
) -> Callable[..., Any]:
    """`body(*inputs, *outputs, *scratch)` on `grid` blocks of 128 threads; `lanes.block_index()` tells them apart.

    warpgroups: threads of a block / 128; `lanes.warpgroup_index()` tells them apart, each has its own lanes and `sync`.
    device_barrier: whether XLA lets the devices meet before a kernel that reaches into others' memory.
    cluster: if above 1, `grid` counts clusters of as many blocks, which axis "cluster" tells apart.
    interpret: `plgpu.InterpretGPUParams()` runs it on the CPU.
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
            skip_device_barrier=not device_barrier,
        ),
    )

    def call(*operands: Any) -> Any:
        # Indices are 32 bits wide, with jax_enable_x64 too.
        with jax.enable_x64(False):
            return traced_call(*operands)

    batchable = _batchable(call, persistent=warpgroups > 1)

    def run(*operands: Any) -> Any:
        if any(isinstance(a, jax.Ref) for a in operands):  # vmap does not know references
            return call(*operands)
        # Inside shard_map a result varies over the mesh axes that its operands vary over; the kernel does not say so.
        axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
        return jax.tree.map(lambda a: lax.pcast(a, tuple(axes), to="varying") if axes else a, batchable(*operands))

    return run


def _batchable(call, persistent):
    """The same call under vmap: a batch becomes an axis of the grid, as far as CUDA's limit allows."""

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

        # A persistent kernel fills the device by itself, so those of a batch run one after the other.
        results = lax.map(one, split, batch_size=None if persistent else MAX_GRID_AXIS)
        return results, jax.tree.map(lambda _: True, results)

    return within_grid_limit


def _name_of(body):
    """What profiles call a kernel: module and functions around `body`, without repetitions."""
    parts = [body.__module__.rpartition(".")[2], *body.__qualname__.split(".")]
    return "_".join(dict.fromkeys(part for part in parts if part not in ("<locals>", "body")))
