"""Blocks of fixed token counts: any count gives what the function gives, pads are inert, nothing compiles later."""

import threading

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from fp4jax.benchmarking import count_compilations
from fp4jax.block_graph import Bucketed, block_graph
from fp4jax.bucketed import pad_tokens

BUCKETS = (4, 8, 16)


def scale_rows(weight, x):
    return jnp.tanh(x * weight), x.sum(axis=-1)


@pytest.fixture(scope="module")
def rows():
    """Two outputs, one weight; used by several tests, so no test may count its calls from zero."""
    graph = block_graph(scale_rows, buckets=BUCKETS, in_axes=(None, 0))
    graph.warm_up(jnp.ones(3), jax.ShapeDtypeStruct((1, 3), jnp.float32), progress=False)
    return graph


def expected(weight, x):
    x = x.astype(np.float64)
    return np.tanh(x * np.asarray(weight, np.float64)), x.sum(axis=-1)


@hypothesis.given(tokens=st.integers(1, 50), on_device=st.booleans())
def test_any_number_of_tokens(rows, tokens, on_device):
    """Also above the largest bucket."""
    x = np.random.default_rng(tokens).standard_normal((tokens, 3)).astype(np.float32)
    weight = jnp.asarray([1.0, -2, 0.5])
    got = rows(weight, jnp.asarray(x) if on_device else x)
    for a, b in zip(got, expected(weight, x), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert rows.stats.misses == 0


def test_nothing_compiles_after_warm_up(rng):
    graph = block_graph(scale_rows, buckets=BUCKETS, in_axes=(None, 0))
    weight = jnp.ones(3)
    graph.warm_up(weight, jax.ShapeDtypeStruct((1, 3), jnp.float32), progress=False)
    inputs = [jnp.asarray(rng.standard_normal((n, 3)), jnp.float32) for n in (1, 3, 4, 5, 11, 16, 17, 40)]
    with count_compilations() as compiled:
        for x in inputs * 3:
            jax.block_until_ready(graph(weight, x))
        graph(weight, np.zeros((0, 3), np.float32))
    assert not compiled
    stats = graph.stats
    assert stats.misses == 0 and stats.chunked == 6 and len(stats.seconds) == len(BUCKETS)
    assert stats.tokens == 3 * sum(len(x) for x in inputs)
    assert stats.rows == 3 * (3 * 4 + 8 + 16 + 16 + (16 + 4) + (16 + 16 + 8))
    assert stats.waste == pytest.approx(1 - stats.tokens / stats.rows)
    with count_compilations() as compiled:
        jax.jit(lambda x: x * 3 + 1)(inputs[0])
    assert len(compiled) == 1  # the count counts


def test_bound_weights_are_looked_at_once(rows, monkeypatch):
    weight, x = jnp.asarray([1.0, -2, 0.5]), np.ones((3, 3), np.float32)
    bound, whole = rows.bind(weight), rows.bind(weight, x)
    before = len(rows.stats.seconds)
    looked_at = []
    monkeypatch.setattr(
        rows, "_argument", lambda place, value: looked_at.append(place) or type(rows)._argument(rows, place, value)
    )
    for got in (bound(x), whole(), bound(np.concatenate([x] * 7))[:2]):
        for a, b in zip(got, expected(weight, np.resize(x, (len(got[0]), 3))), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)
    padded = bound(Bucketed(jnp.ones((4, 3)), 3))
    np.testing.assert_array_equal(padded[0].values[:3], bound(x)[0])
    assert len(rows.stats.seconds) == before and rows.stats.misses == 0  # the executables of calls that are not bound
    assert looked_at.count(1) >= 4 and 0 in looked_at  # chunks of 21 tokens are calls of their own
    for refused in (
        lambda: rows.bind(weight, x, x),
        lambda: bound(x, x),
        lambda: bound(),
        lambda: rows.bind(weight, k=1)(x),
    ):
        with pytest.raises(ValueError, match=r"positional arguments|static arguments"):
            refused()


def test_pads_are_inert():
    """NaN in every pad of Bucketed values, in a function whose tokens meet."""
    graph = block_graph(lambda x: x @ x.T @ x, buckets=(8,), in_axes=(0,))
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    results = []
    for pad in (0.0, np.nan, np.inf, 3.0):
        values = np.full((8, 4), pad, np.float32)
        values[:5] = x
        found = graph(Bucketed(jnp.asarray(values), 5))
        assert found.tokens == 5 and found.values.shape == (8, 4)
        results.append(np.asarray(found.values)[:5])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])
    np.testing.assert_allclose(results[0], x @ x.T @ x, rtol=1e-5)


def test_the_number_of_tokens_is_handed_on():
    def mean(x, num_tokens):
        return x - x.sum(axis=0) / num_tokens, num_tokens

    graph = block_graph(mean, buckets=(8,), in_axes=(0,), out_axes=(0, None), count_argname="num_tokens")
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    centred, count = graph(x)
    np.testing.assert_allclose(centred, x - x.mean(axis=0), atol=1e-6)
    assert int(count) == 5
    with pytest.raises(ValueError, match="runs as a whole"):
        graph(np.zeros((9, 2), np.float32))


def test_token_axes_are_those_of_vmap():
    """A tree of arguments, tokens on axis 1 and 0, outputs on axis 2."""

    def fn(tree, weights):
        return {"a": tree["x"][:, None] * weights["w"], "b": tree["y"] + 1}

    graph = block_graph(
        fn, buckets=(4, 8), in_axes=({"x": 1, "y": 0}, None), out_axes={"a": 2, "b": 0}
    )  # fmt: skip
    rng = np.random.default_rng(1)
    for tokens in (1, 6, 13):
        x, y = rng.standard_normal((3, tokens)).astype(np.float32), rng.standard_normal(tokens).astype(np.float32)
        got = graph({"x": x, "y": y}, {"w": jnp.float32(2)})
        np.testing.assert_array_equal(got["a"], 2 * x[:, None])
        np.testing.assert_array_equal(got["b"], y + 1)


def test_no_tokens_run_nothing(rows):
    before = sum(rows.stats.calls.values())
    a, b = rows(jnp.ones(3), np.zeros((0, 3), np.float32))
    assert a.shape == (0, 3) and b.shape == (0,) and a.dtype == jnp.float32
    assert sum(rows.stats.calls.values()) == before


def test_layers_of_one_shape_share_executables(rows):
    before = len(rows.stats.seconds)
    for layer in range(3):
        weight = jnp.full(3, layer, jnp.float32)
        np.testing.assert_allclose(rows(weight, np.ones((2, 3), np.float32))[0], np.tanh(np.full((2, 3), layer)), 1e-6)
    assert len(rows.stats.seconds) == before


def test_dtypes_shapes_and_static_arguments_are_part_of_the_key():
    def power(x, *, exponent):
        return x**exponent

    graph = block_graph(power, buckets=(4,), in_axes=(0,), static_argnames=("exponent",))
    ones = np.full((3, 2), 3)
    for x in (ones.astype(np.float32), ones.astype(np.int32), ones.astype(np.float32)[:, :1]):
        for exponent in (1, 2):
            got = graph(x, exponent=exponent)
            assert got.dtype == x.dtype
            np.testing.assert_array_equal(got, x**exponent)
    assert len(graph.stats.seconds) == 6


def test_a_failed_compilation_leaves_nothing_behind():
    fails = [True]

    def fn(x):
        if fails[0]:
            raise RuntimeError("no memory")
        return x + 1

    graph = block_graph(fn, buckets=(4,), in_axes=(0,))
    x = np.zeros((3, 2), np.float32)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            graph(x)
    fails[0] = False
    np.testing.assert_array_equal(graph(x), x + 1)
    assert len(graph.stats.seconds) == 1


def test_threads_compile_once():
    traces = []

    def fn(x):
        traces.append(x.shape)
        return x * 2

    graph = block_graph(fn, buckets=BUCKETS, in_axes=(0,))
    wrong = []

    def work(seed):
        for tokens in np.random.default_rng(seed).integers(1, 40, 20):
            x = np.full((tokens, 2), seed, np.float32)
            if not np.array_equal(graph(x), 2 * x):
                wrong.append((seed, tokens))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(traces) == [(b, 2) for b in BUCKETS]


def test_donated_buffers_are_gone_and_outputs_are_fresh():
    graph = block_graph(
        lambda cache, x: (cache + x.sum(), x), buckets=(4,), in_axes=(None, 0), out_axes=(None, 0), donate_argnums=(0,)
    )
    cache = jnp.zeros(16)
    new, first = graph(cache, np.ones((4, 1), np.float32))
    assert cache.is_deleted() and float(new[0]) == 4
    newer, second = graph(new, np.full((4, 1), 2, np.float32))
    assert float(newer[0]) == 12
    np.testing.assert_array_equal(first, np.ones((4, 1)))  # a later call does not overwrite it
    np.testing.assert_array_equal(second, np.full((4, 1), 2))


def test_compilations_are_reported():
    lines = []
    graph = block_graph(scale_rows, buckets=(4, 8), in_axes=(None, 0), name="rows")
    graph.on_compile = lambda name, took: lines.append((name, took.bucket, took.lowering > 0 and took.compiling > 0))
    graph.warm_up(jnp.ones(2), np.ones((1, 2), np.float32), workers=2, progress=False)
    assert sorted(lines) == [("rows", 4, True), ("rows", 8, True)]
    graph(jnp.ones(5), np.ones((1, 5), np.float32))  # another shape
    assert graph.stats.misses == 1


@pytest.mark.parametrize(
    ("args", "static", "message"),
    [
        ((np.ones(3),), {}, "takes 2 positional arguments, got 1"),
        ((np.ones(3), np.ones((2, 3))), {"other": 1}, r"static arguments are \[\], got \['other'\]"),
        ((np.ones(3), np.float32(1)), {}, "no token axis 0"),
        ((np.ones(3), Bucketed(np.ones((5, 3)), 4)), {}, r"4 tokens in \(5, 3\); buckets are \(4, 8, 16\)"),
        ((np.ones(3), Bucketed(np.ones((4, 3)), 5)), {}, "5 tokens in"),
        ((np.ones(3), Bucketed(np.ones((4, 3)), 0)), {}, "0 tokens in"),
        ((np.ones(3), Bucketed(np.ones((16, 3)), 17)), {}, "17 tokens"),
    ],
)
def test_refusals(rows, args, static, message):
    with pytest.raises(ValueError, match=message):
        rows(*args, **static)


def test_counts_that_differ_are_refused():
    graph = block_graph(lambda x, y: x + y, buckets=(4,), in_axes=(0, 0))
    with pytest.raises(ValueError, match=r"\[2, 3\] tokens"):
        graph(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="Bucketed or none"):
        graph(Bucketed(np.ones(4, np.float32), 3), np.ones(3, np.float32))
    with pytest.raises(ValueError, match="ascending"):
        block_graph(lambda x: x, buckets=(8, 4), in_axes=(0,))
    with pytest.raises(ValueError, match="count from the front, got -1"):
        block_graph(lambda x: x, buckets=(4,), in_axes=(0,), out_axes=-1)
    with pytest.raises(ValueError, match=r"output \(1, 2\) has no token axis 0 of 4"):
        block_graph(lambda x: x.sum(0, keepdims=True), buckets=(4,), in_axes=(0,))(np.ones((3, 2), np.float32))


@pytest.mark.parametrize("tokens", [0, 5])
def test_a_donated_cache_is_not_cut(tokens):
    """Neither chunks nor nothing at all can run with it; it is still there afterwards."""
    graph = block_graph(lambda x, c: x + c, buckets=(4,), in_axes=(0, None), donate_argnums=(1,))
    cache = jnp.ones(1)
    with pytest.raises(ValueError, match="runs as a whole"):
        graph(np.ones((tokens, 1), np.float32), cache)
    assert not cache.is_deleted()


@pytest.mark.parametrize("dtype", [bool, np.int8, jnp.bfloat16])
def test_dtypes_survive(dtype):
    x = np.arange(6).reshape(3, 2).astype(dtype)
    graph = block_graph(lambda x: (x, x), buckets=(4,), in_axes=(0,))
    for found in graph(x):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, x)


def test_keys_and_numbers_are_arguments_too():
    graph = block_graph(
        lambda x, key, factor: x * factor + jax.random.uniform(key, x.shape), buckets=(4,), in_axes=(0, None, None)
    )
    x = np.ones((4, 2), np.float32)
    expected = 3 * x + jax.random.uniform(jax.random.key(1), (4, 2))
    np.testing.assert_allclose(graph(x, jax.random.key(1), 3.0), expected, rtol=1e-6)


def test_equal_static_arguments_of_different_types_are_two_programs():
    graph = block_graph(lambda x, *, by: x * by, buckets=(4,), in_axes=(0,), static_argnames=("by",))
    x = np.ones((2, 1), np.int32)
    assert [graph(x, by=by).dtype for by in (1, 1.0)] == [np.int32, np.float32]


def test_inputs_are_copied():
    """The caller may fill its buffer anew at once."""
    graph = block_graph(lambda x: x + 0, buckets=(4,), in_axes=(0,))
    x = np.ones((4, 2), np.float32)
    found = graph(x)
    x[:] = 7
    np.testing.assert_array_equal(found, np.ones((4, 2)))


@pytest.mark.parametrize("devices", [1, 2])
def test_committed_weights_keep_their_place_and_compile_once(make_mesh, devices):
    """What one call gives, the next one takes: sharded weights, outputs whole on the same devices."""
    mesh = make_mesh(devices)
    weight = jax.device_put(jnp.arange(8.0).reshape(4, 2), NamedSharding(mesh, P("ep")))
    graph = block_graph(
        lambda w, x, c: (x + w.sum(0), c + 1), buckets=(4, 8), in_axes=(None, 0, None), out_axes=(0, None)
    )
    cache = jax.device_put(jnp.zeros(3), NamedSharding(mesh, P()))
    graph.warm_up(weight, jax.ShapeDtypeStruct((1, 2), jnp.float32), cache, progress=False)
    with count_compilations() as compiled:
        for tokens in (1, 3, 4, 7):
            x = np.full((tokens, 2), tokens, np.float32)
            y, cache = graph(weight, x, cache)
            np.testing.assert_array_equal(y, x + np.float32([12, 16]))
            y, cache = graph(weight, y, cache)
            np.testing.assert_array_equal(y, x + np.float32([24, 32]))
            values = Bucketed(np.zeros((8, 2), np.float32), tokens)
            values, cache = graph(weight, values, cache)
            values, cache = graph(weight, values, cache)
            np.testing.assert_array_equal(np.asarray(values.values)[:tokens], np.tile([[24, 32]], (tokens, 1)))
    assert not compiled and graph.stats.misses == 0
    assert float(cache[0]) == 16


def test_padding_on_the_host_keeps_values_and_compiles_nothing():
    x = jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3)
    with count_compilations() as compiled:
        padded = pad_tokens(x, 1, 5)
    assert not compiled and padded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(padded, np.pad(np.asarray(x), ((0, 0), (0, 2))))
