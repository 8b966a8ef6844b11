"""Block-wise FP8 against numpy in float64: bits of the format, error of the product."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import mosaic_gpu as plgpu
from model_oracles import calc_diff

from cuda_lowering import kernels_in, struct
from fp4jax.block_fp8 import BLOCK, BlockFP8Weights, block_fp8_matmul, dequantize_blocks, quantize_blocks, to_fp8
from fp4jax.layers import BlockFP8Linear, Linear
from fp4jax.quant_config.schemas import FP8_BLOCK
from pallas_kernels.fp8 import config as fp8_config, gemm as fp8_gemm, quantize as quantize_fp8
from pallas_kernels.fp8.config import TuningConfig
from pallas_kernels.simt.hardware import SMEM_BYTES

pytestmark = pytest.mark.usefixtures("quick_compile")

POWERS = np.ldexp(1.0, np.arange(-126, 128))


def quantized(values, block, power_of_two_scales=False):
    """Values and f32 scales of blocks of a matrix, in numpy: amax / 448 and division in f32.

    power_of_two_scales: the first power whose 448-fold, exact in float64, reaches amax.
    """
    rows, columns = (-(-size // b) for size, b in zip(values.shape, block, strict=True))
    codes, scales = np.zeros(values.shape, ml_dtypes.float8_e4m3fn), np.ones((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            place = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            amax = np.abs(values[place]).max()
            if amax > 0:
                scales[i, j] = np.float32(amax) / np.float32(448)
                if power_of_two_scales:
                    scales[i, j] = POWERS[np.searchsorted(448 * POWERS, np.float64(amax))]
            codes[place] = np.clip(values[place].astype(np.float32) / scales[i, j], -448, 448)
    return codes, scales


def decoded(codes, scales, block):
    wide = np.repeat(np.repeat(scales.astype(np.float64), block[0], 0), block[1], 1)
    return codes.astype(np.float64) * wide[: codes.shape[0], : codes.shape[1]]


def weights(rng, n, k):
    """Blocks of very different magnitude, one of them zeros."""
    w = rng.standard_normal((n, k)) * np.exp2(rng.integers(-8, 9, (n, 1))) * np.exp2(rng.integers(-4, 5, (1, k)))
    w[: min(n, BLOCK), : min(k, BLOCK)] = 0
    return np.asarray(w, jnp.bfloat16)


def test_block_is_what_configs_say():
    assert FP8_BLOCK == (BLOCK, BLOCK)


def around_powers(rng, dtype):
    """Rows of two groups whose amax is 448 * 2^n or its neighbour below or above in the dtype; one group is zeros.

    From n = -116 on a subnormal value, which CPUs flush, is zero to e4m3 anyway.
    """
    edges = np.asarray(448 * 2.0 ** np.array([-116, -60, -1, 0, 1, 60, 118]), dtype)
    amax = np.concatenate(
        [edges, np.nextafter(edges, dtype(0)), np.nextafter(edges, dtype(np.inf)), np.zeros(1, dtype)]
    )
    x = rng.uniform(-0.9, 0.9, (len(amax), 208))
    x[:, 7], x[:, 140] = 1, -1
    x[:, :BLOCK] *= amax[:, None]
    x[:, BLOCK:] *= amax[::-1, None]
    return np.asarray(x, dtype)


def test_blocks_of_nearly_zero_weights_are_zero():
    """Their scale would be no normal number; from 448 * 2^-126 up it is one."""
    w = np.zeros((1, 384), np.float32)
    w[0, 0], w[0, 128], w[0, 256] = 1e-37, 448 * 2.0**-126, -447 * 2.0**-126
    got = quantize_blocks(jnp.asarray(w))
    np.testing.assert_array_equal(np.asarray(got.block_scale), np.array([[1, 2.0**-126, 1]], np.float32))
    np.testing.assert_array_equal(np.asarray(got.qdata, np.float32), np.where(np.arange(384) == 128, 448, 0)[None])


@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384), (1, 1), (130, 200), (64, 300), (300, 64)])
@pytest.mark.parametrize("jit", [False, True])
def test_weights_have_the_bits_of_numpy(rng, n, k, jit):
    w = weights(rng, n, k)
    got = (jax.jit(quantize_blocks) if jit else quantize_blocks)(jnp.asarray(w)).validate()
    codes, scales = quantized(w.astype(np.float32), FP8_BLOCK)
    np.testing.assert_array_equal(np.asarray(got.block_scale), scales)
    np.testing.assert_array_equal(np.asarray(got.qdata).view(np.uint8), codes.view(np.uint8))
    np.testing.assert_allclose(dequantize_blocks(got, jnp.float32), decoded(codes, scales, FP8_BLOCK), rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_power_of_two_scales_have_the_bits_of_numpy(rng, dtype, jit):
    x = around_powers(rng, dtype)
    encode = functools.partial(to_fp8, power_of_two_scales=True)
    values, scales = (jax.jit(encode) if jit else encode)(jnp.asarray(x))
    expected_values, expected_scales = quantized(x.astype(np.float32), (1, BLOCK), power_of_two_scales=True)
    np.testing.assert_array_equal(np.asarray(scales), expected_scales)
    np.testing.assert_array_equal(np.asarray(values).view(np.uint8), expected_values.view(np.uint8))
    assert (np.frexp(np.asarray(scales))[0] == 0.5).all()  # powers of two


def test_power_of_two_scales_of_what_is_no_number_and_of_what_is_too_small():
    smallest = np.float32(448 * 2.0**-126)
    x = jnp.asarray([[smallest], [np.nextafter(smallest, np.float32(0))], [0], [np.nan], [-np.inf]], jnp.float32)
    _, scales = to_fp8(x, power_of_two_scales=True)
    np.testing.assert_array_equal(np.asarray(scales)[:3, 0], np.float32([2.0**-126, 1, 1]))
    assert not np.isfinite(np.asarray(scales)[3:]).any()


@hypothesis.given(
    tokens=st.integers(1, 40),
    n=st.integers(1, 300),
    k=st.integers(1, 400),
    seed=st.integers(0, 99),
    power=st.booleans(),
)
@hypothesis.settings(max_examples=3)
def test_product(tokens, n, k, seed, power):
    rng = np.random.default_rng(seed)
    x, w = np.asarray(rng.standard_normal((tokens, k)) * 3, jnp.bfloat16), weights(rng, n, k)
    w = w.astype(np.float32) + 0.01  # the block of zeros would let a lost block pass
    got = block_fp8_matmul(
        jnp.asarray(x), quantize_blocks(jnp.asarray(w)), out_dtype=jnp.float32, power_of_two_scales=power
    )
    x_exact = decoded(*quantized(x.astype(np.float32), (1, BLOCK), power), (1, BLOCK))
    exact = x_exact @ decoded(*quantized(w, FP8_BLOCK), FP8_BLOCK).T
    magnitude = np.abs(x_exact) @ np.abs(decoded(*quantized(w, FP8_BLOCK), FP8_BLOCK)).T
    assert (np.abs(np.asarray(got, np.float64) - exact) <= 1e-5 * magnitude + 1e-30).all()


def test_a_row_depends_on_itself_only(rng):
    x, w = (
        jnp.asarray(rng.standard_normal((5, 256)), jnp.bfloat16),
        quantize_blocks(jnp.asarray(weights(rng, 200, 256))),
    )
    alone = block_fp8_matmul(x, w)
    poisoned = block_fp8_matmul(x.at[3].set(jnp.nan), w)
    rows = np.array([0, 1, 2, 4])
    np.testing.assert_array_equal(np.asarray(poisoned)[rows].view(np.uint16), np.asarray(alone)[rows].view(np.uint16))
    assert np.isnan(np.asarray(poisoned, np.float32)[3]).all()


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_nan_or_inf_in_a_weight_reaches_the_result(rng, bad):
    w = jnp.asarray(weights(rng, 130, 130).astype(np.float32)).at[129, 129].set(bad)
    y = np.asarray(block_fp8_matmul(jnp.ones((2, 130), jnp.float32), quantize_blocks(w)), np.float32)
    assert np.isnan(y[:, 129]).all() and not np.isnan(y[:, :128]).any()


@pytest.mark.parametrize(("dtype", "power"), [(jnp.bfloat16, False), (jnp.float32, False), (jnp.float32, True)])
def test_linear(rng, dtype, power):
    linear = Linear(300, 200, dtype=dtype, param_dtype=dtype, stddev=0.1, rngs=nnx.Rngs(0))
    quantized_linear = BlockFP8Linear.from_linear(linear, power_of_two_scales=power)
    x = jnp.asarray(rng.standard_normal((2, 3, 300)), dtype)
    got = jax.jit(quantized_linear)(x)
    assert got.shape == (2, 3, 200) and got.dtype == dtype
    w = decoded(*quantized(np.asarray(linear.weight[...], np.float32), FP8_BLOCK), FP8_BLOCK)
    rows = decoded(*quantized(np.asarray(x, np.float32).reshape(6, 300), (1, BLOCK), power), (1, BLOCK))
    assert calc_diff(got.reshape(6, 200), rows @ w.T) < (1e-5 if dtype == jnp.bfloat16 else 1e-12)
    assert calc_diff(got, linear(x)) < 3e-3  # what three bits of mantissa lose


@pytest.mark.parametrize(
    ("x", "w", "error", "message"),
    [
        (
            (2, 64),
            BlockFP8Weights(jnp.zeros((8, 32), jnp.float8_e4m3fn), jnp.ones((1, 1), jnp.float32)),
            ValueError,
            "does not fit",
        ),
        (
            (2, 64),
            BlockFP8Weights(jnp.zeros((8, 64), jnp.float32), jnp.ones((1, 1), jnp.float32)),
            TypeError,
            "qdata must be float8_e4m3fn",
        ),
        (
            (2, 64),
            BlockFP8Weights(jnp.zeros((8, 64), jnp.float8_e4m3fn), jnp.ones((2, 1), jnp.float32)),
            ValueError,
            r"got \(2, 1\)",
        ),
    ],
)
def test_refusals(x, w, error, message):
    with pytest.raises(error, match=message):
        block_fp8_matmul(jnp.zeros(x, jnp.float32), w)


def test_a_named_implementation_never_falls_back():
    w = quantize_blocks(jnp.ones((8, 64), jnp.float32))
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        block_fp8_matmul(jnp.ones((2, 64), jnp.float32), w, implementation="mosaic_gpu")


# --- the kernels ---


def operands(rng, m, n, k):
    """Codes and scales as the kernel takes them, scales beyond the rows NaN; and the exact product in float64."""
    x, w = (np.asarray(rng.standard_normal(shape) * 20, ml_dtypes.float8_e4m3fn) for shape in ((m, k), (n, k)))
    groups = -(-k // BLOCK)
    x_scale = np.full((groups, fp8_config.scale_columns(m)), np.nan, np.float32)
    x_scale[:, :m] = np.exp2(rng.uniform(-9, 3, (groups, m)))
    w_scale = np.exp2(rng.uniform(-9, 3, (-(-n // BLOCK), groups))).astype(np.float32)
    x_exact = decoded(x, x_scale[:, :m].T, (1, BLOCK))
    w_exact = decoded(w, w_scale, FP8_BLOCK)
    arrays = [jax.device_put(a) for a in (x, w, x_scale, w_scale)]
    return arrays, x_exact @ w_exact.T, np.abs(x_exact) @ np.abs(w_exact).T


def check_codes(got, expected):
    """The same bytes, but for the sign of NaN."""
    got, expected = (np.asarray(a).view(np.uint8) for a in (got, expected))
    np.testing.assert_array_equal(*(np.where(a & 0x7F == 0x7F, 0x7F, a) for a in (got, expected)))


SMALL = {  # two stages of every kind of configuration: shapes that end within a tile, a block, a cluster
    (5, 40, 144): TuningConfig(1, 32, 2, k_blocks=2),
    (133, 136, 400): TuningConfig(1, 64, 2, k_blocks=3),
    (200, 264, 272): TuningConfig(2, 128, 2),
    (64, 200, 128): TuningConfig(3, 128, 2, cluster=2),
}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "config"), SMALL.items(), ids=str)
def test_gemm_in_interpret_mode(rng, shape, config):
    arrays, exact, magnitude = operands(rng, *shape)
    run = functools.partial(fp8_gemm.gemm, config=config, interpret=plgpu.InterpretGPUParams())
    got = np.asarray(run(*arrays, out_dtype=jnp.float32))
    assert (np.abs(got - exact) <= 1e-5 * magnitude).all()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 48), jnp.bfloat16),
        pytest.param((3, 400), jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param((9, 128), jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_quantize_in_interpret_mode(rng, shape, dtype):
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-60, 60, (shape[0], 1)))
    x[0, :16], x[-1, 16:32], x[1, 0], x[2, 5] = 0, np.inf, -np.nan, -np.inf
    x = jnp.asarray(x, dtype)
    values, scales = quantize_fp8.quantize(x, interpret=plgpu.InterpretGPUParams())
    expected_values, expected_scales = to_fp8(x)
    check_codes(values, expected_values)
    np.testing.assert_array_equal(np.asarray(scales)[:, : shape[0]].T, np.asarray(expected_scales))


def test_power_of_two_scales_in_interpret_mode(rng, run_kernels):
    x = around_powers(rng, np.float32)[::3]
    x[0, 20], x[1, 40] = np.nan, np.inf
    values, scales = quantize_fp8.quantize(jnp.asarray(x), power_of_two_scales=True, interpret=run_kernels)
    expected_values, expected_scales = to_fp8(jnp.asarray(x), power_of_two_scales=True)
    check_codes(values, expected_values)
    np.testing.assert_array_equal(np.asarray(scales)[:, : len(x)].T, np.asarray(expected_scales))


@pytest.mark.parametrize("config", fp8_config.CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_configuration_lowers_for_a_gpu(config, dtype):
    m, n, k = 136, 264, 400
    fits = fp8_config.fitted(config, dtype)
    structs = (
        struct((m, k), jnp.float8_e4m3fn), struct((n, k), jnp.float8_e4m3fn), struct((4, m), jnp.float32),
        struct((3, 4), jnp.float32),
    )  # fmt: skip
    assert kernels_in(functools.partial(fp8_gemm.gemm, out_dtype=dtype, config=fits), *structs) == 1


def test_the_product_runs_on_two_kernels_for_a_gpu():
    w = BlockFP8Weights(struct((264, 400), jnp.float8_e4m3fn), struct((3, 4), jnp.float32))
    product = functools.partial(block_fp8_matmul, implementation=None)
    assert kernels_in(product, struct((100, 400), jnp.bfloat16), w) == 2
    power = functools.partial(product, power_of_two_scales=True)
    assert kernels_in(power, struct((100, 400), jnp.bfloat16), w) == 2
    odd = BlockFP8Weights(struct((260, 400), jnp.float8_e4m3fn), struct((3, 4), jnp.float32))  # N no multiple of 8
    assert kernels_in(product, struct((100, 400), jnp.bfloat16), odd) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=((64, 256), jnp.bfloat16)), "x must be float8_e4m3fn"),
        (dict(w=((64, 0), jnp.float8_e4m3fn)), "not empty"),
        (dict(x=((64, 264), jnp.float8_e4m3fn)), "K must be a multiple of 16"),
        (dict(w=((68, 256), jnp.float8_e4m3fn)), "N of 8"),
        (dict(x_scale=((2, 63), jnp.float32)), r"x_scale \(2, 63\)"),
        (dict(w_scale=((1, 1), jnp.float32)), r"w_scale \(1, 1\)"),
        (dict(w_scale=((1, 2), jnp.bfloat16)), "must be float32"),
    ],
)
def test_what_the_kernel_does_not_take(change, message):
    e4m3 = jnp.float8_e4m3fn
    shapes = dict(
        x=((64, 256), e4m3), w=((64, 256), e4m3), x_scale=((2, 64), jnp.float32), w_scale=((1, 2), jnp.float32)
    )
    arrays = [jnp.zeros(shape, dtype) for shape, dtype in (shapes | change).values()]
    with pytest.raises(NotImplementedError, match=message):
        fp8_gemm.gemm(*arrays)


def test_configurations_follow_the_shape():
    assert fp8_config.choose(4096, 4096, 7168).tile_m == 192
    assert fp8_config.choose(1, 4096, 7168).tile_n == 32
    for m, n, k in [(1, 8, 16), (100, 576, 7168), (100000, 24576, 1536)]:
        for dtype in (jnp.bfloat16, jnp.float32):
            config = fp8_config.choose(m, n, k, dtype)
            assert config.smem_bytes(np.dtype(dtype).itemsize) <= SMEM_BYTES and config.num_stages >= 2


# --- on a GPU ---

SHAPES = [(1, 576, 7168), (7, 8, 16), (101, 520, 400), (300, 4096, 2048), (513, 136, 1040), (2000, 1536, 1536)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("config", fp8_config.CONFIGS, ids=str)
def test_gemm_on_a_gpu(rng, shape, config):
    """Against float64. Of 32 products the tensor cores keep what is above 2^-13 or so of the largest."""
    m, n, k = shape
    arrays, exact, magnitude = operands(rng, m, n, k)
    for dtype, rounding in ((jnp.float32, 0.0), (jnp.bfloat16, 2.0**-8)):
        run = jax.jit(functools.partial(fp8_gemm.gemm, out_dtype=dtype, config=fp8_config.fitted(config, dtype)))
        got = np.asarray(run(*arrays))
        wrong = np.abs(got.astype(np.float64) - exact) - rounding * np.abs(exact)
        assert (wrong <= 2.0**-10 * magnitude).all()
        assert calc_diff(got, exact) < 1e-5
        for _ in range(5):
            assert (np.asarray(run(*arrays)).view(np.uint8) == got.view(np.uint8)).all()


@pytest.mark.gpu
def test_bits_do_not_depend_on_the_configuration_or_on_other_rows(rng):
    arrays, *_ = operands(rng, 200, 520, 1040)
    every = [np.asarray(fp8_gemm.gemm(*arrays, config=config)) for config in fp8_config.CONFIGS]
    for other in every[1:]:
        np.testing.assert_array_equal(other.view(np.uint16), every[0].view(np.uint16))
    x, *rest = arrays
    poisoned = jax.device_put(np.where(np.arange(200)[:, None] == 77, np.float32(np.nan), np.asarray(x, np.float32)))
    for config in fp8_config.CONFIGS:
        got = np.asarray(fp8_gemm.gemm(poisoned.astype(jnp.float8_e4m3fn), *rest, config=config))
        assert np.isnan(got[77].astype(np.float32)).all()
        np.testing.assert_array_equal(np.delete(got, 77, 0).view(np.uint16), np.delete(every[0], 77, 0).view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 576, 7168), (100, 520, 400), (4096, 4096, 7168)])
def test_product_on_a_gpu(rng, tokens, n, k):
    """The whole op on the kernels against XLA's path, whose products and sums are those of float32."""
    x = jnp.asarray(rng.standard_normal((tokens, k)), jnp.bfloat16)
    w = jax.jit(quantize_blocks)(jnp.asarray(weights(rng, n, k)))
    on_kernel = jax.jit(functools.partial(block_fp8_matmul, implementation="mosaic_gpu"))(x, w)
    xla = jax.jit(functools.partial(block_fp8_matmul, implementation="xla", out_dtype=jnp.float32))(x, w)
    assert on_kernel.shape == (tokens, n)
    assert calc_diff(on_kernel, xla) < 1e-5
    values, scales = quantize_fp8.quantize(x)
    check_codes(values, to_fp8(x)[0])
    np.testing.assert_array_equal(np.asarray(scales)[:, :tokens].T, np.asarray(to_fp8(x)[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_power_of_two_scales_on_a_gpu(rng, dtype):
    """Kernel and XLA against numpy."""
    x = around_powers(rng, dtype)
    expected_values, expected_scales = quantized(x.astype(np.float32), (1, BLOCK), power_of_two_scales=True)
    values, scales = jax.jit(functools.partial(quantize_fp8.quantize, power_of_two_scales=True))(x)
    on_xla = jax.jit(functools.partial(to_fp8, power_of_two_scales=True))(x)
    for found_values, found_scales in ((values, np.asarray(scales)[:, : len(x)].T), on_xla):
        check_codes(found_values, expected_values)
        np.testing.assert_array_equal(np.asarray(found_scales), expected_scales)
