"""Memory accesses of lanes.py: registers of lane arrays, addresses, loads and stores in PTX and the same in jnp."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.simt.hardware import LANES, PIECE_BYTES

LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)


def elements_per_access(count, size):
    """Elements of `size` bytes in one load or store: a power of two that divides `count`, at most 16 bytes in all.

    Elements smaller than 4 bytes are accessed one by one.
    """
    if size < 4:
        return 1
    return math.gcd(count, PIECE_BYTES // size)


def i32():
    """The MLIR type i32."""
    return ir.IntegerType.get_signless(32)


def scalar(array):
    """The value that this lane holds of a lane array, as an MLIR value."""
    (register,) = array.registers.flat
    return vector.extract(register, [], [0]) if isinstance(register.type, ir.VectorType) else register


def lane_array(value, is_signed=False):
    """Inverse of `scalar`: an MLIR value as a lane array."""
    register = vector.broadcast(ir.VectorType.get((1,), value.type), value)
    layout = LAYOUT.to_mgpu()
    is_signed = None if isinstance(value.type, ir.F32Type) else is_signed
    return mgpu.FragmentedArray(_registers=np.array([register], object), _layout=layout, _is_signed=is_signed)


def lane_struct(dtype):
    """Shape, dtype and layout of a lane array."""
    return plgpu.ShapeDtypeStruct((LANES,), jnp.dtype(dtype), layout=LAYOUT)


def address_of(refs, which, index, bytes_per_index):
    """i64 address of element `index` in the reference that the lane chose (`which`). Offsets may exceed 2^31 bytes."""
    i64 = ir.IntegerType.get_signless(64)
    base, *others = (llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref)) for ref in refs)
    for i, other in enumerate(others, 1):
        chosen = arith.cmpi(arith.CmpIPredicate.eq, scalar(which), arith.constant(i32(), i))
        base = arith.select(chosen, other, base)
    offset = arith.muli(arith.extsi(i64, scalar(index)), arith.constant(i64, bytes_per_index))
    return arith.addi(base, offset)


def _suffix(size, width):
    return {1: "u8", 2: "u16", 4: "b32"}[size], {1: "", 2: ".v2", 4: ".v4"}[width]


def load_asm(address, offset, predicate, size, width, space):
    """One load of `width` elements of `size` bytes. Returns one register per element, 0 where the predicate is 0."""
    kind, vec = _suffix(size, width)
    outs = [f"${i}" for i in range(width)]
    target = outs[0] if width == 1 else "{" + ", ".join(outs) + "}"
    zero = "".join(f"mov.b32 {o}, 0; " for o in outs)
    if size == 2:  # a load of u16 needs a 16-bit register
        move = f".reg .u16 h; mov.u16 h, 0; @p ld.{space}.u16 h, [${width}+{offset}]; cvt.u32.u16 $0, h;"
    else:
        move = f"@p ld.{space}{vec}.{kind} {target}, [${width}+{offset}];"
    asm = f"{{ .reg .pred p; setp.ne.b32 p, ${width + 1}, 0; {zero}{move} }}"
    constraints = ",".join(["=&r"] * width + ["l", "r"])
    result = i32() if width == 1 else llvm.StructType.get_literal([i32()] * width)
    value: Any = llvm.inline_asm(result, [address, predicate], asm, constraints, has_side_effects=True)
    return [value] if width == 1 else [llvm.extractvalue(i32(), value, [i]) for i in range(width)]


def store_asm(address, offset, predicate, size, words, space):
    """One store of registers, each truncated to `size` bytes. Nothing is written where the predicate is 0."""
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


def as_unsigned(flat, dtype):
    """The bytes of a flat array as flat unsigned integers of the size of `dtype`."""
    wanted = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    have, want = flat.dtype.itemsize, wanted.itemsize
    if have < want:
        flat = flat.reshape(-1, want // have)
    return lax.bitcast_convert_type(flat, wanted).reshape(-1)


def interpret_scatter(ref, index, values, dtype, where):
    """`lanes.scatter` in interpret mode.

    It writes element by element, so that the race detector sees no race where thread blocks write different elements.
    """
    unsigned = jnp.dtype(f"uint{8 * jnp.dtype(dtype).itemsize}")
    block = jnp.stack([v.astype(unsigned) for v in values], axis=-1)
    if unsigned.itemsize < ref.dtype.itemsize:
        block = block.reshape(LANES, -1, ref.dtype.itemsize // unsigned.itemsize)
    cells = lax.bitcast_convert_type(block, ref.dtype).reshape(LANES, -1)
    per_lane = cells.shape[1]

    def lane(i, _):
        @pl.when(where[i])
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
