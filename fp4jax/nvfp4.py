"""The NVFP4 format: value = e2m1 code x e4m3 block scale x f32 global scale (decode direction: multiply).

A block is 16 values along the last axis. Two codes share a byte, the even element in the low nibble. All arithmetic
that decides a stored bit is float32 with correctly rounded divisions, so that CPU, GPU, eager and jit give the same
bytes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int, UInt8

from fp4jax.implementations import Call, run_implementation
from fp4jax.operands import axis_size, check_array, check_type, summary
from fp4jax.rounding import div_rn, flush_subnormals, largest_magnitude, round_to_e2m1, round_to_e4m3
from pallas_kernels.rows import quantize as quantize_kernel
from pallas_kernels.simt.formats import AMAX_DIVISOR, AMAX_DIVISOR_FOUR_OVER_SIX, BLOCK_SIZE, GLOBAL_SCALE_RANGE

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitude of codes 0..7; bit 3 is the sign
DIALECTS = ("exact", "modelopt", "compressed_tensors")

_F32_MAX = np.float32(np.finfo(np.float32).max)
_E4M3_SATURATES_ABOVE = 464.0  # midpoint of 448 and the absent 480: up to here rounding alone gives 448
_E4M3_ROUNDS_TO_ZERO = 2.0**-10  # half of the smallest subnormal 2^-9; the tie goes to zero


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["qdata", "block_scale", "global_scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class NVFP4Tensor:
    """A tensor in NVFP4. A pytree whose leaves may also be specs, structs or None; `validate()` checks real arrays.

    qdata: u8 [..., K/2] packed codes. block_scale: e4m3 [..., K/16], linear layout. global_scale: f32, decode
    direction, shape () or the rank of qdata with a trailing 1 (tokens [T, 1], stacked weights [E, 1, 1] or [E, N, 1]).
    """

    qdata: Any
    block_scale: Any
    global_scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., K]."""
        return (*self.qdata.shape[:-1], 2 * self.qdata.shape[-1])

    @property
    def ndim(self) -> int:
        """Logical rank."""
        return self.qdata.ndim

    def __repr__(self) -> str:
        return summary(self, "nvfp4", "global_scale")

    def validate(self) -> "NVFP4Tensor":
        """Returns self; raises TypeError or ValueError naming the first leaf whose dtype or shape does not fit."""
        for name, dtype in (("qdata", jnp.uint8), ("block_scale", jnp.float8_e4m3fn), ("global_scale", jnp.float32)):
            found = getattr(getattr(self, name), "dtype", None)
            if found != dtype:
                raise TypeError(f"NVFP4Tensor.{name} must be {jnp.dtype(dtype)}, got {found}")
        k = self.shape[-1]
        if k == 0 or k % BLOCK_SIZE:
            raise ValueError(
                f"NVFP4Tensor.qdata {self.qdata.shape}: K = {k} is not a positive multiple of {BLOCK_SIZE}"
            )
        wanted = (*self.qdata.shape[:-1], k // BLOCK_SIZE)
        if self.block_scale.shape != wanted:
            raise ValueError(f"NVFP4Tensor.block_scale must be {wanted}, got {self.block_scale.shape}")
        check_scale_shape("NVFP4Tensor.global_scale", self.global_scale.shape, self.shape)
        return self


class QuantStats(NamedTuple):
    """Counters of one `quantize` call, i32, shape () or [E] (per expert). Rows beyond `masked_m` do not count.

    saturated_scales: blocks clipped because their scale lies above the e4m3 range. zero_scales: blocks with a non-zero
    value whose scale underflows to zero (they decode as zero, or at the dialect's smallest scale). nonfinite: NaN and
    Inf elements.
    """

    saturated_scales: Int[Array, "..."]
    zero_scales: Int[Array, "..."]
    nonfinite: Int[Array, "..."]


def quantize(
    x: Float[Array, "... k"],
    *,
    global_scale: Any = None,
    masked_m: Int[Array, " e"] | None = None,
    axis_name: str | None = None,
    dialect: str = "exact",
    four_over_six: bool = False,
    return_stats: bool = False,
    checked: bool = False,
    implementation: str | None = None,
) -> Any:
    """x -> NVFP4Tensor, or (NVFP4Tensor, QuantStats) with `return_stats`; nearest even, K a multiple of 16.

    `exact`, with gs = 1/global_scale: sf = e4m3(min(amax_block * (gs * (1/6)), 448)), code = e2m1(x * min(1/(sf *
    (1/gs)), FLT_MAX)), all in f32; a block of zeros has scale 0 and codes +-0. `modelopt` and `compressed_tensors`
    reproduce those tools byte for byte. `four_over_six` stores each block at the better of scale amax/6 and amax/4
    (squared error).

    Inputs below 2^-126 count as signed zero. A NaN or Inf makes its block's scale NaN (0x7F) and the block's codes
    zero, so that whatever the row is multiplied by is NaN. Both are counted in `QuantStats.nonfinite`, and neither
    enters a computed global scale.

    Args:
      x: bf16, f16 or f32.
      global_scale: f32 decode scale used as given (shape () or rank of x with trailing 1); or None: amax of the valid
        rows (and of all devices of `axis_name`) / 2688, / 1536 with four-over-six; "per_token": the same for each row;
        "per_expert": over the last two axes. amax 0 gives 1; computed scales are clamped to [2^-100, 2^100].
      masked_m: i32 [E] for x [E, M, K]: only rows below masked_m[e] are valid.
      axis_name: mesh axis to take the maximum over; only with global_scale=None.
      return_stats: also return `QuantStats`, per expert if `masked_m` or a per-expert scale is given.
      checked: `checkify.check` that scales are in range and valid inputs finite (an eager call throws by itself).

    Raises:
      ValueError, TypeError: shapes, dtypes, options or a concrete global scale outside [2^-100, 2^100].
    """
    _check_quantize_args(x, global_scale, masked_m, axis_name, dialect, four_over_six)
    valid = None if masked_m is None else valid_rows(masked_m, x.shape[1])[..., None]
    per_token = isinstance(global_scale, str) and global_scale == "per_token"
    divisor = np.float32(AMAX_DIVISOR_FOUR_OVER_SIX if four_over_six else AMAX_DIVISOR)
    if global_scale is None or isinstance(global_scale, str):
        amax = _valid_amax(flush_subnormals(x.astype(jnp.float32)), valid, global_scale, axis_name)
        scale = _scale_from(amax, lambda a: div_rn(a, divisor))
        encode_scale = _scale_from(amax, lambda a: div_rn(divisor, a))
    else:
        scale = as_scale(global_scale, x.shape)
        encode_scale = div_rn(np.float32(1), scale)

    quantized = run_implementation(
        "quantize",
        implementation,
        (x, masked_m, scale, encode_scale),
        xla=Call.of(_quantize_xla, dialect=dialect, four_over_six=four_over_six, return_stats=return_stats),
        mosaic_gpu=Call.of(_quantize_kernel, per_token=per_token, four_over_six=four_over_six),
        problem=_kernel_problem(x, "per_token" if per_token else scale, masked_m, dialect, return_stats),
    )
    if checked:
        finite = jnp.isfinite(x) if valid is None else jnp.isfinite(x) | ~valid
        low, high = GLOBAL_SCALE_RANGE
        checkify.check(
            jnp.all((scale >= low) & (scale <= high)), "quantize: a global_scale lies outside [2^-100, 2^100]"
        )
        checkify.check(
            jnp.all(finite), "quantize: {n} input elements are NaN or Inf", n=jnp.sum(~finite, dtype=jnp.int32)
        )
    if return_stats:
        quantized, (block_amax, raw) = quantized
        per_expert = x.ndim == 3 and (masked_m is not None or scale.shape == (x.shape[0], 1, 1))
        return quantized, _count(x, block_amax, raw, valid, axes=(1, 2) if per_expert else None)
    return quantized


def valid_rows(masked_m: Int[Array, " e"], rows: int) -> Bool[Array, "e m"]:
    """Of a masked layout [E, M, ..] with M = `rows`: which rows are valid."""
    counts = jnp.asarray(masked_m)[:, None]
    return jnp.arange(rows, dtype=counts.dtype)[None, :] < counts


def dequantize(t: NVFP4Tensor, dtype: Any = jnp.bfloat16) -> Float[Array, "..."]:
    """code x block_scale (exact) x global_scale in f32, then one rounding to `dtype`; shape [..., K]."""
    check_type("dequantize: t", t, NVFP4Tensor, "`quantize` makes one of an array, `unpack_weights` of PackedWeights")
    t.validate()
    return (decode_blocks(t.qdata, t.block_scale, jnp.float32) * t.global_scale).astype(dtype)


def decode_blocks(
    qdata: UInt8[Array, "... half_k"], block_scale: Float[Array, "... blocks"], dtype: Any = jnp.bfloat16
) -> Float[Array, "..."]:
    """code x block_scale [..., K] without the global scale: exact in bf16, f16 and f32 (6 significant bits at most)."""
    codes = unpack(qdata)
    # Twice the magnitude, branch-free: 0 1 2 3 4 6 8 12 for m = 0..7.
    m = (codes & 7).astype(jnp.int32)
    doubled = m + jnp.maximum(m - 4, 0) + 2 * jnp.maximum(m - 6, 0)
    magnitude = lax.bitcast_convert_type(doubled.astype(jnp.float32) * 0.5, jnp.uint32)
    value = lax.bitcast_convert_type(magnitude | ((codes >> 3).astype(jnp.uint32) << 31), jnp.float32)
    blocks = value.reshape(*block_scale.shape, BLOCK_SIZE) * block_scale.astype(jnp.float32)[..., None]
    return blocks.reshape(codes.shape).astype(dtype)


def unpack(qdata: UInt8[Array, "... half_k"]) -> UInt8[Array, "..."]:
    """Packed bytes [..., K/2] -> one code (0..15) per byte [..., K], the low nibble first."""
    return jnp.stack([qdata & 0xF, qdata >> 4], axis=-1).reshape(*qdata.shape[:-1], 2 * qdata.shape[-1])


def pack_codes(codes: UInt8[Array, "... k"]) -> UInt8[Array, "..."]:
    """Inverse of `unpack`."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def _quantize_xla(x, masked_m, scale, encode_scale, *, dialect, four_over_six, return_stats):
    """-> NVFP4Tensor; with `return_stats` also (amax of each block, the block scales before clipping and rounding)."""
    del masked_m  # invalid rows may hold anything
    x32 = flush_subnormals(x.astype(jnp.float32))
    blocks = x32.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    block_amax = largest_magnitude(blocks, axis=-1)
    block_amax = jnp.where(block_amax <= _F32_MAX, block_amax, np.float32(np.nan))  # and with it the block's scale
    if dialect == "exact":
        codes, block_scale, raw = _encode_exact(blocks, block_amax, scale, four_over_six)
    elif dialect == "modelopt":
        codes, block_scale, raw = _encode_modelopt(blocks, block_amax, scale)
    else:
        codes, block_scale, raw = _encode_compressed_tensors(blocks, block_amax, encode_scale)
    codes = jnp.where(jnp.isnan(block_amax)[..., None], jnp.zeros_like(codes), codes)
    quantized = NVFP4Tensor(pack_codes(codes.reshape(x.shape)), block_scale, scale)
    return (quantized, (block_amax, raw)) if return_stats else quantized


def _quantize_kernel(x, masked_m, scale, encode_scale, *, per_token, four_over_six):
    del encode_scale
    given = "per_token" if per_token else scale  # per token: computed in the same pass over x
    qdata, block_scale, row_scale = quantize_kernel.quantize(x, given, masked_m, four_over_six=four_over_six)
    return NVFP4Tensor(qdata, block_scale, row_scale if per_token else scale)


def _kernel_problem(x, global_scale, masked_m, dialect, return_stats):
    """None, or why the GPU kernel cannot serve this call."""
    if dialect != "exact":
        return f"dialect={dialect!r}; the kernel has 'exact' only"
    if return_stats:
        return "return_stats=True; the kernel does not count"
    return quantize_kernel.check_config(x, global_scale, masked_m)


# --- the dialects: blocks f32 [..., Kb, 16] -> codes u8, e4m3 scales, and the scales before clipping and rounding ---


def _encode_exact(blocks, block_amax, scale, four_over_six):
    gs = div_rn(np.float32(1), scale)
    inverse = div_rn(np.float32(1), gs)

    def candidate(reciprocal):
        raw = block_amax * (gs * np.float32(reciprocal))
        block_scale = round_to_e4m3(raw)
        multiplier = jnp.minimum(div_rn(np.float32(1), block_scale.astype(jnp.float32) * inverse), _F32_MAX)
        multiplier = jnp.where(block_amax == 0, np.float32(0), multiplier)
        return round_to_e2m1(blocks * multiplier[..., None]), block_scale, raw

    six = candidate(1 / 6)
    if not four_over_six:
        return six
    four = candidate(1 / 4)
    four_wins = _squared_error(blocks, *four[:2], scale) < _squared_error(blocks, *six[:2], scale)
    codes = jnp.where(four_wins[..., None], four[0], six[0])
    return codes, jnp.where(four_wins, four[1], six[1]), jnp.where(four_wins, four[2], six[2])


def _encode_modelopt(blocks, block_amax, scale):
    raw = div_rn(block_amax, jnp.broadcast_to(np.float32(6) * scale, block_amax.shape))
    block_scale = round_to_e4m3(jnp.maximum(raw, 2.0**-9))
    block_scale = jnp.where(block_amax == 0, jnp.ones_like(block_scale), block_scale)
    divisor = block_scale.astype(jnp.float32) * scale
    return _sign_of_input(round_to_e2m1(div_rn(blocks, divisor[..., None])), blocks), block_scale, raw


def _encode_compressed_tensors(blocks, block_amax, gs):
    raw = gs * div_rn(block_amax, np.float32(6))
    block_scale = round_to_e4m3(raw)
    block_scale = jnp.where(block_scale == 0, jnp.full_like(block_scale, 0.125), block_scale)
    divisor = div_rn(block_scale.astype(jnp.float32), jnp.broadcast_to(gs, block_scale.shape))
    return _sign_of_input(round_to_e2m1(div_rn(blocks, divisor[..., None])), blocks), block_scale, raw


def _sign_of_input(codes, blocks):
    """Both tools set the sign where x < 0: an input of -0 gets code 0, a negative that rounds to zero keeps code 8."""
    return jnp.where(blocks < 0, codes, codes & 7)


def _squared_error(blocks, codes, block_scale, scale):
    """Sum of (x - value)^2 per block in f32, halves added pairwise 16-8-4-2-1."""
    value = decode_blocks(pack_codes(codes.reshape(*codes.shape[:-2], -1)), block_scale, jnp.float32) * scale
    # The barriers keep XLA from contracting product and sum into one FMA, which would change the last bit. CPUs flush
    # subnormal errors and squares, GPUs do not: flush them everywhere.
    error = flush_subnormals(blocks - lax.optimization_barrier(value).reshape(blocks.shape))
    total = flush_subnormals(lax.optimization_barrier(error * error))
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


# --- global scales, counters, argument checks ---


def tensor_scale(x: Float[Array, "..."], axis_name: str | None = None) -> Float[Array, ""]:
    """The global scale that `quantize` computes for all of x, of all devices of `axis_name`, with global_scale=None."""
    amax = _valid_amax(flush_subnormals(x.astype(jnp.float32)), None, None, axis_name)
    return _scale_from(amax, lambda a: div_rn(a, np.float32(AMAX_DIVISOR)))


def _valid_amax(x32, valid, mode, axis_name):
    magnitude = jnp.abs(x32)
    use = jnp.isfinite(x32) if valid is None else jnp.isfinite(x32) & valid
    axes = {None: None, "per_token": -1, "per_expert": (-2, -1)}[mode]
    amax = jnp.max(jnp.where(use, magnitude, 0), axis=axes, keepdims=axes is not None, initial=0)
    return amax if axis_name is None else lax.pmax(amax, axis_name)


def _scale_from(amax, divide):
    return jnp.where(amax == 0, np.float32(1), jnp.clip(divide(amax), *map(np.float32, GLOBAL_SCALE_RANGE)))


def as_scale(global_scale: Any, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """A given global scale as f32, checked against a tensor of `shape`; concrete values must be in range."""
    if not isinstance(global_scale, int | float):
        check_array("quantize: global_scale", global_scale)
    scale = jnp.asarray(global_scale)
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"quantize: global_scale must be float32, got {scale.dtype}")
    check_scale_shape("quantize: global_scale", scale.shape, shape)
    if not isinstance(scale, jax.core.Tracer):
        values, (low, high) = np.asarray(scale, np.float64), GLOBAL_SCALE_RANGE
        fits = (values >= low) & (values <= high)
        if scale.ndim > 1 and scale.shape[-2] > 1:  # one for every row: those of pads may be NaN
            fits |= np.isnan(values)
        bad = values[~fits]
        if bad.size:
            raise ValueError(f"quantize: global_scale {bad.flat[0]} (shape {scale.shape}) is outside [2^-100, 2^100]")
    return scale.astype(jnp.float32)


def check_scale_shape(name: str, scale_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a scale of `scale_shape` is () or broadcasts over the rows of a tensor of `shape`."""
    fits = len(scale_shape) == len(shape) and scale_shape[-1] == 1
    fits = fits and all(s in (1, d) for s, d in zip(scale_shape[:-1], shape[:-1], strict=True))
    if scale_shape != () and not fits:
        raise ValueError(
            f"{name} must have shape () or {(*shape[:-1], 1)} (or 1 in place of an axis), got {scale_shape}"
        )


def _count(x, block_amax, raw, valid, axes):
    def count(flags):
        return jnp.sum(flags if valid is None else flags & valid, axis=axes, dtype=jnp.int32)

    return QuantStats(
        saturated_scales=count(raw > _E4M3_SATURATES_ABOVE),
        zero_scales=count((block_amax > 0) & (raw <= _E4M3_ROUNDS_TO_ZERO)),
        nonfinite=count(~jnp.isfinite(x)),
    )


def _check_quantize_args(x, global_scale, masked_m, axis_name, dialect, four_over_six):
    check_array("quantize: x", x)
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise TypeError(f"quantize: x must be bfloat16, float16 or float32, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % BLOCK_SIZE:
        raise ValueError(f"quantize: the last axis must be a positive multiple of {BLOCK_SIZE}, got shape {x.shape}")
    if dialect not in DIALECTS:
        raise ValueError(f"quantize: dialect={dialect!r} is unknown; choose one of {DIALECTS}")
    if four_over_six and dialect != "exact":
        raise ValueError(f"quantize: four_over_six needs dialect='exact', got {dialect!r}")
    if isinstance(global_scale, str) and global_scale not in ("per_token", "per_expert"):
        raise ValueError(f"quantize: global_scale={global_scale!r}: the named modes are 'per_token' and 'per_expert'")
    if isinstance(global_scale, str) and global_scale == "per_expert" and x.ndim < 3:
        raise ValueError(f"quantize: global_scale='per_expert' needs x [E, M, K], got shape {x.shape}")
    if axis_name is not None and global_scale is not None:
        raise ValueError("quantize: axis_name only goes with global_scale=None (a scale agreed across devices)")
    if axis_name is not None:
        axis_size("quantize", axis_name)
    if masked_m is not None:
        check_array("quantize: masked_m", masked_m, jnp.integer)
    if masked_m is not None and (x.ndim != 3 or masked_m.shape != x.shape[:1]):
        raise ValueError(f"quantize: masked_m {masked_m.shape} needs x [E, M, K] with the same E, got {x.shape}")
