"""What a grouped GEMM refuses before it runs."""

import jax.numpy as jnp
import numpy as np

from fp4jax.global_scale import check_scale_shape
from fp4jax.grouped_gemm.packed_weights import PackedWeights
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.operands import check_array, check_unsharded


def check_operands(op, x, w, sizes, x_scale, expected_m, ndim):
    """Raises ValueError or TypeError if the operands of a grouped GEMM do not fit; x must have `ndim` axes."""
    if isinstance(x, PackedWeights):
        raise TypeError(f"{op}: x must be an NVFP4Tensor or an array, got {x}; only weights are packed")
    for name, t in (("x", x), ("w", w)):
        if isinstance(t, NVFP4Tensor | PackedWeights):
            t.validate()
            continue
        check_array(f"{op}: {name}", t)
        if t.dtype not in (jnp.bfloat16, jnp.float32):
            raise TypeError(f"{op}: {name} must be an NVFP4Tensor, bfloat16 or float32, got {t.dtype}")
    check_array(f"{op}: counts", sizes)
    if len(x.shape) != ndim or len(w.shape) != 3 or x.shape[-1] != w.shape[-1] or sizes.shape != w.shape[:1]:
        raise ValueError(f"{op}: shapes do not fit: x {x.shape}, w {w.shape} (must be [E, N, K]), counts {sizes.shape}")
    if ndim == 3 and x.shape[0] != w.shape[0]:
        raise ValueError(f"{op}: x has {x.shape[0]} experts and w has {w.shape[0]}: x {x.shape}, w {w.shape}")
    if isinstance(w, NVFP4Tensor) and (w.global_scale.ndim != 3 or w.global_scale.shape[0] != w.shape[0]):
        raise ValueError(f"{op}: w.global_scale must be [E, 1, 1] or [E, N, 1], got {w.global_scale.shape}")
    if isinstance(x, NVFP4Tensor) and x_scale is not None:
        raise ValueError(f"{op}: x_scale is for a plain x; an NVFP4Tensor carries its own global_scale")
    if x_scale is not None:
        if not isinstance(x_scale, float):
            check_array(f"{op}: x_scale", x_scale)
        check_scale_shape(f"{op}: x_scale", jnp.shape(x_scale), x.shape)
    if sizes.dtype not in (jnp.int32, jnp.int64):
        raise TypeError(f"{op}: counts must be int32 or int64, got {sizes.dtype}")
    if expected_m is not None and not isinstance(expected_m, int | np.integer):
        raise TypeError(f"{op}: expected_m is a static hint, an int or None, got {expected_m!r}")
    if expected_m is not None and expected_m < 0:
        raise ValueError(f"{op}: expected_m must not be negative, got {expected_m}")
    check_unsharded(op, x, w, sizes, x_scale)
