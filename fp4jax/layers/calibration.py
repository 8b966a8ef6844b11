"""The activations of plain experts, measured for static NVFP4 scales, and the check of such scales."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fp4jax.layers.linear import largest
from fp4jax.rounding import exact_precision
from fp4jax.routing import Routing


class ExpertAmax(NamedTuple):
    """The largest magnitudes (amax) of the activations in one block.

    Attributes:
      input_1: f32 (), amax of the inputs of GEMM 1.
      input_2: f32 [E], amax of the inputs of GEMM 2 of every expert; 0 if no token visited the expert.
    """

    input_1: Float[Array, ""]
    input_2: Float[Array, "E"]


def measure_experts(
    hidden: Float[Array, "T H"],
    route: Routing,
    w13: Float[Array, "E two_i H"],
    w2: Float[Array, "E H I"],
    *,
    all_tokens: bool,
) -> tuple[Float[Array, "T H"], ExpertAmax]:
    """Runs plain experts one after the other, and measures the inputs of both GEMMs.

    Args:
      hidden: tokens, in the dtype of the computation.
      route: the experts of the tokens, and their weights.
      w13, w2: plain weights of all experts.
      all_tokens: measure GEMM 2 of an expert on all tokens, not only on those that are routed to it.

    Returns:
      The weighted sums of the experts' outputs, f32, and the amax of both GEMMs' inputs; NaN if an input is NaN.
    """
    dtype = hidden.dtype
    product = partial(jnp.einsum, "tk,nk->tn", precision=exact_precision(dtype))

    def add_expert(y: jax.Array, expert_and_weights: Any) -> tuple[jax.Array, jax.Array]:
        expert, *weights = expert_and_weights
        gate_up = product(hidden, weights[0].astype(dtype))
        gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
        act = jax.nn.silu(gate) * up
        chosen = route.topk_ids == expert
        hit = jnp.any(chosen, axis=1, keepdims=True)
        amax = largest(act, where=hit | all_tokens)
        out = product(act.astype(dtype), weights[1].astype(dtype)).astype(jnp.float32)
        weight = jnp.sum(jnp.where(chosen, route.topk_weights, 0), axis=1, keepdims=True)
        return y + jnp.where(hit, weight * out, 0), amax

    zeros = jnp.zeros((hidden.shape[0], w2.shape[1]), jnp.float32)
    y, amax_2 = jax.lax.scan(add_expert, zeros, (jnp.arange(w13.shape[0], dtype=jnp.int32), w13, w2))
    return y, ExpertAmax(largest(hidden), amax_2)


def check_input_scales(
    path: str, scales: Sequence[Float[Array, "..."] | None], quantized: Sequence[bool], num_experts: int
) -> None:
    """Checks the static scales of the two GEMMs of a block.

    Args:
      path: the name of the block, for errors.
      scales: the scale of the inputs of each GEMM, () and [E]; None: it gets no static scale.
      quantized: whether the weights of each GEMM are NVFP4.
      num_experts: the number of experts (E).

    Raises:
      ValueError: a scale is zero, negative or not finite, or the second one is not [E]; or only one of the two is
        given, and the GEMM of the other has NVFP4 weights or both GEMMs have plain ones. The message names the tensor.
    """
    names = [f"{path}.experts.input_scale_{gemm}" for gemm in (1, 2)]
    needed = quantized if any(quantized) else (True, True)
    missing = [name for name, scale, need in zip(names, scales, needed, strict=True) if scale is None and need]
    if missing and any(scale is not None for scale in scales):
        raise ValueError(f"{missing[0]} is missing while the other input scale is given")
    for name, scale in zip(names, scales, strict=True):
        if scale is not None:
            _check_values(name, scale)
    if scales[1] is not None and scales[1].shape != (num_experts,):
        raise ValueError(f"{names[1]} has shape {scales[1].shape}, expected ({num_experts},)")


def _check_values(name: str, scale: Float[Array, "..."]) -> None:
    """Raises ValueError, which names the tensor and the value, unless all scales are positive and finite."""
    flat = np.atleast_1d(np.asarray(scale, np.float32))
    bad = np.flatnonzero(~(np.isfinite(flat) & (flat > 0)))
    if bad.size:
        where = f"[{bad[0]}]" if flat.size > 1 else ""
        raise ValueError(f"{name}{where} = {flat[bad[0]]} must be positive and finite")
