"""From e4m3 codes in shared memory to bf16 matrices there, which wgmma reads.

A lane reads 16 codes of one row at a time, and writes them as two chunks of 16 bytes. Neighbouring lanes take
neighbouring rows of the same columns, which the swizzles of both tiles put into different banks.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from pallas_kernels.attention import softmax
from pallas_kernels.simt.hardware import LANES

_CODES = 16  # that a lane reads at a time: 16 bytes, the unit of the swizzles
_COLUMNS = 64  # of a tile of codes, and of a tile of bf16
_SPAN = 8  # rows of both kinds of tiles
TRANSFORMS = (plgpu.TilingTransform((_SPAN, _COLUMNS)), plgpu.SwizzleTransform(_COLUMNS))


def tiles(*shape: int) -> Any:
    """Shared memory for e4m3 matrices: rows of 64 codes, in the 64-byte swizzle."""
    return plgpu.SMEM(shape, jnp.float8_e4m3fn, transforms=TRANSFORMS)


# Two e4m3 codes, moved into the upper bytes of two halves ($2 says which of the word), become bf16 of 2^-120 times
# their values: the sign stays, and the exponent and the mantissa move down by four bits. The factor 2^120 is exact.
_PAIR = (
    "prmt.b32 a, $1, 0, {select}; shr.b32 m, a, 4; and.b32 m, m, 0x07f007f0; "
    "{spoiled}lop3.b32 m, a, 0x80008000, m, 0xea; mul.bf16x2 $0, m, f; {merge}"
)
# The code 0x7f is NaN, and would become 480. 0x07f0 + 0x10 is the only sum with the bit 0x0800.
_SPOILED = "add.u32 n, m, 0x00100010; and.b32 n, n, 0x08000800; "
_MERGE = "shl.b32 a, n, 4; shr.b32 n, n, 4; sub.u32 n, a, n; or.b32 $0, $0, n; "  # 0x7f80 where it is set


def widen(codes_smem: Any, wide_smem: Any, *, may_be_nan: bool) -> None:
    """Writes e4m3 codes as bf16. A wgmma may read them after `plgpu.commit_smem`.

    Args:
      codes_smem: e4m3 [64, D] in `tiles`; D is a multiple of 64.
      wide_smem: bf16 [64, D] in `softmax.tiles`.
      may_be_nan: whether rows may be NaN. A row of which the first of 16 successive codes is NaN becomes NaN there.
    """
    rows, dim = codes_smem.shape
    apart = LANES // rows  # columns of 16 codes that the lanes read at the same time
    assert apart == 2 and dim % _COLUMNS == 0, (rows, dim)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(TRANSFORMS), plgpu.RefType(softmax.TRANSFORMS)))
    def run(_, codes, wide):
        i32 = ir.IntegerType.get_signless(32)
        c = lambda value: arith.constant(i32, value)  # noqa: E731
        thread = arith.remui(mgpu_utils.thread_idx(), c(LANES))
        row, second = arith.remui(thread, c(rows)), arith.divui(thread, c(rows))
        in_span = arith.remui(row, c(_SPAN))
        tile_row = arith.muli(arith.divui(row, c(_SPAN)), c(dim // _COLUMNS * _SPAN))
        # In row r of a span, chunk i of 16 bytes lies at i ^ (r / 2) in a tile of codes, and at i ^ r in one of bf16.
        source = arith.addi(_address(codes), arith.muli(arith.addi(tile_row, in_span), c(_COLUMNS)))
        target = arith.addi(_address(wide), arith.muli(arith.addi(tile_row, in_span), c(2 * _COLUMNS)))
        chunk = lambda base, index, by: arith.addi(base, arith.muli(arith.xori(index, by), c(_CODES)))  # noqa: E731
        half_row = arith.divui(in_span, c(2))
        sources = [chunk(source, arith.addi(second, c(i)), half_row) for i in (0, 2)]
        targets = [
            [chunk(target, arith.addi(arith.muli(second, c(2)), c(2 * i + half)), in_span) for half in (0, 1)]
            for i in (0, 2)
        ]
        steps = [(tile, i) for tile in range(dim // _COLUMNS) for i in (0, 1)]
        loaded = [_load(sources[i], tile * _SPAN * _COLUMNS) for tile, i in steps]  # all before the first is needed
        for (tile, i), words in zip(steps, loaded, strict=True):
            pairs = [_widened(word, half, may_be_nan and k == 0) for k, word in enumerate(words) for half in (0, 1)]
            for half in (0, 1):
                _store(targets[i][half], tile * _SPAN * _COLUMNS * 2, pairs[4 * half : 4 * half + 4])

    run(codes_smem, wide_smem)


def _address(ref: Any) -> Any:
    """The 32-bit address of a reference in shared memory."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(32), mgpu_utils.memref_ptr(ref))


def _load(address: Any, offset: int) -> list[Any]:
    i32 = ir.IntegerType.get_signless(32)
    found: Any = llvm.inline_asm(
        llvm.StructType.get_literal([i32] * 4), [address], f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];",
        "=r,=r,=r,=r,r", has_side_effects=True,
    )  # fmt: skip
    return [llvm.extractvalue(i32, found, [i]) for i in range(4)]


def _store(address: Any, offset: int, words: list[Any]) -> None:
    asm = f"st.shared.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};"
    llvm.inline_asm(llvm.StructType.get_literal([]), [address, *words], asm, "r,r,r,r,r", has_side_effects=True)


def _widened(word: Any, half: int, may_be_nan: bool) -> Any:
    """Two of the four codes of a word as two bf16: the lower two for half 0."""
    pair = _PAIR.format(
        select=("0x1404", "0x3424")[half], spoiled=_SPOILED if may_be_nan else "", merge=_MERGE if may_be_nan else ""
    )
    asm = f"{{ .reg .b32 a, m, n, f; mov.b32 f, 0x7b807b80; {pair}}}"
    return llvm.inline_asm(ir.IntegerType.get_signless(32), [word], asm, "=r,r")
