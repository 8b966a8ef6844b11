"""The grouped GEMM's kernel on a GPU against numpy float64 on dequantized operands; every pad is poisoned with NaN.

Its bits depend on K alone, not on the configuration, the other rows or the layout: that is tested without an oracle.
"""

import functools
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from poisoned_tokens import check_outputs, poison

import oracles
from fp4jax.grouped_gemm import contiguous_grouped_gemm, grouped_gemm_swiglu, masked_grouped_gemm, pack_weights
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.swiglu import swiglu_quantize
from pallas_kernels.gemm import choice, grouped_gemm as gemm_kernel
from pallas_kernels.gemm.config import TuningConfig
from pallas_kernels.rows import swiglu_quantize as swiglu_kernel

pytestmark = pytest.mark.gpu
LIMIT = 3e-3  # relative Frobenius error: the bf16 rounding of the result is 1.7e-3
CONFIGS = sorted(
    {choice.from_fields(f) for rows in json.loads(choice.TABLE.read_text()).values() for f in rows.values()}
    | {choice.rule_of_thumb(k, m) for k in (1024, 8192) for m in (64, 256, 1024)}
    | {choice._that_fits(config, 64) for by_config in choice._STEP_US.values() for config in by_config}
    | {
        TuningConfig((8, 40), warpgroups=1, row_tiles=2, k_tiles=3, num_stages=3),
        TuningConfig((128,), warpgroups=2, row_tiles=2, num_stages=4, own_store=False),
    },
    key=str,
)


def bf16_values(rng, shape):
    return oracles.round_bf16(rng.standard_normal(shape).astype(np.float32))


def nvfp4_weights(rng, experts, n, k, per_row):
    """NVFP4Tensor with random codes and all kinds of scales, and its values in float64."""
    qdata = rng.integers(0, 256, (experts, n, k // 2), dtype=np.uint8)
    scales = rng.integers(0x20, 0x58, (experts, n, k // 16), dtype=np.uint8)
    # 0, subnormals, the smallest normal, -0, -1. No lone 448: a result that consists of one product has the error of
    # one bf16 rounding, up to 3.9e-3, and not their mean (that scale is in the test of exact decoding).
    special = np.array([0x00, 0x01, 0x07, 0x08, 0x80, 0xB8], np.uint8)
    scales = np.where(rng.random(scales.shape) < 0.02, rng.choice(special, scales.shape), scales)
    g = rng.uniform(0.001, 0.01, (experts, n if per_row else 1, 1)).astype(np.float32)
    w = NVFP4Tensor(jnp.asarray(qdata), jnp.asarray(scales).view(jnp.float8_e4m3fn), jnp.asarray(g))
    return w, oracles.dequantize(qdata, scales, g).astype(np.float64)


@functools.cache
def kernel(config, out=None, blocks=132):
    """One compilation per configuration and shape. Few blocks have many tasks each, as at the shapes of real models."""
    jitted = jax.jit(functools.partial(gemm_kernel.grouped_gemm, config=config, out=out))

    def run(*args, **kwargs):
        with mock.patch.object(gemm_kernel, "H100_SMS", blocks):
            return jitted(*args, **kwargs)

    return run


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)


def draw_counts(rng, experts, capacity, case):
    """Multinomial, one-hot, full, with empty experts, beyond the capacity."""
    kind = case % 4
    if kind == 0:
        return rng.multinomial(experts * capacity // 2, [1 / experts] * experts).astype(np.int32)
    if kind == 1:
        return np.where(np.arange(experts) == rng.integers(experts), capacity, 0).astype(np.int32)
    if kind == 2:
        return rng.integers(-2, capacity + 9, experts).astype(np.int32)
    return np.where(rng.random(experts) < 0.5, 0, rng.integers(1, 10, experts)).astype(np.int32)


@pytest.mark.parametrize("seed", range(50))
def test_random_cases(seed):
    """200 cases: 50 shapes and configurations, 4 distributions of rows each; on 132 blocks or on 5."""
    rng = np.random.default_rng(seed)
    blocks = (132, 5)[seed // len(CONFIGS) % 2 if seed >= len(CONFIGS) else seed % 2]
    config = CONFIGS[seed % len(CONFIGS)]
    experts, m = int(rng.integers(1, 7)), int(rng.choice([1, 3, 8, 30, 64, 129, 300]))
    n, k = 64 * int(rng.integers(1, 13)), 64 * int(rng.integers(1, 13))
    contiguous, per_row = bool(rng.integers(2)), bool(rng.integers(2))
    w, w_values = nvfp4_weights(rng, experts, n, k, per_row)
    packed = jax.jit(pack_weights)(w)
    for case in range(4):
        counts = draw_counts(rng, experts, m, case)
        rows = experts * m
        lead = (rows,) if contiguous else (experts, m)
        x = bf16_values(rng, (*lead, k))
        by_row = bool(rng.integers(2))
        x_scale = rng.uniform(0.1, 2, (rows, 1) if by_row else (experts,)).astype(np.float32)
        expert_of_row, valid = rows_of(counts, experts, m, contiguous)
        x = np.where(valid.reshape(lead)[..., None], x, np.nan)
        if by_row:
            x_scale = np.where(valid[:, None], x_scale, np.nan).astype(np.float32)
        (out,) = kernel(config, None, blocks)(
            jnp.asarray(x, jnp.bfloat16), packed.words, packed.global_scale[..., 0], jnp.asarray(counts), x_scale
        )
        out = np.asarray(out.astype(jnp.float32)).reshape(rows, n)
        x, scale = x.reshape(rows, k), x_scale if by_row else x_scale[expert_of_row][:, None]
        for e in range(experts):
            mine = valid & (expert_of_row == e)
            expected = (x[mine].astype(np.float64) @ w_values[e].T) * scale[mine]
            where = (seed, case, e, config, lead, n, k, counts)
            assert relative_error(out[mine], expected) < LIMIT, where
            # Every element: one rounding to bf16, and f32 sums.
            largest = np.abs(x[mine]).astype(np.float64) @ np.abs(w_values[e]).T * scale[mine]
            assert (np.abs(out[mine] - expected) <= 2.0**-8 * np.abs(expected) + 1e-6 * largest).all(), where


@pytest.mark.parametrize(
    "experts, n, k",
    [
        (2, 3072, 2560),
        (2, 2560, 1536),
        (1, 7168, 8192),
        (1, 8192, 3584),
        (1, 7168, 3584),
        (1, 4096, 7168),
        (260, 64, 128),
    ],
)
@pytest.mark.parametrize("m", [3, 70])
def test_shapes_of_real_models(experts, n, k, m):
    """With the configuration that the op takes; 64 columns of the result are compared."""
    rng = np.random.default_rng(8)
    w, values = nvfp4_weights(rng, experts, n, k, True)
    counts = np.where(np.arange(experts) % 3 == 0, m, rng.integers(0, m + 1, experts)).astype(np.int32)
    valid = np.arange(m) < counts[:, None]
    x = np.where(valid[..., None], bf16_values(rng, (experts, m, k)), np.nan)
    out = masked_grouped_gemm(
        jnp.asarray(x, jnp.bfloat16), pack_weights(w), jnp.asarray(counts), expected_m=m, implementation="mosaic_gpu"
    )
    columns = rng.choice(n, 64, replace=False)
    expected = oracles.grouped_gemm(x, values[:, columns], counts)[valid]
    assert relative_error(np.asarray(out[:, :, columns].astype(jnp.float32))[valid], expected) < LIMIT


def rows_of(counts, experts, m, contiguous):
    """-> expert of every row [rows] and whether it is valid; counts beyond what exists are clipped."""
    rows = experts * m
    if not contiguous:
        return np.repeat(np.arange(experts), m), np.tile(np.arange(m), experts) < np.repeat(np.clip(counts, 0, m), m)
    ends = np.minimum(np.cumsum(np.clip(counts, 0, rows)), rows)
    expert = np.minimum(np.searchsorted(ends, np.arange(rows), side="right"), experts - 1)
    return expert, np.arange(rows) < ends[-1]


def test_decoding_is_exact_for_every_code_and_scale():
    """x = unit vectors: the result is code * scale, which bf16 holds."""
    n = k = 256
    codes = np.tile(np.arange(16, dtype=np.uint8), (n, k // 16))
    scales = np.arange(n * k // 16, dtype=np.int64).reshape(n, k // 16) % 256
    scales = np.where((scales & 0x7F) == 0x7F, 0x7E, scales).astype(np.uint8)  # no NaN
    qdata = oracles.pack(codes)
    w = NVFP4Tensor(
        jnp.asarray(qdata[None]), jnp.asarray(scales[None]).view(jnp.float8_e4m3fn), jnp.ones((1, 1, 1), jnp.float32)
    )
    out = masked_grouped_gemm(
        jnp.eye(k, dtype=jnp.bfloat16)[None], pack_weights(w), jnp.asarray([k]), implementation="mosaic_gpu"
    )
    expected = oracles.dequantize(qdata, scales).T
    np.testing.assert_array_equal(np.asarray(out[0].astype(jnp.float32)), expected)


def test_a_nan_scale_reaches_its_row_only():
    rng = np.random.default_rng(0)
    w, _ = nvfp4_weights(rng, 1, 128, 128, False)
    scales = np.asarray(w.block_scale).view(np.uint8).copy()
    scales[0, 77, 3] = 0x7F
    qdata = np.asarray(w.qdata) | 0x11  # no code 0, whose product with NaN would be the same NaN
    w = NVFP4Tensor(jnp.asarray(qdata), jnp.asarray(scales).view(jnp.float8_e4m3fn), w.global_scale)
    x = jnp.ones((1, 9, 128), jnp.bfloat16)
    out = masked_grouped_gemm(x, pack_weights(w), jnp.asarray([9]), implementation="mosaic_gpu")
    nan = np.isnan(np.asarray(out[0].astype(jnp.float32)))
    assert nan[:, 77].all() and nan.sum() == 9


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
def test_a_row_with_nan_or_inf_changes_no_other(contiguous, fused):
    """Also where SwiGLU is in the epilogue: every block of a spoiled row has the scale NaN and codes of zero."""
    rng = np.random.default_rng(3)
    w, _ = nvfp4_weights(rng, 3, 256, 192, True)
    packed, (poisoned, zeroed, rows) = pack_weights(w), poison(bf16_values(rng, (300, 192)))
    counts = jnp.full(3, 100, jnp.int32)
    lead = (300,) if contiguous else (3, 100)
    results = []
    for x in (poisoned, zeroed):
        x = jnp.asarray(x, jnp.bfloat16).reshape(*lead, 192)
        if fused:
            t = grouped_gemm_swiglu(x, packed, counts, global_scale=jnp.float32(0.01), implementation="mosaic_gpu")
            results.append([np.asarray(a).view(np.uint8).reshape(300, -1) for a in (t.qdata, t.block_scale)])
        else:
            gemm = contiguous_grouped_gemm if contiguous else masked_grouped_gemm
            results.append(np.asarray(gemm(x, packed, counts, implementation="mosaic_gpu")).reshape(300, -1))
    if not fused:
        check_outputs(*results, rows)
        return
    assert not results[0][0][rows].any() and (results[0][1][rows] == 0x7F).all()
    for got, clean in zip(*results, strict=True):
        np.testing.assert_array_equal(got[~rows], clean[~rows])


@pytest.fixture(scope="module")
def problem():
    """Weights of 4 experts and 300 rows with an expert each."""
    rng = np.random.default_rng(1)
    w, _ = nvfp4_weights(rng, 4, 384, 832, True)
    return jax.jit(pack_weights)(w), bf16_values(rng, (300, 832)), rng.integers(0, 4, 300)


def results_by_row(config, packed, x, expert, m, contiguous, rng, blocks=132):
    """Every row's result, rows and experts in random order."""
    order_of_experts = rng.permutation(4)
    words, scale = packed.words[order_of_experts], packed.global_scale[order_of_experts]
    expert = np.argsort(order_of_experts)[expert]
    order = np.argsort(expert + rng.random(len(expert)) * 0.5)
    counts = np.bincount(expert, minlength=4)
    place = (
        np.arange(len(expert)) if contiguous else np.concatenate([e * m + np.arange(c) for e, c in enumerate(counts)])
    )
    rows = 307 if contiguous else 4 * m
    buffer = np.full((rows, x.shape[1]), np.nan, np.float32)
    buffer[place] = x[order]
    lead = (rows,) if contiguous else (4, m)
    (found,) = kernel(config, None, blocks)(
        jnp.asarray(buffer, jnp.bfloat16).reshape(*lead, -1), words, scale[..., 0], jnp.asarray(counts, jnp.int32)
    )
    back = np.empty(len(expert), int)
    back[order] = place
    return np.asarray(found).view(np.uint16).reshape(rows, -1)[back]


def test_a_rows_bits_depend_on_the_row_and_the_weights_only(problem):
    """Not on its place, the other rows and experts, the capacity, the layout, the configuration or the blocks."""
    packed, x, expert = problem
    rng = np.random.default_rng(2)
    reference = None
    for number, config in enumerate(CONFIGS):
        m, contiguous, blocks = 120 + number, number % 2 == 1, (132, 3)[number % 3 == 0]
        got = results_by_row(config, packed, x, expert, m, contiguous, rng, blocks)
        reference = got if reference is None else reference
        np.testing.assert_array_equal(got, reference, err_msg=str(config))
        some = rng.random(300) < 0.3  # most rows removed, and all of one expert
        some &= expert != number % 4
        got = results_by_row(config, packed, x[some], expert[some], m, contiguous, rng, blocks)
        np.testing.assert_array_equal(got, reference[some], err_msg=str(config))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_repeats_are_identical(config, problem):
    """A race on the registers of a running wgmma would show here."""
    packed, x, expert = problem
    order = np.argsort(expert, kind="stable")
    counts = jnp.asarray(np.bincount(expert, minlength=4), jnp.int32)
    args = (jnp.asarray(x[order], jnp.bfloat16), packed.words, packed.global_scale[..., 0], counts)
    different = jax.jit(lambda a, b: jnp.sum(a.view(jnp.uint16) != b.view(jnp.uint16)))
    for blocks in (132, 3):
        run = kernel(config, None, blocks)
        first = run(*args)[0]
        assert sum(int(different(first, run(*args)[0])) for _ in range(200)) == 0


FUSED = [config for config in CONFIGS if config.tiles % 2 == 0]


@pytest.mark.parametrize("config", FUSED, ids=str)
def test_fused_swiglu_has_the_bits_of_the_two_kernels_in_every_configuration(config):
    """Several tasks per block, a scale per row in x and in SwiGLU, NaN in the pads of both."""
    rng = np.random.default_rng(9)
    experts, m, n, k = 3, 90, 640, 192
    w, _ = nvfp4_weights(rng, experts, n, k, False)
    packed, counts = pack_weights(w), jnp.asarray([90, 7, 55])
    valid = np.arange(m) < np.asarray(counts)[:, None]
    x = jnp.asarray(np.where(valid[..., None], bf16_values(rng, (experts, m, k)), np.nan), jnp.bfloat16)
    x_scale = jnp.asarray(np.where(valid, rng.uniform(0.1, 2, valid.shape), np.nan).reshape(-1, 1), jnp.float32)
    scale = jnp.asarray(np.where(valid, rng.uniform(0.001, 0.01, valid.shape), np.nan)[..., None], jnp.float32)
    args = x, packed.words, packed.global_scale[..., 0], counts, x_scale
    (gate_up,) = kernel(CONFIGS[0])(*args)
    for out in ("bf16", "nvfp4", "nvfp4_as_bf16"):
        for blocks in (132, 2):
            got = kernel(config, out, blocks)(*args, act_scale=scale)
            expected = swiglu_kernel.swiglu_quantize(gate_up, counts, scale, out=out)
            for a, b in zip(got, expected, strict=False):
                a, b = (np.asarray(v).view(np.uint8).reshape(valid.size, -1)[valid.ravel()] for v in (a, b))
                np.testing.assert_array_equal(a, b, err_msg=f"{out} on {blocks} blocks")


@pytest.mark.parametrize("layout", ["masked", "contiguous"])
@pytest.mark.parametrize("out", ["bf16", "nvfp4", "nvfp4_as_bf16"])
@pytest.mark.parametrize("scale", ["one", "expert", "row"])
def test_fused_swiglu_has_the_bits_of_the_two_ops(layout, out, scale):
    rng = np.random.default_rng(4)
    experts, m, n, k = 5, 70, 384, 320
    w, _ = nvfp4_weights(rng, experts, n, k, True)
    packed = jax.jit(pack_weights)(w)
    counts = np.array([0, 70, 33, 1, 64], np.int32)
    lead = (experts, m) if layout == "masked" else (experts * m,)
    _, valid = rows_of(counts, experts, m, layout == "contiguous")
    x = np.where(valid.reshape(lead)[..., None], bf16_values(rng, (*lead, k)), np.nan)
    x = jnp.asarray(x, jnp.bfloat16)
    if scale == "one" or (scale == "expert" and layout == "contiguous"):
        g = jnp.float32(0.004)
    else:
        shape = (experts, 1, 1) if scale == "expert" else (*lead, 1)
        g = jnp.asarray(rng.uniform(0.001, 0.01, shape), jnp.float32)
    named = dict(implementation="mosaic_gpu")
    for expected_m in (4, 64, 256, 2048):
        options = dict(x_scale=jnp.float32(0.7), expected_m=expected_m, **named)
        gemm = masked_grouped_gemm if layout == "masked" else contiguous_grouped_gemm
        gate_up = gemm(x, packed, jnp.asarray(counts), **options)
        given = g if out != "bf16" else None
        expected = swiglu_quantize(
            gate_up, jnp.asarray(counts) if layout == "masked" else None, global_scale=given, out=out, **named
        )
        got = grouped_gemm_swiglu(x, packed, jnp.asarray(counts), global_scale=given, out=out, **options)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            if a.shape[: len(lead)] == lead:
                a, b = (np.asarray(v).view(np.uint8).reshape(valid.size, -1)[valid] for v in (a, b))
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_ops_choose_the_kernel_and_agree_with_xla():
    rng = np.random.default_rng(5)
    w, _ = nvfp4_weights(rng, 3, 192, 256, True)
    packed = pack_weights(w)
    x = jnp.asarray(bf16_values(rng, (3, 20, 256)), jnp.bfloat16)
    counts, scale = jnp.asarray([20, 0, 7]), jnp.asarray(rng.uniform(0.5, 2, (3, 20, 1)), jnp.float32)
    valid = np.arange(20) < np.asarray(counts)[:, None]
    chosen = masked_grouped_gemm(x, packed, counts, x_scale=scale)
    named = masked_grouped_gemm(x, packed, counts, x_scale=scale, implementation="mosaic_gpu")
    inside = masked_grouped_gemm(x, w, counts, x_scale=scale, implementation="mosaic_gpu")
    xla = masked_grouped_gemm(x, packed, counts, x_scale=scale, implementation="xla")
    chosen, named, inside, xla = (np.asarray(v.astype(jnp.float32))[valid] for v in (chosen, named, inside, xla))
    np.testing.assert_array_equal(chosen, named)
    np.testing.assert_array_equal(inside, named)
    assert relative_error(named, xla) < LIMIT


def test_quantized_tokens_are_decoded_first():
    rng = np.random.default_rng(6)
    w, values = nvfp4_weights(rng, 2, 128, 192, False)
    qdata, scales = oracles.quantize_exact(rng.standard_normal((2, 9, 192)).astype(np.float32), np.float32(0.01))
    g = rng.uniform(0.005, 0.02, (2, 9, 1)).astype(np.float32)
    x = NVFP4Tensor(jnp.asarray(qdata), jnp.asarray(scales).view(jnp.float8_e4m3fn), jnp.asarray(g))
    out = masked_grouped_gemm(x, pack_weights(w), jnp.asarray([9, 9]), implementation="mosaic_gpu")
    expected = oracles.grouped_gemm(oracles.dequantize(qdata, scales, g), values, [9, 9])
    assert relative_error(out.astype(jnp.float32), expected) < LIMIT


def test_under_vmap_and_jvp():
    rng = np.random.default_rng(7)
    w, _ = nvfp4_weights(rng, 2, 64, 128, False)
    packed = pack_weights(w)
    x = jnp.asarray(bf16_values(rng, (3, 2, 5, 128)), jnp.bfloat16)
    counts = jnp.asarray([[5, 2], [0, 5], [1, 1]])
    one = lambda x, c: masked_grouped_gemm(x, packed, c, implementation="mosaic_gpu")  # noqa: E731
    many = jax.jit(jax.vmap(one))(x, counts)
    for i in range(3):
        valid = np.arange(5) < np.asarray(counts[i])[:, None]
        np.testing.assert_array_equal(np.asarray(many[i])[valid], np.asarray(one(x[i], counts[i]))[valid])
    full = jnp.asarray([5, 5])
    derivative = [
        jax.jvp(lambda x, i=i: masked_grouped_gemm(x, packed, full, implementation=i), (x[0],), (x[1],))[1]
        for i in (None, "mosaic_gpu", "xla")
    ]
    for found in derivative[:2]:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(derivative[2]))
