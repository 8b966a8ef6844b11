"""The Hopper kernels on a GPU, bit for bit against numpy over random shapes, with every pad poisoned.

`implementation="mosaic_gpu"` is named everywhere, so that nothing falls back. A new shape costs a compilation: the
shapes are drawn once per seed and kept few.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from poisoned_tokens import check_outputs, poison as spoiled_rows

import oracles
from fp4jax.grouped_gemm import pack_weights
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from fp4jax.nvfp4 import quantize
from fp4jax.permute import depermute_combine, permute_to_contiguous, permute_to_masked
from fp4jax.swiglu import swiglu_quantize
from pallas_kernels.rows import (
    quantize as quantize_kernel,
    route_metadata,
    swiglu_quantize as swiglu_kernel,
)

pytestmark = pytest.mark.gpu
KERNEL = dict(implementation="mosaic_gpu")


def bf16_values(rng, shape, spread=3):
    """f32 with bf16 values, rows of different magnitude."""
    x = rng.standard_normal(shape) * 2.0 ** rng.uniform(-spread, spread, (*shape[:-1], 1))
    return oracles.round_bf16(x.astype(np.float32))


def as_bytes(array):
    return np.asarray(array).view(np.uint8)


def poison(x, valid):
    return np.where(valid[..., None], x, np.nan)


# --- quantize ---


@functools.cache
def _quantize(layout, four_over_six, config):
    kernel = functools.partial(
        quantize_kernel.quantize, scale_layout=layout, four_over_six=four_over_six, config=config
    )
    return jax.jit(kernel, static_argnums=1), jax.jit(kernel)


def run_quantize(x, g, masked_m=None, *, layout="linear", four_over_six=False, config=None):
    by_name, by_array = _quantize(layout, four_over_six, config)
    return (by_name if isinstance(g, str) else by_array)(x, g, masked_m)


@pytest.mark.parametrize("seed", range(12))
def test_quantize_random_shapes(seed):
    rng = np.random.default_rng(seed)
    rows, k = int(rng.integers(1, 700)), 16 * int(rng.integers(1, 300))
    dtype = (jnp.bfloat16, jnp.float32)[seed % 2]
    x = np.asarray(jnp.asarray(bf16_values(rng, (rows, k)) * (1 if seed % 2 == 0 else 1.0001), dtype), np.float32)
    mode = ("scalar", "row", "per_token")[seed % 3]
    g = {
        "scalar": np.float32(0.01),
        "row": rng.uniform(1e-3, 1, (rows, 1)).astype(np.float32),
        "per_token": oracles.computed_scale(x, -1),
    }[mode]
    layout = "linear" if mode == "per_token" else ("linear", "swizzled")[seed // 2 % 2]
    config = quantize_kernel.TuningConfig(blocks_per_lane=1 + seed % 4)
    qdata, scales, row_scale = run_quantize(
        jnp.asarray(x, dtype), mode if mode == "per_token" else jnp.asarray(g), layout=layout, config=config
    )
    expected = oracles.quantize_exact(x, g)
    np.testing.assert_array_equal(np.asarray(qdata), expected[0])
    wanted = expected[1] if layout == "linear" else oracles.swizzle(expected[1][None])
    np.testing.assert_array_equal(as_bytes(scales).ravel(), wanted.ravel())
    if mode == "per_token":
        np.testing.assert_array_equal(np.asarray(row_scale), g)


@pytest.mark.parametrize("seed", range(8))
def test_quantize_masked_random_shapes(seed):
    rng = np.random.default_rng(100 + seed)
    experts, m, k = int(rng.integers(1, 40)), int(rng.integers(1, 150)), 16 * int(rng.integers(1, 200))
    masked_m = rng.integers(0, m + 1, experts).astype(np.int32)
    masked_m[rng.random(experts) < 0.3] = 0
    masked_m[0] = m + 3  # counts as m
    valid = np.arange(m) < masked_m[:, None]
    x = bf16_values(rng, (experts, m, k))
    mode = ("expert", "per_token", "row")[seed % 3]
    g = {
        "expert": rng.uniform(1e-3, 1, (experts, 1, 1)).astype(np.float32),
        "row": rng.uniform(1e-3, 1, (experts, m, 1)).astype(np.float32),
        "per_token": oracles.computed_scale(x, -1),
    }[mode]
    four_over_six = seed >= 6
    if four_over_six and mode == "per_token":
        g = oracles.computed_scale(x, -1, divisor=1536)
    layout = "linear" if mode == "per_token" else ("linear", "swizzled")[seed % 2]
    qdata, scales, row_scale = run_quantize(
        jnp.asarray(poison(x, valid), jnp.bfloat16),
        mode if mode == "per_token" else jnp.asarray(g),
        jnp.asarray(masked_m),
        layout=layout,
        four_over_six=four_over_six,
    )
    oracle = oracles.quantize_four_over_six if four_over_six else oracles.quantize_exact
    expected = oracle(x, g)
    np.testing.assert_array_equal(np.asarray(qdata)[valid], expected[0][valid])
    if layout == "linear":
        np.testing.assert_array_equal(as_bytes(scales)[valid], expected[1][valid])
    else:
        clean = np.where(valid[..., None], expected[1], 0).astype(np.uint8)
        np.testing.assert_array_equal(as_bytes(scales).ravel(), oracles.swizzle(clean))
    if mode == "per_token":
        np.testing.assert_array_equal(np.asarray(row_scale)[valid], g[valid])


@pytest.mark.parametrize("four_over_six", [False, True])
def test_quantize_every_bf16_and_values_next_to_ties(four_over_six, rng):
    bf16 = oracles.all_bf16()
    bf16 = rng.permutation(np.where(np.isfinite(bf16), bf16, 0)).reshape(-1, 256)
    # f32 whose quotient by the block's scale lies within a few ulp of a midpoint of e2m1: amax 6 fixes the scale at 1.
    ties = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], (512, 256)).astype(np.float32)
    ties = (ties.view(np.int32) + rng.integers(-3, 4, ties.shape)).astype(np.int32).view(np.float32)
    ties[:, ::16] = 6
    for x, g in ((bf16, 1.0), (bf16, 2.0**-100), (bf16, 0.0123), (bf16, 2.0**100), (ties, 1.0), (ties, 1 / 3)):
        g = np.float32(g)
        qdata, scales, _ = run_quantize(jnp.asarray(x), jnp.asarray(g), four_over_six=four_over_six)
        expected = (oracles.quantize_four_over_six if four_over_six else oracles.quantize_exact)(x, g)
        np.testing.assert_array_equal(np.asarray(qdata), expected[0])
        np.testing.assert_array_equal(as_bytes(scales), expected[1])


def test_quantize_beyond_four_gigabytes_of_offsets():
    """Element offsets above 2^31: the last rows of a large tensor."""
    rows, k = 2**31 // 7168 + 300, 7168
    x = jax.jit(lambda: jnp.broadcast_to(jnp.arange(k, dtype=jnp.bfloat16) / 64 - 7, (rows, k)))()
    qdata, scales, _ = run_quantize(x, jnp.float32(0.01))
    expected = oracles.quantize_exact(np.asarray(x[:1], np.float32), np.float32(0.01))
    assert bool(jnp.all(qdata == jnp.asarray(expected[0])))
    assert bool(jnp.all(scales.view(jnp.uint8) == jnp.asarray(expected[1])))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("mode", "layout", "four_over_six"),
    [(0.01, "linear", False), (0.01, "swizzled", False), (0.01, "linear", True), ("per_token", "linear", False)],
)
def test_quantize_nan_and_inf(mode, layout, four_over_six, dtype, rng):
    x, _, rows = spoiled_rows(bf16_values(rng, (300, 256)))
    g = oracles.computed_scale(x, -1) if mode == "per_token" else np.float32(mode)
    given = mode if mode == "per_token" else jnp.float32(mode)
    qdata, scales, row_scale = run_quantize(jnp.asarray(x, dtype), given, layout=layout, four_over_six=four_over_six)
    expected = (oracles.quantize_four_over_six if four_over_six else oracles.quantize_exact)(x, g)
    np.testing.assert_array_equal(np.asarray(qdata), expected[0])
    wanted = expected[1] if layout == "linear" else oracles.swizzle(expected[1][None])
    np.testing.assert_array_equal(as_bytes(scales).ravel(), wanted.ravel())
    np.testing.assert_array_equal((expected[1] == 0x7F).any(1), rows)
    if mode == "per_token":
        np.testing.assert_array_equal(np.asarray(row_scale), g)


def test_quantize_under_vmap(rng):
    x = bf16_values(rng, (3, 40, 64))
    t = jax.jit(jax.vmap(lambda x: quantize(x, global_scale="per_token", **KERNEL)))(jnp.asarray(x))
    g = oracles.computed_scale(x, -1)
    expected = oracles.quantize_exact(x, g)
    np.testing.assert_array_equal(np.asarray(t.qdata), expected[0])
    np.testing.assert_array_equal(np.asarray(t.global_scale), g)


# --- SwiGLU ---


def _mismatch(got, expected):
    return np.mean(np.asarray(got) != expected)


@pytest.mark.parametrize("per_token", [False, True])
def test_swiglu_of_nan_and_inf(per_token, rng):
    """In the gates, in the ups, in both: the same places as XLA's, in every form of the result."""
    gates, ups = (spoiled_rows(rng.standard_normal((300, 128)))[0] for _ in range(2))
    gates[1:9], ups[9:13] = rng.standard_normal((8, 128)), -2
    x = jnp.asarray(np.concatenate([gates, ups], axis=1), jnp.bfloat16)
    found = {}
    for implementation in ("mosaic_gpu", "xla"):
        for out in ("nvfp4", "nvfp4_as_bf16", "bf16"):
            run = functools.partial(swiglu_quantize, out=out, implementation=implementation)
            run = functools.partial(run, global_scale="per_token" if per_token else jnp.float32(0.01))
            found[implementation, out] = jax.tree.leaves(jax.jit(lambda x, run=run: run(x, None))(x))
    for out in ("nvfp4", "nvfp4_as_bf16", "bf16"):
        ours, theirs = found["mosaic_gpu", out], found["xla", out]
        if out == "nvfp4":
            spoiled = as_bytes(theirs[1]) == 0x7F
            np.testing.assert_array_equal(as_bytes(ours[1]) == 0x7F, spoiled)
            assert not np.asarray(ours[0]).reshape(*spoiled.shape, 8)[spoiled].any()
            np.testing.assert_array_equal(spoiled.any(1), (np.arange(300) > 0) & (np.arange(300) < 17))
        else:
            ours_f32, theirs_f32 = (np.asarray(a[0].astype(jnp.float32)) for a in (ours, theirs))
            np.testing.assert_array_equal(np.isnan(ours_f32), np.isnan(theirs_f32))
            np.testing.assert_array_equal(np.isinf(ours_f32), np.isinf(theirs_f32))
        if per_token and out != "bf16":
            np.testing.assert_allclose(np.asarray(ours[-1]), np.asarray(theirs[-1]), rtol=1e-6)


@pytest.mark.parametrize("seed", range(9))
def test_swiglu_random_shapes(seed):
    rng = np.random.default_rng(200 + seed)
    experts, m, i = int(rng.integers(1, 40)), int(rng.integers(1, 120)), 16 * int(rng.integers(1, 230))
    masked_m = rng.integers(0, m + 1, experts).astype(np.int32)
    valid = np.arange(m) < masked_m[:, None]
    if seed % 3 == 2:
        masked_m, valid = None, np.ones((experts, m), bool)
    gate_up = bf16_values(rng, (experts, m, 2 * i), spread=2)
    v = oracles.swiglu(gate_up)
    per_token = seed % 4 == 3
    g = oracles.computed_scale(v.astype(np.float32), -1) if per_token else np.full((experts, m, 1), 0.003, np.float32)
    if not per_token and masked_m is not None:
        g = g * rng.uniform(0.5, 2, (experts, 1, 1)).astype(np.float32)
    x = jnp.asarray(poison(gate_up, valid), jnp.bfloat16)
    given = "per_token" if per_token else jnp.asarray(g)
    if masked_m is None:
        x, given = x.reshape(-1, 2 * i), given if per_token else given.reshape(-1, 1)
    counts = None if masked_m is None else jnp.asarray(masked_m)

    def run(out):
        if isinstance(given, str):
            return jax.jit(lambda x, c: swiglu_quantize(x, c, global_scale=given, out=out, **KERNEL))(x, counts)
        return jax.jit(lambda x, c, g: swiglu_quantize(x, c, global_scale=g, out=out, **KERNEL))(x, counts, given)

    t = run("nvfp4")
    if per_token:
        got = np.asarray(t.global_scale).reshape(experts, m, 1)[valid]
        np.testing.assert_allclose(got, g[valid], rtol=1e-6)
        g = np.where(valid[..., None], np.asarray(t.global_scale).reshape(experts, m, 1), 1)
    qdata, scales = oracles.quantize_exact(v.astype(np.float32), g)
    # architecture.md section 6 point 8: at most 1 code in 10^4 differs from float64 arithmetic.
    codes = oracles.unpack(np.asarray(t.qdata).reshape(experts, m, -1))[valid]
    assert _mismatch(codes, oracles.unpack(qdata)[valid]) <= 1e-4
    assert _mismatch(as_bytes(t.block_scale).reshape(experts, m, -1)[valid], scales[valid]) <= 1e-4
    # The bf16 form holds exactly the values of the packed one.
    exact = oracles.dequantize(np.asarray(t.qdata), as_bytes(t.block_scale)).reshape(experts, m, -1)
    as_bf16 = run("nvfp4_as_bf16")
    if per_token:
        as_bf16, row_scale = as_bf16
        np.testing.assert_array_equal(
            np.asarray(row_scale).reshape(experts, m)[valid], np.asarray(t.global_scale).reshape(experts, m)[valid]
        )
    # What is not valid may be a signalling NaN, of which a conversion warns: select first.
    as_bf16 = np.asarray(as_bf16).reshape(experts, m, -1)[valid].astype(np.float64)
    np.testing.assert_array_equal(as_bf16, exact[valid])
    plain = np.asarray(run("bf16")).reshape(experts, m, -1)[valid].astype(np.float32)
    rounded = oracles.round_bf16(v.astype(np.float32))[valid]
    assert _mismatch(plain, rounded) <= 1e-4
    np.testing.assert_allclose(plain, rounded, rtol=2.0**-7, atol=1e-37)


def test_silu_tail_within_one_bf16_rounding():
    gate = oracles.round_bf16(np.linspace(-100, 100, 32 * 1024).astype(np.float32)).reshape(32, 1024)
    x = jnp.asarray(np.concatenate([gate, np.ones_like(gate)], axis=1), jnp.bfloat16)
    got = np.asarray(swiglu_quantize(x, None, global_scale=None, out="bf16", **KERNEL), np.float64)
    expected = oracles.silu(gate)
    normal = np.abs(expected) > oracles.F32_TINY
    np.testing.assert_allclose(got[normal], expected[normal], rtol=2.0**-8 * (1 + 2.0**-8))


@pytest.mark.parametrize("out", ["nvfp4", "bf16"])
def test_swiglu_repeats_bit_for_bit(out, rng):
    x = jnp.asarray(bf16_values(rng, (16, 64, 1536)), jnp.bfloat16)
    counts = jnp.asarray(rng.integers(0, 65, 16), jnp.int32)
    scale = None if out == "bf16" else jnp.float32(1)
    run = jax.jit(lambda x: swiglu_kernel.swiglu_quantize(x, counts, scale, out=out))
    first = [np.asarray(a) for a in run(x) if a is not None]
    valid = np.arange(64) < np.asarray(counts)[:, None]
    for _ in range(20):
        for a, b in zip(first, [a for a in run(x) if a is not None], strict=True):
            np.testing.assert_array_equal(a[valid].view(np.uint8), np.asarray(b)[valid].view(np.uint8))


# --- permute and depermute ---


def _ids(rng, tokens, k, experts):
    ids = rng.integers(0, experts, (tokens, k)).astype(np.int32)
    ids[rng.random((tokens, k)) < 0.1] = -1
    bad = rng.random((tokens, k)) < 0.01
    ids[bad] = rng.choice([experts, -2, 10**6], bad.sum())
    ids[rng.random(tokens) < 0.05] = -1
    return ids


@pytest.mark.parametrize("seed", range(12))
def test_permute_random_shapes(seed):
    rng = np.random.default_rng(300 + seed)
    tokens, k = int(rng.integers(1, 900)), (1, 2, 4, 6, 8, 3)[seed % 6]
    experts, hidden = int(rng.integers(1, 300)), 16 * int(rng.integers(1, 60))
    ids = _ids(rng, tokens, k, experts)
    if seed == 5:
        ids[:] = experts - 1  # one hot expert
    capacity = max(1, int(tokens * k / experts * rng.uniform(0.5, 2)))
    row_map, masked_m, dropped, source = oracles.permute_masked(ids, experts, capacity)
    qdata = rng.integers(0, 256, (tokens, hidden // 2)).astype(np.uint8)
    scales = rng.integers(0, 127, (tokens, hidden // 16)).astype(np.uint8)
    row_scale = rng.random((tokens, 1)).astype(np.float32)
    layout = ("linear", "swizzled", "m_major")[seed % 3]
    decode = seed % 4 == 3
    p = permute_to_masked(
        jnp.asarray(qdata), jnp.asarray(scales).view(jnp.float8_e4m3fn), jnp.asarray(ids),
        row_scale=jnp.asarray(row_scale), num_experts=experts, capacity=capacity, scale_layout=layout, decode=decode,
        **KERNEL,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(p.row_map), row_map)
    np.testing.assert_array_equal(np.asarray(p.masked_m), masked_m)
    assert int(p.dropped) == dropped
    where = tuple(np.array(list(source)).T.reshape(2, -1))
    token = np.array(list(source.values()), int)
    np.testing.assert_array_equal(np.asarray(p.row_scale)[where], row_scale[token])
    if decode:
        np.testing.assert_array_equal(
            np.asarray(p.x)[where].astype(np.float64), oracles.dequantize(qdata, scales)[token]
        )
        return
    np.testing.assert_array_equal(np.asarray(p.x)[where], qdata[token])
    if layout == "linear":
        np.testing.assert_array_equal(as_bytes(p.scales)[where], scales[token])
        return
    linear = np.zeros((experts, capacity, hidden // 16), np.uint8)
    linear[where] = scales[token]
    wanted = oracles.swizzle(linear) if layout == "swizzled" else linear.transpose(0, 2, 1).ravel()
    np.testing.assert_array_equal(as_bytes(p.scales).ravel(), wanted)


@pytest.mark.parametrize("seed", range(6))
def test_permute_contiguous_and_back_random_shapes(seed):
    rng = np.random.default_rng(400 + seed)
    tokens, k, experts = int(rng.integers(1, 900)), (1, 8, 6)[seed % 3], int(rng.integers(1, 80))
    hidden = 2 * int(rng.integers(1, 400))
    dtype = (jnp.bfloat16, jnp.float32)[seed % 2]
    ids = _ids(rng, tokens, k, experts)
    num_rows = max(1, int(tokens * k * rng.uniform(0.5, 1.1)))
    row_map, sizes, dropped, source = oracles.permute_contiguous(ids, experts, num_rows)
    x = np.asarray(jnp.asarray(rng.standard_normal((tokens, hidden)), dtype))
    p = permute_to_contiguous(jnp.asarray(x), None, jnp.asarray(ids), num_experts=experts, num_rows=num_rows, **KERNEL)
    np.testing.assert_array_equal(np.asarray(p.row_map), row_map)
    np.testing.assert_array_equal(np.asarray(p.group_sizes), sizes)
    assert int(p.dropped) == dropped
    np.testing.assert_array_equal(as_bytes(np.asarray(p.x)[: len(source)]), as_bytes(x[source]))
    y = np.array(p.x)
    y[len(source) :] = np.nan
    weights = np.where(row_map >= 0, rng.standard_normal(ids.shape), np.nan).astype(np.float32)
    for residual in (None, jnp.asarray(x)):
        operands = jnp.asarray(y), p.row_map, jnp.asarray(weights), residual
        out = depermute_combine(*operands, **KERNEL)
        added = None if residual is None else x.astype(np.float32)
        expected = oracles.depermute(y.astype(np.float32), row_map, weights, added)
        expected = oracles.round_bf16(expected) if dtype == jnp.bfloat16 else expected
        np.testing.assert_array_equal(np.asarray(out.astype(jnp.float32)), expected)
        by_xla = jax.jit(functools.partial(depermute_combine, implementation="xla"))(*operands)
        np.testing.assert_array_equal(as_bytes(out), as_bytes(by_xla))


def test_metadata_of_many_chunks_and_repeats(rng):
    ids = _ids(rng, 16384, 8, 64)
    row_map, masked_m, _, _ = oracles.permute_masked(ids, 64, 2000)
    run = jax.jit(lambda ids: route_metadata.route_metadata(ids, 64, capacity=2000, num_rows=64 * 2000))
    for _ in range(20):
        meta = run(jnp.asarray(ids))
        np.testing.assert_array_equal(np.asarray(meta.row_map), row_map)
        np.testing.assert_array_equal(np.minimum(np.asarray(meta.counts), 2000), masked_m)


@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 8, 64), (300, 6, 20), (1024, 8, 128), (777, 3, 300)])
def test_metadata_of_few_routes_is_that_of_many(tokens, k, experts, capacity, rng):
    """One kernel for few, two for any number: both against the loop, 20 times."""
    ids = _ids(rng, tokens, k, experts)
    num_rows = tokens * k // 2 + 1 if capacity is None else experts * capacity
    oracle = oracles.permute_contiguous if capacity is None else oracles.permute_masked
    row_map, filled, dropped, _ = oracle(ids, experts, num_rows if capacity is None else capacity)
    for config in (None, route_metadata.DEFAULT_CONFIG):
        run = jax.jit(
            lambda ids, config=config: route_metadata.route_metadata(
                ids, experts, capacity=capacity, num_rows=num_rows, config=config
            )
        )
        for _ in range(20):
            meta = run(jnp.asarray(ids))
            np.testing.assert_array_equal(np.asarray(meta.row_map), row_map)
            np.testing.assert_array_equal(np.asarray(meta.filled), filled)
            assert int(meta.bad) + (np.asarray(meta.counts) - np.asarray(meta.filled)).sum() == dropped


# --- the layer that they were made for ---


@pytest.mark.parametrize("static_scale", [False, True])
@pytest.mark.parametrize(
    ("formats", "layout"), [("nvfp4 nvfp4", "masked"), ("nvfp4 bf16", "contiguous"), ("bf16 bf16", "contiguous")]
)
def test_a_token_with_nan_or_inf_has_no_finite_output(formats, layout, static_scale, rng):
    tokens, k, experts, hidden, intermediate = 300, 2, 8, 256, 128
    poisoned, zeroed, rows = spoiled_rows(rng.standard_normal((tokens, hidden)))
    ids = jnp.asarray(np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)).at[200].set(-1)
    poisoned[200] = np.nan  # a token without experts stays zero
    packed = MoEWeights(
        *(
            pack_weights(quantize(jnp.asarray(rng.standard_normal(shape), jnp.float32), global_scale="per_expert"))
            for shape in ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate))
        )
    )
    if static_scale:
        packed = packed._replace(
            input_scale_1=jnp.float32(0.002), input_scale_2=jnp.full((experts, 1, 1), 0.5, jnp.float32)
        )
    first, second = formats.split()
    config = MoEConfig(num_experts=experts, layout=layout, activation_format_1=first, activation_format_2=second)
    layer = jax.jit(lambda x: moe_layer(x, ids, jnp.ones((tokens, k)), packed, config)[0])
    y, clean = (np.asarray(layer(jnp.asarray(x, jnp.bfloat16))) for x in (poisoned, zeroed))
    assert not y[200].astype(np.float32).any()
    keep = np.arange(tokens) != 200
    check_outputs(y[keep], clean[keep], rows[keep])


@pytest.mark.parametrize("layout", ["masked", "contiguous"])
@pytest.mark.parametrize("activation_format, limit", [("nvfp4", 1e-5), ("bf16", 3e-6)])
@pytest.mark.parametrize("axis_name", [None, "ep"])
@pytest.mark.parametrize("static_scale", [False, True])
def test_moe_layer_runs_on_the_kernels_and_agrees_with_xla(
    layout, activation_format, limit, axis_name, static_scale, rng, make_mesh
):
    tokens, k, experts, hidden, intermediate = 200, 4, 16, 256, 128
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    ids[rng.random((tokens, k)) < 0.1] = -1
    x = jnp.asarray(rng.standard_normal((tokens, hidden)), jnp.bfloat16)
    weights = MoEWeights(
        *(
            quantize(jnp.asarray(rng.standard_normal(shape) / 16, jnp.float32), global_scale="per_expert")
            for shape in ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate))
        )
    )
    if static_scale:
        weights = weights._replace(
            input_scale_1=jnp.float32(0.002),
            input_scale_2=jnp.asarray(rng.uniform(0.0003, 0.003, (experts, 1, 1)), jnp.float32),
        )
    packed = weights._replace(w13=pack_weights(weights.w13), w2=pack_weights(weights.w2))
    args = x, jnp.asarray(ids), jnp.asarray(rng.random((tokens, k)), jnp.float32)

    def run(implementation, weights=packed):
        config = MoEConfig(
            num_experts=experts, layout=layout, axis_name=axis_name, activation_format_1=activation_format,
            activation_format_2=activation_format, wire_format=activation_format, implementation=implementation,
        )  # fmt: skip

        def layer(*args):
            return moe_layer(*args, config)[0]

        if axis_name is not None:
            specs = jax.tree.map(lambda _: P("ep"), weights)
            if static_scale:
                specs = specs._replace(input_scale_1=P())
            layer = jax.shard_map(layer, mesh=make_mesh(1), in_specs=(*[P("ep")] * 3, specs), out_specs=P("ep"))
        lowered = jax.jit(layer).lower(*args, weights)
        return lowered.compile()(*args, weights), lowered.as_text().count("@mosaic_gpu_v2")

    (ours, kernels), (theirs, none), (_, without_gemm) = run(None), run("xla"), run(None, weights)
    # Weights that are not packed leave the GEMMs to XLA, and SwiGLU, if it was in GEMM 1's epilogue, to its own kernel.
    fused = static_scale or activation_format == "bf16"
    assert (kernels - without_gemm, none) == (1 if fused else 2, 0)
    assert oracles.calc_diff(ours, theirs) <= limit
    again, _ = run(None)
    np.testing.assert_array_equal(as_bytes(ours), as_bytes(again))
