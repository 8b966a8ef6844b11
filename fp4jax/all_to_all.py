"""Dispatch and combine through one all_to_all of rows of bytes: where kernels cannot store to peers, between hosts say.

On Hopper a kernel quantizes the tokens and puts the rows where they leave from, in one pass; elsewhere XLA does.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from fp4jax.implementations import Call, has_hopper_gpu, run_implementation
from fp4jax.nvfp4 import quantize
from fp4jax.permute import depermute_combine, permute_to_masked
from fp4jax.wire_formats import from_bytes, to_bytes, wire_arrays
from pallas_kernels import dispatch as dispatch_kernels
from pallas_kernels.row_plan import Routes


def dispatch_all_to_all(
    parts: list[Array],
    scale: Float[Array, ""] | None,
    ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    *,
    routes: Routes,
    axis_name: str,
    quantized: bool,
    implementation: str | None,
) -> tuple[list[Array], Int[Array, "rows s"], Float[Array, "rows s"], Int[Array, "t c"]]:
    """The exchange as one all_to_all of u8 rows -> (received parts, local ids, local weights, send map).

    parts: what a row consists of, [T, n]; or, to be `quantized` here, one [T, H] with a `scale` (None: per token).
    """
    problem = dispatch_kernels.check_pack(parts, routes, quantize_scale=quantize_mode(scale, quantized))
    like = _row_of(parts, scale, routes, quantized)
    row_bytes = sum(p.shape[1] * p.dtype.itemsize for p in like)
    if implementation != "xla" and problem is None and has_hopper_gpu():
        row_bytes = -(-row_bytes // 16) * 16  # what the kernel writes
    options = dict(routes=routes, quantized=quantized)
    payload, send_map = run_implementation(
        "dispatch",
        implementation,
        (parts, scale, ids, topk_weights),
        xla=Call.of(_pack_xla, **options, row_bytes=row_bytes, implementation=implementation),
        mosaic_gpu=Call.of(_pack_kernel, **options),
        problem=problem,
    )
    arrays = from_bytes(_exchange(payload, axis_name), like)
    local_weights = arrays.pop() if routes.form == "per_peer" else None
    local_ids = _localize(arrays.pop(), routes.local_experts, axis_name)
    if local_weights is None:
        local_weights = jnp.ones(local_ids.shape, jnp.float32)
    return arrays, local_ids, local_weights, send_map


def quantize_mode(scale: Any, quantized: bool) -> Any:
    """What the kernels call `quantize_scale`: None if nothing is quantized on the way."""
    return ("per_token" if scale is None else scale) if quantized else None


def _row_of(parts, scale, routes, quantized):
    """Structs of what a row of the payload consists of."""
    tokens = parts[0].shape[0]
    row = [jax.ShapeDtypeStruct(p.shape, p.dtype) for p in parts]
    if quantized:
        row = jax.eval_shape(lambda x: wire_arrays(quantize(x, global_scale="per_token"), "nvfp4"), row[0])
        row = row[: 2 + (scale is None)]
    ids = jax.ShapeDtypeStruct((tokens, routes.k if routes.form == "per_peer" else 1), jnp.int32)
    weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
    return [*row, ids, weights] if routes.form == "per_peer" else [*row, ids]


def _pack_xla(parts, scale, ids, topk_weights, *, routes, quantized, row_bytes, implementation):
    """-> (u8 [devices, capacity, row_bytes], map): the rows for every device, bytes side by side."""
    if quantized:
        with jax.named_scope("quantize"):
            x = quantize(parts[0], global_scale=quantize_mode(scale, True), implementation=implementation)
        parts = wire_arrays(x, "nvfp4")
    valid = (ids >= 0) & (ids < routes.devices * routes.local_experts)
    peer = jnp.where(valid, ids // routes.local_experts, -1)
    rows = [*parts, ids]
    if routes.form == "per_peer":
        ranks = jnp.arange(routes.devices, dtype=jnp.int32)
        destination = jnp.where(jnp.any(peer[:, :, None] == ranks, axis=1), ranks, -1)
        rows.append(topk_weights)
    else:  # every route is a row of its own; its weight stays at home
        destination = peer.reshape(-1, 1)
        rows = [*(jnp.repeat(a, routes.k, axis=0) for a in parts), ids.reshape(-1, 1)]
    payload = to_bytes(rows)
    payload = jnp.pad(payload, ((0, 0), (0, row_bytes - payload.shape[1])))
    sent = permute_to_masked(
        payload, None, destination, num_experts=routes.devices, capacity=routes.capacity, implementation=implementation
    )
    # 0xFF in every pad: ids become -1 and floats NaN, so that nothing can come to depend on a pad unnoticed.
    filled = (jnp.arange(routes.capacity) < sent.masked_m[:, None])[..., None]
    return jnp.where(filled, sent.x, jnp.uint8(0xFF)), sent.row_map.reshape(ids.shape[0], routes.columns)


def _pack_kernel(parts, scale, ids, topk_weights, *, routes, quantized):
    return dispatch_kernels.pack(parts, ids, topk_weights, routes, quantize_scale=quantize_mode(scale, quantized))


def combine_all_to_all(
    y: Float[Array, "rows h"],
    send_map: Int[Array, "t s"],
    weights: Float[Array, "t s"],
    *,
    devices: int,
    axis_name: str,
    implementation: str | None,
) -> Float[Array, "t h"]:
    """The way back as one all_to_all of u8 rows, summed at home."""
    payload = to_bytes([y]).reshape(devices, y.shape[0] // devices, -1)
    (home,) = from_bytes(_exchange(payload, axis_name), [y])
    return depermute_combine(home, send_map, weights, implementation=implementation)


def _exchange(payload, axis_name):
    """u8 [R, C, bytes], block r for device r -> [R*C, bytes], block r from device r."""
    received = lax.all_to_all(payload, axis_name, split_axis=0, concat_axis=0)
    return received.reshape(-1, payload.shape[-1])


def _localize(ids, local_experts, axis_name):
    local = ids - lax.axis_index(axis_name) * local_experts
    return jnp.where((ids >= 0) & (local >= 0) & (local < local_experts), local, -1)
