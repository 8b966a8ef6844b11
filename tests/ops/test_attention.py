"""Attention over pages: against float64, with shuffled pages and NaN in every unfilled place, and its cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from paged_cache import FP8, attention, poisoned_pages

import oracles
from cuda_lowering import kernels_in, struct
from fp4jax.attention import KeyValuePages, attend, pages_of
from fp4jax.attention.pages import seal
from fp4jax.attention.rotary import rope_frequency, rotate_and_write

# heads, key heads, size of a key, size of a value, places of a page
SHAPES = {
    "qwen3": (32, 4, 128, 128, 64),
    "ernie": (20, 4, 128, 128, 64),
    "small heads": (8, 8, 64, 64, 128),
    "wide heads": (8, 2, 256, 256, 64),
    "deepseek": (16, 16, 192, 128, 64),
    "large pages": (16, 2, 128, 128, 192),
}
_run = jax.jit(attend, static_argnames=("scale", "implementation"))


def queries(rng, counts, length, heads, dim, dtype):
    """[B, length, heads, dim] with NaN behind the `counts` valid queries of each request."""
    q = np.full((len(counts), length, heads, dim), np.nan, np.float32)
    for row, count in zip(q, counts, strict=True):
        row[:count] = rng.standard_normal((count, heads, dim))
    return jnp.asarray(q, dtype)


def check(q, pages, starts, counts, rows, *, tolerance, **options):
    """Compares every request's valid queries with float64. Returns the result as bits."""
    scale = options.get("scale") or q.shape[-1] ** -0.5
    found = _run(q, pages._replace(counts=jnp.asarray(counts, jnp.int32)), jnp.asarray(starts, jnp.int32), **options)
    assert found.dtype == q.dtype
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            expected = attention(np.asarray(q[b, :count], np.float64), *rows[b], start, scale)
            ours = np.asarray(found[b, :count], np.float64)
            assert np.linalg.norm(ours - expected) <= tolerance * np.linalg.norm(expected)
    return np.asarray(found).view(np.uint16 if q.dtype == jnp.bfloat16 else np.uint32)


# --- XLA ---


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("cached", [jnp.float32, jnp.bfloat16, FP8])
def test_against_float64(rng, length, cached):
    """Requests that start anywhere, with as many valid queries as they like."""
    starts, counts = (0, 3, 17, 9), (min(length, 5), length, 1, 0)
    lengths = [s + c for s, c in zip(starts, counts, strict=True)]
    dtype = jnp.float32 if cached == FP8 else cached
    pages, rows = poisoned_pages(rng, lengths, 2, 16, 8, 4, 24, cached)
    q = queries(rng, counts, length, 6, 16, dtype)
    bits = check(q, pages, starts, counts, rows, tolerance=1e-6 if dtype == jnp.float32 else 6e-3, scale=0.3)
    for b in range(2):  # alone, in other pages
        own = [part[pages.table[b]] for part in pages.arrays]
        alone = KeyValuePages(*own, jnp.arange(6, dtype=jnp.int32)[None], scales=pages.scales)
        one = check(
            q[b : b + 1], alone, starts[b : b + 1], counts[b : b + 1], rows[b : b + 1], tolerance=6e-3, scale=0.3
        )
        np.testing.assert_array_equal(one[0, : counts[b]], bits[b, : counts[b]])


@given(seed=st.integers(0, 2**32 - 1), page=st.sampled_from([1, 3, 8]), start=st.integers(0, 12))
def test_what_is_written_in_chunks_is_found_in_order(seed, page, start):
    """Pages after two writes hold the tokens of both; all other places are as before."""
    rng = np.random.default_rng(seed)
    n = -(-20 // page)
    table = rng.permutation(2 * n).reshape(2, n).astype(np.int32)
    before = jnp.full((2 * n, 2, page, 4), 7.0)
    pages = KeyValuePages(before, before[..., :3], jnp.asarray(table))
    starts, total = np.array([start, 0], np.int32), 6
    keys, values = (jnp.asarray(rng.standard_normal((2, total, 2, size)), jnp.float32) for size in (4, 3))
    counts = jnp.asarray([2, 1], jnp.int32)  # of the last three tokens
    write = functools.partial(KeyValuePages.write)
    after = write(pages, keys[:, :3], values[:, :3], jnp.asarray(starts))
    after = write(after._replace(counts=counts), keys[:, 3:], values[:, 3:], jnp.asarray(starts) + 3)
    for found, new, size in ((after.keys, keys, 4), (after.values, values, 3)):
        expected = np.full((2 * n, 2, page, size), 7.0, np.float32)
        for b in range(2):
            for i in range(3 + int(counts[b])):
                place = starts[b] + i
                expected[table[b, place // page], :, place % page] = np.asarray(new)[b, i]
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_positions_beyond_the_last_page_are_dropped():
    pages = pages_of(jnp.zeros((1, 1, 4, 2)), jnp.zeros((1, 1, 4, 2)))
    ones = jnp.ones((1, 3, 1, 2))
    found = pages.write(ones, ones, jnp.int32(2))
    np.testing.assert_array_equal(np.asarray(found.keys)[0, 0, :, 0], [0, 0, 1, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_spoiled_place_is_seen_by_later_queries_only(rng, bad):
    """One value and one key that are not finite: the places from there on have no finite output, in that sequence."""
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 9, 4, 16), (3, 2, 9, 16), (3, 2, 9, 8)))
    clean = np.asarray(_run(q, pages_of(k, v), jnp.int32(0)))
    k, v = seal(k.at[2, :, 5].set(jnp.nan), v.at[1, :, 4, 3].set(bad))
    assert np.isfinite(np.asarray(v)).all()
    found = np.asarray(_run(q, pages_of(k, v), jnp.int32(0)))
    assert np.isnan(found[1, 4:]).all() and np.isnan(found[2, 5:]).all()
    np.testing.assert_array_equal(found[0], clean[0])
    np.testing.assert_array_equal(found[1, :4], clean[1, :4])
    np.testing.assert_array_equal(found[2, :5], clean[2, :5])


def test_gradients_do_not_see_unfilled_places(rng):
    q, k, v = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((1, 4, 2, 16), (1, 2, 9, 16), (1, 2, 9, 8)))
    gradient = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, pages_of(k, v), jnp.int32(0)) ** 2)))
    expected = np.asarray(gradient(q, k, v))
    poisoned = gradient(q, k.at[:, :, 4:].set(np.nan), v.at[:, :, 4:].set(np.nan))
    np.testing.assert_allclose(np.asarray(poisoned), expected, rtol=1e-5)
    assert np.abs(expected).max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(heads=5), "q .* do not fit"),
        (dict(dim=8), "q .* do not fit"),
        (dict(batch=3), "q .* do not fit"),
        (dict(scale=0.0), "scale must be positive, got 0.0"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    shape = {**dict(batch=2, heads=4, dim=16, scale=None), **change}
    pages = pages_of(jnp.zeros((2, 2, 8, 16)), jnp.zeros((2, 2, 8, 16)))
    with pytest.raises(ValueError, match=message):
        q = jnp.zeros((shape["batch"], 1, shape["heads"], shape["dim"]))
        attend(q, pages, jnp.int32(0), scale=shape["scale"])


def test_pages_of_codes_need_scales_and_others_have_none():
    q, codes = jnp.zeros((1, 1, 2, 16)), jnp.zeros((1, 2, 8, 16), FP8)
    with pytest.raises(TypeError, match="float8_e4m3fn have no scales; e4m3 needs scales"):
        attend(q, pages_of(codes, codes), jnp.int32(0))
    plain = pages_of(jnp.zeros((1, 2, 8, 16)), jnp.zeros((1, 2, 8, 16)))
    with pytest.raises(TypeError, match="float32 have scales"):
        attend(q, plain._replace(scales=jnp.ones(2)), jnp.int32(0))


# --- kernels ---


def structs(name, length, cached, requests=3):
    heads, kv_heads, dim, value_dim, page = SHAPES[name]
    pages = 12
    return (
        struct((requests, length, heads, dim), jnp.bfloat16), struct((pages, kv_heads, page, dim), cached),
        struct((pages, kv_heads, page, value_dim), cached), struct((requests, 4), jnp.int32),
        struct((requests,), jnp.int32),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("qwen3", "deepseek") else pytest.mark.slow) for name in SHAPES]
)
@pytest.mark.parametrize("length", [1, 100])
@pytest.mark.parametrize("cached", [jnp.bfloat16, pytest.param(FP8, marks=pytest.mark.slow)])
def test_kernels_lower(name, length, cached):
    """One kernel for prefill, two for decode: the parts, and their sum."""

    def run(q, keys, values, table, starts):
        scales = jnp.ones(2) if cached == FP8 else None
        return attend(q, KeyValuePages(keys, values, table, scales=scales), starts)

    assert kernels_in(run, *structs(name, length, cached)) == (2 if length == 1 else 1)


@pytest.mark.parametrize(
    ("q", "pages", "message"),
    [
        ((1, 1, 4, 64), (3, 2, 32, 64), "a multiple of 64 places, got 32"),
        ((1, 1, 4, 96), (3, 2, 64, 96), "must be among"),
        ((1, 1, 130, 64), (3, 2, 64, 64), "at most 64 query heads"),
    ],
)
def test_calls_that_the_kernel_does_not_serve(q, pages, message):
    keys = jnp.zeros(pages, jnp.bfloat16)
    cache = KeyValuePages(keys, keys, jnp.zeros((q[0], 3), jnp.int32))
    with pytest.raises(NotImplementedError, match=message):
        attend(jnp.zeros(q, jnp.bfloat16), cache, jnp.int32(0), implementation="mosaic_gpu")
    assert _run(jnp.zeros(q, jnp.bfloat16), cache, jnp.int32(0)).shape == q  # XLA serves it


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("cached", [jnp.bfloat16, FP8])
def test_decode_on_the_gpu(name, seed, cached):
    """Lengths around the limits of tiles, parts and pages; a request without a token; alone and among others."""
    rng = np.random.default_rng(seed)
    heads, kv_heads, dim, value_dim, page = SHAPES[name]
    places = -(-1024 // page) * page
    lengths = [1, 63, 64, 65, 256, 257, 0, *rng.integers(1, 1000, 3).tolist(), places]
    pages, rows = poisoned_pages(rng, lengths, kv_heads, dim, value_dim, page, places, cached)
    counts, starts = [int(n > 0) for n in lengths], [max(n - 1, 0) for n in lengths]
    q = queries(rng, counts, 1, heads, dim, jnp.bfloat16)
    options = dict(tolerance=4e-3, implementation="mosaic_gpu")
    bits = check(q, pages, starts, counts, rows, **options)
    again = check(q, pages, starts, counts, rows, **options)
    np.testing.assert_array_equal(again, bits)
    # Behind its last place a request sees no more than its own pages.
    beyond = jnp.asarray([*starts[:-1], starts[-1] + 5], jnp.int32)
    found = _run(q, pages._replace(counts=jnp.asarray(counts, jnp.int32)), beyond, implementation="mosaic_gpu")
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), bits)
    assert not bits[6].any()  # a request without keys: zeros
    for b in (3, 10):
        where = slice(b, b + 1)
        one = check(
            q[where], pages._replace(table=pages.table[where]), starts[where], counts[where], rows[where], **options
        )
        np.testing.assert_array_equal(one[0], bits[b])


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("length", "starts", "counts"), [(130, (0, 65, 301), (130, 77, 1)), (300, (0, 128), (300, 0))])
@pytest.mark.parametrize("cached", [jnp.bfloat16, FP8])
def test_prefill_on_the_gpu(rng, name, length, starts, counts, cached):
    heads, kv_heads, dim, value_dim, page = SHAPES[name]
    heads, kv_heads = min(2, kv_heads) * (heads // kv_heads), min(2, kv_heads)  # the oracle is slow
    lengths = [s + c for s, c in zip(starts, counts, strict=True)]
    pages, rows = poisoned_pages(rng, lengths, kv_heads, dim, value_dim, page, 448, cached)
    q = queries(rng, counts, length, heads, dim, jnp.bfloat16)
    options = dict(tolerance=4e-3, implementation="mosaic_gpu")
    bits = check(q, pages, starts, counts, rows, **options)
    again = check(q, pages, starts, counts, rows, **options)
    for b, count in enumerate(counts):
        np.testing.assert_array_equal(again[b, :count], bits[b, :count])
    # The last queries of the first request in a chunk of their own: the same bits.
    chunk = check(q[:1, 64:], pages._replace(table=pages.table[:1]), [64], [counts[0] - 64], [rows[0]], **options)
    np.testing.assert_array_equal(chunk[0, : counts[0] - 64], bits[0, 64 : counts[0]])


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 9, 100])
def test_xla_and_kernel_agree_and_share_derivatives(rng, length):
    """One page per request, of a length that no tile divides; the gradient is that of XLA."""
    q, k, v = (
        jnp.asarray(oracles.round_bf16(rng.standard_normal(s).astype(np.float32)), jnp.bfloat16)
        for s in ((2, length, 8, 64), (2, 2, 150, 64), (2, 2, 150, 64))
    )
    starts = jnp.asarray([0, 40], jnp.int32)
    found = {name: _run(q, pages_of(k, v), starts, implementation=name) for name in ("xla", "mosaic_gpu")}
    a, b = (np.asarray(found[name], np.float64) for name in found)
    assert np.linalg.norm(a - b) <= 6e-3 * np.linalg.norm(a)

    def loss(q, implementation):
        return jnp.sum(attend(q, pages_of(k, v), starts, implementation=implementation).astype(jnp.float32) ** 2)

    gradients = [np.asarray(jax.jit(jax.grad(loss), static_argnums=1)(q, name), np.float64) for name in found]
    assert np.linalg.norm(gradients[0] - gradients[1]) <= 2e-2 * np.linalg.norm(gradients[0])


def rotated(q, start, norms, interleaved):
    """Queries [S, heads, D] from position `start` on after norm and RoPE, in float64."""
    if norms is not None:
        q = q / np.sqrt((q * q).mean(-1, keepdims=True) + 1e-6) * np.asarray(norms[0], np.float64)
    half = q.shape[-1] // 2
    angle = (start + np.arange(q.shape[0]))[:, None, None] * 1e4 ** -(np.arange(half) / half)
    pairs = q.reshape(*q.shape[:-1], half, 2) if interleaved else np.stack(np.split(q, 2, -1), -1)
    turned = (
        pairs[..., 0] * np.cos(angle) - pairs[..., 1] * np.sin(angle),
        (pairs[..., 1] * np.cos(angle) + pairs[..., 0] * np.sin(angle)),
    )
    return np.stack(turned, -1).reshape(q.shape) if interleaved else np.concatenate(turned, -1)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 4, 128), (20, 4, 64), (6, 2, 256)])
@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("cached", [jnp.bfloat16, FP8])
def test_rotate_and_write_on_the_gpu(rng, interleaved, with_norms, heads, kv_heads, dim, length, cached):
    """The kernel's queries and pages are those of XLA but for the last bits; places that are not written stay as is."""
    pages, _ = poisoned_pages(rng, (3, 80, 0), kv_heads, dim, dim, 64, 160, cached)
    starts, counts = jnp.asarray([3, 80, 0], jnp.int32), jnp.asarray([length, length - length // 3, 0], jnp.int32)
    qkv = rng.standard_normal((3, length, (heads + 2 * kv_heads) * dim)).astype(np.float32)
    qkv[0, 0, -1] = np.inf  # in the last value of the first token
    norms = jnp.asarray(rng.uniform(0.5, 2, (2, dim)), jnp.float32) if with_norms else None
    run = jax.jit(rotate_and_write, static_argnames=("heads", "epsilon", "interleaved", "implementation"))
    found = [
        run(
            jnp.asarray(qkv, jnp.bfloat16), pages._replace(counts=counts), starts, rope_frequency(1e4, dim),
            heads=heads, norms=norms, epsilon=1e-6, interleaved=interleaved, implementation=name,
        )
        for name in ("xla", "mosaic_gpu")
    ]  # fmt: skip
    for ours, expected in zip(jax.tree.leaves(found[1]), jax.tree.leaves(found[0]), strict=True):
        ours, expected = np.asarray(ours, np.float32), np.asarray(expected, np.float32)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected))
        step = 1 / 64 if cached != FP8 else 1 / 8  # of e4m3: the last bits of a bf16 may decide how a code is rounded
        np.testing.assert_allclose(ours, expected, rtol=step, atol=1 / 64)
    q = np.asarray(qkv[1, :, : heads * dim], np.float32).reshape(length, heads, dim)
    exact = rotated(oracles.round_bf16(q).astype(np.float64), 80, norms, interleaved)
    assert np.linalg.norm(np.asarray(found[1][0][1], np.float64) - exact) <= 2.5e-3 * np.linalg.norm(exact)
    written = np.asarray(found[1][1].keys != pages.keys).reshape(-1, kv_heads, 64, dim).any(axis=(1, 3))
    filled = ~np.isnan(np.asarray(pages.values, np.float32)).any(axis=(1, 3))
    assert not (written & filled & ~np.isnan(np.asarray(pages.keys, np.float32)).any(axis=(1, 3))).any()
    values = np.asarray(found[1][1].values, np.float32)
    table = np.asarray(pages.table)
    np.testing.assert_array_equal(values[table[0, 0], -1, 3], 0)  # the value that was not finite
    assert np.isnan(np.asarray(found[1][1].keys, np.float32)[table[0, 0], -1, 3]).all()
    for place in range(80, 80 + int(counts[1])):
        row = qkv[1, place - 80, (heads + kv_heads) * dim :].reshape(kv_heads, dim)
        wanted = oracles.round_bf16(row)
        if cached == FP8:
            wanted = (wanted * (1 / pages.scales[1])).astype(FP8).astype(np.float32)
        np.testing.assert_array_equal(values[table[1, place // 64], :, place % 64], wanted)
