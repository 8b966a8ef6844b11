"""The GPU kernels without a GPU: whole kernels in interpret mode on tiny shapes, and lowering for CUDA of real ones."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec as P, use_abstract_mesh
from poisoned_tokens import poison

import oracles
from cuda_lowering import H100, H100_MESH, kernels_in, lowered_text, struct
from fp4jax import implementations
from fp4jax.grouped_gemm import PackedWeights
from fp4jax.layers import MoEBlock, RoutingConfig
from fp4jax.moe import MoEConfig, MoEWeights, moe_layer
from fp4jax.nvfp4 import NVFP4Tensor, dequantize, quantize
from fp4jax.permute import depermute_combine, permute_to_contiguous, permute_to_masked
from fp4jax.swiglu import swiglu_quantize
from pallas_kernels.rows import (
    depermute,
    few_routes,
    permute,
    quantize as quantize_kernel,
    route_metadata,
    swiglu_quantize as swiglu_kernel,
)
from pallas_kernels.simt import tuning

TINY = quantize_kernel.TuningConfig(blocks_per_lane=1, blocks_per_sm=1)
TINY_PERMUTE = permute.TuningConfig(items_per_lane=1)
TINY_METADATA = route_metadata.TuningConfig(chunk=32)


pytestmark = pytest.mark.usefixtures("on_the_cpu", "quick_compile")


def bf16(array):
    return jnp.asarray(array, jnp.bfloat16)


def scale_bytes(array):
    return np.asarray(array).view(np.uint8)


# --- quantize ---


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=pytest.mark.slow)])
def test_quantize_one_scale(dtype, rng, interpret):
    x = np.asarray(jnp.asarray(rng.standard_normal((9, 48)) * 3, dtype).astype(jnp.float32))
    qdata, scales, _ = quantize_kernel.quantize(
        jnp.asarray(x, dtype), jnp.float32(0.01), config=TINY, interpret=interpret
    )
    expected = oracles.quantize_exact(x, np.float32(0.01))
    np.testing.assert_array_equal(qdata, expected[0])
    np.testing.assert_array_equal(scale_bytes(scales), expected[1])


@pytest.mark.parametrize(
    "mode", ["per_token", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("row", "expert"))]
)
def test_quantize_masked(mode, rng, interpret):
    x = np.asarray(bf16(rng.standard_normal((3, 5, 48))).astype(jnp.float32))
    masked_m = np.array([4, 0, 5])
    valid = np.arange(5) < masked_m[:, None]
    poisoned = np.where(valid[..., None], x, np.nan)
    given = {
        "per_token": oracles.computed_scale(x, -1),
        "row": rng.uniform(0.001, 0.01, (3, 5, 1)).astype(np.float32),
        "expert": rng.uniform(0.001, 0.01, (3, 1, 1)).astype(np.float32),
    }[mode]
    qdata, scales, row_scale = quantize_kernel.quantize(
        bf16(poisoned),
        mode if mode == "per_token" else jnp.asarray(given),
        jnp.asarray(masked_m, jnp.int32),
        config=TINY,
        interpret=interpret,
    )
    expected = oracles.quantize_exact(x, given)
    np.testing.assert_array_equal(np.asarray(qdata)[valid], expected[0][valid])
    np.testing.assert_array_equal(scale_bytes(scales)[valid], expected[1][valid])
    if mode == "per_token":
        np.testing.assert_array_equal(np.asarray(row_scale)[valid], given[valid])


@pytest.mark.parametrize(
    ("mode", "dtype", "four_over_six"),
    [
        ("per_token", jnp.float32, False),
        pytest.param(0.01, jnp.bfloat16, False, marks=pytest.mark.slow),
        pytest.param(0.01, jnp.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_quantize_nan_and_inf(mode, dtype, four_over_six, rng, interpret):
    x, _, rows = poison(oracles.round_bf16(rng.standard_normal((17, 48)).astype(np.float32)))
    g = oracles.computed_scale(x, -1) if mode == "per_token" else np.float32(mode)
    qdata, scales, row_scale = quantize_kernel.quantize(
        jnp.asarray(x, dtype),
        mode if mode == "per_token" else jnp.float32(mode),
        four_over_six=four_over_six,
        config=TINY,
        interpret=interpret,
    )
    expected = (oracles.quantize_four_over_six if four_over_six else oracles.quantize_exact)(x, g)
    np.testing.assert_array_equal(qdata, expected[0])
    np.testing.assert_array_equal(scale_bytes(scales), expected[1])
    np.testing.assert_array_equal((scale_bytes(scales) == 0x7F).any(1), rows)
    if mode == "per_token":
        np.testing.assert_array_equal(row_scale, g)


def test_counts_of_64_bits_do_not_wrap():
    with jax.enable_x64(True):
        counts = jnp.asarray([2**32, 2**32 + 3, -1, 2, 2**40], jnp.int64)
        found = quantize_kernel.counts_of_32_bits(counts, 5)
    assert found.dtype == jnp.int32 and found.tolist() == [5, 5, 0, 2, 5]


def test_quantize_swizzled_with_zero_pads(rng, run_kernels):
    x = np.asarray(bf16(rng.standard_normal((2, 5, 48))).astype(jnp.float32))
    masked_m = np.array([5, 2], np.int32)
    _, scales, _ = quantize_kernel.quantize(
        bf16(x), jnp.float32(0.01), jnp.asarray(masked_m), scale_layout="swizzled", config=TINY, interpret=run_kernels
    )
    linear = oracles.quantize_exact(x, np.float32(0.01))[1]
    linear[np.arange(5) >= masked_m[:, None]] = 0
    np.testing.assert_array_equal(scale_bytes(scales).ravel(), oracles.swizzle(linear))


# --- SwiGLU ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "per_token"),
    [
        ("nvfp4", False),
        ("nvfp4_as_bf16", True),
        ("nvfp4_as_bf16", False),
        ("bf16", False),
    ],
)
def test_swiglu(out, per_token, rng, interpret):
    gate_up = np.asarray(bf16(rng.standard_normal((2, 4, 64)) * 3).astype(jnp.float32))
    masked_m = np.array([3, 4], np.int32)
    valid = np.arange(4) < masked_m[:, None]
    poisoned = np.where(valid[..., None], gate_up, np.nan)
    scale = np.array([0.004, 0.01], np.float32).reshape(2, 1, 1)
    v = oracles.swiglu(gate_up).astype(np.float32)
    result = swiglu_kernel.swiglu_quantize(
        bf16(poisoned),
        jnp.asarray(masked_m),
        "per_token" if per_token else None if out == "bf16" else jnp.asarray(scale),
        out=out,
        config=TINY,
        interpret=interpret,
    )
    if out == "bf16":
        np.testing.assert_array_equal(np.asarray(result[0], np.float32)[valid], oracles.round_bf16(v)[valid])
        return
    g = oracles.computed_scale(v, -1) if per_token else scale
    if per_token:
        np.testing.assert_array_equal(np.asarray(result[1])[valid], g[valid])
    qdata, scales = oracles.quantize_exact(v, g)
    if out == "nvfp4_as_bf16":
        np.testing.assert_array_equal(
            np.asarray(result[0], np.float64)[valid], oracles.dequantize(qdata, scales)[valid]
        )
        return
    np.testing.assert_array_equal(np.asarray(result[0])[valid], qdata[valid])
    np.testing.assert_array_equal(scale_bytes(result[1])[valid], scales[valid])


@pytest.mark.slow
@pytest.mark.parametrize(("out", "scale"), [("nvfp4_as_bf16", "per_token"), ("nvfp4", 0.01), ("bf16", None)])
def test_swiglu_of_nan_and_inf(out, scale, rng, interpret):
    """In the gates, in the ups, in both: as XLA has it, scales of rows are those of the finite products."""
    halves = [poison(rng.standard_normal((17, 32)))[0] for _ in range(2)]
    halves[0][1:9], halves[1][9:13] = rng.standard_normal((8, 32)), -2
    gate_up = bf16(np.concatenate(halves, axis=1))
    given = jnp.float32(scale) if isinstance(scale, float) else scale
    got = swiglu_kernel.swiglu_quantize(gate_up, None, given, out=out, config=TINY, interpret=interpret)
    expected = swiglu_quantize(gate_up, None, global_scale=given, out=out, implementation="xla")
    if out == "nvfp4":
        np.testing.assert_array_equal(got[0], expected.qdata)
        np.testing.assert_array_equal(scale_bytes(got[1]), scale_bytes(expected.block_scale))
        return
    expected, row_scale = expected if scale == "per_token" else (expected, None)
    if scale == "per_token":
        np.testing.assert_allclose(got[1], row_scale, rtol=1e-6)  # silu: 4 ulp
    got, expected = (np.asarray(v, np.float32) for v in (got[0], expected))
    np.testing.assert_allclose(got, expected, rtol=2**-7 if out == "bf16" else 1e-6)  # NaN and Inf in the same places
    bad = ~np.isfinite(got)
    assert bad[1:].any(1).all() and not bad[0].any()


# --- permute ---


@pytest.fixture
def routing(rng):
    """ids [6, 3] with absent, bad and hot experts, 4 experts of capacity 4 -> (ids, oracle)."""
    ids = rng.integers(-1, 6, (6, 3)).astype(np.int32)
    ids[1], ids[2], ids[4, 0] = -1, 2, -9
    return ids, oracles.permute_masked(ids, 4, 4)


def _metadata(ids, experts, capacity, interpret):
    return route_metadata.route_metadata(
        jnp.asarray(ids),
        experts,
        capacity=capacity,
        num_rows=experts * capacity,
        with_source=True,
        config=TINY_METADATA,
        interpret=interpret,
    )


def test_metadata_masked(routing, run_kernels):
    ids, (row_map, masked_m, dropped, source) = routing
    meta = _metadata(ids, 4, 4, run_kernels)
    np.testing.assert_array_equal(meta.row_map, row_map)
    np.testing.assert_array_equal(np.minimum(meta.counts, 4), masked_m)
    assert int(meta.bad) + np.maximum(np.asarray(meta.counts) - 4, 0).sum() == dropped
    assert {key: int(meta.source[key[0] * 4 + key[1]]) for key in source} == source


def test_metadata_of_several_chunks_and_many_experts(rng, run_kernels):
    ids = rng.integers(-1, 131, (12, 4)).astype(np.int32)  # 131 columns: more than one tile of 128 lanes
    ids[3] = 7
    row_map, masked_m, _, _ = oracles.permute_masked(ids, 130, 3)
    meta = _metadata(ids, 130, 3, run_kernels)
    np.testing.assert_array_equal(meta.row_map, row_map)
    np.testing.assert_array_equal(np.minimum(meta.counts, 3), masked_m)


def test_metadata_contiguous(routing, run_kernels):
    ids, _ = routing
    row_map, sizes, _, source = oracles.permute_contiguous(ids, 4, 9)
    meta = route_metadata.route_metadata(
        jnp.asarray(ids), 4, num_rows=9, with_source=True, config=TINY_METADATA, interpret=run_kernels
    )
    np.testing.assert_array_equal(meta.row_map, row_map)
    assert np.asarray(meta.source)[: len(source)].tolist() == source
    assert sizes.sum() == min(9, np.asarray(meta.counts).sum())


def check_metadata_of_few_routes(tokens, k, experts, capacity, rng, interpret):
    """One kernel: several chunks, ids that are no experts, more experts than lanes, full experts, rows that run out."""
    ids = rng.integers(-1, experts + 1, (tokens, k)).astype(np.int32)
    ids[tokens // 2] = experts - 1
    ids[0, 0] = -(2**31)
    num_rows = max(1, tokens * k // 2) if capacity is None else experts * capacity
    if capacity is None:
        row_map, filled, dropped, _ = oracles.permute_contiguous(ids, experts, num_rows)
    else:
        row_map, filled, dropped, _ = oracles.permute_masked(ids, experts, capacity)
    meta = route_metadata.route_metadata(
        jnp.asarray(ids), experts, capacity=capacity, num_rows=num_rows, interpret=interpret
    )
    np.testing.assert_array_equal(meta.row_map, row_map)
    np.testing.assert_array_equal(meta.filled, filled)
    np.testing.assert_array_equal(meta.counts, [(ids == e).sum() for e in range(experts)])
    assert int(meta.bad) == ((ids < -1) | (ids >= experts)).sum() > 0
    assert int(meta.bad) + (np.asarray(meta.counts) - np.asarray(meta.filled)).sum() == dropped


@pytest.mark.parametrize("capacity", [None, 3])
@pytest.mark.parametrize(("tokens", "k", "experts"), [(1, 3, 5), (12, 3, 131)])
def test_metadata_of_few_routes(tokens, k, experts, capacity, rng, run_kernels):
    check_metadata_of_few_routes(tokens, k, experts, capacity, rng, run_kernels)


@pytest.mark.slow
@pytest.mark.parametrize("capacity", [None, 3])
def test_metadata_of_few_routes_in_several_chunks(capacity, rng, interpret):
    check_metadata_of_few_routes(70, 2, 4, capacity, rng, interpret)


@pytest.mark.parametrize(
    "dtype, width",
    [
        (np.uint8, 7),
        (jnp.bfloat16, 5),
        pytest.param(np.uint8, 32, marks=pytest.mark.slow),
        pytest.param(np.float32, 1, marks=pytest.mark.slow),
    ],
)
def test_scatter_rows(dtype, width, routing, rng, interpret):
    _, (row_map, _, _, source) = routing
    rows = rng.integers(0, 100, (6, width)).astype(dtype)
    (out,) = permute.scatter_rows(
        [jnp.asarray(rows)], jnp.asarray(row_map, jnp.int32), 16, config=TINY_PERMUTE, interpret=interpret
    )
    for (e, r), token in source.items():
        np.testing.assert_array_equal(np.asarray(out)[e * 4 + r], rows[token])


def test_scatter_decoded_rows(routing, rng, interpret):
    _, (row_map, _, _, source) = routing
    qdata, scales = rng.integers(0, 256, (6, 16)).astype(np.uint8), rng.integers(0, 127, (6, 2)).astype(np.uint8)
    scales[0, 1], scales[5, 0], qdata[0, 8:] = 0x7F, 0xFF, 0x80  # NaN, of zeros too
    out = permute.scatter_decoded_rows(
        jnp.asarray(qdata),
        jnp.asarray(scales).view(jnp.float8_e4m3fn),
        jnp.asarray(row_map, jnp.int32),
        16,
        config=TINY_PERMUTE,
        interpret=interpret,
    )
    expected = oracles.dequantize(qdata, scales)
    for (e, r), token in source.items():
        np.testing.assert_array_equal(np.asarray(out, np.float64)[e * 4 + r], expected[token])


@pytest.mark.parametrize("layout, columns", [("m_major", 3), ("m_major", 8), ("swizzled", 3)])
def test_arrange_scales(layout, columns, routing, rng, run_kernels):
    ids = np.minimum(routing[0], 1)  # two experts: the interpreter takes seconds per block
    _, masked_m, _, source = oracles.permute_masked(ids, 2, 4)
    scales = rng.integers(1, 255, (6, columns)).astype(np.uint8)
    linear = np.zeros((2, 4, columns), np.uint8)
    token_of_row = np.full(8, 99, np.int32)  # other rows hold anything
    for (e, r), token in source.items():
        linear[e, r] = scales[token]
        token_of_row[e * 4 + r] = token
    out = permute.arrange_scales(
        jnp.asarray(scales).view(jnp.float8_e4m3fn),
        jnp.asarray(token_of_row),
        jnp.asarray(masked_m, jnp.int32),
        4,
        layout,
        interpret=run_kernels,
    )
    expected = linear.transpose(0, 2, 1).ravel() if layout == "m_major" else oracles.swizzle(linear)
    np.testing.assert_array_equal(scale_bytes(out).ravel(), expected)


@pytest.mark.parametrize(("dtype", "residual"), [(jnp.bfloat16, False), (jnp.bfloat16, True), (jnp.float32, True)])
def test_depermute(dtype, residual, routing, rng, run_kernels):
    """The bits of the oracle and of XLA."""
    _, (row_map, _, _, _) = routing
    y = np.asarray(jnp.asarray(rng.standard_normal((16, 24)), dtype).astype(jnp.float32))
    weights = np.where(row_map >= 0, rng.random(row_map.shape), np.nan).astype(np.float32)
    if dtype == jnp.float32:
        used = row_map[row_map >= 0]
        y = y.copy()
        y[used[0], 5], y[used[1], 6] = np.nan, -np.inf
    operands = [jnp.asarray(y, dtype), jnp.asarray(row_map, jnp.int32), jnp.asarray(weights)]
    if residual:
        operands.append(jnp.asarray(rng.standard_normal((len(row_map), 24)), dtype))
    expected = oracles.depermute(y, row_map, weights, *(np.asarray(r, np.float32) for r in operands[3:]))
    out = depermute.depermute_combine(*operands, interpret=run_kernels)
    expected = oracles.round_bf16(expected) if dtype == jnp.bfloat16 else expected
    np.testing.assert_array_equal(np.asarray(out.astype(jnp.float32)), expected)
    np.testing.assert_array_equal(scale_bytes(out), scale_bytes(depermute_combine(*operands, implementation="xla")))


# --- lowering for CUDA: catches what Mosaic GPU does not accept, not what ptxas does not ---

MODELS = {  # hidden, intermediate, experts on a device, top k: contract.md section 9
    "ernie-21b": (2560, 1536, 64, 6),
    "ernie-300b": (8192, 3584, 64, 8),
    "qwen3-30b": (2048, 768, 128, 8),
    "deepseek-v3": (7168, 2048, 256, 8),
    "large-ernie": (7168, 3584, 20, 4),
}


def test_many_routes_take_two_kernels():
    """At the limit, beyond it, in 64 bits, and in batches."""
    call = lambda i: route_metadata.route_metadata(i, 4, capacity=9, num_rows=36).row_map  # noqa: E731
    most = few_routes.MAX_ROUTES
    assert kernels_in(call, struct((most // 4, 4), jnp.int32)) == 1
    assert kernels_in(call, struct((most + 1, 1), jnp.int32)) == 2
    assert kernels_in(jax.vmap(call), struct((3, 70, 4), jnp.int32)) == 1
    with jax.enable_x64():
        assert kernels_in(call, struct((70, 4), jnp.int64)) == 1


def test_ids_of_64_bits_do_not_wrap_into_experts(run_kernels):
    with jax.enable_x64():
        ids = jnp.array([[1, 2**32 + 1], [-(2**32), -1], [0, 2**32 - 1]], jnp.int64)
        meta = route_metadata.route_metadata(ids, 4, capacity=2, num_rows=8, interpret=run_kernels)
    np.testing.assert_array_equal(meta.row_map, [[2, -1], [-1, -1], [0, -1]])
    np.testing.assert_array_equal(meta.filled, [1, 1, 0, 0])
    assert int(meta.bad) == 3


def test_kernels_have_names_of_their_own():
    call = lambda i: route_metadata.route_metadata(i, 4, capacity=9, num_rows=36)  # noqa: E731
    assert "few_routes_metadata_mosaic_gpu" in lowered_text(call, struct((9, 6), jnp.int32))
    assert "route_metadata_assign_mosaic_gpu" in lowered_text(call, struct((9000, 6), jnp.int32))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, tokens",
    [("ernie-21b", 16384), ("deepseek-v3", 1024), ("large-ernie", 128)],
)
def test_ops_lower_with_the_tuned_configs(model, tokens):
    hidden, intermediate, experts, k = MODELS[model]
    rows = -(-tokens * k // experts) + 8
    metadata = 1 if tokens * k <= few_routes.MAX_ROUTES else 2
    x, ids = struct((tokens, hidden), jnp.bfloat16), struct((tokens, k), jnp.int32)
    qdata, scales = struct((tokens, hidden // 2), jnp.uint8), struct((tokens, hidden // 16), jnp.float8_e4m3fn)
    gate_up, counts = struct((experts, rows, 2 * intermediate), jnp.bfloat16), struct((experts,), jnp.int32)
    g, g_expert = struct((), jnp.float32), struct((experts, 1, 1), jnp.float32)
    y, weights = struct((experts, rows, hidden), jnp.bfloat16), struct((tokens, k), jnp.float32)

    def permuted(q, s, i, **options):
        return permute_to_masked(q, s, i, num_experts=experts, capacity=rows, **options)

    cases = [
        (1, lambda x, g: quantize(x, global_scale=g, implementation="mosaic_gpu"), (x, g)),
        (1, lambda x: quantize(x, global_scale="per_token", implementation="mosaic_gpu"), (x,)),
        (1, lambda x, g: quantize(x, global_scale=g, four_over_six=True, implementation="mosaic_gpu"), (x, g)),
        (
            1,
            lambda x, g, m: swiglu_quantize(x, m, global_scale=g, implementation="mosaic_gpu"),
            (gate_up, g_expert, counts),
        ),
        (
            1,
            lambda x, m: swiglu_quantize(x, m, global_scale=None, out="bf16", implementation="mosaic_gpu"),
            (gate_up, counts),
        ),
        (1 + metadata, lambda *a: permuted(*a, implementation="mosaic_gpu"), (qdata, scales, ids)),
        (1 + metadata, lambda *a: permuted(*a, decode=True, implementation="mosaic_gpu"), (qdata, scales, ids)),
        (4, lambda *a: permuted(*a, scale_layout="swizzled", implementation="mosaic_gpu"), (qdata, scales, ids)),
        (4, lambda *a: permuted(*a, scale_layout="m_major", implementation="mosaic_gpu"), (qdata, scales, ids)),
        (
            1 + metadata,
            lambda *a: permute_to_contiguous(*a, num_experts=experts, implementation="mosaic_gpu"),
            (qdata, scales, ids),
        ),
        (
            1,
            lambda y, r, w: depermute_combine(y, r, w, implementation="mosaic_gpu"),
            (y, struct((tokens, k), jnp.int32), weights),
        ),
        (
            1,
            lambda y, r, w, x: depermute_combine(y, r, w, x, implementation="mosaic_gpu"),
            (y, struct((tokens, k), jnp.int32), weights, x),
        ),
    ]
    for wanted, fn, structs in cases:
        assert kernels_in(fn, *structs) == wanted, (model, tokens, fn.__code__.co_firstlineno)


_TUNED = [
    (kernel, size, fields)
    for kernel, by_class in json.loads(tuning.TABLE.read_text())[tuning.DEVICE].items()
    for size, fields in by_class.items()
]


@pytest.mark.slow
@pytest.mark.parametrize("kernel, size, fields", _TUNED)
def test_every_tuned_config_lowers(kernel, size, fields):
    x, g = struct((300, 2, 1040), jnp.bfloat16), struct((), jnp.float32)
    counts, ids = struct((300,), jnp.int32), struct((100, 6), jnp.int32)
    if kernel in ("quantize", "swiglu_quantize"):
        config = quantize_kernel.TuningConfig(**fields)
        if kernel == "quantize":
            assert kernels_in(lambda x, g: quantize_kernel.quantize(x, g, config=config), x, g) == 1
            assert kernels_in(lambda x, g, m: quantize_kernel.quantize(x, g, m, config=config), x, g, counts) == 1
        else:
            x = struct((300, 2, 2080), jnp.bfloat16)
            call = lambda x, g, m: swiglu_kernel.swiglu_quantize(x, m, g, config=config)[:2]  # noqa: E731
            assert kernels_in(call, x, g, counts) == 1
        return
    kernels = route_metadata if kernel == "route_metadata" else permute
    config = kernels.TuningConfig(**fields)
    qdata, scales = struct((100, 520), jnp.uint8), struct((100, 65), jnp.float8_e4m3fn)
    row_map = struct((100, 6), jnp.int32)
    call, structs, wanted = {
        "route_metadata": (
            lambda i: route_metadata.route_metadata(i, 300, capacity=9, num_rows=2700, config=config), (ids,), 2,
        ),
        "scatter_rows": (
            lambda q, s, r: permute.scatter_rows([q, s], r, 2700, config=config), (qdata, scales, row_map), 1,
        ),
        "scatter_decoded_rows": (
            lambda q, s, r: permute.scatter_decoded_rows(q, s, r, 2700, config=config),
            (qdata, scales, row_map), 1,
        ),
    }[kernel]  # fmt: skip
    assert kernels_in(call, *structs) == wanted


@pytest.mark.slow
def test_moe_layer_uses_every_kernel_where_none_is_named():
    """quantize, metadata, decoded rows, their scales, SwiGLU, depermute; packed weights: both GEMMs too."""
    w13 = NVFP4Tensor(
        struct((8, 512, 128), jnp.uint8), struct((8, 512, 16), jnp.float8_e4m3fn), struct((8, 1, 1), jnp.float32)
    )
    w2 = NVFP4Tensor(
        struct((8, 256, 128), jnp.uint8), struct((8, 256, 16), jnp.float8_e4m3fn), struct((8, 1, 1), jnp.float32)
    )
    ids, weights = struct((64, 2), jnp.int32), struct((64, 2), jnp.float32)

    def layer(x, ids, topk_weights, w13, w2):
        return moe_layer(x, ids, topk_weights, MoEWeights(w13, w2), MoEConfig(num_experts=8, **oracles.W4A4))

    x = struct((64, 256), jnp.bfloat16)
    assert kernels_in(layer, x, ids, weights, w13, w2) == 6
    one = struct((8, 1, 1), jnp.float32)
    packed = (PackedWeights(struct((8, n // 64, 4, 9, 64), jnp.uint32), one) for n in (512, 256))
    assert kernels_in(layer, x, ids, weights, *packed) == 8


# --- implementation=None on a machine with a Hopper GPU, as far as it can be told without one ---


def test_derivatives_are_those_of_xla():
    def loss(x):
        straight_through = x + jax.lax.stop_gradient(dequantize(quantize(x), jnp.float32) - x)
        return jnp.sum(straight_through**2)

    x = struct((8, 64), jnp.float32)
    assert kernels_in(loss, x) == 1
    assert kernels_in(jax.grad(loss), x) >= 0  # it traces and lowers
    y, row_map, weights = struct((16, 32), jnp.float32), struct((8, 2), jnp.int32), struct((8, 2), jnp.float32)

    def combined(y, row_map, weights):
        return jnp.sum(depermute_combine(y, row_map, weights))

    assert kernels_in(combined, y, row_map, weights) == 1
    assert kernels_in(jax.grad(combined, argnums=(0, 2)), y, row_map, weights) == 0


@pytest.mark.slow
def test_a_decoder_layer_ends_in_the_kernel_that_adds_its_residual():
    """No addition follows the kernel, and with shared experts there is one: of their result and the residual."""
    for shared, additions in ((None, 0), (384, 1)):
        block = MoEBlock(
            256, 128, RoutingConfig(8, 2), shared_intermediate_size=shared, dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
        )  # fmt: skip
        x = struct((64, 256), jnp.bfloat16)
        text = lowered_text(lambda x, residual, block=block: block(x, residual=residual)[0], x, x)
        lines = [line for line in text.splitlines() if "stablehlo.add " in line and "64x256x" in line]
        assert len(lines) == additions, lines


def test_arrays_of_explicit_meshes_go_through_xla():
    mesh = AbstractMesh((2,), ("ep",), (AxisType.Explicit,), abstract_device=H100)
    x = jax.ShapeDtypeStruct((8, 32, 64), jnp.bfloat16, sharding=NamedSharding(mesh, P("ep")))
    with use_abstract_mesh(mesh):
        jax.eval_shape(lambda x: quantize(x, global_scale="per_expert"), x)
        with pytest.raises(NotImplementedError, match="shard_map"):
            jax.eval_shape(lambda x: quantize(x, implementation="mosaic_gpu"), x)


def test_operands_that_vary_over_different_axes(monkeypatch):
    """Inside shard_map both branches give results that vary alike."""
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: True)
    mesh = jax.make_mesh((2,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:2])

    def body(x, masked_m):
        return quantize(x, global_scale=1.0, masked_m=masked_m).qdata

    f = jax.shard_map(body, mesh=mesh, in_specs=(P(), P("ep")), out_specs=P("ep"))
    x, masked_m = np.ones((2, 3, 16), np.float32), np.array([3, 1, 2, 3], np.int32)
    assert jax.jit(f)(x, masked_m).shape == (4, 3, 8)  # CPU devices: XLA runs, as the lowering decides


def test_eager_calls_go_where_their_arrays_are_and_compile_once(monkeypatch):
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: True)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32)), jnp.float32)
    expected = quantize(x, global_scale=0.01, implementation="xla")
    before = implementations._run_by_platform._cache_size()
    for _ in range(3):
        found = quantize(x, global_scale=0.01)  # a CPU array: XLA, though a GPU seems to be there
        np.testing.assert_array_equal(found.qdata, expected.qdata)
    assert implementations._run_by_platform._cache_size() == before + 1


def test_large_batches_under_vmap_stay_within_the_grid():
    x, g = struct((70_000, 2, 32), jnp.bfloat16), struct((), jnp.float32)
    call = jax.vmap(lambda x, g: quantize(x, global_scale=g, implementation="mosaic_gpu"), in_axes=(0, None))
    assert kernels_in(call, x, g) == 2  # full batches of 65,535 in a loop, and the rest
    assert kernels_in(call, struct((7, 2, 32), jnp.bfloat16), g) == 1


# --- refusals ---


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: quantize(jnp.ones((2, 16), jnp.float16), implementation="mosaic_gpu"), "float16"),
        (lambda: quantize(jnp.ones((2, 16)), dialect="modelopt", implementation="mosaic_gpu"), "modelopt"),
        (lambda: quantize(jnp.ones((2, 16)), return_stats=True, implementation="mosaic_gpu"), "return_stats"),
        (lambda: quantize(jnp.ones((0, 16)), implementation="mosaic_gpu"), r"\(0, 16\)"),
        (
            lambda: swiglu_quantize(jnp.ones((2, 32)), None, global_scale=1.0, implementation="mosaic_gpu"),
            "float32",
        ),
        (
            lambda: depermute_combine(
                jnp.ones((2, 3), jnp.bfloat16),
                jnp.zeros((2, 1), jnp.int32),
                jnp.ones((2, 1)),
                implementation="mosaic_gpu",
            ),
            "even H",
        ),
        (
            lambda: permute_to_masked(
                jnp.ones((2, 4)),
                None,
                jnp.zeros((2, 1), jnp.int32),
                num_experts=2000,
                capacity=1,
                implementation="mosaic_gpu",
            ),
            "2000",
        ),
        (
            lambda: permute_to_masked(
                jnp.ones((2, 8), jnp.int4),
                None,
                jnp.zeros((2, 1), jnp.int32),
                num_experts=2,
                capacity=1,
                implementation="mosaic_gpu",
            ),
            "int4",
        ),
        (
            lambda: depermute_combine(
                jnp.ones((1_200_000, 7168)),
                jnp.zeros((2, 1), jnp.int32),
                jnp.ones((2, 1)),
                implementation="mosaic_gpu",
            ),
            "32-bit",
        ),
    ],
)
def test_a_named_kernel_refuses_with_the_value(call, message):
    with use_abstract_mesh(H100_MESH), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(call)


def test_a_named_kernel_needs_a_hopper_gpu():
    if implementations.has_hopper_gpu():
        pytest.skip("this machine has one")
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        quantize(jnp.ones((2, 16)), implementation="mosaic_gpu")


@pytest.mark.parametrize(
    "config",
    [quantize_kernel.TuningConfig(0, 1), quantize_kernel.TuningConfig(9, 1), quantize_kernel.TuningConfig(1, 17)],
)
def test_quantize_refuses_a_bad_tuning(config):
    with pytest.raises(NotImplementedError, match="must be 1"):
        quantize_kernel.quantize(jnp.ones((2, 16)), jnp.float32(1), config=config)
