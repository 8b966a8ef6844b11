"""Grouped GEMM with packed NVFP4 weights on Hopper: out[rows of e] = scale * x[rows of e] @ dequantized(w[e])^T.

**Operands.** A task is one expert, up to tile_m of its rows and 64 * tiles columns of the result, computed transposed,
out^T = W x^T: the weights are the operand that a wgmma takes from registers, x the one it reads from shared memory.
Packed weights are tiles of 64 x 64 in 2304 contiguous bytes (weight_layout.py has the formulas): thread t of a
warpgroup finds the codes of its fragment in 16 bytes at 16 t, one word per k16 slice, and the scales of its two rows in
two words. x is any [rows, K] in row order, the masked form being [E * M, K] with first row e * M, the contiguous form
one after the other; the copy engine reads tile_m rows from any row on, in the 128-byte swizzle that wgmma expects, and
zeros beyond the end. Columns beyond N or K are zeros likewise, so N and K need only be multiples of 64.

**Decoding is exact.** A code s eem sits in a word so that a shift and a mask give the bf16 with sign s at bit 15 and
eem at bits 8..6, which is value * 2^-126 (subnormal for the smallest code, which the multiplier takes). A block scale,
any e4m3 but zero, is stored as a byte that one byte permutation and one multiply-add turn into the bf16 scale * 2^119.
Their product value * scale * 2^-7 has 6 significant bits and an exponent within -17..4: exact in bf16. 11 integer and 4
multiply instructions decode 8 weights, 4 more the scales of 32. The 2^7 goes into the f32 scale of the epilogue.

**Schedule.** A persistent grid of one block per SM. Every block sums up row tiles per expert from the counts
(group_tiles.py; about a microsecond, nothing goes to the host) and takes a task of every wave, columns fastest, so that
blocks running together share an expert's weights and a row tile's tokens in the L2 cache. Experts without rows have no
tasks. In a block (gemm_roles.py)

    loader       fills a ring of stages, weights and x, across task boundaries: the next task's data arrives during the
                 end of this one
    consumers    warpgroups that decode a weight tile and issue wgmmas on the x tile they share. With in_flight=1 the
                 next tile is decoded while a wgmma runs (needs two tiles per iteration: its registers are still read),
                 otherwise the consumers overlap each other. A task of few rows runs a smaller tile_m
    storer       a warpgroup that writes a finished task from shared memory while the next is multiplied; in a block's
                 last task the consumers help. The widest tile_m needs its registers: there the consumers store

    f32 sums -> * (x scale * weight scale * 2^7) -> bf16, rounded once -> transposed by stmatrix into shared memory ->
    16 bytes per lane to the result; rows beyond the expert's are not written.

**SwiGLU in the epilogue.** A task then takes as many up tiles as gate tiles. The storer reads 16 gates and 16 ups of a
row and does what swiglu_quantize.py does with them from global memory, by the same functions: bit for bit the same.

**Bits.** K is summed in order in every configuration, so a row's bits depend on the row and the weights only.

**What limits it** (H100; experiments/results/gemm_log.md): up to 16 rows per expert the weights' bandwidth, 97% of a
copy's where K is large; small shapes lose 5 to 6 us to start, plan and last wave. At 64 rows decoding (every
instruction of it issues beside a wgmma of 64 to 96 columns) and bandwidth together: 75% of the latter. From 256 rows on
the tensor cores' power limit; decoding costs 3 to 5% there. The fused epilogue adds about 26 instructions per result,
7 to 10% of the time where K is 2048.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gemm.config import TuningConfig, check_config
from pallas_kernels.gemm.roles import Gemm, Refs
from pallas_kernels.gemm.tasks import GroupTiles
from pallas_kernels.gemm.weight_layout import TILE, WORDS
from pallas_kernels.rows.quantize import rows_scale
from pallas_kernels.simt import launch
from pallas_kernels.simt.hardware import H100_SMS

__all__ = ["TuningConfig", "check_config", "grouped_gemm"]


def grouped_gemm(
    x: jax.Array,
    words: jax.Array,
    w_scale: jax.Array,
    counts: jax.Array,
    x_scale: jax.Array | None = None,
    *,
    out: str | None = None,
    act_scale: jax.Array | None = None,
    config: TuningConfig,
) -> tuple[jax.Array, ...]:
    """x [E, M, K] with counts valid rows per expert, or [rows, K] sorted by expert -> [.., N] bf16, or its SwiGLU.

    Args:
      words: `weight_layout.pack`. w_scale: f32 [E, 1] or [E, N]. x_scale: f32 [E], or [rows, 1] with one for every row
        (masked: E * M of them), None = 1. counts: i32 [E], clipped to what exists.
      out: None: (result,). Else N = 2I, gate rows first, and the result is `swiglu_quantize(result, out=out)` of the
        rounded bf16 product, bit for bit: (bf16 [.., I],) or for "nvfp4" (codes u8 [.., I/2], scales e4m3 [.., I/16]).
      act_scale: global scale of that quantization: one element, [E, 1, 1] (masked), or one for every row.

    Rows that are not valid are read (and ignored) but not written.

    Raises:
      NotImplementedError: what `check_config` returns.
    """
    problem = check_config(x, words, w_scale, counts, x_scale, out=out, act_scale=act_scale, config=config)
    if problem:
        raise NotImplementedError(f"grouped GEMM kernel: {problem}")
    experts, n_tiles, k_tiles = words.shape[:3]
    n, k = n_tiles * TILE, k_tiles * TILE
    *lead, _ = x.shape
    rows = int(np.prod(lead, dtype=np.int64))
    x_scale = jnp.ones(experts, jnp.float32) if x_scale is None else x_scale
    if counts.dtype != jnp.int32:
        counts = jnp.clip(counts, 0, rows).astype(jnp.int32)
    operands = [
        x.reshape(rows, k), words.reshape(experts, n_tiles, k_tiles * WORDS, TILE), w_scale, counts,
        x_scale.reshape(-1),
    ]  # fmt: skip
    act_scale_by = None
    if out not in (None, "bf16") and act_scale is not None:
        flat, stride = rows_scale(act_scale, lead)
        act_scale_by = {0: "all", 1: "row"}.get(stride, "expert")
        operands.append(flat)
    plan = GroupTiles(experts, lead[-1], max(config.tile_m), contiguous=x.ndim == 2, blocks=H100_SMS)
    gemm = Gemm(config, n, k, plan, w_scale.shape[1] != 1, x_scale.ndim == 2, out, act_scale_by)
    out_type = gemm.out_type(rows)

    def body(*refs):
        inputs, refs = refs[: len(operands)], refs[len(operands) :]
        results, ((x_rows, x_tiles), *scratch) = refs[: len(out_type)], refs[len(out_type) :]
        act_scale_gmem = None if act_scale_by is None else inputs[5]
        shared: list[Any] = [*inputs[:5], act_scale_gmem, results, x_rows, x_tiles, *scratch]
        gemm.run(Refs(*shared))

    found = launch.kernel(
        body, out_type, grid=plan.blocks, scratch_types=gemm.scratch_types(), warpgroups=config.all_warpgroups
    )(*operands)
    return tuple(r.reshape(*lead, r.shape[-1]) for r in found)
