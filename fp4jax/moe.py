"""The expert layer, composed from the ops: quantize, dispatch, permute, GEMM, SwiGLU, GEMM, depermute, combine."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.block_fp8 import from_fp8
from fp4jax.expert_parallel.exchange import FORMS, agree_global_scale, combine, combine_into_buffers, dispatch
from fp4jax.expert_parallel.low_latency import ReceiveBuffers
from fp4jax.expert_parallel.wire_formats import WIRE_FORMATS
from fp4jax.grouped_gemm.fused_swiglu import grouped_gemm_swiglu
from fp4jax.grouped_gemm.gemm import contiguous_grouped_gemm, masked_grouped_gemm
from fp4jax.grouped_gemm.packed_weights import PackedWeights
from fp4jax.implementations import IMPLEMENTATIONS
from fp4jax.nvfp4 import NVFP4Tensor, quantize
from fp4jax.operands import axis_size, check_array, check_routes, check_type, check_unsharded, described
from fp4jax.permute import depermute_combine, permute_to_contiguous, permute_to_masked
from fp4jax.swiglu import silu

LAYOUTS = ("masked", "contiguous")
ACTIVATION_FORMATS = ("nvfp4", "bf16")


class MoEWeights(NamedTuple):
    """Expert weights of one device, L local experts.

    w13 [L, 2I, H] (gate rows first) and w2 [L, H, I]: PackedWeights (what the kernel on Hopper takes), NVFP4Tensor, or
    bf16 / f32 arrays. input_scale_1: f32 decode scale of the tokens, (), the same on every device; per-expert scales
    [L, 1, 1] are reduced to their maximum over all devices, in every call. input_scale_2: f32 [L, 1, 1]. None = a
    dynamic scale per token.
    """

    w13: Any
    w2: Any
    input_scale_1: Any = None
    input_scale_2: Any = None


class MoEStats(NamedTuple):
    """dropped i32 []: routes lost to bad ids or capacities, summed over the devices of the axis.

    buffers: for the program's next layer, where this one was given some.
    """

    dropped: Int[Array, ""]
    buffers: ReceiveBuffers | None = None


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """Static choices of `moe_layer`.

    num_experts: of all devices together. wire_format and form: see `expert_parallel.dispatch`; unused without
    `axis_name`.
    layout: "masked" [L, M, ..] or "contiguous" (prefill). activation_format_1 / _2: "nvfp4" (W4A4) or "bf16" (W4A16)
    operand of each GEMM; None = as its weights say: NVFP4 for NVFP4 weights that come with an input scale, bf16 for
    all others, plain ones among them. Tokens that crossed as nvfp4 stay as they are. capacity: rows per local expert
    (M), contiguous: rows in all; None = the worst case for distinct ids per token. pair_capacity: rows per (sender,
    receiver), None = worst case.
    axis_name: mesh axis of the surrounding shard_map, None = one device.
    """

    num_experts: int
    wire_format: str = "bf16"
    form: str = "per_peer"
    layout: str = "masked"
    activation_format_1: str | None = None
    activation_format_2: str | None = None
    capacity: int | None = None
    pair_capacity: int | None = None
    axis_name: str | None = None
    implementation: str | None = None

    def __post_init__(self):
        for name, choices in (
            ("wire_format", WIRE_FORMATS),
            ("form", FORMS),
            ("layout", LAYOUTS),
            ("activation_format_1", (None, *ACTIVATION_FORMATS)),
            ("activation_format_2", (None, *ACTIVATION_FORMATS)),
            ("implementation", (None, *IMPLEMENTATIONS)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"MoEConfig: {name}={getattr(self, name)!r} is unknown; choose one of {choices}")
        if not isinstance(self.axis_name, str | None):
            raise TypeError(f"MoEConfig: axis_name must be the name of one mesh axis or None, got {self.axis_name!r}")
        for name in ("num_experts", "capacity", "pair_capacity"):
            value = getattr(self, name)
            if name != "num_experts" and value is None:
                continue
            if not isinstance(value, int | np.integer):
                raise TypeError(f"MoEConfig: {name} must be an int, got {described(value)}")
            if value < 1:
                raise ValueError(f"MoEConfig: {name} must be at least 1, got {value}")


def moe_layer(
    x: Float[Array, "t h"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    weights: MoEWeights,
    config: MoEConfig,
    buffers: ReceiveBuffers | None = None,
) -> tuple[Float[Array, "t h"], MoEStats]:
    """y[t] = sum over slots j of topk_weights[t, j] * expert_{topk_ids[t, j]}(x[t]); expert(x) = w2 (silu(gate) * up).

    x bf16 (or f32: then the GEMMs round to f32). With `config.axis_name`, called inside shard_map with this device's
    tokens, routing and local experts; buffers: see `expert_parallel.dispatch`. Raises ValueError or TypeError for
    arguments of another kind, shape or dtype, and where weights and config do not fit.
    """
    _check_arguments(x, topk_ids, topk_weights, weights, config)
    _check_weights(x, weights, config)
    config = _with_formats(config, weights)
    if x.shape[0] == 0:  # on every device, as shapes are the same there: no device waits for another's collective
        return x, MoEStats(jnp.int32(0), buffers)
    axis, scope = config.axis_name, jax.named_scope
    scale_1 = weights.input_scale_1
    if scale_1 is not None and jnp.ndim(scale_1):  # a scalar is the same on all devices: no collective
        scale_1 = agree_global_scale(scale_1, axis)
    global_scale = "per_token" if scale_1 is None else scale_1
    to_nvfp4 = functools.partial(quantize, global_scale=global_scale, implementation=config.implementation)
    rows, ids, row_weights, dispatched = x, topk_ids, topk_weights, None
    if axis is None and config.activation_format_1 == "nvfp4":
        with scope("quantize"):
            rows = to_nvfp4(x)
    if axis is not None:
        with scope("dispatch"):
            dispatched = dispatch(
                x, topk_ids, topk_weights, axis_name=axis, num_experts=config.num_experts, form=config.form,
                wire_format=config.wire_format, pair_capacity=config.pair_capacity,
                global_scale=global_scale if config.wire_format == "nvfp4" else None, buffers=buffers,
                implementation=config.implementation,
            )  # fmt: skip
            rows, ids, row_weights = dispatched.x, dispatched.local_ids, dispatched.local_weights
        if isinstance(rows, tuple):
            rows = from_fp8(*rows)
        if config.activation_format_1 == "nvfp4" and not isinstance(rows, NVFP4Tensor):
            with scope("quantize"):
                rows = to_nvfp4(rows)
    expected_m = max(1, topk_ids.size // weights.w13.shape[0])  # all devices send topk_ids.size routes on average
    y, row_map, dropped = _experts(rows, ids, weights, config, x.dtype, expected_m)
    home: dict[str, Any] = dict(topk_weights=topk_weights if config.form == "per_slot" else None, axis_name=axis)
    if dispatched is not None and buffers is not None:
        with scope("combine"):
            y, buffers = combine_into_buffers(y, row_map, dispatched, **home)
    else:
        with scope("depermute"):
            y = depermute_combine(y, row_map, row_weights, implementation=config.implementation)
        if dispatched is not None:
            with scope("combine"):
                y = combine(y, dispatched, **home, implementation=config.implementation)
    if dispatched is not None and axis is not None:
        dropped = lax.psum(dropped + dispatched.dropped, axis)
    return y, MoEStats(dropped, buffers)


def dense_moe(
    x: Float[Array, "t h"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    w13: Float[Array, "e two_i h"],
    w2: Float[Array, "e h i"],
) -> Float[Array, "t h"]:
    """The same layer with every expert on every token, unquantized and differentiable: E/k times the FLOPs.

    The reference for training and calibration; an id of -1 adds nothing.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None  # GPUs would use TF32 otherwise
    gate_up = jnp.einsum("th,enh->etn", x, w13.astype(x.dtype), precision=precision)
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    y = jnp.einsum("eti,ehi->eth", (silu(gate) * up).astype(x.dtype), w2.astype(x.dtype), precision=precision)
    ids = jnp.asarray(topk_ids)[..., None]
    chosen = ids == jnp.arange(w13.shape[0], dtype=ids.dtype)[None, None, :]
    mixing = jnp.sum(jnp.where(chosen, topk_weights[..., None], 0), axis=1)
    # An expert that was not chosen may have made Inf or NaN of a token, and times 0 that is NaN.
    y = jnp.where(jnp.any(chosen, axis=1).T[..., None], y.astype(jnp.float32), 0)
    mixed = jnp.einsum("te,eth->th", mixing, y, precision=lax.Precision.HIGHEST)
    return mixed.astype(x.dtype)


def _experts(rows, ids, weights, config, dtype, expected_m):
    """Local experts on rows [rows, H] (plain or NVFP4) -> their outputs, which of them a route's is, dropped routes."""
    scope, impl = jax.named_scope, config.implementation
    local_experts = weights.w13.shape[0]
    x, scales, row_scale, x_scale = rows, None, None, None
    if isinstance(rows, NVFP4Tensor):
        x, scales = rows.qdata, rows.block_scale
        row_scale, x_scale = (None, rows.global_scale) if rows.global_scale.ndim == 0 else (rows.global_scale, None)
    # Hopper multiplies code x block_scale in bf16, which is exact: NVFP4 rows are decoded while they are moved, and
    # their global scales go to the epilogue.
    decode = scales is not None

    with scope("permute"):
        options = dict(row_scale=row_scale, num_experts=local_experts, decode=decode, implementation=impl)
        if config.layout == "masked":
            capacity = max(1, ids.shape[0]) if config.capacity is None else config.capacity
            p = permute_to_masked(x, scales, ids, capacity=capacity, **options)
            counts, gemm = p.masked_m, masked_grouped_gemm
            scale_2 = weights.input_scale_2
        else:
            p = permute_to_contiguous(x, scales, ids, num_rows=config.capacity, **options)
            counts, gemm = p.group_sizes, contiguous_grouped_gemm
            scale_2 = _scale_of_row(weights.input_scale_2, p.group_sizes, p.x.shape[0])
    x_scale = x_scale if p.row_scale is None else p.row_scale
    options = dict(expected_m=expected_m, out_dtype=dtype, implementation=impl)

    with scope("gemm_1_swiglu"):
        out: str = "bf16"
        act_scale: Any = None
        if config.activation_format_2 == "nvfp4":
            out, act_scale = "nvfp4_as_bf16", "per_token" if scale_2 is None else scale_2
        act = grouped_gemm_swiglu(p.x, weights.w13, counts, x_scale=x_scale, global_scale=act_scale, out=out, **options)
        if isinstance(act, tuple):
            act, act_scale = act
    with scope("gemm_2"):
        return gemm(act, weights.w2, counts, x_scale=act_scale, **options), p.row_map, p.dropped


def _scale_of_row(scale, group_sizes, num_rows):
    """Per-expert scales [L, 1, 1] -> [rows, 1] for rows sorted by expert; a pad takes the last expert's."""
    if scale is None:
        return None
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(num_rows, dtype=ends.dtype)
    expert = jnp.searchsorted(ends, row, side="right", method="compare_all")  # one kernel, no loop
    return scale.reshape(-1)[jnp.minimum(expert, scale.shape[0] - 1)][:, None]


def _with_formats(config, weights):
    """The config with activation formats that are not given as the weights say."""
    formats = {
        "activation_format_1": (weights.w13, weights.input_scale_1),
        "activation_format_2": (weights.w2, weights.input_scale_2),
    }
    for name, (w, scale) in formats.items():
        if getattr(config, name) is None:
            is_w4a4 = isinstance(w, NVFP4Tensor | PackedWeights) and scale is not None
            config = dataclasses.replace(config, **{name: "nvfp4" if is_w4a4 else "bf16"})
    return config


def _check_arguments(x, topk_ids, topk_weights, weights, config):
    op = "moe_layer"
    check_type(f"{op}: config", config, MoEConfig, "e.g. MoEConfig(num_experts=8)")
    check_type(f"{op}: weights", weights, MoEWeights, "MoEWeights(w13, w2) makes one")
    check_array(f"{op}: x", x, jnp.floating)
    if x.ndim != 2:
        raise ValueError(f"{op}: x must be [T, H], one row per token, got {x.shape}; x.reshape(-1, H) makes rows")
    check_routes(op, x.shape[0], topk_ids, topk_weights)
    for name, w in (("w13", weights.w13), ("w2", weights.w2)):
        if isinstance(w, NVFP4Tensor | PackedWeights):
            w.validate()
        else:
            check_array(f"{op}: {name}", w, jnp.floating)
    if not isinstance(weights.input_scale_1, float | None):
        check_array(f"{op}: input_scale_1", weights.input_scale_1, jnp.floating)
    if weights.input_scale_2 is not None:
        check_array(f"{op}: input_scale_2", weights.input_scale_2, jnp.floating)
    check_unsharded(op, x, topk_ids, topk_weights, weights)


def _check_weights(x, weights, config):
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
