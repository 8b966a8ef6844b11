"""One value per lane: a small SIMT vocabulary for memory-bound Pallas Mosaic GPU kernels.

A lane array is an array of shape [128], element i held by thread i of a warpgroup, so jnp arithmetic on lane arrays is
per-thread arithmetic on registers. What Pallas lacks is here: `gather` and `scatter` give every lane its own address
(16 bytes per instruction where the count allows), `sync` is the barrier of the block, `instruction` is one of PTX.
Memory is seen as flat and untyped: a bf16 array can be read as u32 words without a copy.

In interpret mode the same functions run as plain jnp, so that a whole kernel can be tested on a CPU.
"""

import contextlib
import math
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
from jaxlib.mlir.dialects import arith, llvm, vector

LANES = 128  # threads of a warpgroup
SMEM_BYTES = 232448  # shared memory of a block
# What the float instructions take: a lane array, or a number that is the same for all lanes.
Value = jax.Array | np.floating | float
_LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
_MAX_VECTOR_BYTES = 16
_MAX_GRID_AXIS = 2**16 - 1  # of CUDA's second and third grid axes
_interpreting = False


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
    """`body(*inputs, *outputs, *scratch)` on `grid` blocks of 128 threads; `block_index()` tells them apart.

    warpgroups: threads of a block / 128; `warpgroup_index()` tells them apart, and each has its own lanes and `sync`.
    device_barrier: whether XLA lets the devices meet before a kernel that reaches into others' memory.
    cluster: if above 1, `grid` counts clusters of as many blocks, which axis "cluster" tells apart.
    interpret: `plgpu.InterpretGPUParams()` runs it on the CPU.
    """

    def traced(*refs: Any) -> None:
        with interpreting(interpret is not None):
            body(*refs)

    traced.__name__ = _name_of(body)
    threads: dict[str, Any] = {} if warpgroups == 1 else dict(num_threads=warpgroups, thread_name="warpgroup")
    if cluster > 1:
        threads |= dict(cluster=(cluster,), cluster_names=("cluster",))
    call = plgpu.kernel(
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

    @jax.custom_batching.custom_vmap
    def within_grid_limit(*operands: jax.Array) -> Any:
        return call(*operands)

    @within_grid_limit.def_vmap
    def batched(axis_size: int, in_batched: Sequence[bool], *operands: jax.Array) -> Any:
        # A batch becomes an axis of the grid, and those have a limit.
        axes = tuple(0 if b else None for b in in_batched)
        many = jax.vmap(call, in_axes=axes)
        if axis_size > _MAX_GRID_AXIS or warpgroups > 1:  # a persistent kernel fills the device by itself
            split = [o for o, b in zip(operands, in_batched, strict=True) if b]

            def one(mapped: list[jax.Array]) -> Any:
                rest = iter(mapped)
                return call(*(next(rest) if b else o for o, b in zip(operands, in_batched, strict=True)))

            results = lax.map(one, split, batch_size=None if warpgroups > 1 else _MAX_GRID_AXIS)
        else:
            results = many(*operands)
        return results, jax.tree.map(lambda _: True, results)

    def run(*operands: Any) -> Any:
        if any(isinstance(a, jax.Ref) for a in operands):  # vmap does not know references
            return call(*operands)
        # Inside shard_map a result varies over the mesh axes that its operands vary over; the kernel does not say so.
        axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in operands))
        return jax.tree.map(
            lambda a: lax.pcast(a, tuple(axes), to="varying") if axes else a, within_grid_limit(*operands)
        )

    return run


@contextlib.contextmanager
def interpreting(on: bool = True) -> Iterator[None]:
    """Within it the functions of this module are plain jnp on arrays of any one shape: for tests of functions."""
    global _interpreting
    before, _interpreting = _interpreting, on
    try:
        yield
    finally:
        _interpreting = before


def is_interpreting() -> bool:
    """Whether the kernel runs in interpret mode, where inline_mgpu does not exist."""
    return _interpreting


def block_index() -> jax.Array:
    """Index of this block in the grid, i32 scalar."""
    return lax.axis_index("block")


def warpgroup_index() -> jax.Array:
    """Index of this warpgroup in its block, i32 scalar."""
    return lax.axis_index("warpgroup")


def lane_index() -> jax.Array:
    """0..127, i32 [128]."""
    if _interpreting:
        return jnp.arange(LANES, dtype=jnp.int32)
    return plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=_LAYOUT)


def splat(value: Any, dtype: Any) -> jax.Array:
    """A scalar as a lane array."""
    full = jnp.full((LANES,), value, dtype)
    return full if _interpreting else plgpu.layout_cast(full, _LAYOUT)


def gather(
    ref: Any, index: Any, count: int = 1, *, dtype: Any = jnp.uint32, where: Any = None, which: Any = 0
) -> tuple[jax.Array, ...]:
    """Each lane reads `count` consecutive elements of `dtype` (1, 2 or 4 bytes) at element index * count of `ref`.

    `ref` lies in global memory, of this device or of a peer, or in shared memory; or it is a list of references to
    global memory, of which each lane reads the one that `which` says.

    -> `count` u32 lane arrays, zero-extended. index: i32 lane array or scalar (the same for all lanes). Lanes where
    `where` is False read nothing and get 0. `count` elements must be naturally aligned as one access of up to 16 bytes.
    """
    size = jnp.dtype(dtype).itemsize
    refs = ref if isinstance(ref, list) else [ref]
    index, where, which = _lane_args(index, where, which)
    if _interpreting:
        found = jnp.zeros((LANES, count), jnp.uint32)
        for i, one in enumerate(refs):
            words = _as_unsigned(one[...].reshape(-1), dtype).reshape(-1, count)
            words = words[jnp.clip(index, 0, words.shape[0] - 1)].astype(jnp.uint32)
            found = jnp.where((where & (which == i))[:, None], words, found)
        return tuple(found[:, j] for j in range(count))
    width = _elements_per_access(count, size)

    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT, _LAYOUT, _LAYOUT, *(plgpu.RefType(),) * len(refs)),
        return_type=(_lane_struct(jnp.uint32),) * count,
    )
    def load(_, index, where, which, *refs):
        address, predicate = _address(refs, which, index, count * size), _scalar(where)
        space = "shared" if mgpu_utils.is_smem_ref(refs[0]) else "global"
        found = []
        for start in range(0, count, width):
            found += _load_asm(address, start * size, predicate, size, width, space)
        return tuple(_lane_array(value) for value in found)

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
    """Each lane writes its `values` (u32 lane arrays, truncated to `dtype`) from element index * len(values) on.

    Lanes where `where` is False write nothing. `ref`, `which` and alignment as in `gather`.
    """
    size, count = jnp.dtype(dtype).itemsize, len(values)
    refs = ref if isinstance(ref, list) else [ref]
    index, where, which = _lane_args(index, where, which)
    if _interpreting:
        for i, one in enumerate(refs):
            _interpret_scatter(one, index, values, dtype, where & (which == i))
        return
    width = _elements_per_access(count, size)

    @plgpu.inline_mgpu(arg_types=(_LAYOUT, _LAYOUT, _LAYOUT, *(plgpu.RefType(),) * len(refs), *(_LAYOUT,) * count))
    def store(_, index, where, which, *rest):
        refs, words = rest[: len(rest) - count], [_scalar(v) for v in rest[len(rest) - count :]]
        address, predicate = _address(refs, which, index, count * size), _scalar(where)
        space = "shared" if mgpu_utils.is_smem_ref(refs[0]) else "global"
        for start in range(0, count, width):
            _store_asm(address, start * size, predicate, size, words[start : start + width], space)

    store(index, where, which, *refs, *values)


def add_to(shared_ref: Any, index: Any, *, where: Any = None) -> None:
    """Each lane adds 1 to element `index` of an i32 array in shared memory; lanes may meet at an element."""
    index, where, _ = _lane_args(index, where, 0)
    if _interpreting:
        shared_ref[...] = shared_ref[...].at[jnp.where(where, index, 0)].add(where.astype(jnp.int32))
        return

    @plgpu.inline_mgpu(arg_types=(_LAYOUT, _LAYOUT, plgpu.RefType()))
    def add(_, index, where, ref):
        address = _address([ref], None, index, 4)
        asm = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p red.shared.add.u32 [$0], 1; }"
        nothing = llvm.StructType.get_literal([])
        llvm.inline_asm(nothing, [address, _scalar(where)], asm, "l,r", has_side_effects=True)

    add(index, where, shared_ref)


def when(condition: Any) -> Callable[[Callable[[], None]], None]:
    """Decorator that runs a function at once if the scalar is true, the same for all lanes of the block."""
    return pl.when(condition)


def replace_where(
    mask: jax.Array, replacement: Callable[[], list[jax.Array]], values: list[jax.Array]
) -> list[jax.Array]:
    """`replacement()` in lanes where `mask` holds, `values` elsewhere; free of cost where no lane of a warp needs it.

    A branch that each lane takes by itself, so `replacement` must be elementwise: no barrier, no reduction.
    """
    if _interpreting:
        return [jnp.where(mask, r, v) for r, v in zip(replacement(), values, strict=True)]

    @plgpu.inline_mgpu(
        arg_types=(_LAYOUT,),
        return_type=plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT(())),
    )
    def own_flag(_, flag):  # called a splat, but every lane holds its own
        return mgpu.FragmentedArray.splat(_scalar(flag), (), is_signed=True)

    own = own_flag(mask.astype(jnp.int32))
    return list(lax.cond(own != 0, lambda: tuple(replacement()), lambda: tuple(values)))


def prefix_sum(x: jax.Array, scratch_ref: Any, at: int) -> tuple[jax.Array, jax.Array]:
    """-> inclusive prefix sums over the 128 lanes of an i32 lane array, and the sum of all.

    The totals of the warps meet in `scratch_ref[at : at + 4]`, i32 in shared memory.
    """
    return prefix_sums([x], scratch_ref, at)[0]


def prefix_sums(many: Sequence[jax.Array], scratch_ref: Any, at: int) -> list[tuple[jax.Array, jax.Array]]:
    """`prefix_sum` of several lane arrays with two barriers in all; 4 words of `scratch_ref` for each."""
    lane, warp = lane_index() & 31, lane_index() >> 5
    sums = []
    for x in many:
        for step in (1, 2, 4, 8, 16):
            x = x + jnp.where(lane >= step, _shuffle(x, "up", step, 0), 0)
        sums.append(x)
    sync()  # whoever still reads what is there
    for i, x in enumerate(sums):
        scatter(scratch_ref, at + 4 * i + warp, [x.astype(jnp.uint32)], where=lane == 31)
    sync()
    found = []
    for i, x in enumerate(sums):
        before = jnp.int32(0)
        for w in range(LANES // 32):
            x = x + jnp.where(warp == w, before, 0)
            before = before + scratch_ref[at + 4 * i + w]
        found.append((x, before))
    return found


def largest(x: jax.Array, scratch_ref: Any, at: int) -> jax.Array:
    """The largest of the 128 lanes of an i32 lane array, in every lane; what prefix_sum says of `scratch_ref`."""
    x = largest_of_neighbours(x, 32)
    sync()
    scatter(scratch_ref, at + (lane_index() >> 5), [x.astype(jnp.uint32)], where=(lane_index() & 31) == 0)
    sync()
    for w in range(LANES // 32):
        x = jnp.maximum(x, scratch_ref[at + w])
    return x


def largest_of_neighbours(x: jax.Array, count: int) -> jax.Array:
    """The largest among every `count` (a power of two up to 32) successive lanes of an i32 lane array, in each."""
    step = 1
    while step < count:
        x = jnp.maximum(x, _shuffle(x, "bfly", step, 31))
        step *= 2
    return x


def _shuffle(x, kind, step, clamp):
    """i32 from another lane of the warp."""
    if _interpreting:
        below, above = jnp.roll(x, step), jnp.roll(x, -step)
        return below if kind == "up" else jnp.where((lane_index() & step) == 0, above, below)

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=_lane_struct(jnp.int32))
    def shuffle(_, x):
        asm = f"shfl.sync.{kind}.b32 $0, $1, {step}, {clamp}, 0xffffffff;"
        return _lane_array(llvm.inline_asm(_i32(), [_scalar(x)], asm, "=r,r", has_side_effects=True), is_signed=True)

    return shuffle(x)


def sync() -> None:
    """Barrier of the warpgroup's 128 threads; what they wrote before it is visible to all of them after it."""
    if _interpreting:
        return

    @plgpu.inline_mgpu()
    def barrier(_):
        mgpu_utils.warpgroup_barrier()

    barrier()


def instruction(asm: str, interpreted: Callable[..., jax.Array], *args: Value, dtype: Any = jnp.float32) -> jax.Array:
    """One PTX instruction on lane arrays, f32 or u32; numbers are spread over the lanes as f32.

    asm: with $0 for the result, $1.. for the arguments. interpreted: the same in jnp.
    """
    arrays = [a if jnp.ndim(a) else jnp.asarray(a, jnp.float32) for a in args]
    if _interpreting:
        return interpreted(*jnp.broadcast_arrays(*arrays))
    arrays = [a if jnp.ndim(a) else splat(a, jnp.float32) for a in arrays]

    @plgpu.inline_mgpu(arg_types=(_LAYOUT,) * len(arrays), return_type=_lane_struct(dtype))
    def inline(_, *lanes):
        result, register = (ir.F32Type.get(), "=f") if dtype == jnp.float32 else (_i32(), "=r")
        constraints = ",".join([register] + ["f" if a.mlir_dtype == ir.F32Type.get() else "r" for a in lanes])
        return _lane_array(llvm.inline_asm(result, [_scalar(a) for a in lanes], asm, constraints))

    return inline(*arrays)


# --- implementation ---


def _name_of(body):
    """What profiles call a kernel: module and functions around `body`, without repetitions."""
    parts = [body.__module__.rpartition(".")[2], *body.__qualname__.split(".")]
    return "_".join(dict.fromkeys(part for part in parts if part not in ("<locals>", "body")))


def _lane_args(index, where, which):
    index, which = (a.astype(jnp.int32) if jnp.ndim(a) else splat(a, jnp.int32) for a in (index, which))
    if where is None:
        return index, splat(True, jnp.bool_) if _interpreting else splat(1, jnp.uint32), which
    where = where if jnp.ndim(where) else splat(where, jnp.bool_)
    return index, where if _interpreting else where.astype(jnp.uint32), which


def _elements_per_access(count, size):
    """Elements of one load or store: a power of two of at most 16 bytes that divides `count`; bytes go one by one."""
    if size < 4:
        return 1
    return math.gcd(count, _MAX_VECTOR_BYTES // size)


def _i32():
    return ir.IntegerType.get_signless(32)


def _scalar(array):
    """The register of this lane."""
    (register,) = array.registers.flat
    return vector.extract(register, [], [0]) if isinstance(register.type, ir.VectorType) else register


def _lane_array(value, is_signed=False):
    register = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    layout = _LAYOUT.to_mgpu()
    is_signed = None if isinstance(value.type, ir.F32Type) else is_signed
    return mgpu.FragmentedArray(_registers=np.array([register], object), _layout=layout, _is_signed=is_signed)


def _lane_struct(dtype):
    return plgpu.ShapeDtypeStruct((LANES,), jnp.dtype(dtype), layout=_LAYOUT)


def _address(refs, which, index, bytes_per_index):
    """i64 address of element `index` of the lane's reference; offsets may exceed 2^31 bytes."""
    i64 = ir.IntegerType.get_signless(64)
    base, *others = (llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref)) for ref in refs)
    for i, other in enumerate(others, 1):
        chosen = arith.cmpi(arith.CmpIPredicate.eq, _scalar(which), arith.constant(_i32(), i))
        base = arith.select(chosen, other, base)
    offset = arith.muli(arith.extsi(i64, _scalar(index)), arith.constant(i64, bytes_per_index))
    return arith.addi(base, offset)


def _suffix(size, width):
    return {1: "u8", 2: "u16", 4: "b32"}[size], {1: "", 2: ".v2", 4: ".v4"}[width]


def _load_asm(address, offset, predicate, size, width, space):
    kind, vec = _suffix(size, width)
    outs = [f"${i}" for i in range(width)]
    target = outs[0] if width == 1 else "{" + ", ".join(outs) + "}"
    zero = "".join(f"mov.b32 {o}, 0; " for o in outs)
    if size == 2:  # u16 loads need a 16-bit register
        move = f".reg .u16 h; mov.u16 h, 0; @p ld.{space}.u16 h, [${width}+{offset}]; cvt.u32.u16 $0, h;"
    else:
        move = f"@p ld.{space}{vec}.{kind} {target}, [${width}+{offset}];"
    asm = f"{{ .reg .pred p; setp.ne.b32 p, ${width + 1}, 0; {zero}{move} }}"
    constraints = ",".join(["=&r"] * width + ["l", "r"])
    result = _i32() if width == 1 else llvm.StructType.get_literal([_i32()] * width)
    value: Any = llvm.inline_asm(result, [address, predicate], asm, constraints, has_side_effects=True)
    return [value] if width == 1 else [llvm.extractvalue(_i32(), value, [i]) for i in range(width)]


def _store_asm(address, offset, predicate, size, words, space):
    width = len(words)
    kind, vec = _suffix(size, width)
    names = [f"${i + 2}" for i in range(width)]
    source = names[0] if width == 1 else "{" + ", ".join(names) + "}"
    if size == 2:
        move = f".reg .u16 h; cvt.u16.u32 h, $2; @p st.{space}.u16 [$0+{offset}], h;"
    else:
        move = f"@p st.{space}{vec}.{kind} [$0+{offset}], {source};"
    asm = f"{{ .reg .pred p; setp.ne.b32 p, $1, 0; {move} }}"
    constraints = ",".join(["l", "r"] + ["r"] * width)
    llvm.inline_asm(
        llvm.StructType.get_literal([]), [address, predicate, *words], asm, constraints, has_side_effects=True
    )


def _as_unsigned(flat, dtype):
    """Flat array of any dtype -> the same bytes as flat unsigned integers of dtype's size."""
    wanted = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    have, want = flat.dtype.itemsize, wanted.itemsize
    if have < want:
        flat = flat.reshape(-1, want // have)
    return lax.bitcast_convert_type(flat, wanted).reshape(-1)


def _interpret_scatter(ref, index, values, dtype, where):
    """Element by element, so that blocks that write different elements of one array do not seem to race."""
    unsigned = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    block = jnp.stack([v.astype(unsigned) for v in values], axis=-1)
    if unsigned.itemsize < ref.dtype.itemsize:
        block = block.reshape(LANES, -1, ref.dtype.itemsize // unsigned.itemsize)
    cells = lax.bitcast_convert_type(block, ref.dtype).reshape(LANES, -1)
    per_lane = cells.shape[1]

    def lane(i, _):
        @when(where[i])
        def _():
            for j in range(per_lane):
                position = index[i] * per_lane + j
                ref[_unravel(position, ref.shape)] = cells[i, j]

    lax.fori_loop(0, LANES, lane, None)


def _unravel(position, shape):
    index = []
    for size in reversed(shape):
        index.append(position % size)
        position = position // size
    return tuple(reversed(index))
