"""The expert layer on global arrays: experts and tokens split over the devices of a mesh."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
from jaxtyping import Array, Float, Int

from fp4jax.expert_parallel.low_latency import ReceiveBuffers
from fp4jax.experts import MoEWeights
from fp4jax.moe import MoEStats, moe_layer
from fp4jax.moe_config import MoEConfig
from fp4jax.operands import check_type

EP_AXIS = "ep"


def sharded_moe_layer(
    x: Float[Array, "t h"],
    topk_ids: Int[Array, "t k"],
    topk_weights: Float[Array, "t k"],
    weights: MoEWeights,
    config: MoEConfig,
    mesh: Mesh,
    buffers: ReceiveBuffers | None = None,
) -> tuple[Float[Array, "t h"], MoEStats]:
    """`moe_layer` on global arrays, tokens and experts split over the axis "ep" of a mesh; compiled once per shape.

    Any number of tokens: where it is no multiple of the devices, tokens that go to no expert fill up the last one.

    Args:
      weights: of all experts, E a multiple of the devices. To keep each expert on its device between calls, place them
        with `jax.device_put(weights, NamedSharding(mesh, PartitionSpec("ep")))`.
      mesh: has the one axis "ep". `config.axis_name` may be None; here it is "ep".

    Raises:
      TypeError, ValueError: as `moe_layer`, and for a mesh with other axes or experts that it does not divide.
    """
    mesh = expert_mesh(mesh)
    check_type("sharded_moe_layer: config", config, MoEConfig, "e.g. MoEConfig(num_experts=8)")
    if config.axis_name not in (None, EP_AXIS):
        raise ValueError(f"sharded_moe_layer: axis_name must be None or {EP_AXIS!r}, got {config.axis_name!r}")
    if config.num_experts % mesh.size:
        raise ValueError(f"sharded_moe_layer: {config.num_experts} experts cannot be split over {mesh.size} devices")
    config = dataclasses.replace(config, axis_name=EP_AXIS)
    return _sharded(x, topk_ids, topk_weights, weights, buffers, config=config, mesh=mesh)


@partial(jax.jit, static_argnames=("config", "mesh"))
def _sharded(x, topk_ids, topk_weights, weights, buffers, *, config, mesh):
    tokens = x.shape[0]
    pad = ((0, -tokens % mesh.size), (0, 0))
    padded = jnp.pad(x, pad), jnp.pad(topk_ids, pad, constant_values=-1), jnp.pad(topk_weights, pad)
    by_expert = jax.tree.map(lambda _: P(EP_AXIS), weights)
    if weights.input_scale_1 is not None and jnp.ndim(weights.input_scale_1) == 0:
        by_expert = by_expert._replace(input_scale_1=P())
    specs: Any = (P(), P(EP_AXIS))
    sharded = jax.shard_map(
        lambda x, ids, topk_weights, weights, buffers: moe_layer(x, ids, topk_weights, weights, config, buffers),
        mesh=mesh,
        in_specs=(P(EP_AXIS), P(EP_AXIS), P(EP_AXIS), by_expert, P(EP_AXIS)),
        out_specs=(P(EP_AXIS), MoEStats(*specs)),
        check_vma=buffers is None,  # JAX knows no references that vary over a mesh
    )
    y, stats = sharded(*padded, weights, buffers)
    return y[:tokens], stats


def expert_mesh(mesh: Mesh) -> Mesh:
    """The mesh with Auto axes, which shard_map needs here; `jax.make_mesh` makes Explicit ones.

    Raises:
      TypeError, ValueError: no mesh of devices, or other axes than the one named "ep".
    """
    check_type("mesh", mesh, Mesh, f"`jax.make_mesh((devices,), ({EP_AXIS!r},))` makes one")
    if mesh.axis_names != (EP_AXIS,):
        raise ValueError(f"the mesh of the experts must have the one axis {EP_AXIS!r}, got {mesh.axis_names}")
    return Mesh(mesh.devices, mesh.axis_names)
