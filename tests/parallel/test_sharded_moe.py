"""sharded_moe_layer: the layer on global arrays equals the float64 oracle and the layer on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import oracles
from fp4jax import (
    MoEConfig,
    MoEWeights,
    PackedWeights,
    dequantize,
    moe_layer,
    prepare_experts,
    sharded_moe_layer,
    unpack_weights,
)

pytestmark = pytest.mark.usefixtures("quick_compile")

E, K, H, I = 8, 2, 64, 32
W4A16 = MoEConfig(E, form="per_slot")


def _batch(rng, tokens):
    x = oracles.round_bf16(rng.standard_normal((tokens, H)).astype(np.float32))
    ids = np.argsort(rng.random((tokens, E)), axis=1)[:, :K].astype(np.int32)
    return x, ids, rng.uniform(0.1, 1, (tokens, K)).astype(np.float32)


def _weights(rng):
    shapes = (E, I, H), (E, I, H), (E, H, I)
    return prepare_experts(*(jnp.asarray(0.2 * rng.standard_normal(shape), jnp.float32) for shape in shapes))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "axis_type", "counts"),
    [
        (2, AxisType.Auto, (7, 16)),
        (4, AxisType.Explicit, (7,)),
    ],
)
def test_any_number_of_tokens(rng, devices, axis_type, counts):
    """A decode step, and numbers that the devices do not divide; with the mesh that jax.make_mesh makes, too."""
    mesh = jax.make_mesh((devices,), ("ep",), axis_types=(axis_type,), devices=jax.devices()[:devices])
    weights = _weights(rng)
    placed = jax.device_put(weights, NamedSharding(mesh, P("ep")))
    plain = [unpack_weights(w) if isinstance(w, PackedWeights) else w for w in weights[:2]]  # on a GPU they are packed
    w13, w2 = (np.asarray(dequantize(w, jnp.float32), np.float64) for w in plain)
    for tokens in counts:
        x, ids, topk = _batch(rng, tokens)
        arguments = jnp.asarray(x, jnp.bfloat16), jnp.asarray(ids), jnp.asarray(topk)
        y, stats = sharded_moe_layer(*arguments, placed, W4A16, mesh)
        assert y.dtype == jnp.bfloat16 and int(stats.dropped) == 0
        expected = oracles.moe(x, ids, topk, w13, w2, quantized=(False, False))
        assert oracles.calc_diff(y, expected) <= 1e-5
        alone, _ = jax.jit(moe_layer, static_argnums=4)(*arguments, weights, W4A16)
        np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(alone).view(np.uint16))


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_result_adds_to_the_tokens(rng, axis_type):
    """x + layer(x), wherever x lies; Explicit axes refuse to add arrays of different meshes."""
    mesh = jax.make_mesh((4,), ("ep",), axis_types=(axis_type,), devices=jax.devices()[:4])
    weights = _weights(rng)
    x, ids, topk = _batch(rng, 8)
    x, routing = jnp.asarray(x, jnp.bfloat16), (jnp.asarray(ids), jnp.asarray(topk))
    alone, _ = jax.jit(moe_layer, static_argnums=4)(x, *routing, weights, W4A16)
    expected = np.asarray(x + alone).view(np.uint16)

    def residual(x, ids, topk, weights):
        y, stats = sharded_moe_layer(x, ids, topk, weights, W4A16, mesh)
        return x + y, stats.dropped

    compiled = jax.jit(residual)
    placed = jax.device_put(weights, NamedSharding(mesh, P("ep")))
    places = {"nowhere": x} | {str(spec): jax.device_put(x, NamedSharding(mesh, spec)) for spec in (P(), P("ep"))}
    for name, place in places.items():
        for function in (residual, compiled) if name == "P()" else (compiled,):
            y, dropped = function(place, *routing, weights if name == "nowhere" else placed)
            assert y.sharding.mesh == mesh, name
            assert axis_type == AxisType.Auto or y.sharding.spec == jax.typeof(place).sharding.spec, name
            np.testing.assert_array_equal(np.asarray(y).view(np.uint16), expected, err_msg=name)
            assert dropped == 0
    with jax.set_mesh(mesh):
        y, _ = compiled(compiled(x, *routing, placed)[0], *routing, placed)
    once_more, _ = compiled(compiled(places["P()"], *routing, placed)[0], *routing, placed)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(once_more).view(np.uint16))


@pytest.mark.slow
def test_drops_and_scales_per_expert(rng, make_mesh):
    """Routes beyond a capacity are counted over all devices; input scales per expert are split with the experts."""
    mesh, weights, (x, ids, topk) = make_mesh(4), _weights(rng), _batch(rng, 12)
    ids[:, 0] = 3  # all tokens want this expert
    ids[:, 1] = -1
    scales = jnp.full((E, 1, 1), 0.004)
    weights = weights._replace(input_scale_1=scales, input_scale_2=scales)
    arguments = jnp.asarray(x, jnp.bfloat16), jnp.asarray(ids), jnp.asarray(topk)
    _, stats = sharded_moe_layer(*arguments, weights, dataclasses.replace(W4A16, capacity=5), mesh)
    assert int(stats.dropped) == 12 - 5
    y, _ = sharded_moe_layer(*arguments, weights, dataclasses.replace(W4A16, wire_format="nvfp4"), mesh)
    one_scale = MoEWeights(*weights[:2], jnp.float32(0.004), scales)
    alone, _ = jax.jit(moe_layer, static_argnums=4)(*arguments, one_scale, W4A16)
    np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(alone).view(np.uint16))
