"""Linear layers that are computed as one: the outputs of the single layers, and which layers stay apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import forward, make_qwen3_moe, sample_ids

from fp4jax import implementations
from fp4jax.engine.blocks import with_fused_projections
from fp4jax.layers import BlockFP8Linear, Linear, NVFP4Linear
from fp4jax.layers.fused import fuse
from fp4jax.layers.linear import dot

SIZES = (256, 128, 128)

pytestmark = pytest.mark.usefixtures("quick_compile")


def linears(dtype, kind=None, sizes=SIZES, **options):
    plain = [Linear(128, n, dtype=dtype, param_dtype=dtype, stddev=0.1, rngs=nnx.Rngs(i)) for i, n in enumerate(sizes)]
    return plain if kind is None else [kind.from_linear(linear, **options) for linear in plain]


@pytest.fixture
def on_hopper(monkeypatch):
    """NVFP4 weights are packed as on a Hopper GPU."""
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: True)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (None, {}),
        pytest.param(BlockFP8Linear, {"power_of_two_scales": True}, marks=pytest.mark.slow),
        pytest.param(NVFP4Linear, {"activation_format": "bf16"}, marks=pytest.mark.slow),
        pytest.param(
            NVFP4Linear, {"activation_format": "nvfp4", "input_scale": jnp.float32(0.01)}, marks=pytest.mark.slow
        ),
    ],
)
def test_one_product_gives_the_outputs_of_all(rng, on_hopper, monkeypatch, kind, options):
    single = linears(jnp.bfloat16, kind, **options)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves([nnx.state(linear) for linear in single])]
    fused = fuse(*single)
    assert fused is not None and fused.sizes == SIZES
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: False)  # what follows runs in XLA
    x = jnp.asarray(rng.standard_normal((2, 3, 128)), jnp.bfloat16)
    for found, linear in zip(fused(x), single, strict=True):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(linear(x), np.float32))
    after = [np.asarray(leaf) for leaf in jax.tree.leaves([nnx.state(linear) for linear in single])]
    for a, b in zip(before, after, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.slow
def test_layers_that_do_not_compute_alike_stay_apart(on_hopper):
    bf16, f32 = jnp.bfloat16, jnp.float32
    nvfp4 = dict(kind=NVFP4Linear, sizes=(128,))
    assert fuse(*linears(bf16), *linears(f32)) is None
    assert fuse(*linears(bf16), *linears(bf16, BlockFP8Linear)) is None
    assert fuse(*linears(bf16, BlockFP8Linear, sizes=(128, 96))) is None
    scales = [{"input_scale": jnp.float32(scale)} for scale in (0.01, 0.02)]
    assert fuse(*(linears(bf16, **nvfp4, **scale)[0] for scale in scales)) is None
    formats = [{"activation_format": name} for name in ("bf16", "nvfp4")]
    assert fuse(*(linears(bf16, **nvfp4, **of)[0] for of in formats)) is None


def test_a_fused_model_is_another_one_and_computes_the_same():
    model = make_qwen3_moe(num_hidden_layers=1, mlp_only_layers=(0,))
    ids = sample_ids(2, 7)
    before = np.asarray(forward(model, ids))
    fused = with_fused_projections(with_fused_projections(model))
    assert fused.layers[0].mlp.gate_proj is None and model.layers[0].mlp.gate_proj is not None
    assert fused.layers[0].self_attn.q_proj is None and model.layers[0].self_attn.q_proj is not None
    np.testing.assert_allclose(np.asarray(forward(fused, ids)), before, atol=1e-5 * np.abs(before).max())
    np.testing.assert_array_equal(np.asarray(forward(model, ids)), before)


# --- products ---


@pytest.mark.parametrize("weight_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rows", [1, 9])
def test_a_float32_product_of_bf16_tokens_is_a_float32_product(rng, weight_dtype, rows):
    """As exact as float32 sums are, though tensor cores may compute it: a router's choices depend on it."""
    x = jnp.asarray(rng.standard_normal((rows, 512)), jnp.bfloat16)
    weight = jnp.asarray(rng.standard_normal((24, 512)), weight_dtype)
    found = np.asarray(jax.jit(lambda x, w: dot(x, w, dtype=jnp.float32))(x, weight), np.float64)
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()
    rounded = np.asarray(x, np.float64) @ np.asarray(weight.astype(jnp.bfloat16), np.float64).T
    assert weight_dtype == jnp.bfloat16 or np.abs(rounded - expected).max() > 1e-4 * np.abs(expected).max()


def test_the_gradient_of_a_split_weight(rng):
    x, weight = jnp.asarray(rng.standard_normal((5, 32)), jnp.bfloat16), jnp.asarray(rng.standard_normal((3, 32)))
    by_weight = jax.grad(lambda w: jnp.sum(jnp.sin(dot(x, w, dtype=jnp.float32))))(weight)
    expected = jax.grad(lambda w: jnp.sum(jnp.sin(x.astype(jnp.float32) @ w.T)))(weight)
    np.testing.assert_allclose(np.asarray(by_weight), np.asarray(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_router_chooses_as_float64_does(rng):
    """The top 8 of 128 experts for 2^20 tokens of Qwen3-30B's size, but for ties closer than a float32 sum can tell."""
    weight = jnp.asarray(0.02 * rng.standard_normal((128, 2048)), jnp.bfloat16)
    exact_weight = np.asarray(weight, np.float64)
    run = jax.jit(lambda x, w: dot(x, w, dtype=jnp.float32))
    differ = 0
    for _ in range(16):
        x = jnp.asarray(rng.standard_normal((1 << 16, 2048), np.float32), jnp.bfloat16)
        exact = np.asarray(x, np.float64) @ exact_weight.T
        found = np.asarray(run(x, weight))
        chosen, expected = (np.sort(np.argpartition(-logits, 8, axis=1)[:, :8], axis=1) for logits in (found, exact))
        wrong = (chosen != expected).any(axis=1)
        ordered = np.sort(exact[wrong], axis=1)
        gap = ordered[:, -8] - ordered[:, -9]
        assert (gap <= 4e-6 * np.abs(exact[wrong]).max(axis=1)).all()
        differ += int(wrong.sum())
    assert differ < 200
