"""Stores of a matrix in the registers of a warpgroup to rows of global memory, of which some may be left out."""

from typing import Any

import jax
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.simt.hardware import LANES, WARP


def store_rows(matrix: jax.Array, ref: Any, rows: int, columns: int | None = None, pitch: int | None = None) -> None:
    """Stores the first `rows` rows of an f32 matrix [64, n] in the wgmma layout to global memory.

    Args:
      matrix: f32 [64, n].
      ref: f32 [rows, n], or [rows, 1] with columns=1: then column 0 alone is stored.
      rows: how many rows are stored.
      columns: 1 or None, see `ref`.
      pitch: values from one row of `ref` to the next; None: rows follow each other without a gap.
    """
    width = columns or matrix.shape[1]
    pitch = pitch or width

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))
    def store(_, matrix, ref):
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        c = lambda value: arith.constant(i32, value)  # noqa: E731
        thread = arith.remui(mgpu_utils.thread_idx(), c(LANES))
        warp, lane = arith.shrui(thread, c(WARP.bit_length() - 1)), arith.andi(thread, c(WARP - 1))
        row = arith.addi(arith.shli(warp, c(4)), arith.shrui(lane, c(2)))
        quad = arith.andi(lane, c(3))
        base = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(ref))
        registers = list(matrix.registers.flat)
        for half in range(2):
            here = arith.addi(row, c(8 * half))
            where = arith.cmpi(arith.CmpIPredicate.ult, here, c(rows))
            if columns == 1:
                where = arith.andi(where, arith.cmpi(arith.CmpIPredicate.eq, quad, c(0)))
            offset = arith.addi(arith.muli(here, c(pitch)), c(0) if columns == 1 else arith.shli(quad, c(1)))
            address = arith.addi(base, arith.extui(i64, arith.shli(offset, c(2))))
            predicate = arith.extui(i32, where)
            for j in range(1 if columns == 1 else width // 8):
                pair = registers[2 * j + half]
                first, second = (llvm.extractelement(pair, c(k)) for k in range(2))
                asm = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p st.global."
                asm += "f32 [$0], $2; }" if columns == 1 else f"v2.f32 [$0+{32 * j}], {{$2, $3}}; }}"
                operands = [address, predicate, first] + ([] if columns == 1 else [second])
                llvm.inline_asm(
                    llvm.StructType.get_literal([]), operands, asm, "l,r" + ",f" * (len(operands) - 2),
                    has_side_effects=True,
                )  # fmt: skip

    store(matrix, ref)
