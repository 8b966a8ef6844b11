"""Grouped GEMM against float64 on dequantized operands; per-row scales; poison; bits of a row; refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from fp4jax.grouped_gemm import contiguous_grouped_gemm, masked_grouped_gemm
from fp4jax.nvfp4 import NVFP4Tensor

E, M, N, K = 4, 40, 48, 128  # M is not a multiple of any tile
COUNTS = np.array([40, 0, 1, 33], np.int32)  # full, empty, one row, one more than a tile of 32
VALID = np.arange(M) < COUNTS[:, None]

_masked = jax.jit(masked_grouped_gemm, static_argnames=("out_dtype", "expected_m"))
_contiguous = jax.jit(contiguous_grouped_gemm, static_argnames=("out_dtype", "expected_m"))


def _quantized(rng, shape, scale_shape, spread=1.0):
    """-> (NVFP4Tensor, its float64 values); built by the oracle."""
    x = rng.standard_normal(shape).astype(np.float32)
    g = (rng.uniform(0.001, 0.002, scale_shape) * spread).astype(np.float32)
    qdata, scales = oracles.quantize_exact(x, g)
    return _tensor(qdata, scales, g), oracles.dequantize(qdata, scales, g)


def _tensor(qdata, scale_bytes, global_scale):
    return NVFP4Tensor(
        jnp.asarray(qdata), jnp.asarray(scale_bytes.view(jnp.float8_e4m3fn)), jnp.asarray(global_scale, jnp.float32)
    )


def _parts(t):
    """Writable numpy copies of a tensor's leaves, block scales as bytes."""
    return np.array(t.qdata), np.array(t.block_scale).view(np.uint8), np.array(t.global_scale)


def _bits(a):
    return np.asarray(a).view(np.uint8)


def assert_close(got, x, w, counts, dtype=jnp.bfloat16):
    """Every valid element within the error of f32 summation in any order, plus the final rounding.

    Products of decoded operands are exact in f32, so |error| <= K 2^-24 sum|x w| from the sum, 3 * 2^-24 from the
    scales and 2^-8 relative (half an ulp) from bf16. Stated per format besides: calc_diff, half the mean squared
    relative error, is at most 2^-17 / 3 for bf16 (rounding errors uniform within 2^-8) and 1e-12 for f32.
    """
    exact = oracles.grouped_gemm(x, w, counts)
    bound = (K + 3) * 2.0**-24 * oracles.grouped_gemm(np.abs(x), np.abs(w), counts)
    if dtype == jnp.bfloat16:
        bound = bound + 2.0**-8 * np.abs(exact)
    valid = np.arange(x.shape[1]) < np.asarray(counts)[:, None]
    got = np.asarray(got, np.float64)
    assert got.shape == exact.shape
    error = np.where(valid[..., None], np.abs(got - exact), 0)
    assert (error <= bound + 1e-40).all(), f"largest error {error.max()}, allowed there {bound.flat[error.argmax()]}"
    assert oracles.calc_diff(got[valid], exact[valid]) <= (2.0**-17 / 3 if dtype == jnp.bfloat16 else 1e-12)


@pytest.mark.parametrize(
    "x_scale_shape, w_scale_shape, out_dtype",
    [
        ((), (E, 1, 1), jnp.bfloat16),
        ((E, 1, 1), (E, 1, 1), jnp.bfloat16),
        ((E, 1, 1), (E, N, 1), jnp.bfloat16),
        ((E, M, 1), (E, N, 1), jnp.bfloat16),
        ((E, M, 1), (E, N, 1), jnp.float32),
    ],
)
def test_w4a4(x_scale_shape, w_scale_shape, out_dtype, rng):
    x, x64 = _quantized(rng, (E, M, K), x_scale_shape)
    w, w64 = _quantized(rng, (E, N, K), w_scale_shape)
    out = _masked(x, w, jnp.asarray(COUNTS), out_dtype=out_dtype)
    assert out.dtype == out_dtype
    assert_close(out, x64, w64, COUNTS, out_dtype)


@pytest.mark.parametrize("x_scale_shape", [None, (), (E, 1, 1), (E, M, 1)])
def test_w4a16(x_scale_shape, rng):
    x = rng.standard_normal((E, M, K)).astype(np.float32).astype(jnp.bfloat16)
    scale = None if x_scale_shape is None else rng.uniform(0.1, 10, x_scale_shape).astype(np.float32)
    w, w64 = _quantized(rng, (E, N, K), (E, 1, 1))
    out = _masked(jnp.asarray(x), w, jnp.asarray(COUNTS), x_scale=None if scale is None else jnp.asarray(scale))
    assert_close(out, x.astype(np.float64) * (1 if scale is None else scale), w64, COUNTS)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_plain_weights(dtype, rng):
    x, w = (rng.standard_normal(s).astype(np.float32).astype(dtype) for s in ((E, M, K), (E, N, K)))
    out = _masked(jnp.asarray(x), jnp.asarray(w), jnp.asarray(COUNTS), out_dtype=dtype)
    # f32 products are not exact: each is rounded once more, which the bound's 3 roundings cover.
    assert_close(out, x.astype(np.float64), w.astype(np.float64), COUNTS, dtype)


def test_decoded_x_with_x_scale_equals_nvfp4_x_bit_for_bit(rng):
    # out="nvfp4_as_bf16" of SwiGLU passes code x block_scale in bf16 and the global scale as x_scale.
    x, _ = _quantized(rng, (E, M, K), (E, 1, 1))
    w, _ = _quantized(rng, (E, N, K), (E, 1, 1))
    qdata, scales, g = _parts(x)
    decoded = jnp.asarray(oracles.dequantize(qdata, scales).astype(jnp.bfloat16))
    counts = jnp.asarray(COUNTS)
    np.testing.assert_array_equal(
        _bits(_masked(x, w, counts))[VALID], _bits(_masked(decoded, w, counts, x_scale=jnp.asarray(g)))[VALID]
    )


@pytest.mark.parametrize("ratio", [10.0, 0.1])
def test_gate_and_up_scales_apart(ratio, rng):
    # The first half of the output rows (gate) and the second (up) have global scales 10x apart, differently per expert.
    spread = np.ones((E, N, 1))
    spread[:, N // 2 :] = ratio
    x, x64 = _quantized(rng, (E, M, K), (E, 1, 1))
    w, w64 = _quantized(rng, (E, N, K), (E, N, 1), spread)
    out = _masked(x, w, jnp.asarray(COUNTS))
    assert_close(out, x64, w64, COUNTS)
    for half in (slice(None, N // 2), slice(N // 2, None)):  # each half by itself: the larger cannot hide the smaller
        assert_close(np.asarray(out)[..., half], x64, w64[:, half], COUNTS)


def test_contiguous_equals_masked_bit_for_bit(rng):
    x, _ = _quantized(rng, (E, M, K), (E, M, 1))
    w, _ = _quantized(rng, (E, N, K), (E, N, 1))
    masked = _masked(x, w, jnp.asarray(COUNTS))
    # The same rows back to back, and six rows of NaN behind them.
    pad = np.full((6, 1), 0x7F, np.uint8)
    qdata, scales, g = (p[VALID] for p in _parts(x))
    rows = _tensor(
        np.concatenate([qdata, np.broadcast_to(pad, (6, K // 2))]),
        np.concatenate([scales, np.broadcast_to(pad, (6, K // 16))]),
        np.concatenate([g, np.full((6, 1), np.nan, np.float32)]),
    )
    out = _contiguous(rows, w, jnp.asarray(COUNTS))
    assert out.shape == (COUNTS.sum() + 6, N)
    np.testing.assert_array_equal(_bits(out)[:-6], _bits(masked)[VALID])
    decoded = jnp.asarray(oracles.dequantize(qdata, scales).astype(jnp.bfloat16))
    plain = _contiguous(decoded, w, jnp.asarray(COUNTS), x_scale=jnp.asarray(g))
    np.testing.assert_array_equal(_bits(plain), _bits(masked)[VALID])


def test_poison_in_pads_and_in_unused_experts(rng):
    x, _ = _quantized(rng, (E, M, K), (E, M, 1))
    w, _ = _quantized(rng, (E, N, K), (E, N, 1))
    counts = jnp.asarray(COUNTS)
    clean = _bits(_masked(x, w, counts))[VALID]
    qdata, scales, g = _parts(x)
    qdata[~VALID], scales[~VALID], g[~VALID] = 0xFF, 0x7F, np.nan
    w_qdata, w_scales, w_g = _parts(w)
    w_qdata[1], w_scales[1], w_g[1] = 0xFF, 0xFF, np.nan  # expert 1 has no rows
    poisoned = _masked(_tensor(qdata, scales, g), _tensor(w_qdata, w_scales, w_g), counts)
    np.testing.assert_array_equal(_bits(poisoned)[VALID], clean)
    # bf16 x with x_scale: NaN and Inf in the pads.
    x16 = np.where(VALID[..., None], rng.standard_normal((E, M, K)), 0).astype(jnp.bfloat16)
    scale = np.where(VALID[..., None], 0.5, 1).astype(np.float32)
    clean = _bits(_masked(jnp.asarray(x16), w, counts, x_scale=jnp.asarray(scale)))[VALID]
    x16[~VALID], scale[~VALID] = np.inf, np.nan
    poisoned = _masked(jnp.asarray(x16), w, counts, x_scale=jnp.asarray(scale))
    np.testing.assert_array_equal(_bits(poisoned)[VALID], clean)


def test_bits_of_a_row_do_not_depend_on_m_neighbours_or_position(rng):
    w, _ = _quantized(rng, (E, N, K), (E, N, 1))
    row = rng.standard_normal(K).astype(np.float32).astype(jnp.bfloat16)
    reference = None
    for m, position, count in [
        (M, 0, 1),
        (M, 0, 40),
        (M, 39, 40),
        (M, 32, 33),
        (8, 3, 8),
        (8, 0, 1),
        (1, 0, 1),
        (96, 70, 96),
    ]:
        x = rng.standard_normal((E, m, K)).astype(np.float32).astype(jnp.bfloat16)
        x[:, position] = row
        out = _bits(_masked(jnp.asarray(x), w, jnp.full(E, count, jnp.int32)))[:, position]
        reference = out if reference is None else reference
        np.testing.assert_array_equal(out, reference, err_msg=f"M {m}, row {position} of {count}")
    for sizes in ([3, 5, 2, 1], [0, 30, 0, 40], [1, 0, 0, 0]):
        rows = rng.standard_normal((96, K)).astype(np.float32).astype(jnp.bfloat16)
        starts = np.cumsum([0, *sizes[:-1]])
        rows[starts[np.array(sizes) > 0]] = row
        out = _bits(_contiguous(jnp.asarray(rows), w, jnp.asarray(sizes, jnp.int32)))
        for e in np.nonzero(sizes)[0]:
            np.testing.assert_array_equal(out[starts[e]], reference[e], err_msg=f"contiguous {sizes}, expert {e}")


def test_no_rows_at_all(rng):
    w, _ = _quantized(rng, (E, N, K), (E, 1, 1))
    x = jnp.full((E, M, K), jnp.nan, jnp.bfloat16)
    assert _masked(x, w, jnp.zeros(E, jnp.int32)).shape == (E, M, N)
    empty = _contiguous(jnp.zeros((0, K), jnp.bfloat16), w, jnp.zeros(E, jnp.int32))
    assert empty.shape == (0, N)


def test_counts_above_m_and_expected_m_change_nothing(rng):
    x, x64 = _quantized(rng, (E, M, K), ())
    w, w64 = _quantized(rng, (E, N, K), (E, 1, 1))
    full = _masked(x, w, jnp.full(E, M, jnp.int32))
    assert_close(full, x64, w64, [M] * E)
    np.testing.assert_array_equal(_bits(_masked(x, w, jnp.full(E, M + 200, jnp.int32))), _bits(full))
    np.testing.assert_array_equal(_bits(_masked(x, w, jnp.full(E, M, jnp.int32), expected_m=2)), _bits(full))


@pytest.mark.slow
def test_eager_equals_jit(rng):
    x, _ = _quantized(rng, (E, M, K), (E, 1, 1))
    w, _ = _quantized(rng, (E, N, K), (E, 1, 1))
    counts = jnp.asarray(COUNTS)
    jitted = _bits(_masked(x, w, counts))[VALID]
    np.testing.assert_array_equal(_bits(masked_grouped_gemm(x, w, counts))[VALID], jitted)


def _zeros(shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


def _weights(e=E, n=N, k=K, scale_shape=None):
    return NVFP4Tensor(
        _zeros((e, n, k // 2), jnp.uint8),
        _zeros((e, n, k // 16), jnp.float8_e4m3fn),
        jnp.ones((e, 1, 1) if scale_shape is None else scale_shape, jnp.float32),
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": _zeros((E, M, 64))}, r"64.*128"),
        ({"x": _zeros((3, M, K))}, "3"),
        ({"x": _zeros((M, K))}, r"\(40, 128\)|\[40,128\]"),
        ({"x": _zeros((E, M, K), jnp.float16)}, "f(loat)?16"),
        ({"x": _zeros((E, M, K), jnp.int8)}, "i(nt)?8"),
        ({"w": _weights(scale_shape=())}, r"global_scale.*\(\)"),
        ({"w": _weights(scale_shape=(1, 1, 1))}, r"global_scale.*\(1, 1, 1\)"),
        ({"w": _weights(scale_shape=(E, 1, K))}, r"global_scale.*\(4, 1, 128\)"),
        ({"w": _zeros((E, N, K), jnp.uint8)}, "u(int)?8"),
        ({"masked_m": jnp.zeros(3, jnp.int32)}, "3"),
        ({"x_scale": jnp.ones(E, jnp.float32)}, r"\(4,\)"),
        ({"x_scale": jnp.ones((E, M, 2), jnp.float32)}, r"x_scale.*\(4, 40, 2\)"),
        ({"x": _weights(n=M), "x_scale": jnp.ones((), jnp.float32)}, "x_scale"),
        ({"expected_m": -1}, "-1"),
        ({"implementation": "tpu"}, "tpu"),
    ],
)
def test_refusals(change, message):
    arguments = {"x": _zeros((E, M, K)), "w": _weights(), "masked_m": jnp.zeros(E, jnp.int32), **change}
    with pytest.raises((ValueError, TypeError), match=message):
        masked_grouped_gemm(**arguments)


def test_a_named_implementation_never_falls_back():
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        masked_grouped_gemm(_zeros((E, M, K)), _weights(), jnp.zeros(E, jnp.int32), implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="triton"):
        contiguous_grouped_gemm(_zeros((M, K)), _weights(), jnp.zeros(E, jnp.int32), implementation="triton")


def test_never_holds_more_than_one_expert_in_bf16():
    # 32 experts: all of them in bf16 would take 32 * 512 * 256 * 2 bytes = 8 MiB; one takes 256 KiB (512 KiB in f32).
    experts, n, k = 32, 512, 256
    shapes = jax.eval_shape(functools.partial(_weights, experts, n, k))
    x = jax.ShapeDtypeStruct((experts, 8, k), jnp.bfloat16)
    compiled = jax.jit(masked_grouped_gemm).lower(x, shapes, jax.ShapeDtypeStruct((experts,), jnp.int32)).compile()
    out = experts * 8 * n * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 2**20 + 3 * out
