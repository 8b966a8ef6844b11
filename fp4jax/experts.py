"""The weights of an expert layer, and their quantization from plain arrays."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fp4jax import implementations
from fp4jax.grouped_gemm.gemm import Weights
from fp4jax.grouped_gemm.packed_weights import arrange_experts
from fp4jax.implementations import Implementation
from fp4jax.moe_config import ACTIVATION_FORMATS, ActivationFormat
from fp4jax.nvfp4 import NVFP4Tensor, quantize
from fp4jax.operands import check_array


class MoEWeights(NamedTuple):
    """Stacked expert weights: the E experts of a whole layer, or inside shard_map the L experts of one device.

    w13 and w2 may each be PackedWeights (the layout of the kernel on Hopper), an NVFP4Tensor, or a bf16 or f32 array.

    Attributes:
      w13: the weights of GEMM 1, [E, 2I, H]: the rows of gate, then the rows of up.
      w2: the weights of GEMM 2, [E, H, I].
      input_scale_1: f32 decode scale of the tokens, () and the same on every device. An array of several scales, such
        as [E, 1, 1], is reduced in every call to its maximum over all devices. None: a scale per token is computed.
      input_scale_2: f32 decode scales [E, 1, 1] of the activations of GEMM 2. None: a scale per row is computed.
    """

    w13: Weights
    w2: Weights
    input_scale_1: Float[Array, "..."] | float | None = None
    input_scale_2: Float[Array, "e 1 1"] | None = None


def prepare_experts(
    gate: Float[Array, "e i h"],
    up: Float[Array, "e i h"],
    down: Float[Array, "e h i"],
    *,
    activation_format: ActivationFormat | None = None,
    four_over_six: bool = False,
) -> MoEWeights:
    """Quantizes plain expert weights to NVFP4, for `moe_layer` and `sharded_moe_layer`.

    Every expert and projection gets a global scale of its own: amax / 2688, or amax / 1536 with four-over-six. If JAX
    sees a Hopper GPU, the weights are packed for its kernel, and zeros pad I to a multiple of 64. Weights whose H is
    not a multiple of 64 are not packed; XLA multiplies them. Packing does not change the values.

    Args:
      gate: bf16 or f32 [E, I, H]; I and H are multiples of 16.
      up: like gate.
      down: bf16 or f32 [E, H, I].
      activation_format: the format of the activations that these weights will be multiplied by, "nvfp4" or "bf16".
        None: either one. All three choices give the same weights.
      four_over_six: choose the better of two scales for every block, see `nvfp4.quantize`.

    Returns:
      `MoEWeights` without input scales, so that activation scales, where needed, are computed per token.

    Raises:
      TypeError, ValueError: arguments of another kind, dtype or shape.
    """
    op = "prepare_experts"
    for name, w in (("gate", gate), ("up", up), ("down", down)):
        check_array(f"{op}: {name}", w, jnp.floating)
    experts, size, hidden = gate.shape if gate.ndim == 3 else (-1, -1, -1)
    if gate.ndim != 3 or up.shape != gate.shape or down.shape != (experts, hidden, size):
        raise ValueError(
            f"{op}: gate and up must be [E, I, H] and down [E, H, I], got {gate.shape}, {up.shape} and {down.shape}"
        )
    if activation_format not in (None, *ACTIVATION_FORMATS):
        raise ValueError(
            f"{op}: activation_format={activation_format!r} is unknown; choose None or one of {ACTIVATION_FORMATS}"
        )
    w13 = quantize_gate_up(gate, up, four_over_six=four_over_six)
    w2 = quantize_experts(down, four_over_six=four_over_six)
    return MoEWeights(*arrange_experts(w13, w2, size, packed=runs_on_kernel(jnp.bfloat16)))


# The next two functions run under jit, so that no f32 copy of all weights is in memory at once.


@functools.partial(jax.jit, static_argnames="four_over_six")
def quantize_experts(w: Float[Array, "e n k"], *, four_over_six: bool = False) -> NVFP4Tensor:
    """Quantizes stacked weights [E, N, K] to NVFP4 with one global scale per expert, [E, 1, 1]."""
    return quantize(w, global_scale="per_expert", four_over_six=four_over_six)


@functools.partial(jax.jit, static_argnames="four_over_six")
def quantize_gate_up(
    gate: Float[Array, "e i h"], up: Float[Array, "e i h"], *, four_over_six: bool = False
) -> NVFP4Tensor:
    """Quantizes gate and up, each with a global scale per expert, and stacks them to w13 [E, 2I, H].

    The global scale of w13 has one entry per row, [E, 2I, 1].
    """
    halves = [quantize_experts(w, four_over_six=four_over_six) for w in (gate, up)]
    scales = [jnp.broadcast_to(t.global_scale, (*t.shape[:2], 1)) for t in halves]
    parts = [[t.qdata for t in halves], [t.block_scale for t in halves], scales]
    return NVFP4Tensor(*(jnp.concatenate(part, axis=1) for part in parts))


def runs_on_kernel(dtype: Any, implementation: Implementation | None = None) -> bool:
    """Whether the kernel of the grouped GEMM runs NVFP4 experts that compute in `dtype`; their weights are packed."""
    return implementations.has_hopper_gpu() and implementation in (None, "mosaic_gpu") and dtype == jnp.bfloat16
