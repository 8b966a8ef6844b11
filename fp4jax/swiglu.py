"""SwiGLU between the two grouped GEMMs: silu(gate) * up, and its quantization to NVFP4."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.global_scale import as_scale
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.nvfp4 import BLOCK_SIZE, NVFP4Tensor, quantize
from fp4jax.nvfp4_codes import decode_blocks
from fp4jax.operands import check_array
from pallas_kernels.rows import swiglu_quantize as swiglu_kernel
from pallas_kernels.rows.swiglu_quantize import OUTPUTS, Output


def swiglu_quantize(
    gate_up: Float[Array, "..."],
    masked_m: Int[Array, " e"] | None,
    *,
    global_scale: Any,
    out: Output = "nvfp4",
    implementation: Implementation | None = None,
) -> NVFP4Tensor | Float[Array, "..."] | tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Computes silu(gate) * up in f32 and returns it quantized to NVFP4 (dialect "exact"), or rounded once.

    The product is not rounded before it is quantized. Rows beyond `masked_m` may hold anything, here and in the result.

    Args:
      gate_up: floating-point [E, M, 2I], or contiguous rows [rows, 2I], usually the bf16 result of GEMM 1. The first
        half of the columns is gate, the second half is up. I is a multiple of 16 unless `out` is "bf16".
      masked_m: integer [E], valid rows per expert; None for contiguous rows.
      global_scale: as in `nvfp4.quantize`: an array such as f32 [E, 1, 1], or "per_token", "per_expert" or None for
        scales that are computed here. Not used by "bf16".
      out: the form of the result, see below.
      implementation: "xla", "mosaic_gpu", or None for the best one (`implementations.run_implementation`).

    Returns:
      "nvfp4": an NVFP4Tensor [E, M, I] or [rows, I]. "nvfp4_as_bf16": the same codes as bf16 code x block_scale, which
      is exact; GEMM 2 multiplies by the global scale (its `x_scale`). If the scale is computed here, this is the pair
      (values, global scale). "bf16": the unquantized product in the dtype of gate_up.

    Raises:
      ValueError, TypeError: `out` is unknown, or shapes or dtypes do not fit.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    if out not in OUTPUTS:
        raise ValueError(f"swiglu_quantize: out={out!r} is unknown; choose one of {OUTPUTS}")
    check_array("swiglu_quantize: gate_up", gate_up, jnp.floating)
    if masked_m is not None:
        check_array("swiglu_quantize: masked_m", masked_m, jnp.integer)
    if gate_up.ndim != (2 if masked_m is None else 3) or gate_up.shape[-1] % 2:
        raise ValueError(
            f"swiglu_quantize: gate_up must be [E, M, 2I] with masked_m or [rows, 2I] without, got {gate_up.shape}"
        )
    if out != "bf16" and gate_up.shape[-1] % (2 * BLOCK_SIZE):
        raise ValueError(f"swiglu_quantize: I must be a multiple of {BLOCK_SIZE}, got gate_up {gate_up.shape}")
    if isinstance(global_scale, str | None):
        mode, scale = global_scale, None
    else:
        mode, scale = None, as_scale(global_scale, (*gate_up.shape[:-1], gate_up.shape[-1] // 2))

    return run_implementation(
        "swiglu_quantize",
        implementation,
        (gate_up, masked_m, scale),
        xla=Call.of(_swiglu_xla, mode=mode, out=out),
        mosaic_gpu=Call.of(_swiglu_kernel, mode=mode, out=out),
        problem=swiglu_kernel.check_config(gate_up, masked_m, mode if scale is None else scale, out),
    )


def _swiglu_xla(gate_up, masked_m, scale, *, mode, out):
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    v = silu(gate) * up
    if out == "bf16":
        return v.astype(gate_up.dtype)
    given = mode if scale is None else scale
    quantized = quantize(v, global_scale=given, masked_m=masked_m, implementation="xla")
    if out == "nvfp4":
        return quantized
    decoded = decode_blocks(quantized.qdata, quantized.block_scale)
    return (decoded, quantized.global_scale) if scale is None else decoded


def _swiglu_kernel(gate_up, masked_m, scale, *, mode, out):
    *arrays, row_scale = swiglu_kernel.swiglu_quantize(gate_up, masked_m, mode if scale is None else scale, out=out)
    if out == "nvfp4":
        qdata, block_scale = arrays
        return NVFP4Tensor(qdata, block_scale, row_scale if scale is None else scale)
    return arrays[0] if row_scale is None else (arrays[0], row_scale)


def silu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x * sigmoid(x) in f32: within 4 ulp of float64 where the result is a normal number, NaN for x = -Inf."""
    # exp(-x) overflows for x below -88, while silu(x) is a normal number down to about -91. Below -80 sigmoid(x) equals
    # exp(x) in f32, computed as the square of exp(x / 2) so that no factor is subnormal.
    root = jnp.exp(jnp.minimum(x, -80) * 0.5)
    return jnp.where(x < -80, x * root * root, x / (1 + jnp.exp(-jnp.maximum(x, -80))))
