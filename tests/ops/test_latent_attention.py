"""Attention over pages of latents: against float64, with shuffled pages and NaN in every unfilled place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paged_cache import attention, poisoned_pages

from cuda_lowering import kernels_in, struct
from fp4jax.attention import KeyValuePages, attend_latents
from fp4jax.layers.latent_attention import LatentAttention

SCALE = 0.07
_run = jax.jit(attend_latents, static_argnames=("scale", "implementation"))


def queries(rng, counts, length, heads, sizes, dtype):
    """The two parts [B, length, heads, size] of queries, with NaN behind the `counts` valid ones of each request."""
    parts = []
    for size in sizes:
        q = rng.standard_normal((len(counts), length, heads, size)).astype(np.float32)
        for row, count in zip(q, counts, strict=True):
            row[count:] = np.nan
        parts.append(jnp.asarray(q, dtype))
    return parts


def check(q, pages, starts, counts, rows, *, tolerance, implementation=None):
    """Compares every request's valid queries with float64. Returns the result as bits."""
    pages = pages._replace(counts=jnp.asarray(counts, jnp.int32))
    found = _run(*q, pages, jnp.asarray(starts, jnp.int32), scale=SCALE, implementation=implementation)
    assert found.dtype == q[0].dtype and found.shape == q[0].shape
    for b, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            both = np.concatenate([np.asarray(part[b, :count], np.float64) for part in q], axis=-1)
            expected = attention(both, np.concatenate(rows[b], axis=-1), rows[b][0], start, SCALE)
            ours = np.asarray(found[b, :count], np.float64)
            assert np.linalg.norm(ours - expected) <= tolerance * np.linalg.norm(expected)
    return np.asarray(found).view(np.uint16 if q[0].dtype == jnp.bfloat16 else np.uint32)


def of_request(array, b):
    return array[b : b + 1]


def check_alone(b, q, pages, starts, counts, rows, bits, **options):
    """A request alone has the bits `bits` that it has among others."""
    alone = pages._replace(table=of_request(pages.table, b))
    one = [of_request(a, b) for a in (starts, counts, rows)]
    found = check([of_request(part, b) for part in q], alone, *one, **options)
    np.testing.assert_array_equal(found[0, : counts[b]], bits[b, : counts[b]])


# --- XLA ---


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize(("length", "dtype"), [(1, jnp.float32), (1, jnp.bfloat16), (3, jnp.float32)])
def test_against_float64(rng, length, dtype):
    starts, counts = (0, 3, 17, 9), (min(length, 2), length, 1, 0)
    lengths = [s + c for s, c in zip(starts, counts, strict=True)]
    pages, rows = poisoned_pages(rng, lengths, 1, 32, 8, 4, 24, dtype)
    q = queries(rng, counts, length, 6, (32, 8), dtype)
    options = dict(tolerance=1e-6 if dtype == jnp.float32 else 6e-3)
    bits = check(q, pages, starts, counts, rows, **options)
    check_alone(1, q, pages, starts, counts, rows, bits, **options)


def check_a_spoiled_place(rng, heads, sizes, page, dtype, implementation):
    """NaN in a latent and in a rotated key that are filled: all of those two requests, and nothing of the third."""
    lengths = (9, 70, 5)
    pages, _ = poisoned_pages(rng, lengths, 1, *sizes, page, 128, dtype)
    q, starts = queries(rng, (1, 1, 1), 1, heads, sizes, dtype), jnp.asarray(lengths, jnp.int32) - 1
    run = lambda pages: np.asarray(_run(*q, pages, starts, scale=SCALE, implementation=implementation), np.float32)  # noqa: E731
    clean = run(pages)
    assert np.isfinite(clean).all()
    first, second = pages.table[0, 4 // page], pages.table[1, 64 // page]
    found = run(
        pages._replace(
            keys=pages.keys.at[first, 0, 4 % page, 3].set(np.nan),
            values=pages.values.at[second, 0, 64 % page, 1].set(np.nan),
        )
    )
    assert np.isnan(found[:2]).all()
    np.testing.assert_array_equal(found[2], clean[2])


def test_a_spoiled_place(rng):
    check_a_spoiled_place(rng, 4, (32, 8), 8, jnp.float32, "xla")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(latent=16), "do not fit"),
        (dict(rotated=4), "do not fit"),
        (dict(batch=3), "do not fit"),
        (dict(kv_heads=2), "do not fit"),
        (dict(scale=0.0), "scale must be positive, got 0.0"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    shape = {**dict(batch=2, latent=32, rotated=8, kv_heads=1, scale=1.0), **change}
    q_latent, q_rotated = (jnp.zeros((2, 1, 4, size)) for size in (32, 8))
    keys, values = (jnp.zeros((2, shape["kv_heads"], 8, shape[name])) for name in ("latent", "rotated"))
    pages = KeyValuePages(keys, values, jnp.zeros((shape["batch"], 1), jnp.int32))
    with pytest.raises(ValueError, match=message):
        attend_latents(q_latent, q_rotated, pages, jnp.int32(0), scale=shape["scale"])


# --- kernels ---


def structs(heads, length=1, rank=512, page=64, dtype=jnp.bfloat16):
    return (
        struct((3, length, heads, rank), dtype), struct((3, length, heads, 64), dtype),
        struct((12, 1, page, rank), dtype), struct((12, 1, page, 64), dtype), struct((3, 4), jnp.int32),
        struct((3,), jnp.int32),
    )  # fmt: skip


@pytest.mark.parametrize("heads", [128, pytest.param(16, marks=pytest.mark.slow), 20])
def test_kernels_lower(heads):
    """Two kernels: the parts, and their sum."""

    def run(q_latent, q_rotated, latents, rotated, table, starts):
        return attend_latents(q_latent, q_rotated, KeyValuePages(latents, rotated, table), starts, scale=SCALE)

    assert kernels_in(run, *structs(heads)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype=jnp.float32), "needs bf16"),
        (dict(rank=256), r"must have sizes \(512, 64\), got \(256, 64\)"),
        (dict(length=2), "one query per request, got 2"),
        (dict(page=32), "a multiple of 64 places, got 32"),
    ],
)
def test_calls_that_the_kernel_does_not_serve(change, message):
    q_latent, q_rotated, *cache, _ = (jnp.zeros(s.shape, s.dtype) for s in structs(2, **change))
    pages = KeyValuePages(*cache)
    with pytest.raises(NotImplementedError, match=message):
        attend_latents(q_latent, q_rotated, pages, jnp.int32(0), scale=SCALE, implementation="mosaic_gpu")
    assert _run(q_latent, q_rotated, pages, jnp.int32(0), scale=SCALE).shape == q_latent.shape  # XLA serves it


def test_a_decode_step_of_the_layer_runs_the_kernels():
    sizes = dict(q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=16, qk_rope_head_dim=64, v_head_dim=16)
    kinds = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, stddev=0.02, rngs=nnx.Rngs(0))
    layer = LatentAttention(64, 4, theta=1e4, **sizes, **kinds)

    def step(x, latents, rotated, table, starts):
        return layer(x, starts, KeyValuePages(latents, rotated, table))

    assert kernels_in(step, struct((3, 1, 64), jnp.bfloat16), *structs(4)[2:]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "page"), [(128, 64), (16, 128), (20, 192), (80, 64)])
@pytest.mark.parametrize("seed", range(2))
def test_decode_on_the_gpu(heads, page, seed):
    """Lengths around the limits of tiles, parts and pages; a request without a token; alone and among others."""
    rng = np.random.default_rng(seed)
    places = -(-1024 // page) * page
    lengths = [1, 63, 64, 65, 256, 257, 0, *rng.integers(1, 1000, 3).tolist(), places]
    pages, rows = poisoned_pages(rng, lengths, 1, 512, 64, page, places, jnp.bfloat16)
    counts, starts = [int(n > 0) for n in lengths], [max(n - 1, 0) for n in lengths]
    q = queries(rng, counts, 1, heads, (512, 64), jnp.bfloat16)
    options = dict(tolerance=4e-3, implementation="mosaic_gpu")
    bits = check(q, pages, starts, counts, rows, **options)
    np.testing.assert_array_equal(check(q, pages, starts, counts, rows, **options), bits)
    # Behind its last place a request sees no more than its own pages.
    beyond, pages_now = jnp.asarray([*starts[:-1], places + 4], jnp.int32), pages._replace(counts=jnp.asarray(counts))
    found = _run(*q, pages_now, beyond, scale=SCALE, implementation="mosaic_gpu")
    np.testing.assert_array_equal(np.asarray(found).view(np.uint16), bits)
    assert not bits[6].any()  # a request without keys: zeros
    for b in (3, 10):
        check_alone(b, q, pages, starts, counts, rows, bits, **options)


@pytest.mark.gpu
def test_long_requests_have_larger_parts(rng):
    """From 4097 keys on, and again from 8193 on; many requests, so that blocks of threads take several parts."""
    lengths = [4096, 4097, 8200, 3000, 5000, *rng.integers(1, 2000, 12).tolist()]
    pages, rows = poisoned_pages(rng, lengths, 1, 512, 64, 64, 8256, jnp.bfloat16)
    counts, starts = [1] * len(lengths), [n - 1 for n in lengths]
    q = queries(rng, counts, 1, 72, (512, 64), jnp.bfloat16)
    options = dict(tolerance=4e-3, implementation="mosaic_gpu")
    bits = check(q, pages, starts, counts, rows, **options)
    np.testing.assert_array_equal(check(q, pages, starts, counts, rows, **options), bits)
    for b in (1, 2, 9):
        check_alone(b, q, pages, starts, counts, rows, bits, **options)


@pytest.mark.gpu
def test_a_spoiled_place_on_the_gpu(rng):
    check_a_spoiled_place(rng, 128, (512, 64), 64, jnp.bfloat16, "mosaic_gpu")
