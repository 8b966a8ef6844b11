"""Experts whose I is no multiple of the kernel layout's 64: loaded as they are, padded where the kernel will run."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import model_oracles
import numpy as np
import pytest
from flax import nnx
from quantized_folders import CONFIGS, WEIGHT_ONLY, nvfp4 as as_nvfp4
from safetensors.numpy import save_file
from small_folders import CONFIG, edit_config, loaded_bytes
from small_models import forward
from tensor_files import read_tensors
from test_layers import f64, run, tokens

from cuda_lowering import kernels_in, struct
from fp4jax import MoEConfig, implementations, nvfp4
from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.inspect import inspect_folder
from fp4jax.grouped_gemm import PackedWeights, grouped_gemm_swiglu, masked_grouped_gemm, pack_weights
from fp4jax.grouped_gemm.packed_weights import arrange_experts, pad_experts, trim_experts
from fp4jax.layers import MoEBlock, RoutingConfig
from fp4jax.models import Qwen3Moe, configure_experts

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:.*modules are not as the config says"),
]


def write_folder(folder, intermediate, config):
    """A model of that I with experts in NVFP4; what its tensors decode to, in float64, by name."""
    shape = dataclasses.replace(CONFIG, hidden_size=64, moe_intermediate_size=intermediate)
    save_model(Qwen3Moe(shape, rngs=nnx.Rngs(0)), shape, folder)
    tensors, rng = read_tensors(folder / "model.safetensors"), np.random.default_rng(3)
    decoded = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
    for name in sorted(name for name in tensors if ".experts." in name):
        decoded[name] = as_nvfp4(tensors, name.removesuffix(".weight"), "modelopt", rng)
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, quantization_config=config)
    return dataclasses.asdict(shape), decoded


def onto_hopper(monkeypatch, there=True):
    monkeypatch.setattr(implementations, "has_hopper_gpu", lambda: there)


@pytest.mark.slow
@pytest.mark.parametrize("intermediate", [48, 80])
def test_loaded_logits_are_those_of_float64(tmp_path, intermediate):
    config, decoded = write_folder(tmp_path, intermediate, WEIGHT_ONLY["modelopt"])
    model, _ = load_model(tmp_path, dtype="float32")
    ids = np.arange(9) % config["vocab_size"]
    expected = model_oracles.qwen3_moe(config, decoded, ids)
    found = np.asarray(forward(model, jnp.asarray(ids, jnp.int32)[None]))[0]
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["W4A16", "W4A4"])
def test_memory_is_what_loading_takes_where_experts_are_padded(tmp_path, monkeypatch, kind):
    config = {"W4A16": WEIGHT_ONLY["modelopt"], "W4A4": CONFIGS["modelopt"]}[kind]
    write_folder(tmp_path, 48, config)
    onto_hopper(monkeypatch, there=False)
    before = inspect_folder(tmp_path)["bytes_per_device"]
    assert before["experts"] + before["other"] == loaded_bytes(tmp_path)
    onto_hopper(monkeypatch)
    after = inspect_folder(tmp_path)["bytes_per_device"]
    block = load_model(tmp_path)[0].layers[0].mlp
    assert isinstance(block.w13.get_value(), PackedWeights) and isinstance(block.w2.get_value(), PackedWeights)
    assert block.w13.get_value().shape == (4, 128, 64) and block.w2.get_value().shape == (4, 64, 64)
    assert after["experts"] + after["other"] == loaded_bytes(tmp_path) > before["experts"] + before["other"]


@pytest.mark.slow
def test_memory_of_what_is_quantized_while_loading(tmp_path, monkeypatch):
    shape = dataclasses.replace(CONFIG, hidden_size=64, moe_intermediate_size=48, intermediate_size=32)
    save_model(Qwen3Moe(shape, rngs=nnx.Rngs(0)), shape, tmp_path)
    mixed = {"quantization": "mix_quant", "dense_quant_type": "block_wise_fp8", "moe_quant_type": "modelopt_fp4"}
    for quantization in (mixed, "modelopt_fp4"):
        for hopper in (False, True):
            onto_hopper(monkeypatch, hopper)
            size = inspect_folder(tmp_path, quantization=quantization)["bytes_per_device"]
            assert size["experts"] + size["other"] == loaded_bytes(tmp_path, quantization=quantization)


def make_experts(rng, experts=3, intermediate=48, hidden=64):
    """w13 and w2 in random codes and scales, negative zeros and zero scales included."""

    def one(n, k, scale_shape):
        return nvfp4.NVFP4Tensor(
            jnp.asarray(rng.integers(0, 256, (experts, n, k // 2)), jnp.uint8),
            jnp.asarray(rng.integers(0, 127, (experts, n, k // 16)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)),
            jnp.asarray(rng.uniform(0.5, 2, scale_shape), jnp.float32),
        )

    return one(2 * intermediate, hidden, (experts, 2 * intermediate, 1)), one(hidden, intermediate, (experts, 1, 1))


@pytest.mark.slow
def test_gate_and_up_are_padded_each_on_their_own(rng):
    w13, w2 = make_experts(rng)
    wide, long = pad_experts(w13, w2)
    values, before = (f64(nvfp4.dequantize(w, jnp.float32)) for w in (wide, w13))
    np.testing.assert_array_equal(values[:, :48], before[:, :48])
    np.testing.assert_array_equal(values[:, 64:112], before[:, 48:])
    assert not values[:, 48:64].any() and not values[:, 112:].any()
    np.testing.assert_array_equal(
        f64(nvfp4.dequantize(long, jnp.float32))[..., :48], f64(nvfp4.dequantize(w2, jnp.float32))
    )
    assert not f64(nvfp4.dequantize(long, jnp.float32))[..., 48:].any()
    for again, original in zip(trim_experts(wide, long, 48), (w13, w2), strict=True):
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(original), strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize(
    ("intermediate", "devices", "activations", "layout"),
    [
        pytest.param(48, None, "bf16", "masked", marks=pytest.mark.slow),
        pytest.param(80, None, "nvfp4", "contiguous", marks=pytest.mark.slow),
        pytest.param(48, 2, "nvfp4", "masked", marks=pytest.mark.slow),
    ],
)
def test_padding_changes_no_bit(rng, make_mesh, monkeypatch, intermediate, devices, activations, layout):
    """Through XLA, on what a GPU would hold; and taking the pads off again gives the bytes that were there."""
    kinds = dict(dtype="bfloat16", param_dtype="bfloat16")
    block = MoEBlock(64, intermediate, RoutingConfig(8, 2), stddev=0.3, rngs=nnx.Rngs(0), **kinds)
    block.quantize_experts()
    x = tokens(rng, "bfloat16")
    settings = dict(
        activation_format_1=activations,
        activation_format_2=activations,
        layout=layout,
    )
    mesh = None if devices is None else make_mesh(devices)
    block.configure(MoEConfig(block.router_config.num_experts, implementation="xla", **settings), mesh)
    expected, plain = run(block, x), (block.w13.get_value(), block.w2.get_value())
    onto_hopper(monkeypatch)
    block.configure(MoEConfig(block.router_config.num_experts, **settings), mesh)
    packed = block.w13.get_value()
    assert isinstance(packed, PackedWeights) and packed.shape[1] == 2 * (-(-intermediate // 64) * 64)
    assert packed.words.sharding.is_equivalent_to(plain[0].qdata.sharding, 5)
    onto_hopper(monkeypatch, False)
    for a, b in zip(jax.tree.leaves(run(block, x)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    block.configure(MoEConfig(block.router_config.num_experts, implementation="xla", **settings), mesh)
    for a, b in zip(
        jax.tree.leaves((block.w13.get_value(), block.w2.get_value())), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.slow
def test_the_kernels_take_the_padded_shape(rng):
    """Both GEMMs lower to kernels for an H100; with the weights as they were, only the SwiGLU between them does."""
    w13, w2 = make_experts(rng)
    counts = struct((3,), jnp.int32)

    def experts(x, counts, w13, w2):
        act = grouped_gemm_swiglu(x, w13, counts, out="bf16")
        return masked_grouped_gemm(act, w2, counts)

    x = struct((3, 16, 64), jnp.bfloat16)
    packed = jax.eval_shape(lambda *pair: arrange_experts(*pair, 48, packed=True), w13, w2)
    assert kernels_in(experts, x, counts, *packed) == 2
    assert kernels_in(experts, x, counts, w13, w2) == 1
    with pytest.raises(ValueError, match=r"multiples of 64, got \(3, 96, 64\)"):
        pack_weights(w13)


@pytest.mark.gpu
@pytest.mark.parametrize("intermediate", [48, 80, 720])
def test_the_kernels_on_a_gpu(tmp_path, intermediate):
    """A loaded model is packed, and its logits are as close to float64 as those of XLA."""
    config, decoded = write_folder(tmp_path, intermediate, WEIGHT_ONLY["modelopt"])
    ids = np.arange(20) % config["vocab_size"]
    expected = model_oracles.qwen3_moe(config, decoded, ids)
    model, _ = load_model(tmp_path)
    assert isinstance(model.layers[0].mlp.w13.get_value(), PackedWeights)
    found = np.asarray(model(jnp.asarray(ids, jnp.int32)[None]), np.float64)[0]
    configure_experts(model, implementation="xla")
    assert isinstance(model.layers[0].mlp.w13.get_value(), nvfp4.NVFP4Tensor)
    reference = np.asarray(model(jnp.asarray(ids, jnp.int32)[None]), np.float64)[0]
    assert model_oracles.calc_diff(found, expected) < 2 * model_oracles.calc_diff(reference, expected) + 1e-6
