"""A token with NaN or Inf has no finite output, in every format, layout and size, and changes no other token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from poisoned_tokens import check_outputs, poison

import oracles
from fp4jax.expert_parallel import combine, dispatch
from fp4jax.moe import MoEConfig, MoEWeights, dense_moe, moe_layer
from fp4jax.nvfp4 import quantize
from fp4jax.routing import route

T, K, E, H, I = 300, 2, 8, 256, 64  # more than the 4,096 values from which on XLA:CPU computes maxima in another way
SLOW = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("quick_compile")
SCALE_1 = jnp.float32(0.0021)
EP = P("ep")

layer = jax.jit(moe_layer, static_argnames="config")


def batch(rng, tokens=T, step=1):
    """-> x with poisoned rows, x with zeros there, the rows, ids, weights; bf16."""
    poisoned, zeroed, rows = poison(rng.standard_normal((tokens, H)), step)
    ids = np.argsort(rng.random((tokens, E)), axis=1)[:, :K].astype(np.int32)
    weights = jnp.asarray(rng.uniform(0.1, 1, (tokens, K)), jnp.float32)
    return *(jnp.asarray(x, jnp.bfloat16) for x in (poisoned, zeroed)), rows, ids, weights


def expert_weights(rng, nvfp4=True, static=False):
    w13, w2 = (jnp.asarray(rng.standard_normal(s) / 8, jnp.float32) for s in ((E, 2 * I, H), (E, H, I)))
    if nvfp4:
        w13, w2 = (quantize(w, global_scale="per_expert", implementation="xla") for w in (w13, w2))
    else:
        w13, w2 = w13.astype(jnp.bfloat16), w2.astype(jnp.bfloat16)
    return MoEWeights(w13, w2, *((SCALE_1, jnp.full((E, 1, 1), 0.004, jnp.float32)) if static else ()))


def formats(first, second):
    return dict(activation_format_1=first, activation_format_2=second)


W4A4, W4A16 = formats("nvfp4", "nvfp4"), formats("bf16", "bf16")


@pytest.mark.parametrize(
    ("kinds", "options", "layout"),
    [
        pytest.param({}, W4A4, "masked", id="W4A4 per token", marks=SLOW),
        pytest.param(dict(static=True), W4A4, "contiguous", id="W4A4 static", marks=SLOW),
        pytest.param({}, W4A16, "masked", id="W4A16", marks=SLOW),
        pytest.param({}, W4A4, "contiguous", marks=SLOW),
        pytest.param(dict(static=True), W4A4, "masked", marks=SLOW),
        pytest.param({}, W4A16, "contiguous", marks=SLOW),
        pytest.param({}, formats("nvfp4", "bf16"), "masked", marks=SLOW),
        pytest.param({}, formats("bf16", "nvfp4"), "contiguous", marks=SLOW),
        pytest.param(dict(nvfp4=False), W4A16, "masked", id="plain", marks=SLOW),
        pytest.param(dict(nvfp4=False), W4A4, "contiguous", id="plain weights, nvfp4 activations", marks=SLOW),
    ],
)
def test_moe_layer(kinds, options, layout, rng):
    x, zeroed, rows, ids, weights = batch(rng)
    experts = expert_weights(rng, **kinds)
    config = MoEConfig(num_experts=E, layout=layout, implementation="xla", **options)
    ids[200] = E + 5  # a token without experts stays zero, whatever it holds
    x = x.at[200].set(jnp.nan)
    y, clean = (np.asarray(layer(a, jnp.asarray(ids), weights, experts, config)[0]) for a in (x, zeroed))
    assert not y[200].astype(np.float32).any()
    keep = np.arange(T) != 200
    check_outputs(y[keep], clean[keep], rows[keep])


@pytest.mark.slow
@pytest.mark.parametrize("options", [W4A4, W4A16], ids=["W4A4", "W4A16"])
def test_moe_layer_eager(options, rng):
    x, zeroed, rows, ids, weights = batch(rng)
    experts, config = expert_weights(rng), MoEConfig(num_experts=E, implementation="xla", **options)
    check_outputs(*(moe_layer(a, jnp.asarray(ids), weights, experts, config)[0] for a in (x, zeroed)), rows)


@pytest.mark.slow
def test_dropped_routes_of_spoiled_tokens_add_nothing(rng):
    """Beyond the capacity: a token that lost all its routes is zero, one that kept some has no finite value."""
    x, zeroed, rows, _, weights = batch(rng)
    ids = np.tile([[0, 1]], (T, 1)).astype(np.int32)
    ids[:8, 1], ids[8:16, 0] = -1, -1
    experts = expert_weights(rng)
    config = MoEConfig(num_experts=E, capacity=8, implementation="xla", **W4A16)  # tokens 0..7 in expert 0, 8..15 in 1
    y, clean = (np.asarray(layer(a, jnp.asarray(ids), weights, experts, config)[0]) for a in (x, zeroed))
    check_outputs(y[:16], clean[:16], rows[:16])
    assert not y[16:].astype(np.float32).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wire", "form", "options", "static"),
    [
        ("nvfp4", "per_peer", W4A4, False),
        ("fp8", "per_slot", W4A16, False),
        ("nvfp4", "per_slot", W4A4, True),
        ("fp8", "per_peer", W4A4, True),
        ("bf16", "per_peer", W4A16, False),
        ("bf16", "per_slot", W4A4, False),
        ("nvfp4", "per_peer", W4A16, False),
    ],
)
def test_moe_layer_on_four_devices(make_mesh, wire, form, options, static, rng):
    x, zeroed, rows, ids, weights = batch(rng, step=15)
    experts = expert_weights(rng, static=static)
    config = MoEConfig(
        num_experts=E, axis_name="ep", wire_format=wire, form=form, layout="contiguous", implementation="xla", **options
    )
    split = jax.tree.map(lambda _: EP, experts)._replace(input_scale_1=P() if static else None)
    on_device = lambda x, ids, w, experts: moe_layer(x, ids, w, experts, config)[0]  # noqa: E731
    run = jax.jit(jax.shard_map(on_device, mesh=make_mesh(4), in_specs=(EP, EP, EP, split), out_specs=EP))
    check_outputs(*(run(a, jnp.asarray(ids), weights, experts) for a in (x, zeroed)), rows)


@pytest.mark.parametrize("form", ["per_peer", pytest.param("per_slot", marks=SLOW)])
def test_the_scale_that_devices_agree_on_is_that_of_the_finite_values(make_mesh, form, rng):
    x, _, _, ids, weights = batch(rng, step=15)

    def body(x, ids, weights):
        d = dispatch(x, ids, weights, num_experts=E, form=form, wire_format="nvfp4", implementation="xla")
        return d.x.global_scale[None]

    agreed = jax.jit(jax.shard_map(body, mesh=make_mesh(4), in_specs=EP, out_specs=EP))(x, jnp.asarray(ids), weights)
    np.testing.assert_array_equal(np.asarray(agreed), oracles.computed_scale(np.asarray(x, np.float32)))


@pytest.mark.parametrize("form", ["per_peer", pytest.param("per_slot", marks=SLOW)])
def test_combine_spoils_the_token_of_a_row_only(make_mesh, form, rng):
    x, _, _, ids, weights = batch(rng, step=15)
    ids[9] = -1

    def body(x, ids, weights):
        d = dispatch(x, ids, weights, num_experts=E, form=form, wire_format="bf16", implementation="xla")
        home = weights if form == "per_slot" else None
        return combine(d.x, d, topk_weights=home, implementation="xla")

    y = jax.jit(jax.shard_map(body, mesh=make_mesh(4), in_specs=EP, out_specs=EP))(x, jnp.asarray(ids), weights)
    y = np.asarray(y, np.float32)
    np.testing.assert_array_equal(np.isfinite(y), np.isfinite(np.asarray(x, np.float32)))  # value by value
    assert not y[9].any()


def test_dense_moe(rng):
    """Also of an expert that overflows, on tokens that were not routed to it, and of tokens without experts."""
    x, zeroed, rows, ids, weights = batch(rng)
    ids[ids == 5] = 6
    ids[rows.nonzero()[0][-1]] = -1
    w13, w2 = expert_weights(rng, nvfp4=False)[:2]
    w2 = w2.at[5].set(1e38)
    y, clean = (np.asarray(jax.jit(dense_moe)(a, jnp.asarray(ids), weights, w13, w2)) for a in (x, zeroed))
    assert not y[16].astype(np.float32).any()
    keep = np.arange(T) != 16
    check_outputs(y[keep], clean[keep], rows[keep])


@pytest.mark.parametrize("how", ["eager", "jit"])
@pytest.mark.parametrize(
    "options",
    [
        dict(scoring="softmax"),
        dict(scoring="softmax", renormalize=False, correction_bias=True),
        dict(scoring="sigmoid", correction_bias=True, num_groups=4, topk_groups=2, routed_scaling_factor=2.5),
        dict(scoring="sigmoid", renormalize=False),
    ],
    ids=["softmax", "softmax with bias", "groups", "sigmoid"],
)
def test_routing(how, options, rng):
    """NaN among the logits of a token: its weights are NaN, its ids experts, and nothing else changes."""
    logits = rng.standard_normal((T, 64)).astype(np.float32)
    poisoned, rows = logits.copy(), np.zeros(T, bool)
    for row, place in ((3, 0), (7, 31), (8, 63), (40, slice(None)), (299, slice(1, None))):
        poisoned[row, place], rows[row] = (-np.nan, np.nan)[row % 2], True
    if options.get("correction_bias"):
        options = {**options, "correction_bias": jnp.asarray(rng.standard_normal(64), jnp.float32)}
    run = lambda x: route(x, top_k=4, **options)  # noqa: E731
    run = jax.jit(run) if how == "jit" else run
    (ids, weights), (clean_ids, clean_weights) = (jax.device_get(run(jnp.asarray(x))) for x in (poisoned, logits))
    assert np.isnan(weights[rows]).all()
    assert ids.min() >= 0 and ids.max() < 64 and all(len(set(token)) == 4 for token in ids.tolist())
    np.testing.assert_array_equal(ids[~rows], clean_ids[~rows])
    np.testing.assert_array_equal(weights[~rows], clean_weights[~rows])
    if options["scoring"] == "softmax":  # Inf - Inf
        assert np.isnan(run(jnp.asarray(logits).at[5, 9].set(jnp.inf)).topk_weights[5]).all()
