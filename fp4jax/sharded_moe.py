"""The expert layer on global arrays, with experts and tokens split over the devices of a mesh."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
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
    """Runs `moe_layer` on global arrays whose tokens and experts are split over the axis "ep" of a mesh.

    The function is compiled once per combination of shapes, config and mesh. T may be any number: if R devices do not
    divide it, tokens without experts fill it up to a multiple of R.

    Args:
      x: bf16 or f32 [T, H].
      topk_ids: i32 or i64 [T, k], ids of experts; -1 = no expert.
      topk_weights: floating-point [T, k].
      weights: all E experts; E is a multiple of R. To keep every expert on its device between calls, place the weights
        with `jax.device_put(weights, NamedSharding(mesh, PartitionSpec("ep")))`.
      config: how the experts run. Its `axis_name` may be None, and counts as "ep".
      mesh: a mesh with the one axis "ep", of type Explicit (as `jax.make_mesh` makes it) or Auto. Arguments may lie on
        this mesh, or on no mesh.
      buffers: as in `moe_layer`.

    Returns:
      y [T, H] in the dtype of x, and `MoEStats` of all devices. They lie on this mesh. If its axis is Explicit, y is
      split as x is, and the statistics are on every device.

    Raises:
      TypeError, ValueError: as `moe_layer`; also a mesh with other axes, or experts that do not divide by R.
      NotImplementedError: as `moe_layer`.
    """
    auto_mesh = expert_mesh(mesh)
    check_type("sharded_moe_layer: config", config, MoEConfig, "e.g. MoEConfig(num_experts=8)")
    if config.axis_name not in (None, EP_AXIS):
        raise ValueError(f"sharded_moe_layer: axis_name must be None or {EP_AXIS!r}, got {config.axis_name!r}")
    if config.num_experts % mesh.size:
        raise ValueError(f"sharded_moe_layer: {config.num_experts} experts cannot be split over {mesh.size} devices")
    config = dataclasses.replace(config, axis_name=EP_AXIS)
    run = partial(_sharded, config=config, mesh=auto_mesh)
    if mesh.axis_types == (AxisType.Auto,):
        return run(x, topk_ids, topk_weights, weights, buffers)
    # Inside auto_axes the compiler places arrays as on an Auto mesh; outside, results have the types of this mesh.
    x_sharding = jax.typeof(x).sharding
    y_spec = x_sharding.spec if x_sharding.mesh.axis_names == (EP_AXIS,) else P()
    shardings: list[Any] = [NamedSharding(mesh, spec) for spec in (y_spec, P(), P(EP_AXIS))]
    out_sharding: Any = shardings[0], MoEStats(*shardings[1:])
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        outside: Any = jax.sharding.auto_axes(run, axes=EP_AXIS, out_sharding=out_sharding)
        return outside(x, topk_ids, topk_weights, weights, buffers)


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
        check_vma=buffers is None,  # JAX has no references that vary over a mesh axis
    )
    y, stats = sharded(*padded, weights, buffers)
    return y[:tokens], stats


def expert_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh with an axis of type Auto, as this layer's shard_map needs; `jax.make_mesh` makes Explicit axes.

    Raises:
      TypeError, ValueError: the argument is no `jax.sharding.Mesh`, or its axes are not just "ep".
    """
    check_type("mesh", mesh, Mesh, f"`jax.make_mesh((devices,), ({EP_AXIS!r},))` makes one")
    if mesh.axis_names != (EP_AXIS,):
        raise ValueError(f"the mesh of the experts must have the one axis {EP_AXIS!r}, got {mesh.axis_names}")
    return Mesh(mesh.devices, mesh.axis_names)
