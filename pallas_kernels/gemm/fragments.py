"""Tensor core fragments in registers: decodes packed weights to a wgmma operand, and transposes results.

In the wgmma layout of a 64 x n matrix, thread t = 32 warp + 4 g + q of a warpgroup holds the rows 16 warp + g and
16 warp + g + 8, and of every 8 columns the columns 2 q and 2 q + 1. Its register number 2 j + h holds two values: row
16 warp + g + 8 h, columns 8 j + 2 q and 8 j + 2 q + 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import (
    fragmented_array,
    utils as mgpu_utils,
)
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.gemm.weight_layout import TILE, WORDS
from pallas_kernels.simt.hardware import LANES, WARP

# Decoding gives code * scale * 2^-7, from the factors 2^-126 and 2^119 of weight_layout.py. The epilogue multiplies by
# this factor to undo that.
DECODE_FACTOR = 2.0**7
ROW_WORDS = TILE // 2  # u32 words of a row of 64 bf16
_ROW_BYTES = 4 * ROW_WORDS
_WGMMA = plgpu.Layout.WGMMA

# Decodes one slice of 16 along K (k16 slice i) to the four registers $0..$3 of the A operand. $4 are its codes, $5 and
# $6 the scale words of rows g and g + 8. The masks are those of weight_layout.py. prmt copies byte i of a scale word to
# both halves of a register; times 16, plus 0x7600 in each half, makes both the bf16 scale * 2^119. The outputs are
# early clobbers, because inputs are still read after the first output is written.
_DECODE_SLICE = """{{
.reg .b32 lower, upper, t, u;
prmt.b32 lower, $5, 0, 0x4{i}4{i}; mad.lo.u32 lower, lower, 16, 0x76007600;
prmt.b32 upper, $6, 0, 0x4{i}4{i}; mad.lo.u32 upper, upper, 16, 0x76007600;
and.b32 t, $4, 0x81C081C0; mul.bf16x2 $0, t, lower;
shl.b32 t, $4, 3; and.b32 t, t, 0x81C081C0; mul.bf16x2 $1, t, upper;
shl.b32 t, $4, 6; shl.b32 u, $4, 2; and.b32 t, t, 0x01C001C0; lop3.b32 t, u, 0x80008000, t, 0xEA; mul.bf16x2 $2, t, lower;
shr.u32 t, $4, 3; shl.b32 u, $4, 1; and.b32 t, t, 0x01C001C0; lop3.b32 t, u, 0x80008000, t, 0xEA; mul.bf16x2 $3, t, upper;
}}"""  # noqa: E501


@plgpu.inline_mgpu(
    arg_types=(plgpu.RefType(),),
    return_type=plgpu.ShapeDtypeStruct((TILE, TILE), jnp.dtype(jnp.bfloat16), layout=_WGMMA),
)
def decode_weights(_, ref):
    """Decodes a packed tile, u32 [9, 64] in shared memory, to code * scale / DECODE_FACTOR.

    The result is bf16 [64, 64] in registers, in the wgmma layout.
    """
    codes = mgpu.FragmentedArray.load_strided(
        mgpu.memref_slice(ref, (slice(0, WORDS - 1),)), is_signed=False, vec_size=4
    )
    scales = mgpu.FragmentedArray.load_untiled(
        mgpu.memref_slice(ref, (WORDS - 1,)), layout=fragmented_array.WGMMA_ROW_LAYOUT, is_signed=False, optimized=False
    )
    (words,) = codes.registers.flat
    lower, upper = [_element(r, 0) if isinstance(r.type, ir.VectorType) else r for r in scales.registers.flat]
    pair = ir.VectorType.get((2,), ir.BF16Type.get())
    i32 = ir.IntegerType.get_signless(32)
    registers = []
    for i in range(4):
        decoded: Any = llvm.inline_asm(
            llvm.StructType.get_literal([i32] * 4), [_element(words, i), lower, upper], _DECODE_SLICE.format(i=i),
            "=&r,=&r,=&r,=&r,r,r,r",
        )  # fmt: skip
        registers += [mgpu_utils.bitcast(llvm.extractvalue(i32, decoded, [j]), pair) for j in range(4)]
    shape = fragmented_array.WGMMA_LAYOUT.registers_shape((TILE, TILE))
    array = np.empty(len(registers), object)
    array[:] = registers
    return mgpu.FragmentedArray(_registers=array.reshape(shape), _layout=fragmented_array.WGMMA_LAYOUT, _is_signed=None)


def store_transposed(matrix: jax.Array, ref: Any) -> None:
    """Stores the transpose of a bf16 matrix [64, n] in the wgmma layout: n rows of 64 values in shared memory.

    ref: u32 [>= n, 32]. The 16-byte pieces of a row are permuted (see `piece_index`), so that neither this store nor
    the loads that follow have bank conflicts.
    """

    @plgpu.inline_mgpu(arg_types=(_WGMMA, plgpu.RefType()))
    def store(_, matrix, ref):
        i32 = ir.IntegerType.get_signless(32)
        c = lambda value: arith.constant(i32, value)  # noqa: E731
        thread = arith.remui(mgpu_utils.thread_idx(), c(LANES))
        warp, lane = arith.shrui(thread, c(WARP.bit_length() - 1)), arith.andi(thread, c(WARP - 1))
        # An instruction stores four 8 x 8 matrices: the two row halves of two groups of 8 columns. Lane l gives the
        # address of row l % 8 of matrix l / 8.
        row, tile = arith.andi(lane, c(7)), arith.shrui(lane, c(3))
        piece = arith.xori(arith.addi(arith.shli(warp, c(1)), arith.andi(tile, c(1))), row)
        offset = arith.addi(arith.muli(arith.shrui(tile, c(1)), c(8 * _ROW_BYTES)), arith.muli(row, c(_ROW_BYTES)))
        base = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(ref))
        address = arith.addi(base, arith.addi(offset, arith.shli(piece, c(4))))
        words = [mgpu_utils.bitcast(r, i32) for r in matrix.registers.flat]
        for first in range(0, len(words), 4):
            some = words[first : first + 4]
            names = ", ".join(f"${j + 1}" for j in range(len(some)))
            asm = (
                f"stmatrix.sync.aligned.m8n8.x{len(some)}.trans.shared.b16 "
                f"[$0 + {first // 2 * 8 * _ROW_BYTES}], {{{names}}};"
            )
            llvm.inline_asm(
                llvm.StructType.get_literal([]), [address, *some], asm, ",".join(["r"] * (1 + len(some))),
                has_side_effects=True,
            )  # fmt: skip

    store(matrix, ref)


def piece_index(row: jax.Array, piece: jax.Array) -> jax.Array:
    """Position, in units of 16 bytes, of piece 0..7 of a row that `store_transposed` stored."""
    return row * 8 + (piece ^ (row & 7))


def _element(vector_value, index):
    return llvm.extractelement(vector_value, arith.constant(ir.IntegerType.get_signless(32), index))
