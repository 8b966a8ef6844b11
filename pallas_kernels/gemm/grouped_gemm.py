"""Grouped GEMM with packed NVFP4 weights on Hopper: out[rows of e] = scale * x[rows of e] @ dequantized(w[e])^T.

**How the work is divided.** A task is up to tile_m rows of one expert and 64 * tiles columns of the result. The grid is
persistent, one thread block per SM. Each thread block computes from the counts how many row tiles every expert has
(tasks.py; it takes about a microsecond, and nothing goes to the host), then takes one task after the other. Its
warpgroups have roles, which roles.py draws on a time line:

    loader       fills a ring of pipeline stages with weights and x. It does not stop at the end of a task, so the data
                 of the next task arrives while this one ends.
    consumers    decode weight tiles and multiply them with the x tile, which all consumers share. With in_flight=1 a
                 consumer decodes the next weight tile while its wgmma runs. That needs two weight tiles per iteration,
                 as the wgmma still reads the registers of the first. With in_flight=0 the consumers overlap each other.
    storer       writes the result of a task from shared memory while the consumers multiply the next task. In the last
                 task of a thread block the consumers help. The widest tile_m needs the storer's registers: with it
                 there is no storer, and the consumers store.

**Operands.** The product is computed transposed, out^T = W x^T: a wgmma takes the weights from registers and reads x
from shared memory. Packed weights are tiles of 64 x 64 in 2304 contiguous bytes (formulas in weight_layout.py). Thread
t of a warpgroup finds the codes of its fragment in the 16 bytes at 16 t, one word per slice of 16 along K, and the
scales of its two rows in two words. x is [rows, K]: in the masked layout expert e begins at row e * M, in the
contiguous layout one expert follows the other. The copy engine can read tile_m rows from any row on; it writes them in
the 128-byte swizzle that wgmma expects. Beyond the last row and beyond N or K it gives zeros, so N and K need only be
multiples of 64.

**Decoding is exact.** A shift and a mask turn a code into a bf16 with the code's sign at bit 15 and its magnitude bits
at 8..6, which is value * 2^-126. (For the smallest code that is a subnormal; the multiplier handles it.) A block scale,
any e4m3 value but zero, is stored as a byte. One byte permutation and one multiply-add turn it into a bf16, which is
scale * 2^119. The product of both, value * scale * 2^-7, has 6 significant bits and an exponent within -17..4, so bf16
represents it exactly. Decoding 8 weights takes 11 integer and 4 multiply instructions; the scales of 32 weights take 4
more. The missing 2^7 is part of the f32 scale in the epilogue.

**Epilogue.** A consumer multiplies its f32 sums by x scale * weight scale * 2^7, rounds once to bf16, and writes them
transposed to shared memory with stmatrix. The storer writes 16 bytes per lane to the result, for valid rows only. With
SwiGLU, a task takes as many up tiles as gate tiles. Then the storer reads 16 gates and 16 ups of a row and calls the
functions of swiglu_quantize.py on them, so the bits are those of that kernel.

**Bits.** Every configuration sums over K in order, so the bits of a row depend on that row and the weights only.

**What bounds the time** (H100; experiments/results/gemm_log.md). Up to 16 rows per expert: reading the weights, at 97%
of the bandwidth of a copy where K is large; small shapes lose 5 to 6 us to start, plan and last wave. At 64 rows:
decoding, whose instructions issue beside wgmmas of 64 to 96 columns, and bandwidth together; it reaches 75% of the
bandwidth. From 256 rows on: the power limit of the tensor cores; decoding costs 3 to 5% there. SwiGLU in the epilogue
adds about 26 instructions per value of the result, 7 to 10% of the time where K is 2048.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gemm.config import TuningConfig, check_config
from pallas_kernels.gemm.layout import Refs
from pallas_kernels.gemm.roles import Gemm
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
    """out[rows of e] = x_scale * w_scale * x[rows of e] @ w[e]^T in bf16, or SwiGLU of that.

    The kernel may read rows that are not valid, but ignores them. It does not write them.

    Args:
      x: bf16, masked [E, M, K], or contiguous [rows, K], sorted by expert.
      words: weights [E, N, K] as `weight_layout.pack` returns them.
      w_scale: global scales of the weights, f32 [E, 1] or [E, N].
      counts: i32 [E], valid rows of each expert, clipped to the rows that exist.
      x_scale: f32 [E], or [rows, 1] with one for every row (E * M of them in the masked layout). None means 1.
      out: None for the product. Otherwise the weights have N = 2I rows, gate rows first, and the result is
        `swiglu_quantize(product, out=out)` of the product rounded to bf16, bit for bit.
      act_scale: global scale of that quantization: one element, [E, 1, 1] (masked only), or one for every row.
      config: see `choice.choose`.

    Returns:
      A tuple: (bf16 [.., N],) without `out`; (codes u8 [.., I/2], block scales e4m3 [.., I/16]) for "nvfp4";
      (bf16 [.., I],) for the other forms.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_config`.
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
