"""The global scales of NVFP4: computed from data, or given and checked."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from fp4jax.operands import check_array
from fp4jax.rounding import div_rn, flush_subnormals
from pallas_kernels.simt.formats import AMAX_DIVISOR, GLOBAL_SCALE_RANGE


def tensor_scale(x: Float[Array, "..."], axis_name: str | None = None) -> Float[Array, ""]:
    """Returns the one global scale, f32 (), that `quantize` computes with global_scale=None.

    With `axis_name`, inside shard_map, the scale covers the x of all devices of that mesh axis.
    """
    amax = amax_of_valid(flush_subnormals(x.astype(jnp.float32)), None, None, axis_name)
    return scale_from(amax, lambda a: div_rn(a, np.float32(AMAX_DIVISOR)))


def amax_of_valid(
    x32: Float[Array, "..."], valid: Bool[Array, "..."] | None, mode: str | None, axis_name: str | None
) -> Float[Array, "..."]:
    """Returns the largest finite magnitude of f32 values where `valid`, 0 if there is none.

    mode: None: over everything; "per_token": over the last axis; "per_expert": over the last two. axis_name: also over
    the devices of this mesh axis.
    """
    magnitude = jnp.abs(x32)
    use = jnp.isfinite(x32) if valid is None else jnp.isfinite(x32) & valid
    axes = {None: None, "per_token": -1, "per_expert": (-2, -1)}[mode]
    amax = jnp.max(jnp.where(use, magnitude, 0), axis=axes, keepdims=axes is not None, initial=0)
    return amax if axis_name is None else lax.pmax(amax, axis_name)


def scale_from(amax: Float[Array, "..."], divide: Callable[..., Any]) -> Float[Array, "..."]:
    """Returns divide(amax) clipped to the range of global scales, or 1 where amax is 0."""
    return jnp.where(amax == 0, np.float32(1), jnp.clip(divide(amax), *map(np.float32, GLOBAL_SCALE_RANGE)))


def as_scale(global_scale: Any, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns a given global scale as f32, after checking that it fits a tensor of `shape`.

    Raises:
      TypeError, ValueError: the dtype or shape does not fit, or a concrete value is outside [2^-100, 2^100].
    """
    if not isinstance(global_scale, int | float):
        check_array("quantize: global_scale", global_scale)
    scale = jnp.asarray(global_scale)
    if not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"quantize: global_scale must be float32, got {scale.dtype}")
    check_scale_shape("quantize: global_scale", scale.shape, shape)
    if not isinstance(scale, jax.core.Tracer):
        values, (low, high) = np.asarray(scale, np.float64), GLOBAL_SCALE_RANGE
        fits = (values >= low) & (values <= high)
        if scale.ndim > 1 and scale.shape[-2] > 1:  # there is one scale per row, and that of a pad row may be NaN
            fits |= np.isnan(values)
        bad = values[~fits]
        if bad.size:
            raise ValueError(f"quantize: global_scale {bad.flat[0]} (shape {scale.shape}) is outside [2^-100, 2^100]")
    return scale.astype(jnp.float32)


def check_scale_shape(name: str, scale_shape: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `scale_shape` is () or broadcasts over the rows of a tensor of `shape`."""
    fits = len(scale_shape) == len(shape) and scale_shape[-1] == 1
    fits = fits and all(s in (1, d) for s, d in zip(scale_shape[:-1], shape[:-1], strict=True))
    if scale_shape != () and not fits:
        raise ValueError(
            f"{name} must have shape () or {(*shape[:-1], 1)} (or 1 in place of an axis), got {scale_shape}"
        )
