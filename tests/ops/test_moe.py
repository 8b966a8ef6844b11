"""The MoE layer on one device against the token-by-token float64 oracle; layouts, poison, drops, scales."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracles
from fp4jax.moe import MoEConfig, MoEWeights, dense_moe, moe_layer
from fp4jax.nvfp4 import NVFP4Tensor

pytestmark = pytest.mark.usefixtures("quick_compile")

T, K, E, H, I = 40, 3, 6, 128, 64
SCALE_1 = np.float32(0.0021)
SCALE_2 = np.linspace(0.0005, 0.004, E, dtype=np.float32).reshape(E, 1, 1)
STATIC = dict(input_scale_1=SCALE_1, input_scale_2=SCALE_2)
W4A4 = MoEConfig(num_experts=E, **oracles.W4A4)
W4A16 = MoEConfig(num_experts=E, activation_format_1="bf16", activation_format_2="bf16", wire_format="bf16")

# calc_diff is half the mean squared relative error. The oracle rounds where the layer does, except at the end: there is
# the final bf16 rounding, at most 2^-17 / 3 = 2.5e-6 (measured 1.4e-6), plus roundings of GEMM outputs that fall the
# other way because f32 sums have another order; in W4A4 these can flip a code. f32 has its own roundings only.
LIMIT = {"bf16": 3e-6, "f32": 1e-12, "w4a16": 3e-6, "w4a4": 1e-5}

layer = jax.jit(moe_layer, static_argnames="config")


def _ids(rng):
    """Distinct experts per token, some slots and one interior token not here."""
    ids = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)
    ids[rng.random((T, K)) < 0.15] = -1
    ids[17] = -1
    return ids


@pytest.fixture
def batch(rng):
    """x f32 with bf16 values, ids, weights."""
    x = oracles.round_bf16(rng.standard_normal((T, H)).astype(np.float32))
    return x, _ids(rng), rng.uniform(0.1, 1, (T, K)).astype(np.float32)


def _weights(rng, spread=1.0, **scales):
    """NVFP4 weights with one global scale per output row of w13 (up: `spread` times gate's) -> (weights, w13, w2)."""
    g13 = rng.uniform(0.0004, 0.0008, (E, 2 * I, 1)).astype(np.float32)
    g13[:, I:] *= np.float32(spread)
    g2 = rng.uniform(0.0004, 0.0008, (E, 1, 1)).astype(np.float32)
    dense, packed = [], []
    for shape, g in (((E, 2 * I, H), g13), ((E, H, I), g2)):
        w = rng.standard_normal(shape).astype(np.float32) * g * 1000
        qdata, scale_bytes = oracles.quantize_exact(w, g)
        dense.append(oracles.dequantize(qdata, scale_bytes, g))
        packed.append(NVFP4Tensor(jnp.asarray(qdata), jnp.asarray(scale_bytes.view(jnp.float8_e4m3fn)), jnp.asarray(g)))
    return MoEWeights(*packed, **{name: jnp.asarray(s) for name, s in scales.items()}), *dense


def _run(batch, weights, config, dtype=jnp.bfloat16):
    x, ids, w = batch
    return layer(jnp.asarray(x).astype(dtype), jnp.asarray(ids), jnp.asarray(w), weights, config)


def _bits(a):
    return np.asarray(a).view(np.uint8)


@pytest.mark.parametrize("layout", ["masked", "contiguous"])
@pytest.mark.parametrize("static_scales", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_w4a4(layout, static_scales, batch, rng):
    weights, w13, w2 = _weights(rng, **(STATIC if static_scales else {}))
    y, stats = _run(batch, weights, dataclasses.replace(W4A4, layout=layout))
    expected = oracles.moe(
        *batch, w13, w2, quantized=(True, True),
        x_scale=SCALE_1 if static_scales else None, act_scale=SCALE_2.ravel() if static_scales else None,
    )  # fmt: skip
    assert y.dtype == jnp.bfloat16 and int(stats.dropped) == 0
    assert oracles.calc_diff(y, expected) <= LIMIT["w4a4"]
    assert not np.asarray(y)[17].any()  # no expert here: exactly zero


@pytest.mark.parametrize(
    "dtype, layout", [(jnp.bfloat16, "masked"), (jnp.bfloat16, "contiguous"), (jnp.float32, "masked")]
)
def test_w4a16(dtype, layout, batch, rng):
    weights, w13, w2 = _weights(rng)
    y, stats = _run(batch, weights, dataclasses.replace(W4A16, layout=layout), dtype)
    bf16 = dtype == jnp.bfloat16
    assert y.dtype == dtype and int(stats.dropped) == 0
    expected = oracles.moe(*batch, w13, w2, bf16=bf16)
    assert oracles.calc_diff(y, expected) <= LIMIT["w4a16" if bf16 else "f32"]


def test_w4a4_in_f32(batch, rng):
    weights, w13, w2 = _weights(rng, **STATIC)
    y, _ = _run(batch, weights, W4A4, jnp.float32)
    options = dict(quantized=(True, True), x_scale=SCALE_1, act_scale=SCALE_2.ravel(), bf16=False)
    assert y.dtype == jnp.float32
    assert oracles.calc_diff(y, oracles.moe(*batch, w13, w2, **options)) <= LIMIT["w4a4"]


@pytest.mark.parametrize("formats", [("nvfp4", "bf16"), ("bf16", "nvfp4")])
def test_one_gemm_quantized(formats, batch, rng):
    weights, w13, w2 = _weights(rng)
    config = MoEConfig(num_experts=E, activation_format_1=formats[0], activation_format_2=formats[1])
    expected = oracles.moe(*batch, w13, w2, quantized=tuple(f == "nvfp4" for f in formats))
    assert oracles.calc_diff(_run(batch, weights, config)[0], expected) <= LIMIT["w4a4"]


@pytest.mark.parametrize(
    "dtype, layout", [(jnp.bfloat16, "masked"), (jnp.float32, "masked"), (jnp.float32, "contiguous")]
)
def test_unquantized(dtype, layout, batch, rng):
    w13, w2 = ((rng.standard_normal(s) / 10).astype(np.float32).astype(dtype) for s in ((E, 2 * I, H), (E, H, I)))
    weights = MoEWeights(jnp.asarray(w13), jnp.asarray(w2))
    y, _ = _run(batch, weights, dataclasses.replace(W4A16, layout=layout), dtype)
    bf16 = dtype == jnp.bfloat16
    expected = oracles.moe(*batch, w13.astype(np.float64), w2.astype(np.float64), bf16=bf16)
    assert y.dtype == dtype
    assert oracles.calc_diff(y, expected) <= LIMIT["bf16" if bf16 else "f32"]


@pytest.mark.parametrize("config", [W4A4, W4A16], ids=["w4a4", "w4a16"])
def test_masked_equals_contiguous_bit_for_bit(config, batch, rng):
    for scales in ({}, STATIC) if config is W4A4 else ({},):
        weights, _, _ = _weights(rng, **scales)
        masked, _ = _run(batch, weights, config)
        contiguous, _ = _run(batch, weights, dataclasses.replace(config, layout="contiguous"))
        np.testing.assert_array_equal(_bits(masked), _bits(contiguous))


def test_the_layout_follows_the_number_of_rows(rng):
    """Few rows stay in the masked layout, whose worst case drops an expert that a token names twice; more do not."""
    weights = MoEWeights(jnp.zeros((E, 2 * I, H), jnp.bfloat16), jnp.zeros((E, H, I), jnp.bfloat16))
    for tokens, capacity, dropped in ((256, None, 256), (257, None, 0), (257, 257, 257)):
        ids = jnp.zeros((tokens, 2), jnp.int32)
        config = MoEConfig(num_experts=E, capacity=capacity)
        _, stats = layer(jnp.zeros((tokens, H), jnp.bfloat16), ids, jnp.ones((tokens, 2)), weights, config)
        assert int(stats.dropped) == dropped
        chosen = config.resolved(weights, tokens)
        assert chosen.layout == ("masked" if dropped else "contiguous")
        assert chosen.activation_format_1 == chosen.activation_format_2 == "bf16"


@pytest.mark.parametrize("spread", [10.0, 0.1])
@pytest.mark.parametrize("config", [W4A4, W4A16], ids=["w4a4", "w4a16"])
def test_gate_and_up_scales_apart(spread, config, batch, rng):
    weights, w13, w2 = _weights(rng, spread)
    quantized = (config is W4A4,) * 2
    expected = oracles.moe(*batch, w13, w2, quantized=quantized)
    y, _ = _run(batch, weights, config)
    assert oracles.calc_diff(y, expected) <= LIMIT["w4a4" if config is W4A4 else "w4a16"]
    # Gate's scale for both halves would be caught: the output would be off by the spread.
    wrong = oracles.moe(*batch, w13 * np.where(np.arange(2 * I) < I, 1, 1 / spread)[:, None], w2, quantized=quantized)
    assert oracles.calc_diff(y, wrong) > 0.1


@pytest.mark.parametrize("config", [W4A4, pytest.param(W4A16, marks=pytest.mark.slow)], ids=["w4a4", "w4a16"])
@pytest.mark.parametrize("layout, capacity", [("masked", 72), ("contiguous", T * K + 9)])
def test_unused_capacity_is_inert(config, layout, capacity, batch, rng):
    weights, _, _ = _weights(rng)
    config = dataclasses.replace(config, layout=layout)
    y, _ = _run(batch, weights, config)
    more, stats = _run(batch, weights, dataclasses.replace(config, capacity=capacity))
    assert int(stats.dropped) == 0
    np.testing.assert_array_equal(_bits(more), _bits(y))


@pytest.mark.parametrize("layout", ["masked", "contiguous"])
@pytest.mark.parametrize("config", [W4A4, W4A16], ids=["w4a4", "w4a16"])
def test_poison_in_tokens_weights_and_experts_that_are_not_here(config, layout, batch, rng):
    # NaN in a token without experts, in the weights of -1 slots, and in an expert that no token uses.
    x, ids, w = batch
    ids = np.where(ids == 2, -1, ids)
    away = (ids == -1).all(1)
    weights, _, _ = _weights(rng, **(STATIC if config is W4A4 else {}))
    config = dataclasses.replace(config, layout=layout)
    clean, _ = _run((x, ids, w), weights, config)
    x, w = x.copy(), w.copy()
    x[away], w[ids == -1] = np.nan, np.nan

    def poison(t):
        g = np.array(t.global_scale)
        g[2] = np.nan
        scales = np.array(t.block_scale).view(np.uint8)
        scales[2] = 0x7F
        return NVFP4Tensor(t.qdata.at[2].set(0xFF), jnp.asarray(scales.view(jnp.float8_e4m3fn)), jnp.asarray(g))

    weights = weights._replace(w13=poison(weights.w13), w2=poison(weights.w2))
    if weights.input_scale_2 is not None:
        weights = weights._replace(input_scale_2=weights.input_scale_2.at[2].set(jnp.nan))
    poisoned, stats = _run((x, ids, w), weights, config)
    assert int(stats.dropped) == 0
    np.testing.assert_array_equal(_bits(poisoned), _bits(clean))


def test_a_token_does_not_depend_on_its_neighbours(batch, rng):
    # Per-token scales: a token's bits depend on itself and the weights only, wherever it stands and whoever is around.
    x, ids, w = batch
    weights, _, _ = _weights(rng)
    y, _ = _run(batch, weights, W4A4)
    order = rng.permutation(T)
    shuffled, _ = _run((x[order], ids[order], w[order]), weights, W4A4)
    np.testing.assert_array_equal(_bits(shuffled), _bits(y)[order])
    others = np.where((np.arange(T) == 5)[:, None], x, np.float32(1e4) * x)
    alone, _ = _run((others, ids, w), weights, W4A4)
    np.testing.assert_array_equal(_bits(alone)[5], _bits(y)[5])


@pytest.mark.parametrize("layout", ["masked", "contiguous"])
def test_overflow_is_dropped_and_counted(layout, batch, rng):
    x, ids, w = batch
    ids = ids.copy()
    ids[:30, 0] = 3  # one hot expert (and duplicates of it within some tokens)
    ids[4, 1], ids[9, 2] = E, -7  # bad ids count too
    weights, w13, w2 = _weights(rng)
    capacity = 12 if layout == "masked" else 70
    if layout == "masked":
        row_map, _, dropped, _ = oracles.permute_masked(ids, E, capacity)
    else:
        row_map, _, dropped, _ = oracles.permute_contiguous(ids, E, capacity)
    assert dropped > 10
    y, stats = _run((x, ids, w), weights, dataclasses.replace(W4A4, layout=layout, capacity=capacity))
    assert int(stats.dropped) == dropped and stats.dropped.dtype == jnp.int32
    kept = np.where(row_map >= 0, ids, -1)
    expected = oracles.moe(x, kept, w, w13, w2, quantized=(True, True))
    assert oracles.calc_diff(y, expected) <= LIMIT["w4a4"]
    assert not np.asarray(y)[(kept == -1).all(1)].any()


def test_no_tokens(rng):
    weights, _, _ = _weights(rng)
    empty = (np.zeros((0, H), np.float32), np.zeros((0, K), np.int32), np.zeros((0, K), np.float32))
    for layout in ("masked", "contiguous"):
        y, stats = _run(empty, weights, dataclasses.replace(W4A4, layout=layout))
        assert y.shape == (0, H) and int(stats.dropped) == 0


@pytest.mark.parametrize("layout", ["contiguous", pytest.param("masked", marks=pytest.mark.slow)])
def test_a_residual_is_added(layout, batch, rng):
    """To the sum of the experts in f32: in f32 the bits of an addition afterwards, in bf16 with one rounding less."""
    weights, w13, w2 = _weights(rng)
    residual = oracles.round_bf16(rng.standard_normal((T, H)).astype(np.float32))
    config = dataclasses.replace(W4A16, layout=layout)
    operands = [jnp.asarray(a) for a in batch]
    y, stats = layer(*operands, weights, config, residual=jnp.asarray(residual))
    alone, _ = layer(*operands, weights, config)
    np.testing.assert_array_equal(_bits(y), _bits(alone + residual))
    np.testing.assert_array_equal(np.asarray(y)[17], residual[17])  # no expert here
    assert int(stats.dropped) == 0
    half = [operands[0].astype(jnp.bfloat16), *operands[1:]]
    y, _ = layer(*half, weights, config, residual=jnp.asarray(residual, jnp.bfloat16))
    expected = residual + oracles.moe(*batch, w13, w2)
    assert y.dtype == jnp.bfloat16 and oracles.calc_diff(y, expected) <= LIMIT["w4a16"]


def test_a_residual_of_the_differentiable_layer_and_one_that_does_not_fit(batch, rng):
    plain = [jnp.asarray(rng.standard_normal(s) / 10, jnp.float32) for s in ((E, 2 * I, H), (E, H, I))]
    operands, config = [jnp.asarray(a) for a in batch], MoEConfig(num_experts=E, differentiable=True)
    residual = jnp.asarray(rng.standard_normal((T, H)), jnp.float32)
    y, _ = layer(*operands, MoEWeights(*plain), config, residual=residual)
    np.testing.assert_array_equal(y, residual + jax.jit(dense_moe)(*operands, *plain))
    with pytest.raises(ValueError, match=r"residual must be as x, float32 \(40, 128\), got bfloat16 \(40, 128\)"):
        layer(*operands, MoEWeights(*plain), config, residual=residual.astype(jnp.bfloat16))


def test_per_expert_input_scales_are_agreed(batch, rng):
    # Scales [L, 1, 1] for GEMM 1 are reduced to their maximum.
    per_expert = np.linspace(0.0001, SCALE_1, E, dtype=np.float32).reshape(E, 1, 1)
    weights, _, _ = _weights(rng, input_scale_1=per_expert, input_scale_2=SCALE_2)
    y, _ = _run(batch, weights, W4A4)
    same, _ = _run(batch, weights._replace(input_scale_1=jnp.asarray(SCALE_1)), W4A4)
    np.testing.assert_array_equal(_bits(y), _bits(same))


def test_dense_moe_is_the_differentiable_reference(batch, rng):
    x, ids, w = batch
    w13, w2 = ((rng.standard_normal(s) / 10).astype(np.float32) for s in ((E, 2 * I, H), (E, H, I)))
    arguments = [jnp.asarray(a) for a in (x, ids, w, w13, w2)]
    expected = oracles.moe(x, ids, w, w13.astype(np.float64), w2.astype(np.float64), bf16=False)
    assert oracles.calc_diff(dense_moe(*arguments), expected) <= LIMIT["f32"]
    # The derivative along one direction of w2, which is linear: the layer with that direction as w2.
    direction = rng.standard_normal(w2.shape).astype(np.float32)
    _, tangent = jax.jvp(lambda v: dense_moe(*arguments[:4], v), (arguments[4],), (jnp.asarray(direction),))
    expected = oracles.moe(x, ids, w, w13.astype(np.float64), direction.astype(np.float64), bf16=False)
    assert oracles.calc_diff(tangent, expected) <= LIMIT["f32"]
    grads = jax.grad(lambda *p: jnp.sum(dense_moe(p[0], arguments[1], *p[1:]) ** 2), argnums=(0, 1, 2, 3))(
        arguments[0], *arguments[2:]
    )
    assert all(np.isfinite(g).all() and np.asarray(g).any() for g in grads)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"wire_format": "int8"}, "int8"),
        ({"form": "ring"}, "ring"),
        ({"layout": "ragged"}, "ragged"),
        ({"activation_format_1": "fp8"}, "fp8"),
        ({"activation_format_2": "w4"}, "w4"),
        ({"implementation": "cuda"}, "cuda"),
        ({"capacity": 0}, "0"),
        ({"pair_capacity": -3}, "-3"),
        ({"num_experts": 0}, "0"),
    ],
)
def test_config_refusals_name_the_value(fields, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"num_experts": E, **fields})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w._replace(w13=jnp.zeros((E, 2 * I, 64), jnp.float32)), r"\(6, 128, 64\)"),
        (lambda w: w._replace(w13=jnp.zeros((E, 2 * I + 1, H), jnp.float32)), r"\(6, 129, 128\)"),
        (lambda w: w._replace(w2=jnp.zeros((E, H, 2 * I), jnp.float32)), r"\(6, 128, 128\)"),
        (lambda w: w._replace(w2=jnp.zeros((E - 1, H, I), jnp.float32)), r"\(5, 128, 64\)"),
        (
            lambda w: w._replace(w13=jnp.zeros((4, 2 * I, H), jnp.float32), w2=jnp.zeros((4, H, I), jnp.float32)),
            r"4.*6",
        ),
        (lambda w: w._replace(input_scale_2=jnp.ones(E, jnp.float32)), r"\(6,\)"),
    ],
)
def test_weight_refusals_name_the_shape(change, message, batch, rng):
    weights, _, _ = _weights(rng)
    with pytest.raises(ValueError, match=message):
        _run(batch, change(weights), W4A4)


def test_dense_moe_ignores_the_weight_of_an_absent_slot(rng):
    x, w13, w2 = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4, H), (E, 2 * I, H), (E, H, I)))
    ids = jnp.asarray([[0, -1], [1, 2], [-1, -1], [3, 3]], jnp.int32)
    weights = jnp.asarray(rng.random((4, 2)), jnp.float32)
    clean = dense_moe(x, ids, weights, w13, w2)
    np.testing.assert_array_equal(dense_moe(x, ids, jnp.where(ids < 0, jnp.nan, weights), w13, w2), clean)
    assert not np.asarray(clean)[2].any()
