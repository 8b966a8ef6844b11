"""GEMM 1 of an expert layer and its SwiGLU as one op, so that gate and up [.., 2I] need not be written to memory.

The kernel rounds where the two separate ops round: it rounds the product to bf16 once, after the scales, and does not
round silu(gate) * up before it quantizes. Its result therefore equals that of the GEMM kernel followed by the SwiGLU
kernel bit for bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.global_scale import as_scale
from fp4jax.grouped_gemm.checks import check_operands
from fp4jax.grouped_gemm.gemm import (
    KernelPlan,
    Weights,
    gemm_xla,
    kernel_operands,
    plan_kernel,
    run_gemm,
)
from fp4jax.implementations import Call, Implementation, run_implementation
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.operands import check_array
from fp4jax.swiglu import OUTPUTS, Output, swiglu_quantize
from pallas_kernels.gemm import grouped_gemm as masked_gemm


def grouped_gemm_swiglu(
    x: Float[Array, "..."] | NVFP4Tensor,
    w13: Weights,
    counts: Int[Array, " e"],
    *,
    x_scale: Float[Array, "..."] | None = None,
    global_scale: Any = None,
    out: Output = "nvfp4",
    out_dtype: Any = jnp.bfloat16,
    expected_m: int | None = None,
    implementation: Implementation | None = None,
) -> Any:
    """Computes swiglu_quantize(grouped_gemm(x, w13, counts)), in the layout that the rank of x says.

    Args:
      x: NVFP4Tensor, bf16 or f32: masked [E, M, K] or contiguous [rows, K].
      w13: weights [E, 2I, K], gate rows first, as in `masked_grouped_gemm`.
      counts: i32 or i64 [E], valid rows per expert: masked_m of a masked x, group_sizes of a contiguous x.
      x_scale: scale of a plain x, as in `masked_grouped_gemm` or `contiguous_grouped_gemm`.
      global_scale: as in `swiglu_quantize`. If scales are to be computed here ("per_token", say), the two ops run one
        after the other, because a scale per token needs a whole row.
      out: as in `swiglu_quantize`.
      out_dtype: dtype of gate and up; the kernel has bfloat16 only.
      expected_m: as in `masked_grouped_gemm` or `contiguous_grouped_gemm`.
      implementation: "xla", "mosaic_gpu", or None for the best one.

    Returns:
      What `swiglu_quantize` returns: an NVFP4Tensor or an array, [E, M, I] or [rows, I]; with "nvfp4_as_bf16" and a
      scale computed here, the pair of that array and the scale.

    Raises:
      ValueError, TypeError: shapes or dtypes do not fit.
      NotImplementedError: implementation "mosaic_gpu" was named and cannot serve the call.
    """
    if not isinstance(x, NVFP4Tensor):
        check_array("grouped_gemm_swiglu: x", x)
    rank = len(x.shape)
    check_operands("grouped_gemm_swiglu", x, w13, counts, x_scale, expected_m, ndim=rank if rank in (2, 3) else 3)
    if out not in OUTPUTS:
        raise ValueError(f"grouped_gemm_swiglu: out={out!r} is unknown; choose one of {OUTPUTS}")
    if w13.shape[1] % 2:
        raise ValueError(f"grouped_gemm_swiglu: w13 must be [E, 2I, K], got {w13.shape}")
    if out != "bf16" and isinstance(global_scale, str | None):
        scale, plan = global_scale, KernelPlan(None, "a scale per token needs whole rows")
    else:
        scale = None if out == "bf16" else as_scale(global_scale, (*x.shape[:-1], w13.shape[1] // 2))
        plan = plan_kernel(x, w13, counts, expected_m, implementation, out=out, act_scale=scale)
        if plan.problem is None and jnp.dtype(out_dtype) != jnp.bfloat16:
            plan = KernelPlan(None, f"out_dtype must be bfloat16, got {jnp.dtype(out_dtype)}")
    if (isinstance(scale, str | None) and out != "bf16") or (plan.problem is not None and implementation is None):
        gate_up = run_gemm("grouped_gemm_swiglu", x, w13, counts, x_scale, expected_m, out_dtype, implementation)
        valid = counts if rank == 3 else None
        return swiglu_quantize(gate_up, valid, global_scale=scale, out=out, implementation=implementation)
    return run_implementation(
        "grouped_gemm_swiglu",
        implementation,
        (x, w13, counts, x_scale, scale),
        xla=Call.of(_xla, out=out, out_dtype=out_dtype),
        mosaic_gpu=Call.of(_kernel, out=out, config=plan.config),
        problem=plan.problem,
    )


def _xla(x, w13, counts, x_scale, scale, *, out, out_dtype):
    gate_up = gemm_xla(x, w13, counts, x_scale, out_dtype=out_dtype)
    valid = counts if gate_up.ndim == 3 else None
    return swiglu_quantize(gate_up, valid, global_scale=scale, out=out, implementation="xla")


def _kernel(x, w13, counts, x_scale, scale, *, out, config):
    x, words, w_scale, x_scale = kernel_operands(x, w13, x_scale)
    found: tuple[jax.Array, ...] = masked_gemm.grouped_gemm(
        x, words, w_scale, counts, x_scale, out=out, act_scale=scale, config=config
    )
    return NVFP4Tensor(found[0], found[1], scale) if out == "nvfp4" else found[0]
