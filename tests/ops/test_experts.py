"""prepare_experts against the float64 quantizer, on this machine and as a Hopper GPU would hold the weights."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import oracles
from fp4jax import MoEConfig, PackedWeights, dequantize, implementations, moe_layer, prepare_experts, unpack_weights

pytestmark = pytest.mark.usefixtures("quick_compile")

E, H = 3, 64


@pytest.fixture(autouse=True)
def on_no_gpu(monkeypatch):
    """Weights stay unpacked, on a machine with a GPU too, but where a test says otherwise."""
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: False)


def _plain(rng, intermediate, dtype=np.float32):
    """gate, up and down; the projections of the experts are of very different sizes."""
    gate, up = (rng.standard_normal((E, intermediate, H)) * rng.uniform(0.01, 10, (E, 1, 1)) for _ in range(2))
    down = rng.standard_normal((E, H, intermediate)) * rng.uniform(0.01, 10, (E, 1, 1))
    return [np.asarray(w).astype(dtype) for w in (gate, up, down)]


def _quantized(w, divisor=2688):
    """The float64 values of each expert quantized alone."""
    w = w.astype(np.float32)
    scale = (np.abs(w).max(axis=(1, 2), keepdims=True) / np.float32(divisor)).astype(np.float32)
    return oracles.dequantize(*oracles.quantize_exact(w, scale), scale)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, pytest.param(np.float32, marks=pytest.mark.slow)])
def test_every_projection_of_every_expert_has_its_own_scale(rng, dtype):
    gate, up, down = _plain(rng, 48, dtype)
    weights = prepare_experts(*map(jnp.asarray, (gate, up, down)))
    assert weights.input_scale_1 is None and weights.input_scale_2 is None
    assert weights.w13.global_scale.shape == (E, 96, 1) and weights.w2.global_scale.shape == (E, 1, 1)
    w13, w2 = (np.asarray(dequantize(w, jnp.float32), np.float64) for w in weights[:2])
    np.testing.assert_allclose(w13[:, :48], _quantized(gate), rtol=1e-6)
    np.testing.assert_allclose(w13[:, 48:], _quantized(up), rtol=1e-6)
    np.testing.assert_allclose(w2, _quantized(down), rtol=1e-6)


@pytest.mark.slow
def test_four_over_six_is_nearer(rng):
    plain = _plain(rng, 64)
    errors = []
    for four_over_six in (False, True):
        w2 = prepare_experts(*map(jnp.asarray, plain), four_over_six=four_over_six).w2
        found = np.asarray(dequantize(w2, jnp.float32), np.float64)
        errors.append(np.mean(((found - plain[2]) / np.abs(plain[2]).max(axis=(1, 2), keepdims=True)) ** 2))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.slow
def test_a_hopper_gpu_gets_packed_weights_of_the_same_values(rng, monkeypatch):
    """I = 48 is raised to 64 by rows of zeros, gate and up each on their own."""
    plain = [jnp.asarray(w) for w in _plain(rng, 48)]
    expected = prepare_experts(*plain)
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: True)
    packed = prepare_experts(*plain)
    assert isinstance(packed.w13, PackedWeights) and isinstance(packed.w2, PackedWeights)
    assert packed.w13.shape == (E, 128, H) and packed.w2.shape == (E, H, 64)
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: False)
    w13, w2 = (np.asarray(dequantize(unpack_weights(w), jnp.float32)) for w in packed[:2])
    plain13, plain2 = (np.asarray(dequantize(w, jnp.float32)) for w in expected[:2])
    np.testing.assert_array_equal(w13[:, :48], plain13[:, :48])
    np.testing.assert_array_equal(w13[:, 64:112], plain13[:, 48:])
    np.testing.assert_array_equal(w2[:, :, :48], plain2)
    assert not w13[:, 48:64].any() and not w13[:, 112:].any() and not w2[:, :, 48:].any()
    x = jnp.asarray(rng.standard_normal((5, H)), jnp.bfloat16)
    ids, topk = jnp.asarray(rng.integers(0, E, (5, 1)), jnp.int32), jnp.ones((5, 1))
    results = [jax.jit(moe_layer, static_argnums=4)(x, ids, topk, w, MoEConfig(E))[0] for w in (packed, expected)]
    np.testing.assert_array_equal(*(np.asarray(y).view(np.uint16) for y in results))
