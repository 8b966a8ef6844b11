"""SwiGLU: silu within 4 ulp of float64; the quantized output against the oracle; the three forms; poison."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from fp4jax.nvfp4 import NVFP4Tensor
from fp4jax.swiglu import swiglu_quantize

E, M, I = 4, 64, 256
COUNTS = np.array([64, 0, 1, 37], np.int32)
VALID = np.arange(M) < COUNTS[:, None]
SCALE = np.array([0.004, 1.0, 0.001, 0.02], np.float32).reshape(E, 1, 1)  # one saturates a little, one is coarse

_jitted = jax.jit(swiglu_quantize, static_argnames="out")
_per_token = jax.jit(functools.partial(swiglu_quantize, global_scale="per_token"))
# Eagerly, each operation is compiled for itself: slow, and less for the compiler to rewrite than under jit.
JIT_AND_SLOWLY_EAGER = ["jit", pytest.param("eager", marks=pytest.mark.slow)]
RUN = {"eager": swiglu_quantize, "jit": _jitted}


def _gate_up(rng):
    """bf16-valued f32 [E, M, 2I]: gates of every size, the product neither tiny nor huge."""
    gate, up = rng.standard_normal((E, M, I)) * 3, rng.standard_normal((E, M, I)) * 2
    return oracles.round_bf16(np.concatenate([gate, up], -1).astype(np.float32))


def _bytes(a):
    return np.asarray(a).view(np.uint8)


def _ulps(got, exact):
    """Distance in f32 ulps of the exact result, which is a normal number."""
    ulp = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 23)
    return np.abs(np.asarray(got, np.float64) - exact) / ulp


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
def test_silu_of_every_bf16_within_4_ulp(how):
    gate = oracles.all_bf16()
    gate = gate[np.isfinite(gate)]
    gate_up = np.concatenate([gate[:, None], np.ones_like(gate)[:, None]], -1)  # [rows, 2]: up = 1
    got = np.asarray(RUN[how](jnp.asarray(gate_up), None, global_scale=None, out="bf16"))[:, 0]
    exact = oracles.silu(gate)
    normal = np.abs(exact) >= 2.0**-126
    assert got.dtype == np.float32 and normal.sum() > 48_000
    assert _ulps(got[normal], exact[normal]).max() <= 4
    # Below the normal range: a subnormal or zero of the right sign at most, never NaN.
    assert (np.abs(got[~normal]) <= 2.0**-125).all()


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
def test_bf16_output(how, rng):
    gate_up = _gate_up(rng)
    got = RUN[how](jnp.asarray(gate_up).astype(jnp.bfloat16), jnp.asarray(COUNTS), global_scale=None, out="bf16")
    exact = oracles.swiglu(gate_up)[VALID]
    got = np.asarray(got)[VALID].astype(np.float64)
    # One bf16 rounding (2^-8 relative) of a product that is 5 f32 ulp off at most.
    assert (np.abs(got - exact) <= np.abs(exact) * (2.0**-8 + 5 * 2.0**-23)).all()
    assert oracles.calc_diff(got, exact) <= 2.0**-17 / 3


def _steps(codes):
    """Codes as signed ranks, so that neighbouring values differ by 1."""
    return np.where(codes & 8, -(codes & 7).astype(int), (codes & 7).astype(int))


@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
@pytest.mark.parametrize("scale", ["per_expert", "one", "per_token"])
def test_quantized_output_against_the_oracle(how, scale, rng):
    gate_up = _gate_up(rng)
    counts = jnp.asarray(COUNTS)
    exact = oracles.swiglu(gate_up)
    product = exact.astype(np.float32)  # not rounded to bf16 in between
    if scale == "per_token":
        run = _per_token if how == "jit" else functools.partial(swiglu_quantize, global_scale="per_token")
        g = oracles.computed_scale(product, -1)
    else:
        g = np.broadcast_to(SCALE if scale == "per_expert" else np.float32(0.004), (E, 1, 1))
        run = functools.partial(RUN[how], global_scale=jnp.asarray(g if scale == "per_expert" else g[0, 0, 0]))
    t = run(jnp.asarray(gate_up).astype(jnp.bfloat16), counts)
    assert isinstance(t, NVFP4Tensor) and t.shape == (E, M, I)
    qdata, scales = oracles.quantize_exact(product, g)
    # A library sigmoid may be some ulp off: at most 1 code in 10^4 differs, by one step, and 1 block scale in 10^3.
    step = np.abs(_steps(oracles.unpack(np.asarray(t.qdata)[VALID])) - _steps(oracles.unpack(qdata[VALID])))
    assert step.max() <= 1 and (step > 0).mean() <= 1e-4
    assert (_bytes(t.block_scale)[VALID] != scales[VALID]).mean() <= 1e-3
    np.testing.assert_allclose(
        np.broadcast_to(np.asarray(t.global_scale), (E, M, 1))[VALID], np.broadcast_to(g, (E, M, 1))[VALID], rtol=1e-6
    )


@pytest.mark.parametrize("how", [pytest.param("eager", marks=pytest.mark.slow), "jit"])
def test_fused_equals_unfused_bit_for_bit(how, rng):
    # The f32 product that `out="bf16"` returns for f32 input, quantized by the oracle, is the quantized output.
    gate_up = jnp.asarray(_gate_up(rng))
    product = RUN[how](gate_up, jnp.asarray(COUNTS), global_scale=None, out="bf16")
    assert product.dtype == jnp.float32
    qdata, scales = oracles.quantize_exact(np.asarray(product), SCALE)
    t = RUN[how](gate_up, jnp.asarray(COUNTS), global_scale=jnp.asarray(SCALE), out="nvfp4")
    np.testing.assert_array_equal(np.asarray(t.qdata)[VALID], qdata[VALID])
    np.testing.assert_array_equal(_bytes(t.block_scale)[VALID], scales[VALID])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["per_token", "per_expert"])
def test_nvfp4_as_bf16_brings_the_scales_that_it_computes(rng, mode):
    gate_up, counts = jnp.asarray(_gate_up(rng)).astype(jnp.bfloat16), jnp.asarray(COUNTS)
    t = swiglu_quantize(gate_up, counts, global_scale=mode)
    decoded, scale = swiglu_quantize(gate_up, counts, global_scale=mode, out="nvfp4_as_bf16")
    assert decoded.dtype == jnp.bfloat16 and scale.shape == ((E, M, 1) if mode == "per_token" else (E, 1, 1))
    values = oracles.dequantize(np.asarray(t.qdata), _bytes(t.block_scale))
    np.testing.assert_array_equal(np.asarray(decoded, np.float64)[VALID], values[VALID])
    valid = VALID if mode == "per_token" else slice(None)
    np.testing.assert_array_equal(np.asarray(scale)[valid], np.asarray(t.global_scale)[valid])


def test_nvfp4_as_bf16_is_code_times_block_scale(rng):
    gate_up = jnp.asarray(_gate_up(rng)).astype(jnp.bfloat16)
    t = _jitted(gate_up, jnp.asarray(COUNTS), global_scale=jnp.asarray(SCALE), out="nvfp4")
    decoded = _jitted(gate_up, jnp.asarray(COUNTS), global_scale=jnp.asarray(SCALE), out="nvfp4_as_bf16")
    values = oracles.dequantize(np.asarray(t.qdata), _bytes(t.block_scale))
    assert decoded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(decoded, np.float64)[VALID], values[VALID])


@pytest.mark.parametrize("out", ["nvfp4", "nvfp4_as_bf16", "bf16"])
def test_contiguous_rows_equal_masked(out, rng):
    gate_up = jnp.asarray(_gate_up(rng)).astype(jnp.bfloat16)
    scale = jnp.asarray(np.broadcast_to(SCALE, (E, M, 1)))
    masked = _jitted(gate_up, jnp.asarray(COUNTS), global_scale=scale, out=out)
    rows = _jitted(gate_up.reshape(E * M, 2 * I), None, global_scale=scale.reshape(E * M, 1), out=out)
    for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(rows), strict=True):
        np.testing.assert_array_equal(_bytes(a).reshape(E * M, -1)[VALID.ravel()], _bytes(b)[VALID.ravel()])


@pytest.mark.parametrize("out", ["nvfp4", "nvfp4_as_bf16", "bf16"])
@pytest.mark.parametrize("how", JIT_AND_SLOWLY_EAGER)
def test_poisoned_pads(out, how, rng):
    clean = _gate_up(rng)
    poisoned = np.where(VALID[..., None], clean, np.nan)
    poisoned[..., ::3] = np.where(VALID[..., None], clean[..., ::3], np.inf)
    clean, poisoned = (
        RUN[how](jnp.asarray(x, jnp.bfloat16), jnp.asarray(COUNTS), global_scale=jnp.asarray(SCALE), out=out)
        for x in (clean, poisoned)
    )
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(poisoned), strict=True):
        a, b = (np.broadcast_to(_bytes(leaf), (E, M, _bytes(leaf).shape[-1])) for leaf in (a, b))
        np.testing.assert_array_equal(a[VALID], b[VALID])


def test_computed_scales_ignore_poisoned_pads(rng):
    gate_up = _gate_up(rng)
    poisoned = np.where(VALID[..., None], gate_up, np.where(np.arange(2 * I) % 2, np.nan, 1e15))  # NaN and 1e30
    for mode in (None, "per_expert"):
        t = swiglu_quantize(jnp.asarray(poisoned), jnp.asarray(COUNTS), global_scale=mode)
        axis = None if mode is None else (-2, -1)
        expected = oracles.computed_scale(oracles.swiglu(gate_up), axis, valid=VALID[..., None])
        np.testing.assert_allclose(np.asarray(t.global_scale), expected, rtol=1e-6)  # silu: 4 ulp


@pytest.mark.parametrize(
    "shape, masked_m, options, message",
    [
        ((E, M, 2 * I), COUNTS, {"out": "fp8"}, "fp8"),
        ((E, M, 2 * I), None, {}, r"\(4, 64, 512\)"),
        ((M, 2 * I), COUNTS, {}, r"\(64, 512\)"),
        ((E, M, 33), COUNTS, {}, r"\(4, 64, 33\)"),
        ((E, M, 48), COUNTS, {}, r"16.*\(4, 64, 48\)"),
        ((E, M, 2 * I), COUNTS[:3], {}, "3"),
        ((E, M, 2 * I), COUNTS, {"global_scale": jnp.ones((E, 1), jnp.float32)}, r"\(4, 1\)"),
        ((E, M, 2 * I), COUNTS, {"global_scale": 2.0**-120}, r"2\^-100"),
        ((E, M, 2 * I), COUNTS, {"implementation": "triton"}, "triton"),
    ],
)
def test_refusals(shape, masked_m, options, message):
    counts = None if masked_m is None else jnp.asarray(masked_m)
    arguments = {"global_scale": jnp.float32(1), **options}
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        swiglu_quantize(jnp.zeros(shape, jnp.bfloat16), counts, **arguments)
