"""SwiGLU and requantization between the two grouped GEMMs: v = silu(gate) * up in f32, quantized from f32."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.implementations import Call, run_implementation
from fp4jax.nvfp4 import BLOCK_SIZE, NVFP4Tensor, as_scale, decode_blocks, quantize
from fp4jax.operands import check_array
from pallas_kernels.rows import swiglu_quantize as swiglu_kernel
from pallas_kernels.rows.swiglu_quantize import OUTPUTS


def swiglu_quantize(
    gate_up: Float[Array, "..."],
    masked_m: Int[Array, " e"] | None,
    *,
    global_scale: Any,
    out: str = "nvfp4",
    implementation: str | None = None,
) -> NVFP4Tensor | Float[Array, "..."] | tuple[Float[Array, "..."], Float[Array, "..."]]:
    """gate_up [E, M, 2I] (gate = first half of the columns) -> silu(gate) * up [E, M, I] in the form `out`.

    GEMM 1 has rounded gate and up to bf16; the product stays f32 until it is quantized (dialect exact), or until the
    one rounding of "bf16". Rows beyond `masked_m` may hold anything.

    Args:
      masked_m: valid rows per expert, or None for contiguous rows [rows, 2I].
      global_scale: as in `nvfp4.quantize`, e.g. f32 [E, 1, 1] or "per_token"; not used by "bf16".
      out: "nvfp4"; "nvfp4_as_bf16": the same values as bf16 code x block_scale (exact), to be multiplied by
        x_scale=global_scale in GEMM 2; a pair of them and the global scale where that is computed here; "bf16":
        unquantized (f32 if gate_up is f32).

    Raises:
      ValueError: unknown `out`, or shapes that do not fit.
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
    """x * sigmoid(x) in f32, within 4 ulp of float64 wherever the result is a normal number; NaN for -Inf."""
    # exp(-x) overflows below -88 while silu is still a normal number down to -91: there sigmoid(x) = exp(x), taken as a
    # square so that no factor is subnormal.
    root = jnp.exp(jnp.minimum(x, -80) * 0.5)
    return jnp.where(x < -80, x * root * root, x / (1 + jnp.exp(-jnp.maximum(x, -80))))
