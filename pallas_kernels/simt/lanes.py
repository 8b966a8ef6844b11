"""One value per lane: a small SIMT vocabulary for memory-bound Pallas Mosaic GPU kernels.

A lane is a thread of a warpgroup. A lane array is an array of shape [128] whose element i is in a register of lane i,
so jnp arithmetic on lane arrays is arithmetic that each thread does by itself. This module adds what Pallas lacks:

* `gather` and `scatter` access memory at an address that each lane chooses, with up to 16 bytes per instruction;
* `sync` is the barrier of the warpgroup;
* `prefix_sum`, `largest` and their variants combine the values of several lanes;
* `instruction` is one instruction of PTX, NVIDIA's assembly language.

`gather` and `scatter` see memory as flat and untyped: they read a bf16 array as u32 words without a copy.

In interpret mode the same functions run as plain jnp, so that a whole kernel can be tested on a CPU.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.simt import lane_memory
from pallas_kernels.simt.hardware import LANES, WARP, WARPS

# Operand of a float instruction: a lane array, or a number, which all lanes then use.
Value = jax.Array | np.floating | float
# Kernels refuse operands with indices from here on. Below it, those of lanes beyond the last item still fit i32.
MAX_INDEX = 2**31 - 2**16
_LAYOUT = lane_memory.LAYOUT
_WARP_BITS = WARP.bit_length() - 1  # lane index >> _WARP_BITS is the index of the lane's warp
_interpreting = False


@contextlib.contextmanager
def interpreting(on: bool = True) -> Iterator[None]:
    """Context manager in which the functions of this module are plain jnp, on arrays of any shape."""
    global _interpreting
    before, _interpreting = _interpreting, on
    try:
        yield
    finally:
        _interpreting = before


def is_interpreting() -> bool:
    """Whether the functions of this module run as plain jnp now (interpret mode has no inline_mgpu)."""
    return _interpreting


def block_index() -> jax.Array:
    """Index of this thread block in the grid (with clusters: of this cluster), i32 scalar."""
    return lax.axis_index("block")


def warpgroup_index() -> jax.Array:
    """Index of this warpgroup in its thread block, i32 scalar."""
    return lax.axis_index("warpgroup")


def lane_index() -> jax.Array:
    """Lane array that holds each lane's own index 0..127, i32."""
    if _interpreting:
        return jnp.arange(LANES, dtype=jnp.int32)
    return plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=_LAYOUT)


def splat(value: Any, dtype: Any) -> jax.Array:
    """A scalar as a lane array: every lane holds it."""
    full = jnp.full((LANES,), value, dtype)
    return full if _interpreting else plgpu.layout_cast(full, _LAYOUT)


def gather(
    ref: Any, index: Any, count: int = 1, *, dtype: Any = jnp.uint32, where: Any = None, which: Any = 0
) -> tuple[jax.Array, ...]:
    """Each lane reads `count` consecutive elements of `dtype`, the first one at element index * count of `ref`.

    Args:
      ref: reference to global memory, of this device or of a peer, or to shared memory; or a list of references to
        global memory, from which each lane reads reference number `which`.
      index: i32 lane array, or a scalar if all lanes read the same elements.
      dtype: a type of 1, 2 or 4 bytes. Memory is read as flat elements of it, whatever the dtype of `ref` is.
      where: boolean lane array. Lanes where it is False read nothing and get 0.
      which: i32 lane array or scalar.

    Returns:
      `count` u32 lane arrays, each element zero-extended.

    An instruction reads up to 16 bytes. Each lane's elements must be aligned to their total size, or to 16 bytes if
    that is larger.
    """
    size = jnp.dtype(dtype).itemsize
    refs = ref if isinstance(ref, list) else [ref]
    index, where, which = _lane_args(index, where, which)
    if _interpreting:
        found = jnp.zeros((LANES, count), jnp.uint32)
        for i, one in enumerate(refs):
            words = lane_memory.as_unsigned(one[...].reshape(-1), dtype).reshape(-1, count)
            words = words[jnp.clip(index, 0, words.shape[0] - 1)].astype(jnp.uint32)
            found = jnp.where((where & (which == i))[:, None], words, found)
        return tuple(found[:, j] for j in range(count))
    width = lane_memory.elements_per_access(count, size)

    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT, _LAYOUT, _LAYOUT, *(plgpu.RefType(),) * len(refs)),
        return_type=(lane_memory.lane_struct(jnp.uint32),) * count,
    )
    def load(_, index, where, which, *refs):
        address, predicate = lane_memory.address_of(refs, which, index, count * size), lane_memory.scalar(where)
        space = "shared" if mgpu_utils.is_smem_ref(refs[0]) else "global"
        found = []
        for start in range(0, count, width):
            found += lane_memory.load_asm(address, start * size, predicate, size, width, space)
        return tuple(lane_memory.lane_array(value) for value in found)

    return load(index, where, which, *refs)


def scatter(
    ref: Any,
    index: Any,
    values: Sequence[jax.Array],
    *,
    dtype: Any = jnp.uint32,
    where: Any = None,
    which: Any = 0,
) -> None:
    """Each lane writes `values` to consecutive elements of `ref`, the first one to element index * len(values).

    values: u32 lane arrays, each truncated to `dtype`. Lanes where `where` is False write nothing. The other arguments
    are those of `gather`.
    """
    size, count = jnp.dtype(dtype).itemsize, len(values)
    refs = ref if isinstance(ref, list) else [ref]
    index, where, which = _lane_args(index, where, which)
    if _interpreting:
        for i, one in enumerate(refs):
            lane_memory.interpret_scatter(one, index, values, dtype, where & (which == i))
        return
    width = lane_memory.elements_per_access(count, size)

    @plgpu.inline_mgpu(arg_types=(_LAYOUT, _LAYOUT, _LAYOUT, *(plgpu.RefType(),) * len(refs), *(_LAYOUT,) * count))
    def store(_, index, where, which, *rest):
        refs, words = rest[: len(rest) - count], [lane_memory.scalar(v) for v in rest[len(rest) - count :]]
        address, predicate = lane_memory.address_of(refs, which, index, count * size), lane_memory.scalar(where)
        space = "shared" if mgpu_utils.is_smem_ref(refs[0]) else "global"
        for start in range(0, count, width):
            lane_memory.store_asm(address, start * size, predicate, size, words[start : start + width], space)

    store(index, where, which, *refs, *values)


def add_to(shared_ref: Any, index: Any, *, where: Any = None) -> None:
    """Each lane atomically adds 1 to element `index` of an i32 array in shared memory, if `where` is True for it."""
    index, where, _ = _lane_args(index, where, 0)
    if _interpreting:
        shared_ref[...] = shared_ref[...].at[jnp.where(where, index, 0)].add(where.astype(jnp.int32))
        return

    @plgpu.inline_mgpu(arg_types=(_LAYOUT, _LAYOUT, plgpu.RefType()))
    def add(_, index, where, ref):
        address = lane_memory.address_of([ref], None, index, 4)
        asm = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p red.shared.add.u32 [$0], 1; }"
        nothing = llvm.StructType.get_literal([])
        llvm.inline_asm(nothing, [address, lane_memory.scalar(where)], asm, "l,r", has_side_effects=True)

    add(index, where, shared_ref)


def when(condition: Any) -> Callable[[Callable[[], None]], None]:
    """Decorator that runs a function at once if `condition` is true, a scalar that is the same for all lanes."""
    return pl.when(condition)


def replace_where(
    mask: jax.Array, replacement: Callable[[], list[jax.Array]], values: list[jax.Array]
) -> list[jax.Array]:
    """`replacement()` in lanes where `mask` is True, `values` in the others.

    Each lane branches by itself, so a warp without such a lane spends no time on it. `replacement` must be elementwise,
    without barriers and reductions.
    """
    if _interpreting:
        return [jnp.where(mask, r, v) for r, v in zip(replacement(), values, strict=True)]

    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(())),
    )
    def own_flag(_, flag):  # the layout says that all lanes hold the same value, but each one holds its own
        return mgpu.FragmentedArray.splat(lane_memory.scalar(flag), (), is_signed=True)

    own = own_flag(mask.astype(jnp.int32))
    return list(lax.cond(own != 0, lambda: tuple(replacement()), lambda: tuple(values)))


def prefix_sum(x: jax.Array, scratch_ref: Any, at: int) -> tuple[jax.Array, jax.Array]:
    """Inclusive prefix sums over the 128 lanes of an i32 lane array, and the sum of all lanes.

    The four warps exchange their sums through `scratch_ref[at : at + 4]`, i32 in shared memory.
    """
    return prefix_sums([x], scratch_ref, at)[0]


def prefix_sums(many: Sequence[jax.Array], scratch_ref: Any, at: int) -> list[tuple[jax.Array, jax.Array]]:
    """`prefix_sum` of several lane arrays with two barriers in all. It uses 4 words of `scratch_ref` for each."""
    lane, warp = lane_index() & (WARP - 1), lane_index() >> _WARP_BITS
    sums = []
    for x in many:
        for step in (1, 2, 4, 8, 16):  # less than a warp
            x = x + jnp.where(lane >= step, _shuffle(x, "up", step, 0), 0)
        sums.append(x)
    sync()  # lanes may still read what an earlier call left in scratch_ref
    for i, x in enumerate(sums):
        scatter(scratch_ref, at + WARPS * i + warp, [x.astype(jnp.uint32)], where=lane == WARP - 1)
    sync()
    found = []
    for i, x in enumerate(sums):
        before = jnp.int32(0)
        for w in range(WARPS):
            x = x + jnp.where(warp == w, before, 0)
            before = before + scratch_ref[at + WARPS * i + w]
        found.append((x, before))
    return found


def largest(x: jax.Array, scratch_ref: Any, at: int) -> jax.Array:
    """Maximum over the 128 lanes of an i32 lane array, in every lane. Uses `scratch_ref` as `prefix_sum` does."""
    x = largest_of_neighbours(x, WARP)
    sync()
    scatter(
        scratch_ref, at + (lane_index() >> _WARP_BITS), [x.astype(jnp.uint32)], where=(lane_index() & (WARP - 1)) == 0
    )
    sync()
    for w in range(WARPS):
        x = jnp.maximum(x, scratch_ref[at + w])
    return x


def largest_of_neighbours(x: jax.Array, count: int) -> jax.Array:
    """Maximum over each group of `count` successive lanes (a power of two up to 32), in all lanes of the group; i32."""
    if count == WARP and not _interpreting:
        return _largest_in_warp(x)
    step = 1
    while step < count:
        x = jnp.maximum(x, _shuffle(x, "bfly", step, WARP - 1))
        step *= 2
    return x


def sum_of_neighbours(x: jax.Array, count: int) -> jax.Array:
    """Sum over each group of `count` successive lanes (a power of two up to 32), in all lanes of the group; f32."""
    step = 1
    while step < count:
        x = x + partner(x, step)
        step *= 2
    return x


def partner(x: jax.Array, step: int) -> jax.Array:
    """Value of a 32-bit lane array in lane xor `step`, a power of two below 32."""
    found = _shuffle(lax.bitcast_convert_type(x, jnp.int32), "bfly", step, WARP - 1)
    return lax.bitcast_convert_type(found, x.dtype)


def _shuffle(x, kind, step, clamp):
    """Value of an i32 lane array in another lane of the warp: `step` lanes before ("up"), or lane xor step ("bfly")."""
    if _interpreting:
        below, above = jnp.roll(x, step), jnp.roll(x, -step)
        return below if kind == "up" else jnp.where((lane_index() & step) == 0, above, below)

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=lane_memory.lane_struct(jnp.int32))
    def shuffle(_, x):
        asm = f"shfl.sync.{kind}.b32 $0, $1, {step}, {clamp}, 0xffffffff;"
        found = llvm.inline_asm(lane_memory.i32(), [lane_memory.scalar(x)], asm, "=r,r", has_side_effects=True)
        return lane_memory.lane_array(found, is_signed=True)

    return shuffle(x)


def _largest_in_warp(x):
    """Maximum over a warp in one instruction."""

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=lane_memory.lane_struct(jnp.int32))
    def reduce(_, x):
        asm = "redux.sync.max.s32 $0, $1, 0xffffffff;"
        found = llvm.inline_asm(lane_memory.i32(), [lane_memory.scalar(x)], asm, "=r,r", has_side_effects=True)
        return lane_memory.lane_array(found, is_signed=True)

    return reduce(x)


def sync() -> None:
    """Barrier of the warpgroup's 128 threads. Each of them sees after it what the others wrote before it."""
    if _interpreting:
        return

    @plgpu.inline_mgpu()
    def barrier(_):
        mgpu_utils.warpgroup_barrier()

    barrier()


def instruction(asm: str, interpreted: Callable[..., jax.Array], *args: Value, dtype: Any = jnp.float32) -> jax.Array:
    """One PTX instruction on lane arrays of f32 or u32.

    asm: the instruction, with $0 for the result and $1, $2, ... for the arguments.
    interpreted: a jnp function that does the same in interpret mode.
    args: lane arrays, or numbers, which every lane gets as f32.
    dtype: of the result, f32 or u32.
    """
    arrays = [a if jnp.ndim(a) else jnp.asarray(a, jnp.float32) for a in args]
    if _interpreting:
        return interpreted(*jnp.broadcast_arrays(*arrays))
    arrays = [a if jnp.ndim(a) else splat(a, jnp.float32) for a in arrays]

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,) * len(arrays), return_type=lane_memory.lane_struct(dtype))
    def inline(_, *lanes):
        result, register = (ir.F32Type.get(), "=f") if dtype == jnp.float32 else (lane_memory.i32(), "=r")
        constraints = ",".join([register] + ["f" if a.mlir_dtype == ir.F32Type.get() else "r" for a in lanes])
        return lane_memory.lane_array(llvm.inline_asm(result, [lane_memory.scalar(a) for a in lanes], asm, constraints))

    return inline(*arrays)


def _lane_args(index, where, which):
    index, which = (a.astype(jnp.int32) if jnp.ndim(a) else splat(a, jnp.int32) for a in (index, which))
    if where is None:
        return index, splat(True, jnp.bool_) if _interpreting else splat(1, jnp.uint32), which
    where = where if jnp.ndim(where) else splat(where, jnp.bool_)
    return index, where if _interpreting else where.astype(jnp.uint32), which
