"""The expert layer as a pipeline of ops: dispatch, quantize, permute, GEMM 1 and SwiGLU, GEMM 2, depermute, combine."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.block_fp8 import from_fp8
from fp4jax.expert_parallel.exchange import (
    Dispatched,
    agree_global_scale,
    combine,
    combine_into_buffers,
    dispatch,
)
from fp4jax.expert_parallel.low_latency import ReceiveBuffers
from fp4jax.experts import MoEWeights
from fp4jax.grouped_gemm import contiguous_grouped_gemm, grouped_gemm_swiglu, masked_grouped_gemm
from fp4jax.grouped_gemm.packed_weights import is_nvfp4
from fp4jax.moe_config import MoEConfig
from fp4jax.nvfp4 import NVFP4Tensor, quantize
from fp4jax.operands import axis_size, check_array, check_routes, check_type, check_unsharded
from fp4jax.permute import depermute_combine, permute_to_contiguous, permute_to_masked
from fp4jax.swiglu import Output, silu


class MoEStats(NamedTuple):
    """What a layer returns besides its result.

    Attributes:
      dropped: i32 (), the number of routes lost to bad ids or capacities, summed over the devices of the mesh axis.
      buffers: the receive buffers to pass to the program's next layer; None if this layer was given none.
    """

    dropped: Int[Array, ""]
    buffers: ReceiveBuffers | None = None


def moe_layer(
    x: Float[Array, "t h"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    weights: MoEWeights,
    config: MoEConfig,
    buffers: ReceiveBuffers | None = None,
    residual: Float[Array, "t h"] | None = None,
) -> tuple[Float[Array, "t h"], MoEStats]:
    """Sends every token through its experts and sums their weighted outputs, and a residual if there is one.

        y[t] = sum over slots j of topk_weights[t, j] * expert_{topk_ids[t, j]}(x[t])  (+ residual[t])
        expert_e(x) = w2[e] @ (silu(gate) * up),  where (gate, up) are the halves of w13[e] @ x

    With `config.axis_name`, call it inside shard_map with the tokens, the routing and the experts of one device.
    `sharded_moe_layer` does that for global arrays.

    Args:
      x: bf16 or f32 [T, H]; with f32, the GEMMs return f32.
      topk_ids: i32 or i64 [T, k], global ids of experts; -1 = no expert.
      topk_weights: floating-point [T, k].
      weights: the experts of this device.
      config: how the experts run.
      buffers: receive buffers that the program keeps, see `expert_parallel.low_latency`; None: new ones in every call.
      residual: [T, H] in the dtype of x, added to the sum over the slots before that is rounded; None: nothing is
        added.

    Returns:
      y [T, H] in the dtype of x, and `MoEStats`.

    Raises:
      TypeError, ValueError: arguments of another kind, shape or dtype, or weights and config that do not fit.
      NotImplementedError: an implementation that the config names, or the buffers, cannot serve the call.
    """
    _check_arguments(x, topk_ids, topk_weights, weights, config, residual)
    if x.shape[0] == 0:  # shapes are the same on every device, so all return here and none waits in a collective
        return x, MoEStats(jnp.int32(0), buffers)
    if config.differentiable:
        plain: Any = weights.w13, weights.w2
        y = dense_moe(x, topk_ids, topk_weights, *plain)
        return y if residual is None else residual + y, MoEStats(jnp.int32(0))
    scale_1 = _token_scale(weights, config)
    local = _dispatch(x, topk_ids, topk_weights, scale_1, config, buffers)
    config = config.resolved(weights, local.ids.shape[0])
    rows = _quantize(local.x, scale_1, config)
    permuted = _permute(rows, local.ids, weights.w13.shape[0], config)
    expected_m = max(1, topk_ids.size // weights.w13.shape[0])  # a device receives topk_ids.size routes on average
    y = _experts(permuted, weights, config, x.dtype, expected_m)
    y, buffers = _bring_home(y, permuted.row_map, local, topk_weights, config, buffers, residual)
    return y, MoEStats(_all_dropped(permuted.dropped, local.sent, config), buffers)


def dense_moe(
    x: Float[Array, "t h"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    w13: Float[Array, "e two_i h"],
    w2: Float[Array, "e h i"],
) -> Float[Array, "t h"]:
    """Computes the layer with every expert on every token: unquantized and differentiable, with E/k times the FLOPs.

    It is meant for training, and as a reference for `moe_layer`.

    Args:
      x: bf16 or f32 [T, H].
      topk_ids: integer [T, k], ids of experts; -1 adds nothing.
      topk_weights: floating-point [T, k].
      w13: plain weights [E, 2I, H], gate rows first.
      w2: plain weights [E, H, I].

    Returns:
      y [T, H] in the dtype of x.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # GPUs would round f32 to TF32 otherwise
    gate_up = jnp.einsum("th,enh->etn", x, w13.astype(x.dtype), precision=precision)
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    y = jnp.einsum("eti,ehi->eth", (silu(gate) * up).astype(x.dtype), w2.astype(x.dtype), precision=precision)
    ids = jnp.asarray(topk_ids)[..., None]
    chosen = ids == jnp.arange(w13.shape[0], dtype=ids.dtype)[None, None, :]
    mixing = jnp.sum(jnp.where(chosen, topk_weights[..., None], 0), axis=1)
    # An expert that a token did not choose may give Inf or NaN, and 0 * Inf is NaN: such outputs are set to 0.
    y = jnp.where(jnp.any(chosen, axis=1).T[..., None], y.astype(jnp.float32), 0)
    mixed = jnp.einsum("te,eth->th", mixing, y, precision=lax.Precision.HIGHEST)
    return mixed.astype(x.dtype)


# --- the stages of `moe_layer`; each runs under a named scope, whose name profiles show ---


class _Local(NamedTuple):
    """The rows that this device's experts work on.

    Attributes:
      x: the rows, as an array or NVFP4Tensor [rows, H].
      ids: i32 [rows, k], experts of this device; -1 = not here.
      weights: f32 [rows, k].
      sent: what `dispatch` returned; None on one device, which has no dispatch.
    """

    x: Any
    ids: jax.Array
    weights: jax.Array
    sent: Dispatched | None


def _token_scale(weights, config):
    """Returns the global scale of the tokens, f32 () and the same on all devices, or "per_token"."""
    scale = weights.input_scale_1
    if scale is None:
        return "per_token"
    return agree_global_scale(scale, config.axis_name) if jnp.ndim(scale) else scale  # a scalar is agreed already


def _dispatch(x, topk_ids, topk_weights, scale_1, config, buffers):
    if config.axis_name is None:
        return _Local(x, topk_ids, topk_weights, None)
    with jax.named_scope("dispatch"):
        sent = dispatch(
            x, topk_ids, topk_weights, axis_name=config.axis_name, num_experts=config.num_experts, form=config.form,
            wire_format=config.wire_format, pair_capacity=config.pair_capacity,
            global_scale=scale_1 if config.wire_format == "nvfp4" else None, buffers=buffers,
            implementation=config.implementation,
        )  # fmt: skip
    rows = from_fp8(*sent.x) if isinstance(sent.x, tuple) else sent.x
    return _Local(rows, sent.local_ids, sent.local_weights, sent)


def _quantize(rows, scale_1, config):
    if config.activation_format_1 == "bf16" or isinstance(rows, NVFP4Tensor):
        return rows
    with jax.named_scope("quantize"):
        return quantize(rows, global_scale=scale_1, implementation=config.implementation)


def _permute(rows, ids, local_experts, config):
    """Moves rows to their experts. NVFP4 rows become bf16 code x block_scale on the way: Hopper multiplies in bf16."""
    options = dict(
        num_experts=local_experts, decode=isinstance(rows, NVFP4Tensor), implementation=config.implementation
    )
    with jax.named_scope("permute"):
        if config.layout == "contiguous":
            return permute_to_contiguous(rows, None, ids, num_rows=config.capacity, **options)
        return permute_to_masked(rows, None, ids, capacity=config.capacity or ids.shape[0], **options)


def _experts(permuted, weights, config, dtype, expected_m):
    if config.layout == "contiguous":
        counts, gemm = permuted.group_sizes, contiguous_grouped_gemm
        scale_2 = _scale_of_row(weights.input_scale_2, counts, permuted.x.shape[0])
    else:
        counts, gemm, scale_2 = permuted.masked_m, masked_grouped_gemm, weights.input_scale_2
    options = dict(expected_m=expected_m, out_dtype=dtype, implementation=config.implementation)
    out: Output = "bf16"
    act_scale: Any = None
    if config.activation_format_2 == "nvfp4":
        out, act_scale = "nvfp4_as_bf16", "per_token" if scale_2 is None else scale_2
    with jax.named_scope("gemm_1_swiglu"):
        act: Any = grouped_gemm_swiglu(
            permuted.x, weights.w13, counts, x_scale=permuted.row_scale, global_scale=act_scale, out=out, **options
        )
    if isinstance(act, tuple):  # scales per row, which SwiGLU computed
        act, act_scale = act
    with jax.named_scope("gemm_2"):
        return gemm(act, weights.w2, counts, x_scale=act_scale, **options)


def _bring_home(y, row_map, local, topk_weights, config, buffers, residual):
    """Returns the sums [T, H] of the tokens on their home device, and the buffers for the next layer."""
    options: dict[str, Any] = dict(implementation=config.implementation)
    if local.sent is None:
        with jax.named_scope("depermute"):
            return depermute_combine(y, row_map, local.weights, residual, **options), buffers
    home: dict[str, Any] = dict(
        topk_weights=topk_weights if config.form == "per_slot" else None, axis_name=config.axis_name
    )
    if buffers is not None:
        with jax.named_scope("combine"):
            return combine_into_buffers(y, row_map, local.sent, residual, **home)
    with jax.named_scope("depermute"):
        y = depermute_combine(y, row_map, local.weights, **options)
    with jax.named_scope("combine"):
        return combine(y, local.sent, residual, **home, **options), None


def _all_dropped(dropped, sent, config):
    return dropped if sent is None else lax.psum(dropped + sent.dropped, config.axis_name)


def _scale_of_row(scale, group_sizes, num_rows):
    """Expands scales per expert [L, 1, 1] to [rows, 1] for rows sorted by expert; pads get the last expert's scale."""
    if scale is None:
        return None
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(num_rows, dtype=ends.dtype)
    expert = jnp.searchsorted(ends, row, side="right", method="compare_all")  # compare_all is one kernel without a loop
    return scale.reshape(-1)[jnp.minimum(expert, scale.shape[0] - 1)][:, None]


def _check_arguments(x, topk_ids, topk_weights, weights, config, residual):
    op = "moe_layer"
    check_type(f"{op}: config", config, MoEConfig, "e.g. MoEConfig(num_experts=8)")
    check_type(f"{op}: weights", weights, MoEWeights, "MoEWeights(w13, w2) makes one")
    check_array(f"{op}: x", x, jnp.floating)
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be [T, H], one row per token, got {x.shape}; x.reshape(-1, H) makes rows")
    check_routes(op, x.shape[0], topk_ids, topk_weights)
    for name, w in (("w13", weights.w13), ("w2", weights.w2)):
        if not is_nvfp4(w):
            check_array(f"{op}: {name}", w, jnp.floating)
            continue
        w.validate()
        if config.differentiable:
            raise ValueError(f"{op}: differentiable=True needs plain expert weights, got {name} {w}")
    if not isinstance(weights.input_scale_1, float | None):
        check_array(f"{op}: input_scale_1", weights.input_scale_1, jnp.floating)
    if weights.input_scale_2 is not None:
        check_array(f"{op}: input_scale_2", weights.input_scale_2, jnp.floating)
    if residual is not None:
        check_array(f"{op}: residual", residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:
            raise ValueError(f"{op}: residual must be as x, {x.dtype} {x.shape}, got {residual.dtype} {residual.shape}")
    check_unsharded(op, x, topk_ids, topk_weights, weights, residual)
    _check_shapes(x, weights, config)


def _check_shapes(x, weights, config):
    devices = 1 if config.axis_name is None else axis_size("moe_layer", config.axis_name)
    w13, w2 = weights.w13.shape, weights.w2.shape
    hidden = x.shape[-1]
    if len(w13) != 3 or len(w2) != 3 or w13[2] != hidden or w2 != (w13[0], hidden, w13[1] // 2) or w13[1] % 2:
        raise ValueError(f"moe_layer: w13 must be [L, 2I, H] and w2 [L, H, I] for H = {hidden}, got {w13} and {w2}")
    if w13[0] * devices != config.num_experts:
        raise ValueError(
            f"moe_layer: {w13[0]} local experts on {devices} devices are not config.num_experts={config.num_experts}"
        )
    scale = weights.input_scale_2
    if scale is not None and scale.shape != (w13[0], 1, 1):
        raise ValueError(f"moe_layer: input_scale_2 must be [{w13[0]}, 1, 1], got {scale.shape}")
