"""Routing against a plain-Python reference in float64: selection, weights, ties, groups, errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, strategies as st
from routing_checks import MODELS, excess_of, weights_of

from fp4jax.routing import load_balance_loss, route

TOKENS, EXPERTS = 6, 16
# f32 exp and a few additions and divisions, against float64.
RTOL = 2e-6


def reference(logits, top_k, scoring="softmax", renormalize=True, bias=None, num_groups=1, topk_groups=1, factor=1.0):
    """One token after the other, with Python's sort (stable, so the lower index wins a tie)."""
    ids, weights = [], []
    for row in np.asarray(logits, np.float64):
        if scoring == "softmax":
            exponentials = [math.exp(v - max(row)) for v in row]
            scores = [v / sum(exponentials) for v in exponentials]
        else:
            scores = [1 / (1 + math.exp(-v)) for v in row]
        biased = [s + (0 if bias is None else float(bias[e])) for e, s in enumerate(scores)]
        size = len(biased) // num_groups
        group_score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
        groups = sorted(range(num_groups), key=lambda g: -group_score[g])[:topk_groups]
        allowed = [e for e in range(len(biased)) if e // size in groups]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
        total = sum(scores[e] for e in chosen) if renormalize else 1.0
        ids.append(chosen)
        weights.append([scores[e] / total * factor for e in chosen])
    return np.array(ids), np.array(weights)


# Multiples of 1/8 have scores that f32 and float64 order alike, apart from exact ties, which they share: equal logits
# give equal scores. The biases are multiples of 1/64 plus an offset by index, so that sums do not tie by accident.
grids = st.lists(st.integers(-40, 40), min_size=TOKENS * EXPERTS, max_size=TOKENS * EXPERTS).map(
    lambda v: (np.array(v, np.float32) / 8).reshape(TOKENS, EXPERTS)
)
biases = st.lists(st.integers(-20, 20), min_size=EXPERTS, max_size=EXPERTS).map(
    lambda v: (np.array(v) / 64 + np.arange(EXPERTS) * 1e-3).astype(np.float32)
)

_MODELS = {
    "qwen3": dict(top_k=4, renormalize=True),
    "plain softmax": dict(top_k=1, renormalize=False),
    "all experts": dict(top_k=16, renormalize=True),
    "sigmoid": dict(top_k=6, scoring="sigmoid", renormalize=False),
}
_BIASED_MODELS = {
    "ernie45": dict(top_k=6, renormalize=True),
    "sigmoid with bias": dict(top_k=8, scoring="sigmoid", factor=2.5),
    "deepseek_v3": dict(top_k=4, scoring="sigmoid", num_groups=4, topk_groups=2, factor=2.5),
    "one group, every expert of it": dict(top_k=4, scoring="sigmoid", num_groups=4, topk_groups=1),
    "groups of one": dict(top_k=3, scoring="sigmoid", num_groups=16, topk_groups=5),
}


def _route(logits, *, bias=None, factor=1.0, **kwargs):
    bias = None if bias is None else jnp.asarray(bias)
    return route(jnp.asarray(logits), correction_bias=bias, routed_scaling_factor=factor, **kwargs)


def _assert_same(found, expected):
    ids, weights = expected
    np.testing.assert_array_equal(np.asarray(found.topk_ids), ids)
    np.testing.assert_allclose(np.asarray(found.topk_weights), weights, rtol=RTOL)
    assert found.topk_ids.dtype == jnp.int32 and found.topk_weights.dtype == jnp.float32


@pytest.mark.parametrize("name", _MODELS)
@given(logits=grids)
def test_equals_the_reference(name, logits):
    _assert_same(_route(logits, **_MODELS[name]), reference(logits, **_MODELS[name]))


@pytest.mark.parametrize("name", _BIASED_MODELS)
@given(logits=grids, bias=biases)
def test_equals_the_reference_with_a_bias(name, logits, bias):
    settings = _BIASED_MODELS[name]
    scores, by_score = _biased_scores(logits, bias, settings)
    assume(not _is_close_call(scores, by_score, settings))
    _assert_same(_route(logits, bias=bias, **settings), reference(logits, bias=bias, **settings))


def _biased_scores(logits, bias, settings):
    logits = np.asarray(logits, np.float64)
    if settings.get("scoring") == "sigmoid":
        scores = 1 / (1 + np.exp(-logits))
    else:
        scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    biased = scores + np.asarray(bias, np.float64)
    size = EXPERTS // settings.get("num_groups", 1)
    groups = np.sort(biased.reshape(TOKENS, -1, size), axis=-1)[..., -2:].sum(-1)
    return biased, groups


def _is_close_call(scores, groups, settings):
    """Two candidates so close (1e-5) that float32 may order them differently: not a question of routing."""
    gaps = [np.diff(np.sort(scores, axis=1), axis=1).min()]
    if settings.get("num_groups", 1) > 1:
        gaps.append(np.diff(np.sort(groups, axis=1), axis=1).min())
    return min(gaps) < 1e-5


def test_bias_selects_and_does_not_weigh():
    logits = jnp.array([[2.0, 1.0, 0.0, -1.0]], jnp.float32)
    bias = jnp.array([0.0, 0.0, 0.0, 5.0], jnp.float32)
    found = route(logits, top_k=1, scoring="sigmoid", renormalize=False, correction_bias=bias)
    assert found.topk_ids.tolist() == [[3]]
    np.testing.assert_allclose(found.topk_weights, [[1 / (1 + math.e)]], rtol=RTOL)


def test_negative_scores_still_beat_masked_groups():
    """With every biased score negative, a mask of 0 would win over the experts of the chosen group."""
    found = route(
        jnp.zeros((1, 8), jnp.float32),
        top_k=2,
        scoring="sigmoid",
        correction_bias=-1.0 - jnp.arange(8, dtype=jnp.float32) / 8,
        num_groups=4,
        topk_groups=1,
    )
    assert found.topk_ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("groups", [1, 4])
def test_ties_go_to_the_lower_index(groups):
    found = route(jnp.zeros((3, 32), jnp.float32), top_k=5, num_groups=groups, topk_groups=groups)
    assert found.topk_ids.tolist() == [[0, 1, 2, 3, 4]] * 3


def test_bfloat16_logits_are_scored_in_float32():
    logits = np.linspace(-3, 3, TOKENS * EXPERTS).reshape(TOKENS, EXPERTS)
    logits = jnp.asarray(np.random.default_rng(0).permutation(logits, axis=1), jnp.bfloat16)
    _assert_same(route(logits, top_k=3), reference(np.asarray(logits, np.float64), 3))


def test_underflowing_scores_give_zero_weights_not_nan():
    found = route(jnp.full((1, 4), -200.0, jnp.float32), top_k=2, scoring="sigmoid")
    assert found.topk_weights.tolist() == [[0.0, 0.0]]


def test_same_choice_under_jit(rng):
    logits = jnp.asarray(rng.normal(size=(TOKENS, EXPERTS)), jnp.float32)
    eager, jitted = route(logits, top_k=4), jax.jit(lambda x: route(x, top_k=4))(logits)
    np.testing.assert_array_equal(eager.topk_ids, jitted.topk_ids)
    np.testing.assert_allclose(eager.topk_weights, jitted.topk_weights, rtol=RTOL)


def test_balance_loss_is_one_when_even_and_grows_with_skew():
    logits = jnp.eye(4, dtype=jnp.float32) * 3
    even = load_balance_loss(logits, jnp.arange(4, dtype=jnp.int32)[:, None])
    np.testing.assert_allclose(even, 1.0, rtol=RTOL)
    skewed = load_balance_loss(jnp.tile(jnp.array([[30.0, 0, 0, 0]]), (4, 1)), jnp.zeros((4, 1), jnp.int32))
    np.testing.assert_allclose(skewed, 4.0, rtol=RTOL)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@given(logits=grids)
def test_balance_loss_equals_the_reference(scoring, logits):
    """Scores of every token add up to 1, sigmoids too."""
    ids, _ = reference(logits, 2)
    scores = np.exp(np.float64(logits)) if scoring == "softmax" else 1 / (1 + np.exp(-np.float64(logits)))
    scores /= scores.sum(axis=1, keepdims=True)
    share = np.bincount(ids.ravel(), minlength=EXPERTS) / ids.size
    found = load_balance_loss(jnp.asarray(logits), jnp.asarray(ids), scoring=scoring)
    np.testing.assert_allclose(found, EXPERTS * (share * scores.mean(axis=0)).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(top_k=0), "top_k=0"),
        (dict(top_k=17), "top_k=17 .* 16 experts"),
        (dict(top_k=2, scoring="relu"), "'relu'"),
        (dict(top_k=2, num_groups=3), "num_groups=3 .* num_experts=16"),
        (dict(top_k=2, num_groups=4, topk_groups=5), "topk_groups=5 .* num_groups=4"),
        (dict(top_k=9, num_groups=4, topk_groups=2), "top_k=9 .* 8 experts"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    if settings.get("scoring") == "relu":
        # The runtime type check of the test suite speaks first; the library's own check is what users see.
        from fp4jax.routing import check_routing

        with pytest.raises(ValueError, match=message):
            check_routing(16, **settings)
        return
    with pytest.raises(ValueError, match=message):
        route(jnp.zeros((1, 16), jnp.float32), **settings)


# --- the kernel against XLA, on a GPU ---

# What `route` promises. The kernel itself is closer: XLA:GPU may compute exponentials and quotients approximately.
ROUNDING = 4e-6


@functools.partial(jax.jit, static_argnames=("implementation", "settings"))
def _run(logits, bias, valid=None, *, implementation, settings):
    return route(logits, correction_bias=bias, valid=valid, implementation=implementation, **dict(settings))


def _compare(logits, bias, settings):
    """Compares kernel and XLA; returns how many tokens chose differently, which only rounding may have decided."""
    found, expected = (
        _run(logits, bias, implementation=name, settings=tuple(settings.items())) for name in ("mosaic_gpu", "xla")
    )
    differ = np.flatnonzero(np.any(found.topk_ids != expected.topk_ids, axis=1))
    rows = np.asarray(logits)[differ]
    for routing in (found, expected):
        assert (excess_of(np.asarray(routing.topk_ids)[differ], rows, bias, **settings) < ROUNDING).all()
    same = np.setdiff1d(np.arange(len(logits)), differ)
    weights = (np.asarray(routing.topk_weights)[same] for routing in (found, expected))
    np.testing.assert_allclose(*weights, rtol=ROUNDING, atol=1e-37)
    return differ.size


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_a_million_tokens_choose_as_in_xla(name):
    experts, settings, biased = MODELS[name]
    bias = jax.random.uniform(jax.random.key(9), (experts,), minval=-0.05, maxval=0.05) if biased else None
    differ = 0
    for seed in range(4):
        logits = jax.random.normal(jax.random.key(seed), (250_000, experts)) * 1.5
        differ += _compare(logits, bias, settings)
    assert differ < 100  # 2 among all three models were measured


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_equal_logits_choose_as_in_xla(name):
    """Of a grid of few values: nearly every choice is one among equals, and the lower index wins."""
    experts, settings, _ = MODELS[name]
    logits = jax.random.randint(jax.random.key(3), (20_000, experts), -4, 5).astype(jnp.float32) / 4
    assert _compare(logits, None, settings) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 5, 4225])
@pytest.mark.parametrize(
    ("experts", "settings"),
    [
        (1, dict(top_k=1)),
        (130, dict(top_k=32, scoring="sigmoid", renormalize=False)),
        (160, dict(top_k=6, num_groups=8, topk_groups=3)),
        (512, dict(top_k=10)),
    ],
)
def test_odd_sizes_and_bad_scores_as_in_xla(tokens, experts, settings, rng):
    logits = rng.normal(size=(tokens, experts)).astype(np.float32)
    logits[0, -1] = np.nan
    found = rng.random(logits.shape) < 0.2 / experts
    logits = np.where(found, rng.choice(np.float32([np.nan, np.inf, -np.inf, 300, -300]), logits.shape), logits)
    logits[tokens // 2] = -np.inf
    whole = np.isfinite(logits).all(axis=1)
    valid = jnp.arange(tokens) % 5 != 3
    found, masked, expected = (
        _run(jnp.asarray(logits), None, mask, implementation=name, settings=tuple(settings.items()))
        for name, mask in (("mosaic_gpu", None), ("mosaic_gpu", valid), ("xla", None))
    )
    np.testing.assert_array_equal(masked.topk_ids, np.where(valid[:, None], found.topk_ids, -1))
    np.testing.assert_array_equal(masked.topk_weights, found.topk_weights)
    np.testing.assert_array_equal(np.asarray(found.topk_ids)[~whole], np.asarray(expected.topk_ids)[~whole])
    np.testing.assert_allclose(found.topk_weights, expected.topk_weights, rtol=ROUNDING, atol=1e-37)
    exact = weights_of(np.asarray(found.topk_ids)[whole], logits[whole], **settings)
    np.testing.assert_allclose(np.asarray(found.topk_weights)[whole], exact, rtol=ROUNDING, atol=1e-37)
