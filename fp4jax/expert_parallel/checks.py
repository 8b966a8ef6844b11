"""What a dispatch refuses before it runs."""

from typing import Any, Literal, get_args

import jax.numpy as jnp

from fp4jax.expert_parallel.wire_formats import WIRE_FORMATS, WireFormat
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.operands import check_array, check_routes

Form = Literal["per_peer", "per_slot"]
FORMS: tuple[str, ...] = get_args(Form)


def check_dispatch(
    x: Any,
    topk_ids: Any,
    topk_weights: Any,
    num_experts: int,
    devices: int,
    form: Form,
    wire_format: WireFormat,
    pair_capacity: int | None,
    global_scale: Any,
) -> None:
    """Raises TypeError or ValueError, which names the argument, where the arguments of a dispatch do not fit."""
    if form not in FORMS:
        raise ValueError(f"dispatch: form={form!r} is unknown; choose one of {FORMS}")
    if wire_format not in WIRE_FORMATS:
        raise ValueError(f"dispatch: wire_format={wire_format!r} is unknown; choose one of {WIRE_FORMATS}")
    if num_experts < 1 or num_experts % devices:
        raise ValueError(f"dispatch: num_experts={num_experts} must be a positive multiple of the {devices} devices")
    if not isinstance(x, NVFP4Tensor):
        check_array("dispatch: x", x, jnp.floating)
    if len(x.shape) != 2:
        raise ValueError(f"dispatch: x must be [T, H], one row per token, got {x.shape}")
    check_routes("dispatch", x.shape[0], topk_ids, topk_weights)
    if pair_capacity is not None and pair_capacity < 1:
        raise ValueError(f"dispatch: pair_capacity must be at least 1, got {pair_capacity}")
    if isinstance(x, NVFP4Tensor):
        x.validate()
        if wire_format != "nvfp4":
            raise ValueError(f"dispatch: x is an NVFP4Tensor, so wire_format must be 'nvfp4', got {wire_format!r}")
    if global_scale is not None and (wire_format != "nvfp4" or isinstance(x, NVFP4Tensor)):
        raise ValueError("dispatch: global_scale is only for a plain x sent with wire_format='nvfp4'")
    if isinstance(global_scale, str) and global_scale != "per_token":
        raise ValueError(f"dispatch: global_scale={global_scale!r} is unknown; give a number, 'per_token' or None")
    if not isinstance(global_scale, str | None) and jnp.ndim(global_scale):
        raise ValueError(f"dispatch: global_scale must be a scalar, got shape {jnp.shape(global_scale)}")
