"""The router without a GPU: the body of its kernel against XLA and float64, plain and interpreted, and its lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec as P, use_abstract_mesh
from plain_lanes import plain_kernels
from routing_checks import MODELS, excess_of, weights_of

from cuda_lowering import H100, H100_MESH, kernels_in, lowered_text, struct
from fp4jax.routing import load_balance_loss, route
from pallas_kernels.rows import router

pytestmark = pytest.mark.usefixtures("on_the_cpu", "quick_compile")
ROUNDING = 4e-6  # what `route` promises
# Experts, groups and groups that may be chosen from: whole and partial lanes, several experts per lane, odd numbers.
SHAPES = [(1, 1, 1), (5, 1, 1), (16, 16, 5), (40, 5, 2), (48, 6, 6), (64, 1, 1), (64, 8, 3), (130, 1, 1), (160, 8, 3)]


def check(logits, bias, interpret=None, **settings):
    """The kernel chooses as XLA does, or as well as it up to rounding; its weights are those of float64."""
    logits, bias = np.asarray(logits, np.float32), None if bias is None else jnp.asarray(bias, jnp.float32)
    ids, weights = router.route(jnp.asarray(logits), bias, config=router.Config(**settings), interpret=interpret)
    expected = route(jnp.asarray(logits), correction_bias=bias, implementation="xla", **settings)
    ids, weights, expected_ids = np.asarray(ids), np.asarray(weights), np.asarray(expected.topk_ids)
    differ = (ids != expected_ids).any(axis=1)
    assert np.isfinite(logits[differ]).all()
    for found in (ids[differ], expected_ids[differ]):
        assert (excess_of(found, logits[differ], bias, **settings) < ROUNDING).all()
    spoiled = np.isnan(expected.topk_weights).any(axis=1)
    np.testing.assert_array_equal(np.isnan(weights), np.repeat(spoiled[:, None], ids.shape[1], axis=1))
    whole = ~spoiled
    exact = weights_of(ids[whole], logits[whole], **settings)
    np.testing.assert_allclose(weights[whole], exact, rtol=ROUNDING, atol=1e-37)
    assert ids.dtype == np.int32 and weights.dtype == np.float32


@st.composite
def cases(draw):
    """Logits on a grid, so that ties are frequent, with some that are not finite, and settings that fit them."""
    experts, num_groups, topk_groups = draw(st.sampled_from(SHAPES))
    tokens = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = draw(st.sampled_from([1, 3, 40]))
    logits = rng.integers(-steps, steps + 1, (tokens, experts)) / np.float32(8)
    spoilt = rng.random(logits.shape) < draw(st.sampled_from([0, 0, 0.02, 0.5]))
    logits = np.where(spoilt, rng.choice(np.float32(draw(st.sampled_from(_SPOILT)))), logits)
    bias = rng.integers(-20, 21, experts) / np.float32(64) if draw(st.booleans()) else None
    reachable = experts // num_groups * topk_groups
    return logits, bias, dict(
        top_k=draw(st.integers(1, min(reachable, router.MAX_TOP_K))),
        scoring=draw(st.sampled_from(["softmax", "sigmoid"])),
        renormalize=draw(st.booleans()),
        num_groups=num_groups,
        topk_groups=topk_groups,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )  # fmt: skip


_SPOILT = [(np.nan,), (-np.nan,), (np.inf,), (-np.inf,), (200.0, -200.0)]


@pytest.mark.slow
@given(cases())
@settings(max_examples=8)
def test_chooses_as_xla_does(case):
    logits, bias, settings = case
    with plain_kernels():
        check(logits, bias, **settings)


@pytest.mark.parametrize("name", MODELS)
def test_models(name, rng):
    experts, settings, biased = MODELS[name]
    with plain_kernels():
        check(rng.normal(size=(9, experts)) * 2, rng.normal(size=experts) / 20 if biased else None, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5])
def test_interpreted(tokens, rng, interpret):
    settings = dict(top_k=3, scoring="sigmoid", num_groups=4, topk_groups=2)
    check(rng.normal(size=(tokens, 40)), rng.normal(size=40) / 20, interpret, **settings)


def test_tokens_that_are_not_valid(rng):
    """They have ids -1; the others are as without them."""
    logits, bias = (jnp.asarray(rng.normal(size=n), jnp.float32) for n in ((6, 16), 16))
    valid = jnp.asarray([True, False, True, True, False, True])
    for given_bias in (None, bias):
        every = route(logits, top_k=3, correction_bias=given_bias)
        found = route(logits, top_k=3, correction_bias=given_bias, valid=valid)
        with plain_kernels():
            ids, weights = router.route(logits, given_bias, valid, config=router.Config(3))
        np.testing.assert_array_equal(found.topk_ids, np.where(valid[:, None], every.topk_ids, -1))
        np.testing.assert_array_equal(ids, found.topk_ids)
        np.testing.assert_allclose(weights, every.topk_weights, rtol=ROUNDING)


def test_more_tokens_than_warps(monkeypatch, rng):
    monkeypatch.setattr(router, "_BLOCKS_PER_SM", 1)
    monkeypatch.setattr(router, "H100_SMS", 2)
    with plain_kernels():
        check(rng.normal(size=(19, 33)), None, top_k=2)


def test_biases_that_leave_too_few_experts(rng):
    """Experts of other groups, whose choice is -inf, tie with experts whose bias is -inf, in XLA too."""
    bias = np.where(np.arange(64) % 8 < 7, -np.inf, 0.0)
    with plain_kernels():
        logits = jnp.asarray(rng.normal(size=(4, 64)), jnp.float32)
        settings = dict(top_k=6, num_groups=8, topk_groups=2)
        ids, _ = router.route(logits, jnp.asarray(bias, jnp.float32), config=router.Config(**settings))
    expected = route(logits, correction_bias=jnp.asarray(bias, jnp.float32), implementation="xla", **settings)
    np.testing.assert_array_equal(ids, expected.topk_ids)


# --- lowering ---


def kernel_route(logits, bias=None, **settings):
    return route(logits, correction_bias=bias, implementation="mosaic_gpu", **settings)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", [1, 8192])
def test_one_kernel(name, tokens):
    experts, settings, biased = MODELS[name]
    operands = [struct((tokens, experts), jnp.float32)] + [struct((experts,), jnp.float32)] * biased
    text = lowered_text(functools.partial(kernel_route, **settings), *operands)
    assert text.count("@mosaic_gpu_v2") == 1 and "top_k" not in text


@pytest.mark.parametrize("experts", [1, 31, 130, 512])
def test_any_number_of_experts_lowers(experts):
    call = functools.partial(kernel_route, top_k=min(experts, 32), scoring="sigmoid", renormalize=False)
    assert kernels_in(call, struct((7, experts), jnp.float32)) == 1


def test_is_the_choice_where_it_can_run():
    """Not under differentiation, and not for what it does not serve."""
    call = functools.partial(route, top_k=4)
    logits = struct((6, 64), jnp.float32)
    assert kernels_in(call, logits) == 1
    assert kernels_in(call, struct((6, 64), jnp.bfloat16)) == 1
    assert kernels_in(jax.vmap(call), struct((3, 6, 64), jnp.float32)) == 1
    assert kernels_in(jax.grad(lambda x: jnp.sum(call(x).topk_weights ** 2)), logits) == 0
    assert kernels_in(call, struct((6, 513), jnp.float32)) == 0
    assert kernels_in(functools.partial(route, top_k=33), logits) == 0
    assert kernels_in(lambda x, v: call(x, valid=v), logits, struct((6,), jnp.bool_)) == 1
    assert kernels_in(call, struct((0, 64), jnp.float32)) == 0


def test_runs_inside_shard_map():
    mesh = AbstractMesh((2,), ("ep",), axis_types=(AxisType.Auto,), abstract_device=H100)
    call = jax.shard_map(functools.partial(kernel_route, top_k=4), mesh=mesh, in_specs=P("ep"), out_specs=P("ep"))
    with use_abstract_mesh(mesh):
        lowered = jax.jit(call).trace(struct((6, 64), jnp.float32)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu_v2") == 1


def test_the_balance_loss_costs_nothing_where_it_is_not_used():
    def ids_only(logits):
        found = route(logits, top_k=4)
        _ = load_balance_loss(logits, found.topk_ids)
        return found

    text = lowered_text(ids_only, struct((6, 64), jnp.float32))
    assert text.count("@mosaic_gpu_v2") == 1 and "exponential" not in text


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((6, 513), dict(top_k=4), "513"),
        ((6, 64), dict(top_k=33), "33"),
        ((0, 64), dict(top_k=4), r"\(0, 64\)"),
        ((6, 64), dict(top_k=4, num_groups=64, topk_groups=8), "64 groups of 1 experts"),
        ((2**25, 64), dict(top_k=4), "32-bit"),
    ],
)
def test_a_named_kernel_refuses_with_the_value(shape, settings, message):
    with use_abstract_mesh(H100_MESH), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(kernel_route, **settings), struct(shape, jnp.float32))
