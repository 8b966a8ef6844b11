"""SwiGLU and requantization in one pass: silu(gate) * up in f32, then rounded to NVFP4 or bf16.

A lane takes 16 columns of a row at a time: it loads 16 gates and 16 ups (bf16), multiplies in f32, and quantizes from
registers with the arithmetic of quantize.py. With `masked_m` a persistent grid goes through the valid rows of every
expert (`schedule.ExpertUnits`); rows beyond them are neither read nor written. Device memory bounds the time.

silu(x) = x / (1 + e^-x) is within 4 ulp of float64 wherever the result is a normal number. To compute e^-x, log2(e) is
split into high + low with 16 bits in `high`. A gate is a bf16 value, so the product x * high is exact, and

    e^-x = 2^(-x high) * (1 - x low ln 2 + ...)

without an error from rounding the exponent. A block with a gate below -80 (e^-x leaves the range of f32) or with a
product that is not finite is computed again in a branch, which is hardly ever taken: with silu(x) = x e^(x + 80) e^-80.
silu(-Inf) is NaN, not 0.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rows.nvfp4_codec import (
    EncodeScales,
    block_amax,
    decoded_bf16,
    encode_block,
    encode_scales,
    unpack_bf16,
)
from pallas_kernels.rows.quantize import (
    DEFAULT_CONFIG,
    MAX_BLOCKS_PER_LANE,
    Item,
    RowWork,
    TuningConfig,
    check_tuning,
    row_encode_scales,
    rows_scale,
    scale_of_row,
    store_block,
    store_row_scale,
)
from pallas_kernels.simt import lane_math, lanes, launch, tuning
from pallas_kernels.simt.formats import AMAX_DIVISOR, BLOCK_SIZE

Output = Literal["nvfp4", "nvfp4_as_bf16", "bf16"]
OUTPUTS: tuple[str, ...] = get_args(Output)
# log2(e) = high + low with 16 significant bits in high.
_LOG2E_HIGH = np.float32(np.round(np.log2(np.e) * 2**15) / 2**15)
_LOW_LN2 = np.float32((np.log2(np.e) - float(_LOG2E_HIGH)) * np.log(2))
_BF16_MINUS_80 = 0xC2A0


def check_config(
    gate_up: Any, masked_m: Any, global_scale: Any, out: str, config: TuningConfig = DEFAULT_CONFIG
) -> str | None:
    """None if `swiglu_quantize` accepts these (arrays or ShapeDtypeStructs), else what does not fit."""
    if gate_up.dtype != jnp.bfloat16:
        return f"gate_up must be bfloat16, got {gate_up.dtype}"
    if gate_up.ndim != (2 if masked_m is None else 3) or 0 in gate_up.shape or gate_up.shape[-1] % (2 * BLOCK_SIZE):
        return (
            f"gate_up must be [E, M, 2I] with masked_m or [rows, 2I] without, not empty, I a multiple of {BLOCK_SIZE}; "
            f"got {gate_up.shape}"
        )
    if out not in OUTPUTS:
        return f"out must be one of {OUTPUTS}, got {out!r}"
    if out != "bf16" and (global_scale is None or isinstance(global_scale, str)):
        if global_scale != "per_token":
            return f"out={out!r} needs an array or 'per_token' as global_scale, got {global_scale!r}"
        if gate_up.shape[-1] > 2 * BLOCK_SIZE * lanes.LANES * MAX_BLOCKS_PER_LANE:
            return f"a per-token scale needs I of at most {BLOCK_SIZE * lanes.LANES * MAX_BLOCKS_PER_LANE}"
    if gate_up.size // BLOCK_SIZE >= lanes.MAX_INDEX:
        return f"gate_up {gate_up.shape} exceeds the kernel's 32-bit block indices"
    return check_tuning(config)


def swiglu_quantize(
    gate_up: jax.Array,
    masked_m: jax.Array | None,
    global_scale: Any,
    *,
    out: str = "nvfp4",
    config: TuningConfig | None = None,
    interpret: Any = None,
) -> tuple[Any, ...]:
    """silu(gate) * up for gate_up = [gate, up] along the last axis, rounded to the form `out`.

    Args:
      gate_up: bf16, [E, M, 2I] with `masked_m`, or [rows, 2I] without; I a multiple of 16.
      masked_m: valid rows of each expert, [E]. The other rows are neither read nor written.
      global_scale: as in `quantize.quantize`; not used for "bf16".
      out: "nvfp4", "nvfp4_as_bf16" or "bf16".

    Returns:
      "nvfp4": codes u8 [.., I/2], block scales e4m3 [.., I/16], global scales.
      "nvfp4_as_bf16": code * block scale of the same as bf16 [.., I] (exact), global scales.
      "bf16": bf16 [.., I], None.
      The global scales are f32 [.., 1] if global_scale is "per_token", otherwise None.

    Raises:
      NotImplementedError: the kernel does not accept the operands; the message is that of `check_config`.
    """
    config = config or tuning.tuned("swiglu_quantize", gate_up.size // (2 * BLOCK_SIZE), TuningConfig)
    if problem := check_config(gate_up, masked_m, global_scale, out, config):
        raise NotImplementedError(f"swiglu_quantize kernel: {problem}")
    *lead, two_i = gate_up.shape
    rows, blocks = int(np.prod(lead, dtype=np.int64)), two_i // 2 // BLOCK_SIZE
    m = lead[-1]
    per_token = out != "bf16" and isinstance(global_scale, str)
    operands, scale_stride = [gate_up.reshape(rows, two_i)], None
    if out != "bf16" and not per_token:
        flat, scale_stride = rows_scale(global_scale, lead)
        operands.append(flat)
    work = RowWork(rows, blocks, m if masked_m is not None else rows, config, per_token)
    work.add_schedule(operands, masked_m)
    products = _Products(blocks, out, scale_stride, per_token)

    def body(*refs):
        x_ref, *refs = refs
        g_ref, refs = (None, refs) if scale_stride is None else (refs[0], refs[1:])
        counts_ref, results, ends_ref = work.schedule_refs(refs)
        work.run(counts_ref, ends_ref, functools.partial(products.unit, x_ref, g_ref, results))

    if out == "nvfp4":
        out_type = [
            jax.ShapeDtypeStruct((rows, two_i // 4), jnp.uint8),
            jax.ShapeDtypeStruct((rows, blocks), jnp.float8_e4m3fn),
        ]
    else:
        out_type = [jax.ShapeDtypeStruct((rows, two_i // 2), jnp.bfloat16)]
    if per_token:
        out_type.append(jax.ShapeDtypeStruct((rows, 1), jnp.float32))
    results = launch.kernel(
        body, tuple(out_type), grid=work.grid, scratch_types=work.scratch_types, interpret=interpret
    )(*operands)
    results = tuple(r.reshape(*lead, r.shape[-1]) for r in results)
    return results if per_token else (*results, None)


@dataclasses.dataclass(frozen=True)
class _Products:
    """What a thread block does with its items.

    blocks: NVFP4 blocks of a row of the result. scale_stride: as in `rows_scale`; None if no scale is given.
    """

    blocks: int
    out: str
    scale_stride: int | None
    per_token: bool

    def unit(self, x_ref: Any, g_ref: Any, results: list[Any], items: list[Item]) -> None:
        """Computes and stores the NVFP4 blocks `items`. With a scale per token they are one whole row."""
        loaded = [self._load(x_ref, item) for item in items]  # before any arithmetic, so that all loads are in flight
        if self.per_token:
            products = [swiglu(*words) for words in loaded]
            scale = scale_of_row([values for values, _ in products], AMAX_DIVISOR)
            store_row_scale(results[-1], items[0], scale)
            scales = encode_scales(scale)
            for item, (values, amax) in zip(items, products, strict=True):
                store_products(results, item, values, amax, scales, self.out)
            return
        for item, words in zip(items, loaded, strict=True):
            scales = None if self.scale_stride is None else row_encode_scales(g_ref, item, self.scale_stride)
            store_products(results, item, *swiglu(*words), scales, self.out)

    def _load(self, x_ref, item):
        """16 gates and 16 ups, as 8 words of two bf16 each."""
        gate = item.block + item.row * self.blocks
        return [lanes.gather(x_ref, b, 8, where=item.valid) for b in (gate, gate + self.blocks)]


# --- one block of 16 columns; shared with the fused epilogue of the grouped GEMM ---


def store_products(
    refs: Sequence[Any], item: Item, values: list[jax.Array], amax: jax.Array, scales: EncodeScales | None, out: str
) -> None:
    """Stores 16 products per lane, one NVFP4 block, in the form `out`. `scales` may be None for "bf16"."""
    if out == "bf16":
        pairs = zip(values[::2], values[1::2], strict=True)
        lanes.scatter(refs[0], item.block, [lane_math.pack_bf16(*pair) for pair in pairs], where=item.valid)
        return
    assert scales is not None
    encoded = encode_block(values, amax, scales, four_over_six=False)
    if out == "nvfp4":
        store_block(refs[0], refs[1], item, encoded)
        return
    lanes.scatter(refs[0], item.block, decoded_bf16(encoded, values), where=item.valid)


def swiglu(gate_words: Sequence[jax.Array], up_words: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """16 products silu(gate) * up in f32 and their `block_amax`. The arguments are 8 words of two bf16 each."""
    gates, ups = unpack_bf16(gate_words), unpack_bf16(up_words)
    values = [lane_math.mul_rn(silu(g), u) for g, u in zip(gates, ups, strict=True)]
    amax = block_amax(values)
    # Compared as unsigned integers, bf16 values below -80 are larger than all others, except for negative NaNs.
    largest = gate_words[0]
    for word in gate_words[1:]:
        largest = lane_math.max_u16x2(largest, word)
    far = (largest >= np.uint32((_BF16_MINUS_80 + 1) << 16)) | ((largest & 0xFFFF) > _BF16_MINUS_80)

    def anywhere():
        again = [lane_math.mul_rn(_silu_anywhere(g), u) for g, u in zip(gates, ups, strict=True)]
        return [*again, block_amax(again)]

    *values, amax = lanes.replace_where(far | (amax != amax), anywhere, [*values, amax])
    return list(values), amax


def silu(x: jax.Array) -> jax.Array:
    """x * sigmoid(x) in f32, for finite x >= -80 that bf16 can represent."""
    return lane_math.mul_rn(x, _reciprocal_of_one_plus(_exp_of_bf16(-x)))


def _silu_anywhere(x):
    """x * sigmoid(x) in f32, for any x that bf16 can represent."""
    far = x < np.float32(-80)
    e = _exp_of_bf16(jnp.maximum(jnp.where(far, x + np.float32(80), -x), np.float32(-126)))
    near_value = lane_math.mul_rn(x, _reciprocal_of_one_plus(e))
    far_value = lane_math.mul_rn(lane_math.mul_rn(x, e), np.float32(np.exp(-80.0)))
    return jnp.where(far, far_value, near_value)


def _exp_of_bf16(y):
    """e^y for y of at most 8 significant bits.

    y * high is exact, and e^(y low ln 2) = 1 + y low ln 2 within 8e-8 for |y| <= 91.
    """
    power = lane_math.exp2_approx(lane_math.mul_rn(y, _LOG2E_HIGH))
    return lane_math.fma_rn(power, lane_math.mul_rn(y, _LOW_LN2), power)


def _reciprocal_of_one_plus(e):
    d = lane_math.add_rn(e, np.float32(1))
    r = lane_math.reciprocal_approx(d)
    return lane_math.fma_rn(lane_math.negative_fma_rn(d, r, np.float32(1)), r, r)
