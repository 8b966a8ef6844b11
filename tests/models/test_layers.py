"""Modules against numpy float64: linears, norm, and the expert layer with its optional parts."""

import jax
import jax.numpy as jnp
import model_oracles
import numpy as np
import pytest
from flax import nnx
from model_oracles import calc_diff, sigmoid, silu, swiglu

from cuda_lowering import lowered_text
from fp4jax import MoEConfig, implementations, nvfp4
from fp4jax.attention.dense import attention
from fp4jax.grouped_gemm import PackedWeights
from fp4jax.layers import Linear, MoEBlock, NVFP4Linear, RMSNorm, RoutingConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

F32 = dict(dtype="float32", param_dtype="float32")
BF16 = dict(dtype="bfloat16", param_dtype="bfloat16")
HIDDEN, INTER, EXPERTS, TOKENS = 64, 32, 8, 24
# float32 sums of 64 products of order one, against float64.
ATOL = 1e-5


def f64(x):
    return np.asarray(x).astype(np.float64)


def make_block(router=None, kinds=None, **changes):
    changes = {"path": "model.layers.3.mlp", **(kinds or F32), **changes}
    return MoEBlock(HIDDEN, INTER, router or RoutingConfig(EXPERTS, 2), stddev=0.3, rngs=nnx.Rngs(0), **changes)


def tokens(rng, dtype="float32", count=TOKENS):
    return jnp.asarray(rng.normal(size=(count, HIDDEN)), dtype)


def run(block, x):
    graphdef, state = nnx.split(block)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


@pytest.mark.parametrize(("kinds", "tolerance"), [(F32, 1e-6), (BF16, 2**-8)], ids=["f32", "bf16"])
def test_linear(rng, kinds, tolerance):
    """bf16: operands exact, one rounding (half a unit in 8 bits) of a float32 sum."""
    linear = Linear(48, 32, stddev=0.2, rngs=nnx.Rngs(1), **kinds)
    x = jnp.asarray(rng.normal(size=(2, 5, 48)), kinds["dtype"])
    expected = f64(x) @ f64(linear.weight[...]).T
    found = linear(x)
    assert found.dtype == kinds["dtype"]
    np.testing.assert_allclose(f64(found), expected, rtol=tolerance, atol=1e-6 if kinds is F32 else 1e-3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("batch", "length", "places", "heads", "kv_heads", "dim", "v_dim"),
    [(2, 12, 12, 4, 2, 16, 16), (2, 5, 12, 4, 4, 24, 12), (1, 7, 7, 3, 1, 16, 16), (8, 1, 12, 6, 2, 16, 16)],
)
def test_attention(rng, dtype, batch, length, places, heads, kv_heads, dim, v_dim):
    """Queries are the last places of their sequence; in bfloat16 too, several sequences at once."""
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((batch, length, heads, dim), (batch, kv_heads, places, dim), (batch, kv_heads, places, v_dim))
    )
    positions = jnp.arange(places - length, places, dtype=jnp.int32)
    got = jax.jit(attention)(q, k, v, jnp.broadcast_to(positions, (batch, length)) if length == 1 else positions)
    wide_q, wide_k, wide_v = (np.asarray(a, np.float64) for a in (q, k, v))
    expected = np.zeros((batch, length, heads, v_dim))
    for b, t, h in np.ndindex(batch, length, heads):
        seen = slice(0, places - length + t + 1)
        keys, values = (a[b, h // (heads // kv_heads), seen] for a in (wide_k, wide_v))
        expected[b, t, h] = model_oracles.softmax(keys @ wide_q[b, t, h] / np.sqrt(dim)) @ values
    assert got.dtype == dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=2e-6 if dtype == jnp.float32 else 0.02)


@pytest.mark.parametrize("rows", [1, 2])
def test_linear_sums_in_float32(rows):
    """In bfloat16 the sum would stop at 256; libraries take another way for one row."""
    linear = Linear(4096, 3, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, stddev=1.0, rngs=nnx.Rngs(0))
    linear.weight[...] = jnp.ones((3, 4096), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(jax.jit(linear)(jnp.ones((rows, 4096), jnp.float32)), np.float64), 4096.0)


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e4])
def test_rms_norm(rng, magnitude):
    norm = RMSNorm(HIDDEN, eps=1e-6, **F32)
    norm.weight.set_value(jnp.asarray(rng.uniform(0.5, 2, HIDDEN), jnp.float32))
    x = tokens(rng) * magnitude
    np.testing.assert_allclose(f64(norm(x)), model_oracles.rms_norm(f64(x), f64(norm.weight[...]), 1e-6), rtol=1e-5)


def test_rms_norm_squares_in_float32(rng):
    """300^2 * 64 overflows nothing here, but sums of bf16 squares would lose it: error stays one bf16 rounding."""
    norm = RMSNorm(HIDDEN, eps=1e-6, **BF16)
    x = tokens(rng, "bfloat16") * 300
    expected = model_oracles.rms_norm(f64(x), np.ones(HIDDEN), 1e-6)
    np.testing.assert_allclose(f64(norm(x)), expected, rtol=2**-8)


@pytest.mark.parametrize("scale_shape", [(), (32, 1)], ids=["one scale", "a scale per row"])
def test_nvfp4_linear_w4a16(rng, scale_shape):
    weight = nvfp4.quantize(jnp.asarray(rng.normal(size=(32, HIDDEN)), jnp.float32))
    scale = jnp.asarray(rng.uniform(0.5, 2, scale_shape), jnp.float32) * weight.global_scale
    weight = nvfp4.NVFP4Tensor(weight.qdata, weight.block_scale, scale)
    linear, x = NVFP4Linear(weight, dtype="float32", activation_format="bf16"), tokens(rng)
    expected = f64(x) @ f64(nvfp4.dequantize(weight, jnp.float32)).T
    np.testing.assert_allclose(f64(linear(x)), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("input_scale", [None, 0.002], ids=["per token", "static"])
def test_nvfp4_linear_w4a4(rng, input_scale):
    """On dequantized operands it is an exact product up to float32 sums; against the original, 4-bit noise."""
    original = Linear(HIDDEN, 32, stddev=0.2, rngs=nnx.Rngs(1), **F32)
    static = None if input_scale is None else jnp.float32(input_scale)
    linear = NVFP4Linear.from_linear(original, input_scale=static)
    x = tokens(rng).reshape(2, -1, HIDDEN)
    rows = nvfp4.quantize(x.reshape(-1, HIDDEN), global_scale="per_token" if static is None else static)
    weight = nvfp4.quantize(original.weight[...])
    expected = f64(nvfp4.dequantize(rows, jnp.float32)) @ f64(nvfp4.dequantize(weight, jnp.float32)).T
    np.testing.assert_allclose(f64(linear(x)).reshape(-1, 32), expected, rtol=0, atol=5e-5)
    assert 1e-4 < calc_diff(linear(x), original(x)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale_shape", "activation_format"),
    [
        pytest.param((), "bf16", id="one scale-bf16"),
        pytest.param((192, 1), "nvfp4", id="a scale per row-nvfp4"),
        pytest.param((), "nvfp4", id="one scale-nvfp4"),
        pytest.param((192, 1), "bf16", id="a scale per row-bf16"),
    ],
)
def test_nvfp4_linear_packs_for_the_kernel(rng, monkeypatch, activation_format, scale_shape):
    """Through XLA, on what a GPU would hold; shapes that the layout does not have stay as they are."""
    x = jnp.asarray(rng.normal(size=(5, 256)), jnp.bfloat16)
    weight = _weight(rng, 192, 256, scale_shape)
    plain = NVFP4Linear(weight, dtype="bfloat16", activation_format=activation_format)
    with monkeypatch.context() as patch:
        patch.setattr(implementations, "has_hopper_gpu", lambda: True)
        packed = NVFP4Linear(weight, dtype="bfloat16", activation_format=activation_format)
        odd = NVFP4Linear(_weight(rng, 200, 256, ()), dtype="bfloat16")
        in_f32 = NVFP4Linear(weight, dtype="float32")
    assert isinstance(packed.weight.get_value(), PackedWeights)
    assert calc_diff(packed(x), plain(x)) < 1e-5  # sums in another order, rounded to bf16
    assert isinstance(odd.weight.get_value(), nvfp4.NVFP4Tensor)
    assert isinstance(in_f32.weight.get_value(), nvfp4.NVFP4Tensor)


def _weight(rng, n, k, scale_shape):
    weight = nvfp4.quantize(jnp.asarray(rng.normal(size=(n, k)), jnp.float32))
    scale = jnp.asarray(rng.uniform(0.5, 2, scale_shape), jnp.float32) * weight.global_scale
    return nvfp4.NVFP4Tensor(weight.qdata, weight.block_scale, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("activation_format", ["bf16", "nvfp4"])
@pytest.mark.parametrize(("tokens", "n", "k"), [(1, 576, 7168), (77, 192, 256), (300, 4096, 1024)])
def test_nvfp4_linear_on_a_gpu(rng, activation_format, tokens, n, k):
    x = jnp.asarray(rng.normal(size=(tokens, k)), jnp.bfloat16)
    weight = _weight(rng, n, k, (n, 1))
    linear = NVFP4Linear(weight, dtype="bfloat16", activation_format=activation_format)
    assert isinstance(linear.weight.get_value(), PackedWeights)
    rows = f64(x)
    if activation_format == "nvfp4":
        rows = f64(nvfp4.dequantize(nvfp4.quantize(x, global_scale="per_token"), jnp.float32))
    expected = rows @ f64(nvfp4.dequantize(weight, jnp.float32)).T
    assert calc_diff(jax.jit(linear)(x), expected) < 1e-5


def test_nvfp4_linear_refuses(rng):
    weight = nvfp4.quantize(jnp.ones((2, 32, 64), jnp.float32), global_scale="per_expert")
    with pytest.raises(ValueError, match=r"one weight \[N, K\], got shape \(2, 32, 64\)"):
        NVFP4Linear(weight, dtype="float32")


_PARTS = {
    "plain": dict(),
    "shared": dict(shared_intermediate_size=48),
    "gated shared": dict(shared_intermediate_size=48, shared_gate=True),
    "latent": dict(latent_size=32),
    "latent and gated shared": dict(latent_size=32, shared_intermediate_size=48, shared_gate=True),
}


def _block_reference(block, x, ids, weights):
    x = f64(x)
    hidden = x if block.fc1_latent_proj is None else x @ f64(block.fc1_latent_proj.weight[...]).T
    y = model_oracles.experts(hidden, ids, weights, f64(block.w13.get_value()), f64(block.w2.get_value()))
    if block.fc2_latent_proj is not None:
        y = y @ f64(block.fc2_latent_proj.weight[...]).T
    if block.shared_experts is not None:
        mlp = block.shared_experts
        shared = swiglu(x, *(f64(p.weight[...]) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))
        if block.shared_expert_gate is not None:
            shared = sigmoid(x @ f64(block.shared_expert_gate.weight[...]).T) * shared
        y = y + shared
    return y


@pytest.mark.parametrize(
    ("parts", "differentiable"),
    [  # the last has everything that those before have apart
        pytest.param(
            parts,
            differentiable,
            id=f"{parts}-{'dense' if differentiable else 'pipeline'}",
            marks=()
            if (parts in ("plain", "shared", "latent and gated shared") and not differentiable)
            or parts == "latent and gated shared"
            else pytest.mark.slow,
        )
        for parts in _PARTS
        for differentiable in (False, True)
    ],
)
def test_moe_block_equals_the_reference(rng, parts, differentiable):
    """The router and the shared experts see the original x, also with latent projections.

    No model of the library has latent projections or a gate of its shared experts yet. They stay because layers of the
    reference serving system take them (fc1_latent_proj, fc2_latent_proj, shared_expert_gate), and checkpoints of that
    kind exist; this test is what keeps them right until a model uses them.
    """
    block, x = make_block(**_PARTS[parts]), tokens(rng)
    block.configure(MoEConfig(EXPERTS, differentiable=differentiable))
    ids, weights = model_oracles.topk_softmax(f64(x) @ f64(block.gate.weight[...]).T, 2, True)
    y, aux = run(block, x.reshape(2, -1, HIDDEN))
    expected = _block_reference(block, x, ids, weights)
    np.testing.assert_allclose(f64(y).reshape(-1, HIDDEN), expected, rtol=0, atol=ATOL * np.abs(expected).max())
    assert int(aux.dropped) == 0 and 0.9 < float(aux.balance_loss) < 3
    residual = tokens(rng).reshape(2, -1, HIDDEN)
    y, _ = nnx.jit(lambda block, x, residual: block(x, residual=residual))(block, x.reshape(residual.shape), residual)
    expected += f64(residual).reshape(-1, HIDDEN)
    np.testing.assert_allclose(f64(y).reshape(-1, HIDDEN), expected, rtol=0, atol=ATOL * np.abs(expected).max())


def test_correction_bias_is_a_parameter(rng):
    router = RoutingConfig(EXPERTS, 2, scoring="sigmoid", correction_bias=True, num_groups=4, topk_groups=2)
    block, x = make_block(router), tokens(rng)
    block.correction_bias.set_value(
        jnp.full(EXPERTS, -5.0, jnp.float32).at[6:].set(5.0)
    )  # group 3 always wins, with both experts
    scores = sigmoid(f64(x) @ f64(block.gate.weight[...]).T)[:, 6:]
    ids = np.tile([6, 7], (TOKENS, 1))
    expected = _block_reference(block, x, ids, scores / scores.sum(axis=1, keepdims=True))
    y, _ = run(block, x)
    np.testing.assert_allclose(f64(y), expected, rtol=0, atol=ATOL * np.abs(expected).max())


def test_gradient_of_the_dense_path(rng):
    """Directional derivative against central differences of the float64 reference."""
    block, x = make_block(), tokens(rng, count=4)
    block.configure(MoEConfig(EXPERTS, differentiable=True))
    direction = rng.normal(size=block.w2.get_value().shape)
    grad = nnx.jit(nnx.grad(lambda block: jnp.sum(block(x)[0] ** 2)))(block)
    found = np.sum(f64(grad.w2.get_value()) * direction)
    ids, weights = model_oracles.topk_softmax(f64(x) @ f64(block.gate.weight[...]).T, 2, True)
    w13, w2, step = f64(block.w13.get_value()), f64(block.w2.get_value()), 1e-4
    loss = lambda w2: np.sum(model_oracles.experts(f64(x), ids, weights, w13, w2) ** 2)  # noqa: E731
    expected = (loss(w2 + step * direction) - loss(w2 - step * direction)) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert float(jnp.abs(grad.gate.weight[...]).max()) > 0  # the router learns through the weights


def test_quantized_block_equals_the_reference_on_dequantized_weights(rng):
    """W4A16 in float32, with gate 10 times larger than up: every projection keeps a global scale of its own."""
    block, x = make_block(), tokens(rng)
    w13 = block.w13.get_value()
    block.w13.set_value(w13.at[:, :INTER].multiply(10))
    gate, up = (nvfp4.quantize(part, global_scale="per_expert") for part in jnp.split(block.w13.get_value(), 2, axis=1))
    block.quantize_experts()
    scale = f64(block.w13.get_value().global_scale)
    assert scale.shape == (EXPERTS, 2 * INTER, 1)
    np.testing.assert_array_equal(scale[:, :INTER], np.broadcast_to(f64(gate.global_scale), (EXPERTS, INTER, 1)))
    np.testing.assert_array_equal(scale[:, INTER:], np.broadcast_to(f64(up.global_scale), (EXPERTS, INTER, 1)))
    w13, w2 = (f64(nvfp4.dequantize(p.get_value(), jnp.float32)) for p in (block.w13, block.w2))
    ids, weights = model_oracles.topk_softmax(f64(x) @ f64(block.gate.weight[...]).T, 2, True)
    expected = model_oracles.experts(f64(x), ids, weights, w13, w2)
    y, _ = run(block, x)
    np.testing.assert_allclose(f64(y), expected, rtol=0, atol=ATOL * np.abs(expected).max())
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp: the experts are quantized already"):
        block.quantize_experts()


@pytest.mark.slow
@pytest.mark.parametrize("devices", [None, 2])
def test_experts_are_packed_where_the_kernel_will_run(rng, make_mesh, monkeypatch, devices):
    """On a Hopper GPU, unless the settings say otherwise; the results do not change."""
    kinds = dict(dtype="bfloat16", param_dtype="bfloat16")
    block = MoEBlock(64, 64, RoutingConfig(8, 2), stddev=0.3, path="mlp", rngs=nnx.Rngs(0), **kinds)
    block.quantize_experts()
    x = tokens(rng, "bfloat16")
    mesh = None if devices is None else make_mesh(devices)
    block.configure(MoEConfig(EXPERTS, implementation="xla"), mesh)
    expected, plain = run(block, x), block.w13.get_value()
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: True)
    block.configure(MoEConfig(EXPERTS), mesh)
    packed = block.w13.get_value()
    assert isinstance(packed, PackedWeights) and isinstance(block.w2.get_value(), PackedWeights)
    assert packed.words.sharding.is_equivalent_to(plain.qdata.sharding, 5)
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: False)
    for a, b in zip(jax.tree.leaves(run(block, x)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    block.configure(MoEConfig(EXPERTS, implementation="xla"), mesh)
    for a, b in zip(jax.tree.leaves(block.w13.get_value()), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_the_router_is_one_kernel_unless_xla_splits_it(rng, make_mesh):
    """Programs that do not use the balance loss route once, with a mask of valid tokens too."""
    block, x, valid = make_block(), tokens(rng), jnp.arange(TOKENS) < 5

    def kernels(*args):
        return lowered_text(lambda *args: block._route(*args)[0], *args).count("router_route_mosaic_gpu")

    assert kernels(x) == kernels(x, valid) == 1
    block.configure(MoEConfig(EXPERTS, implementation="xla"))
    assert kernels(x) == 0
    block.configure(MoEConfig(EXPERTS), make_mesh(1))
    assert kernels(x) == 1
    block.configure(MoEConfig(EXPERTS), make_mesh(2))
    assert kernels(x, valid) == 0


@pytest.mark.slow
def test_the_balance_loss_counts_tokens_that_are_not_valid(rng):
    block, x = make_block(), tokens(rng)
    masked = block(x, valid=jnp.arange(TOKENS) < 5)[1].balance_loss
    np.testing.assert_array_equal(np.asarray(masked), np.asarray(block(x)[1].balance_loss))


@pytest.mark.slow
def test_calibration_reports_the_inputs_of_both_gemms(rng):
    block, x = make_block(latent_size=32), tokens(rng, count=5)
    y, amax = nnx.jit(lambda block, x: block.calibrate(x))(block, x)
    y_all, amax_all = nnx.jit(lambda block, x: block.calibrate(x, all_tokens=True))(block, x)
    hidden = f64(x) @ f64(block.fc1_latent_proj.weight[...]).T
    np.testing.assert_allclose(amax.input_1, np.abs(hidden).max(), rtol=1e-5)
    ids, _ = model_oracles.topk_softmax(f64(x) @ f64(block.gate.weight[...]).T, 2, True)
    for expert, weight in enumerate(f64(block.w13.get_value())):
        act = silu(hidden @ weight[:INTER].T) * (hidden @ weight[INTER:].T)
        expected = np.abs(act[(ids == expert).any(axis=1)]).max(initial=0)
        np.testing.assert_allclose(amax.input_2[expert], expected, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(amax_all.input_2[expert], np.abs(act).max(), rtol=1e-4)
    assert (np.asarray(amax.input_2) < np.asarray(amax_all.input_2)).any()
    np.testing.assert_array_equal(y, y_all)
    with_residual, _ = nnx.jit(lambda block, x: block.calibrate(x, residual=x))(block, x)
    np.testing.assert_allclose(with_residual, x + y, rtol=1e-6)
    np.testing.assert_allclose(y, run(block, x)[0], rtol=0, atol=ATOL * float(jnp.abs(y).max()))
    block.quantize_experts()
    with pytest.raises(ValueError, match="calibrate before quantize_experts"):
        block.calibrate(x)


_GOOD = (jnp.float32(0.01), jnp.full(EXPERTS, 0.02, jnp.float32))


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((None, _GOOD[1]), r"input_scale_1 is missing"),
        ((_GOOD[0], None), r"input_scale_2 is missing"),
        ((jnp.float32(0), _GOOD[1]), r"input_scale_1 = 0\.0 "),
        ((jnp.float32(jnp.nan), _GOOD[1]), r"input_scale_1 = nan "),
        ((_GOOD[0], _GOOD[1].at[5].set(jnp.inf)), r"input_scale_2\[5\] = inf "),
        ((_GOOD[0], _GOOD[1].at[2].set(-1)), r"input_scale_2\[2\] = -1\.0 "),
        ((_GOOD[0], _GOOD[1][:7]), r"input_scale_2 has shape \(7,\), expected \(8,\)"),
    ],
)
def test_broken_input_scales_are_refused_by_name(scales, message):
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.experts\." + message):
        make_block().set_input_scales(*scales)


@pytest.mark.slow
def test_input_scales_can_be_removed(rng):
    block, x = make_block(), tokens(rng)
    block.quantize_experts()
    block.configure(MoEConfig(EXPERTS, activation_format_1="nvfp4", activation_format_2="nvfp4"))
    dynamic, _ = run(block, x)
    block.set_input_scales(*_GOOD)
    static, _ = run(block, x)
    assert 1e-4 < calc_diff(dynamic, static) < 0.1
    block.set_input_scales(None, None)
    np.testing.assert_array_equal(run(block, x)[0], dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("static", [False, True], ids=["per token", "calibrated"])
def test_per_slot_experts_give_the_same_bits_on_every_mesh(rng, make_mesh, static):
    """Given the routing of one device, nvfp4 on the wire, 2 and 4 devices: identical."""
    block, x = make_block(kinds=BF16), tokens(rng, "bfloat16", 32)
    block.quantize_experts()
    if static:
        block.set_input_scales(*_GOOD)
    found = {}
    for devices in (1, 2, 4):
        mesh = make_mesh(devices)
        block.configure(
            MoEConfig(
                EXPERTS,
                activation_format_1="nvfp4",
                activation_format_2="nvfp4",
                wire_format="nvfp4",
                form="per_slot",
            ),
            mesh,
        )
        found[devices], aux = block(x)  # eager: the router runs on one device
        assert int(aux.dropped) == 0
    np.testing.assert_array_equal(f64(found[1]), f64(found[2]))
    np.testing.assert_array_equal(f64(found[1]), f64(found[4]))


@pytest.mark.slow
def test_tokens_that_do_not_divide_and_drops_are_reported(rng, make_mesh):
    block, x = make_block(), tokens(rng, count=10)
    whole, _ = run(block, x)
    block.configure(MoEConfig(EXPERTS), make_mesh(4))
    y, aux = block(x)
    assert int(aux.dropped) == 0 and calc_diff(y, whole) < 1e-4  # the wire rounds float32 to bf16
    np.testing.assert_array_equal(block(x, residual=x)[0], y + x)
    block.configure(MoEConfig(EXPERTS, capacity=1))
    _, aux = run(block, x)
    logits = f64(x) @ f64(block.gate.weight[...]).T
    ids, _ = model_oracles.topk_softmax(logits, 2, True)
    assert int(aux.dropped) == sum(max(count - 1, 0) for count in np.bincount(ids.ravel(), minlength=EXPERTS)) > 0


@pytest.mark.slow
def test_what_fills_up_a_mesh_goes_to_no_expert(rng, make_mesh):
    """One token on 4 devices: every expert has a row for it, and none for what fills up the others."""
    block, x = make_block(), tokens(rng, count=1)
    whole, _ = block(x)
    block.configure(MoEConfig(EXPERTS, capacity=1), make_mesh(4))
    y, aux = block(x)
    assert y.shape == x.shape and int(aux.dropped) == 0
    assert calc_diff(y, whole) < 1e-4  # the wire rounds float32 to bf16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda mesh: make_block().configure(MoEConfig(8), mesh(3)), "8 experts cannot be split over 3 devices"),
        (lambda mesh: make_block().configure(MoEConfig(8), mesh(2, "x")), r"one axis 'ep', got \('x',\)"),
        (lambda mesh: make_block().configure(MoEConfig(4)), "num_experts=4 for a block of 8 experts"),
        (lambda mesh: make_block(shared_gate=True), "shared_gate=True needs shared_intermediate_size"),
        (lambda mesh: RoutingConfig(8, 9), "top_k=9"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_mesh, make, message):
    with pytest.raises(ValueError, match=message):
        make(make_mesh)


@pytest.mark.slow
def test_block_state_survives_split_and_jit(rng):
    block, x = make_block(kinds=BF16), tokens(rng, "bfloat16")
    block.quantize_experts()
    block.set_input_scales(*_GOOD)
    graphdef, state = nnx.split(block)
    again = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)[0])(state, x)
    np.testing.assert_array_equal(f64(again), f64(run(block, x)[0]))
