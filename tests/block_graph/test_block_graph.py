"""Blocks of fixed token counts: any count gives what the function gives, pads are inert, nothing compiles later."""

import functools
import threading
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from experiments.harness.timing import count_compilations
from fp4jax.block_graph import Bucketed, block_graph, compile_all
from fp4jax.block_graph.arguments import pad_tokens

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
    assert looked_at == [1, 1, 1, 1]
    for refused in (
        lambda: rows.bind(weight, x, x),
        lambda: bound(x, x),
        lambda: bound(),
        lambda: rows.bind(weight, k=1)(x),
    ):
        with pytest.raises(ValueError, match=r"positional arguments|static arguments"):
            refused()


def test_bucketed_tokens_take_a_shortcut_that_knows_its_program(monkeypatch):
    """After the first call nothing is examined, until something has another shape, dtype or bucket."""
    graph = block_graph(
        lambda w, x, c, n: (x * w + c, c + n.astype(c.dtype)), buckets=(4, 8), in_axes=(None, 0, None),
        out_axes=(0, None), donate_argnums=(2,), count_argname="n",
    )  # fmt: skip
    bound, examined = graph.bind(jnp.float32(2)), []
    call = type(graph)._call
    monkeypatch.setattr(type(graph), "_call", lambda self, *a: examined.append(0) or call(self, *a))

    def check(tokens, bucket, c, dtype=jnp.float32, times=1):
        examined.clear()
        y, c = bound(Bucketed(jnp.ones((bucket, 2), dtype), tokens), c)
        np.testing.assert_array_equal(y.values[:tokens], np.full((tokens, 2), 2 + float(jnp.max(c)) - tokens))
        assert y.tokens == tokens and len(examined) == times
        return c

    c = check(3, 4, jnp.zeros(()))
    c = check(2, 4, c, times=0)
    c = check(8, 8, c)
    c = check(5, 8, check(1, 4, c, times=0), times=0)
    assert float(c) == 3 + 2 + 8 + 1 + 5
    check(4, 4, jnp.zeros(2))  # a program of its own
    check(4, 4, jnp.zeros(2), times=0)
    check(4, 4, jnp.zeros(2), jnp.bfloat16)
    assert graph.stats.calls == {4: 6, 8: 2} and graph.stats.tokens == 19 + 12 and len(graph.executables) == 4
    with pytest.raises(ValueError, match="Bucketed with 9 tokens"):
        bound(Bucketed(jnp.ones((8, 2)), 9), c)
    with pytest.raises(ValueError, match="Bucketed with 3 tokens in"):
        bound(Bucketed(jnp.ones((5, 2)), 3), c)


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
    with pytest.raises(ValueError, match="2 and 3 tokens"):
        graph(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="all be Bucketed, of one size, or none"):
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


def test_bound_arguments_are_fixed(rows):
    weights = {"a": jnp.float32(2)}
    graph = block_graph(lambda w, x: x * w["a"], buckets=(4,), in_axes=(None, 0))
    bound = graph.bind(weights)
    weights["a"] = jnp.float32(5)
    np.testing.assert_array_equal(bound(np.ones(3, np.float32)), 2.0)
    axes = dict(in_axes=(None, 0), out_axes=(None, 0))
    taken = block_graph(lambda c, x: (c + x.sum(), x), buckets=(4,), donate_argnums=(0,), **axes)
    with pytest.raises(ValueError, match="argument 0 is donated and cannot be bound"):
        taken.bind(jnp.zeros(()))


@pytest.mark.parametrize("kind", ["array", "struct", "P(None)"])
def test_what_a_block_gives_back_compiles_nothing(make_mesh, kind):
    """Warmed up with a cache that has no place, or the same one under another name: outputs are at home."""
    mesh = make_mesh(2)
    weight = jax.device_put(jnp.ones(3), NamedSharding(mesh, P()))
    axes = dict(in_axes=(None, None, 0), out_axes=(None, 0))
    graph = block_graph(lambda w, c, x: (c + (x * w).sum(), x * w), buckets=(4, 8), **axes)
    first = {
        "array": jnp.zeros(3),
        "struct": jax.ShapeDtypeStruct((3,), jnp.float32),
        "P(None)": jax.device_put(jnp.zeros(3), NamedSharding(mesh, P(None))),
    }[kind]
    graph.warm_up(weight, first, np.ones((1, 3), np.float32), progress=False)
    cache = jnp.zeros(3) if kind == "struct" else first
    for tokens in (3, 5, 8):
        cache, _ = graph(weight, cache, np.ones((tokens, 3), np.float32))
    assert graph.stats.misses == 0 and len(graph.stats.seconds) == 2
    np.testing.assert_array_equal(cache, 48.0)


def test_home_of_tokens_is_that_of_chunks_and_of_none(make_mesh):
    place = make_mesh(2).devices.flat[1]
    graph = block_graph(lambda x: x * 2, buckets=(4, 8), in_axes=(0,))
    graph.warm_up(jax.device_put(jnp.ones((20, 2)), place), progress=False)
    for tokens in (20, 8, 3, 0):
        y = graph(jax.device_put(np.ones((tokens, 2), np.float32), place))
        assert y.devices() == {place} and y.shape == (tokens, 2)
    assert graph.stats.misses == 0 and graph.stats.chunked == 1


def test_programs_are_checked_before_they_run():
    seen = []

    def check(compiled):
        seen.append(compiled.as_text())
        if len(seen) == 1:
            raise RuntimeError("not this one")

    graph = block_graph(lambda x: x * 2, buckets=(4,), in_axes=(0,), check_compiled=check)
    with pytest.raises(RuntimeError, match="not this one"):
        graph(jnp.ones(3))
    np.testing.assert_array_equal(graph(jnp.ones(3)), [2, 2, 2])
    assert len(seen) == 2 and "ENTRY" in seen[0]


def test_no_tokens_are_traced_once():
    traced = []
    graph = block_graph(lambda x: traced.append(1) or x, buckets=(4,), in_axes=(0,))
    for _ in range(3):
        assert graph(np.zeros((0, 2), np.float32)).shape == (0, 2)
    assert len(traced) == 1


def test_tokens_that_meet_do_not_run_in_chunks():
    def mean(x, num_tokens):
        return x.sum(0, keepdims=True) / num_tokens + jnp.zeros_like(x)

    options = dict(buckets=(4,), in_axes=(0,), count_argname="num_tokens")
    with pytest.raises(ValueError, match=r"5 tokens are above the largest bucket, 4, and its tokens meet"):
        block_graph(mean, **options)(np.ones(5, np.float32))
    apart = block_graph(mean, chunks=True, **options)(np.arange(5, dtype=np.float32))
    np.testing.assert_array_equal(apart, [1.5] * 4 + [4])
    with pytest.raises(ValueError, match="cannot run in chunks"):
        block_graph(lambda x: x, buckets=(4,), in_axes=(0,), chunks=False)(np.ones(5, np.float32))


def test_donated_arrays_of_callers_survive():
    graph = block_graph(lambda x: x + 1, buckets=(4,), in_axes=(0,), donate_argnums=(0,))
    for tokens in (3, 4):
        x = jnp.ones(tokens)
        np.testing.assert_array_equal(graph(x), 2.0)
        assert not x.is_deleted()
    padded = Bucketed(jnp.ones(4), 3)
    graph(padded)
    assert padded.values.is_deleted()


def test_weak_types_are_kept():
    graph = block_graph(lambda w, x: x * w, buckets=(4,), in_axes=(None, 0))
    x = np.ones(3, jnp.bfloat16)
    assert graph(3.0, x).dtype == jnp.bfloat16 and graph(np.float32(3), x).dtype == jnp.float32


def test_options_reach_the_compiler():
    graph = block_graph(lambda x: x, buckets=(4,), in_axes=(0,), compiler_options={"xla_no_such_option": "1"})
    with pytest.raises(Exception, match="xla_no_such_option"):
        graph(np.ones(3, np.float32))


def test_workers_compile_side_by_side_and_trace_one_after_the_other_the_largest_first():
    together, tracing, order = threading.Barrier(3, timeout=60), threading.Lock(), []

    def alone(x):
        assert tracing.acquire(blocking=False)
        time.sleep(0.05)
        tracing.release()
        order.append(x.shape[0])
        return x

    meet = lambda _: together.wait()  # three programs are there before one is done, or this breaks  # noqa: E731
    block_graph(alone, buckets=BUCKETS, in_axes=(0,), check_compiled=meet).warm_up(
        np.ones(1), workers=3, progress=False
    )
    assert sorted(order) == list(BUCKETS)
    order.clear()
    block_graph(alone, buckets=BUCKETS, in_axes=(0,)).warm_up(np.ones(1), progress=False)
    assert order == list(reversed(BUCKETS))


def test_a_failure_cancels_what_has_not_begun():
    done = []

    def job(i):
        if i == 0:
            raise ValueError("broken")
        time.sleep(0.2)
        done.append(i)

    with pytest.raises(ValueError, match="broken"):
        compile_all({i: functools.partial(job, i) for i in range(20)}, workers=2, progress=False)
    assert len(done) <= 4


def test_requests_during_a_warm_up_are_no_misses():
    graph = block_graph(lambda x: x, buckets=(4, 8), in_axes=(0,))
    jobs = list(graph.compilations(np.ones(1, np.float32)).values())
    jobs[0]()
    graph(np.ones(2, np.float64))  # of another dtype: not among the jobs
    jobs[1]()
    assert graph.stats.misses == 0
    graph(np.ones(2, np.int32))
    assert graph.stats.misses == 1


def test_a_second_warm_up_has_no_misses():
    graph = block_graph(lambda x: x, buckets=(4,), in_axes=(0,))
    for dtype in (np.float32, np.int32):
        graph.warm_up(np.ones(1, dtype), progress=False)
        graph(np.ones(2, dtype))
    assert graph.stats.misses == 0


def test_refused_shapes_leave_nothing():
    def fail(x):
        raise ValueError("no")

    graph = block_graph(fail, buckets=(4,), in_axes=(0,))
    for width in range(5):
        with pytest.raises(ValueError, match="no"):
            graph(np.ones((2, width + 1)))
    assert not graph._executables._compiling and not graph.executables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(donate_argnums=(-1,)), r"donate_argnums has -1"),
        (dict(donate_argnums=(1,)), r"donate_argnums has 1; arguments are 0 to 0"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(ValueError, match=message):
        block_graph(lambda x: x, buckets=(4,), in_axes=(0,), **options)


def test_one_static_name_is_a_name():
    graph = block_graph(lambda x, *, mode: x + mode, buckets=(4,), in_axes=(0,), static_argnames="mode")
    np.testing.assert_array_equal(graph(np.ones(2), mode=2), 3)


def test_misplaced_bucketed_values_are_refused():
    graph = block_graph(lambda w, x, y: x + y + w, buckets=(4, 8), in_axes=(None, 0, 0))
    four, eight = Bucketed(jnp.ones(4), 3), Bucketed(jnp.ones(8), 3)
    with pytest.raises(ValueError, match="3 in a bucket of 4 and 3 in a bucket of 8 tokens"):
        graph(1.0, four, eight)
    with pytest.raises(ValueError, match="where an argument has no token axis"):
        graph(four, four, four)
    with pytest.raises(TypeError, match="integer"):
        graph(1.0, Bucketed(jnp.ones(4), 2.5), Bucketed(jnp.ones(4), 2.5))
    assert graph(1.0, *[Bucketed(jnp.ones(4), jnp.int32(2))] * 2).tokens == 2
