"""Block-wise FP8 against numpy in float64: bits of the format, error of the product."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from model_oracles import calc_diff

from fp4jax.block_fp8 import BLOCK, BlockFP8Weights, block_fp8_matmul, dequantize_blocks, quantize_blocks
from fp4jax.layers import BlockFP8Linear, Linear
from fp4jax.quant_schemas import FP8_BLOCK


def quantized(values, block):
    """Values and f32 scales of blocks of a matrix, in numpy: amax / 448 and division in f32."""
    rows, columns = (-(-size // b) for size, b in zip(values.shape, block, strict=True))
    codes, scales = np.zeros(values.shape, ml_dtypes.float8_e4m3fn), np.ones((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            place = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            amax = np.abs(values[place]).max()
            if amax > 0:
                scales[i, j] = np.float32(amax) / np.float32(448)
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


@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384), (1, 1), (130, 200), (64, 300), (300, 64)])
@pytest.mark.parametrize("jit", [False, True])
def test_weights_have_the_bits_of_numpy(rng, n, k, jit):
    w = weights(rng, n, k)
    got = (jax.jit(quantize_blocks) if jit else quantize_blocks)(jnp.asarray(w)).validate()
    codes, scales = quantized(w.astype(np.float32), FP8_BLOCK)
    np.testing.assert_array_equal(np.asarray(got.block_scale), scales)
    np.testing.assert_array_equal(np.asarray(got.qdata).view(np.uint8), codes.view(np.uint8))
    np.testing.assert_allclose(dequantize_blocks(got, jnp.float32), decoded(codes, scales, FP8_BLOCK), rtol=1e-6)


@hypothesis.given(tokens=st.integers(1, 40), n=st.integers(1, 300), k=st.integers(1, 400), seed=st.integers(0, 99))
@hypothesis.settings(max_examples=3)
def test_product(tokens, n, k, seed):
    rng = np.random.default_rng(seed)
    x, w = np.asarray(rng.standard_normal((tokens, k)) * 3, jnp.bfloat16), weights(rng, n, k)
    w = w.astype(np.float32) + 0.01  # the block of zeros would let a lost block pass
    got = block_fp8_matmul(jnp.asarray(x), quantize_blocks(jnp.asarray(w)), out_dtype=jnp.float32)
    x_exact = decoded(*quantized(x.astype(np.float32), (1, BLOCK)), (1, BLOCK))
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


def test_nan_in_a_weight_reaches_the_result(rng):
    w = jnp.asarray(weights(rng, 130, 130).astype(np.float32)).at[129, 129].set(jnp.nan)
    y = np.asarray(block_fp8_matmul(jnp.ones((2, 130)), quantize_blocks(w)), np.float32)
    assert np.isnan(y[:, 129]).all() and not np.isnan(y[:, :128]).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_linear(rng, dtype):
    linear = Linear(300, 200, dtype=dtype, param_dtype=dtype, stddev=0.1, rngs=nnx.Rngs(0))
    quantized_linear = BlockFP8Linear.from_linear(linear)
    x = jnp.asarray(rng.standard_normal((2, 3, 300)), dtype)
    got = jax.jit(quantized_linear)(x)
    assert got.shape == (2, 3, 200) and got.dtype == dtype
    w = decoded(*quantized(np.asarray(linear.weight[...], np.float32), FP8_BLOCK), FP8_BLOCK)
    rows = decoded(*quantized(np.asarray(x, np.float32).reshape(6, 300), (1, BLOCK)), (1, BLOCK))
    assert calc_diff(got.reshape(6, 200), rows @ w.T) < (1e-5 if dtype == jnp.bfloat16 else 1e-12)
    assert calc_diff(got, linear(x)) < 3e-3  # what three bits of mantissa lose


@pytest.mark.parametrize(
    ("x", "w", "error", "message"),
    [
        ((2, 64), BlockFP8Weights(jnp.zeros((8, 32), jnp.float8_e4m3fn), jnp.ones((1, 1))), ValueError, "does not fit"),
        ((2, 64), BlockFP8Weights(jnp.zeros((8, 64)), jnp.ones((1, 1))), TypeError, "qdata must be float8_e4m3fn"),
        (
            (2, 64),
            BlockFP8Weights(jnp.zeros((8, 64), jnp.float8_e4m3fn), jnp.ones((2, 1))),
            ValueError,
            r"got \(2, 1\)",
        ),
    ],
)
def test_refusals(x, w, error, message):
    with pytest.raises(error, match=message):
        block_fp8_matmul(jnp.zeros(x), w)


def test_a_named_implementation_never_falls_back():
    w = quantize_blocks(jnp.ones((8, 64)))
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        block_fp8_matmul(jnp.ones((2, 64)), w, implementation="mosaic_gpu")
