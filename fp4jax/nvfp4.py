"""The NVFP4 format: value = e2m1 code x e4m3 block scale x f32 global scale (decode direction: multiply).

A block is 16 consecutive values along the last axis; they share one block scale. Two codes share a byte, with the even
element in the low nibble. All arithmetic that decides a stored bit is float32 with correctly rounded divisions, so that
CPU and GPU, eager and under jit, give the same bytes.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float, Int

from fp4jax.global_scale import amax_of_valid, as_scale, check_scale_shape, scale_from
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.nvfp4_codes import (
    decode_blocks as decode_blocks,
    encode_compressed_tensors,
    encode_exact,
    encode_modelopt,
    pack_codes,
)
from fp4jax.operands import axis_size, check_array, check_type, summary
from fp4jax.rounding import div_rn, flush_subnormals, largest_magnitude
from pallas_kernels.rows import quantize as quantize_kernel
from pallas_kernels.simt.formats import (
    AMAX_DIVISOR,
    AMAX_DIVISOR_FOUR_OVER_SIX,
    BLOCK_SIZE,
    F32_MAX,
    GLOBAL_SCALE_RANGE,
)

Dialect = Literal["exact", "modelopt", "compressed_tensors"]
DIALECTS: tuple[str, ...] = get_args(Dialect)

_E4M3_SATURATES_ABOVE = 464.0  # midpoint of 448 and 480, the next step: up to it values round to 448
_E4M3_ROUNDS_TO_ZERO = 2.0**-10  # half of the smallest subnormal 2^-9; the tie rounds to zero


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["qdata", "block_scale", "global_scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class NVFP4Tensor:
    """A tensor in NVFP4, a pytree of three arrays.

    Under tree operations the leaves may also be PartitionSpec, ShapeDtypeStruct or None, so the constructor checks
    nothing; `validate()` does.

    Attributes:
      qdata: u8 [..., K/2], packed codes.
      block_scale: e4m3 [..., K/16], in the linear layout.
      global_scale: f32, decode direction (multiply). Its shape is () or has the rank of qdata and a trailing 1:
        [T, 1] for tokens, [E, 1, 1] or [E, N, 1] for stacked weights.
    """

    qdata: Any
    block_scale: Any
    global_scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [..., K] of the values."""
        return (*self.qdata.shape[:-1], 2 * self.qdata.shape[-1])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.qdata.ndim

    def __repr__(self) -> str:
        return summary(self, "nvfp4", "global_scale")

    def validate(self) -> "NVFP4Tensor":
        """Returns the tensor itself if its leaves fit together.

        Raises:
          TypeError, ValueError: a dtype or shape does not fit; the message names the first such leaf.
        """
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
    """Counters of one `quantize` call: i32, shape () or, per expert, [E]. Rows beyond `masked_m` are not counted.

    Attributes:
      saturated_scales: blocks whose scale is above the e4m3 range and was clipped to 448, which clips their values too.
      zero_scales: blocks that hold a non-zero value but whose scale rounds to zero. They decode to zeros, or to values
        at the smallest scale of the dialect.
      nonfinite: elements that are NaN or Inf.
    """

    saturated_scales: Int[Array, "..."]
    zero_scales: Int[Array, "..."]
    nonfinite: Int[Array, "..."]


@overload
def quantize(
    x: Float[Array, "... k"],
    *,
    global_scale: Any = None,
    masked_m: Int[Array, " e"] | None = None,
    axis_name: str | None = None,
    dialect: Dialect = "exact",
    four_over_six: bool = False,
    return_stats: Literal[False] = False,
    checked: bool = False,
    implementation: Implementation | None = None,
) -> NVFP4Tensor: ...


@overload
def quantize(
    x: Float[Array, "... k"],
    *,
    global_scale: Any = None,
    masked_m: Int[Array, " e"] | None = None,
    axis_name: str | None = None,
    dialect: Dialect = "exact",
    four_over_six: bool = False,
    return_stats: Literal[True],
    checked: bool = False,
    implementation: Implementation | None = None,
) -> tuple[NVFP4Tensor, QuantStats]: ...


def quantize(
    x: Float[Array, "... k"],
    *,
    global_scale: Any = None,
    masked_m: Int[Array, " e"] | None = None,
    axis_name: str | None = None,
    dialect: Dialect = "exact",
    four_over_six: bool = False,
    return_stats: bool = False,
    checked: bool = False,
    implementation: Implementation | None = None,
) -> NVFP4Tensor | tuple[NVFP4Tensor, QuantStats]:
    """Quantizes x to NVFP4 in blocks of 16 along its last axis, to nearest, with ties to the even code.

    The dialect "exact" computes in f32, with gs = 1 / global_scale,

        block_scale = e4m3(min(amax_of_block * (gs * (1/6)), 448))
        code        = e2m1(x * min(1 / (block_scale * (1/gs)), FLT_MAX))

    and gives a block of zeros the block scale 0 and codes +-0. The dialects "modelopt" and "compressed_tensors" give,
    byte for byte, what the quantizers of those two tools give.

    Inputs below 2^-126 in magnitude count as zeros of the same sign. A NaN or Inf makes the scale of its block NaN
    (byte 0x7F) and the codes of the block zero, so that whatever is computed from the block is NaN. NaN and Inf do not
    enter a computed global scale.

    Args:
      x: bf16, f16 or f32 [..., K]; K is a multiple of 16.
      global_scale: an f32 decode scale to use as it is, of shape () or of the rank of x with a trailing 1; or a way to
        compute it as amax / 2688 (amax / 1536 with four-over-six). None: one scale, from amax over all valid rows.
        "per_token": one scale per row. "per_expert": one scale per matrix of the last two axes, [..., 1, 1]. Where amax
        is 0 the scale is 1. Computed scales are clamped to [2^-100, 2^100].
      masked_m: i32 [E] for x [E, M, K]: only the first masked_m[e] rows of expert e are valid. None: all rows are.
      axis_name: with global_scale=None inside shard_map: the mesh axis over whose devices amax is taken.
      dialect: whose rounding to reproduce: "exact", "modelopt" or "compressed_tensors".
      four_over_six: try the block scales amax/6 and amax/4 for every block and keep the one with the smaller squared
        error, amax/6 on a tie. Needs dialect "exact".
      return_stats: also return `QuantStats`; its counters are per expert where x is [E, M, K] and comes with `masked_m`
        or with scales [E, 1, 1].
      checked: use `checkify.check` to assert that global scales are in range and valid inputs finite. An eager call
        raises the error by itself; a traced function needs `checkify.checkify` around it.
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`).

    Returns:
      The NVFP4Tensor of the shape of x; with `return_stats` the pair (NVFP4Tensor, QuantStats).

    Raises:
      ValueError, TypeError: shapes, dtypes or options do not fit, or a concrete global scale is outside
        [2^-100, 2^100].
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    _check_quantize_args(x, global_scale, masked_m, axis_name, dialect, four_over_six)
    valid = None if masked_m is None else valid_rows(masked_m, x.shape[1])[..., None]
    per_token = isinstance(global_scale, str) and global_scale == "per_token"
    divisor = np.float32(AMAX_DIVISOR_FOUR_OVER_SIX if four_over_six else AMAX_DIVISOR)
    if global_scale is None or isinstance(global_scale, str):
        amax = amax_of_valid(flush_subnormals(x.astype(jnp.float32)), valid, global_scale, axis_name)
        scale = scale_from(amax, lambda a: div_rn(a, divisor))
        encode_scale = scale_from(amax, lambda a: div_rn(divisor, a))
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
    """Returns a mask [E, M] with M = `rows`: row m of expert e in a masked layout is valid if m < masked_m[e]."""
    counts = jnp.asarray(masked_m)[:, None]
    return jnp.arange(rows, dtype=counts.dtype)[None, :] < counts


def dequantize(t: NVFP4Tensor, dtype: Any = jnp.bfloat16) -> Float[Array, "..."]:
    """Decodes t to an array [..., K]: (code x block_scale) x global_scale in f32, then one rounding to `dtype`."""
    check_type("dequantize: t", t, NVFP4Tensor, "`quantize` makes one of an array, `unpack_weights` of PackedWeights")
    t.validate()
    return (decode_blocks(t.qdata, t.block_scale, jnp.float32) * t.global_scale).astype(dtype)


def _quantize_xla(x, masked_m, scale, encode_scale, *, dialect, four_over_six, return_stats):
    """Returns the NVFP4Tensor; with `return_stats` also (amax per block, block scales before clipping and rounding)."""
    del masked_m  # rows that are not valid may hold anything, so they are quantized too
    x32 = flush_subnormals(x.astype(jnp.float32))
    blocks = x32.reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    block_amax = largest_magnitude(blocks, axis=-1)
    block_amax = jnp.where(block_amax <= F32_MAX, block_amax, np.float32(np.nan))  # Inf counts as NaN
    if dialect == "exact":
        codes, block_scale, raw = encode_exact(blocks, block_amax, scale, four_over_six)
    elif dialect == "modelopt":
        codes, block_scale, raw = encode_modelopt(blocks, block_amax, scale)
    else:
        codes, block_scale, raw = encode_compressed_tensors(blocks, block_amax, encode_scale)
    codes = jnp.where(jnp.isnan(block_amax)[..., None], jnp.zeros_like(codes), codes)
    quantized = NVFP4Tensor(pack_codes(codes.reshape(x.shape)), block_scale, scale)
    return (quantized, (block_amax, raw)) if return_stats else quantized


def _quantize_kernel(x, masked_m, scale, encode_scale, *, per_token, four_over_six):
    del encode_scale
    given = "per_token" if per_token else scale  # the kernel computes scales per token itself, in its one pass over x
    qdata, block_scale, row_scale = quantize_kernel.quantize(x, given, masked_m, four_over_six=four_over_six)
    return NVFP4Tensor(qdata, block_scale, row_scale if per_token else scale)


def _kernel_problem(x, global_scale, masked_m, dialect, return_stats):
    """Returns None if the GPU kernel can serve this call, else the reason why not."""
    if dialect != "exact":
        return f"dialect={dialect!r}; the kernel has 'exact' only"
    if return_stats:
        return "return_stats=True; the kernel does not count"
    return quantize_kernel.check_config(x, global_scale, masked_m)


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
