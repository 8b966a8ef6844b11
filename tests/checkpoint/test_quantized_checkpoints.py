"""Folders in NVFP4 of both layouts and in block-wise FP8: what is loaded, from which names, and what is refused."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from model_oracles import calc_diff
from quantization_sections import FP8, REFERENCE, USERS
from quantized_folders import (
    EXPERTS,
    NAMES,
    UP,
    WEIGHT_ONLY,
    everything,
    fp8,
    make_folder,
    nvfp4,
    plain_folder,
    put,
    spoil,
)
from safetensors.numpy import save_file
from small_folders import CONFIG, edit, edit_config, make_model
from small_models import forward
from tensor_files import read_tensors

from fp4jax.block_fp8 import dequantize_blocks
from fp4jax.checkpoint import load_model, save_model
from fp4jax.layers import BlockFP8Linear, Linear, NVFP4Linear
from fp4jax.models import Qwen3Moe
from fp4jax.nvfp4 import NVFP4Tensor

__all__ = ["make_folder", "plain_folder"]  # fixtures

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:.*modules are not as the config says"),
]


@pytest.mark.parametrize(
    ("kind", "chosen"),
    [
        pytest.param("modelopt", everything, id="modelopt, all", marks=pytest.mark.slow),
        pytest.param("compressed", lambda name: ".experts." in name, id="compressed, experts"),
    ],
)
def test_weights_decode_to_what_the_tensors_say(make_folder, tmp_path_factory, kind, chosen):
    """W4A16 in float32: the logits of a plain folder that holds the decoded weights."""
    folder, decoded = make_folder(kind, chosen, WEIGHT_ONLY[kind])
    model, _ = load_model(folder, dtype="float32")
    assert isinstance(model.layers[0].mlp.w13.get_value(), NVFP4Tensor)
    assert isinstance(model.layers[0].self_attn.q_proj, NVFP4Linear if chosen is everything else Linear)
    plain = tmp_path_factory.mktemp("plain")
    reference, config = make_model(dtype="float32")
    save_model(reference, config, plain)
    own = read_tensors(folder / "model.safetensors")

    def change(tensors):
        for name in tensors:
            module = name.removesuffix(".weight")
            if module in decoded:
                tensors[name] = decoded[module].astype(np.float32)
            else:
                tensors[name] = own[name].astype(np.float32)

    edit(plain, change)
    ids = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    expected = np.asarray(forward(load_model(plain)[0], ids))
    np.testing.assert_allclose(np.asarray(forward(model, ids)), expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["modelopt", "compressed"])
def test_activation_scales(make_folder, kind):
    """GEMM 1: the largest of all experts' gate and up; GEMM 2: each expert's own; decode direction in both layouts."""
    folder, _ = make_folder(kind)
    tensors = read_tensors(folder / "model.safetensors")
    suffix = NAMES[kind][3]

    def scale(e, name):
        value = np.float32(tensors[f"{EXPERTS}{e}.{name}_proj.{suffix}"].reshape(()))
        return value if kind == "modelopt" else np.float32(1) / value

    with pytest.warns(UserWarning, match="are not as the config says"):  # the layers that are plain
        model, _ = load_model(folder)
    block = model.layers[0].mlp
    assert block.config.activation_format_1 == "nvfp4"
    assert float(block.input_scale_1[...]) == max(scale(e, name) for e in range(4) for name in ("gate", "up"))
    np.testing.assert_array_equal(np.ravel(block.input_scale_2[...]), [scale(e, "down") for e in range(4)])
    per_token, _ = load_model(folder, input_scales="per_token")
    assert per_token.layers[0].mlp.input_scale_1 is None
    assert per_token.layers[0].mlp.config.activation_format_1 == "nvfp4"


@pytest.mark.parametrize(
    ("attention", "experts"), [("NVFP4", "W4A16_NVFP4"), pytest.param("W4A16_NVFP4", "NVFP4", marks=pytest.mark.slow)]
)
def test_layers_of_a_mixed_checkpoint_keep_their_own_activations(make_folder, attention, experts):
    algos = {"model.layers.0.self_attn.q_proj": attention, "model.layers.0.mlp.experts": experts}
    layers = {name: {"quant_algo": algo, "group_size": 16} for name, algo in algos.items()}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    chosen = lambda name: name.startswith(tuple(layers))  # noqa: E731
    folder, _ = make_folder("modelopt", chosen, config)
    layer = load_model(folder)[0].layers[0]
    formats = {"NVFP4": "nvfp4", "W4A16_NVFP4": "bf16"}
    assert layer.self_attn.q_proj.activation_format == formats[attention]
    assert layer.mlp.config.activation_format_1 == formats[experts]
    assert (layer.self_attn.q_proj.input_scale is not None) == (attention == "NVFP4")
    assert (layer.mlp.input_scale_1 is not None) == (experts == "NVFP4")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 32)), jnp.bfloat16)
    plain = NVFP4Linear(layer.self_attn.q_proj.weight.get_value(), dtype=jnp.bfloat16, activation_format="bf16")
    same = np.array_equal(np.asarray(layer.self_attn.q_proj(x)), np.asarray(plain(x)))
    assert same == (attention == "W4A16_NVFP4")


def test_global_scales_at_both_ends_of_the_range_are_loaded(make_folder):
    folder, _ = make_folder("modelopt", config=WEIGHT_ONLY["modelopt"])
    ends = {0: np.float32(2.0**-100), 1: np.float32(2.0**100)}
    edit(folder, lambda t: t.update({f"{EXPERTS}{e}.down_proj.weight_scale_2": np.array(s) for e, s in ends.items()}))
    scales = np.asarray(load_model(folder)[0].layers[0].mlp.w2.get_value().global_scale)
    assert {e: scales[e, 0, 0] for e in ends} == ends


def test_gate_and_up_keep_their_own_scales(make_folder):
    folder, _ = make_folder("modelopt", config=WEIGHT_ONLY["modelopt"])
    tensors = read_tensors(folder / "model.safetensors")
    scales = np.asarray(load_model(folder)[0].layers[0].mlp.w13.get_value().global_scale)
    for e in range(4):
        for half, name in ((slice(0, 16), "gate"), (slice(16, 32), "up")):
            np.testing.assert_array_equal(scales[e, half], tensors[f"{EXPERTS}{e}.{name}_proj.weight_scale_2"])


@pytest.mark.parametrize("kind", ["modelopt", "compressed", "fp8"])
def test_devices_get_their_experts(make_folder, make_mesh, kind):
    folder, _ = make_folder(kind)
    alone, spread = load_model(folder)[0], load_model(folder, mesh=make_mesh(2))[0]
    for name in ("w13", "w2"):
        one, two = (getattr(model.layers[0].mlp, name).get_value() for model in (alone, spread))
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
            assert [shard.index[0] for shard in b.addressable_shards] == [slice(0, 2), slice(2, 4)]


def test_fp8(make_folder):
    """Linear layers stay in FP8, experts are decoded."""
    folder, decoded = make_folder("fp8", everything)
    model, _ = load_model(folder)
    tensors = read_tensors(folder / "model.safetensors")
    linear = model.layers[0].self_attn.o_proj
    assert isinstance(linear, BlockFP8Linear)
    stored = linear.weight.get_value().validate()
    name = "model.layers.0.self_attn.o_proj.weight"
    np.testing.assert_array_equal(np.asarray(stored.qdata).view(np.uint8), tensors[name].view(np.uint8))
    np.testing.assert_array_equal(stored.block_scale, tensors[name + "_scale_inv"])
    w2 = np.asarray(model.layers[0].mlp.w2.get_value())
    expected = [decoded[f"{EXPERTS}{e}.down_proj"].astype(np.float32).astype(ml_dtypes.bfloat16) for e in range(4)]
    np.testing.assert_array_equal(w2, np.stack(expected))
    assert np.isfinite(np.asarray(forward(model, jnp.arange(6, dtype=jnp.int32)[None]))).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modelopt", "fp8"])
def test_a_quantized_head(make_folder, kind):
    """Logits are those of the decoded weight: of FP8 within what rounding the hidden states makes."""
    config = {"modelopt": {**WEIGHT_ONLY["modelopt"], "ignore": ["model*"]}, "fp8": FP8}[kind]
    folder, _ = make_folder(kind, lambda name: False, config=config)
    plain, ids = load_model(folder)[0], jnp.arange(6, dtype=jnp.int32)[None]
    found = {}

    def change(tensors):
        make = fp8 if kind == "fp8" else lambda *a: nvfp4(a[0], a[1], kind, a[2])
        found["head"] = make(tensors, "lm_head", np.random.default_rng(3))

    edit(folder, change)
    logits = np.asarray(load_model(folder)[0](ids))
    assert logits.dtype == np.float32
    plain.lm_head.weight.set_value(jnp.asarray(found["head"], jnp.bfloat16))
    assert calc_diff(logits, np.asarray(plain(ids))) < (1e-5 if kind == "modelopt" else 2e-3)


@pytest.mark.slow
def test_fp8_with_one_scale_per_tensor(make_folder):
    """Of ModelOpt's mixed checkpoints, beside NVFP4 experts; activations are quantized per token all the same."""
    layers = {f"model.layers.{i}.self_attn.{p}_proj": {"quant_algo": "FP8"} for i in (0, 1) for p in "qkvo"}
    layers["model.layers.0.mlp.experts"] = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    folder, _ = make_folder("modelopt", config=config)
    rng, decoded = np.random.default_rng(3), {}

    def change(tensors):
        for module in (name for name in layers if "self_attn" in name):
            decoded[module] = fp8(tensors, module, rng)
            scale = np.float32(rng.uniform(0.001, 0.01))
            decoded[module] = tensors[f"{module}.weight"].astype(np.float64) * scale
            del tensors[f"{module}.weight_scale_inv"]
            tensors[f"{module}.weight_scale"] = np.array(scale)
            tensors[f"{module}.input_scale"] = np.array(0.1, np.float32)

    edit(folder, change)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*modules are not as the config says.*self_attn")
        model, _ = load_model(folder)
    linear = model.layers[1].self_attn.o_proj
    assert isinstance(linear, BlockFP8Linear)
    got = np.asarray(dequantize_blocks(linear.weight.get_value(), jnp.float32))
    np.testing.assert_allclose(got, decoded["model.layers.1.self_attn.o_proj"], rtol=1e-6)
    assert np.isfinite(np.asarray(forward(model, jnp.arange(6, dtype=jnp.int32)[None]))).all()


def test_fp8_experts_with_one_scale_per_tensor(make_folder):
    folder, _ = make_folder("fp8")
    decoded = {}

    def change(tensors):
        for e in range(4):
            name, scale = f"{EXPERTS}{e}.down_proj.weight", np.float32(0.002 * (e + 1))
            decoded[e] = (tensors[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
            del tensors[name + "_scale_inv"]
            tensors[name + "_scale"] = np.array([scale])

    edit(folder, change)
    w2 = np.asarray(load_model(folder)[0].layers[0].mlp.w2.get_value())
    np.testing.assert_array_equal(w2, np.stack([decoded[e] for e in range(4)]))


@pytest.mark.slow
def test_the_command_line_of_the_serving_system(make_folder):
    """Experts as they are stored, linear layers quantized while they are loaded, routers and the head left alone."""
    folder, _ = make_folder("modelopt")
    model, _ = load_model(folder, quantization=REFERENCE)
    layer, dense = model.layers
    assert isinstance(layer.self_attn.q_proj, BlockFP8Linear) and isinstance(dense.mlp.down_proj, BlockFP8Linear)
    assert isinstance(layer.mlp.gate, Linear) and isinstance(model.lm_head, Linear)
    assert isinstance(layer.mlp.w13.get_value(), NVFP4Tensor) and layer.mlp.config.activation_format_1 == "nvfp4"
    assert np.isfinite(np.asarray(forward(model, jnp.arange(6, dtype=jnp.int32)[None]))).all()


@pytest.mark.slow
def test_everything_quantized_while_loading(tmp_path):
    model, config = make_model()
    save_model(model, config, tmp_path)
    loaded, _ = load_model(tmp_path, quantization=USERS["online"])
    assert isinstance(loaded.layers[0].self_attn.q_proj, BlockFP8Linear)
    assert isinstance(loaded.layers[0].mlp.w13.get_value(), NVFP4Tensor)
    assert loaded.layers[0].mlp.input_scale_1 is None and loaded.layers[0].mlp.config.activation_format_1 == "nvfp4"
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: K = 24 is no multiple of 16"):
        load_model(tmp_path, quantization="modelopt_fp4")
    save_model(*make_model(intermediate_size=32), tmp_path)
    other, _ = load_model(tmp_path, quantization="modelopt_fp4")
    assert isinstance(other.layers[1].mlp.down_proj, NVFP4Linear)


@pytest.mark.parametrize(
    ("rename", "head"),
    [
        (lambda name: name.replace("model.", "model.language_model."), "lm_head.weight"),
        (lambda name: "language_model." + name, "language_model.lm_head.weight"),
    ],
    ids=["inside", "outside"],
)
def test_text_models_inside_of_others(tmp_path, rename, head):
    model, config = make_model()
    save_model(model, config, tmp_path)

    def change(tensors):
        for name in list(tensors):
            value = tensors.pop(name)
            tensors[head if name == "lm_head.weight" else rename(name)] = value
        tensors["model.visual.patch_embed.weight"] = np.ones(3, np.float32)

    edit(tmp_path, change)
    ids = jnp.arange(6, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(np.asarray(forward(load_model(tmp_path)[0], ids)), np.asarray(forward(model, ids)))


def test_other_tensors_of_real_checkpoints(make_folder):
    """Scales of a cache are kept; layers that predict further tokens are not loaded."""
    folder, _ = make_folder("modelopt", config=WEIGHT_ONLY["modelopt"])
    edit(folder, lambda t: t.update({
        "model.layers.1.self_attn.k_proj.k_scale": np.array(0.25, np.float32),
        "model.layers.1.self_attn.v_scale": np.array([0.5], np.float32),
        "model.layers.2.enorm.weight": np.ones(3, np.float32),
        "model.mtp_block.0.input_layernorm.weight": np.ones(3, np.float32),
        "model.mtp_linear_proj.0.weight": np.ones((3, 6), np.float32),
        "model.layers.2.self_attn.k_scale": np.array(9, np.float32),
    }))  # fmt: skip
    attention = load_model(folder)[0].layers[1].self_attn
    assert float(attention.k_scale[...]) == 0.25 and float(attention.v_scale[...]) == 0.5


@pytest.mark.parametrize("where", ["section", "file"])
def test_a_cache_in_fp8(make_folder, where):
    """The folder asks for it in config.json or in hf_quant_config.json, and the argument decides; scales come along."""
    folder, _ = make_folder("modelopt", config=WEIGHT_ONLY["modelopt"])
    edit(folder, lambda t: t.update({"model.layers.1.self_attn.k_proj.k_scale": np.array(0.25, np.float32)}))
    if where == "section":
        scheme = {"num_bits": 8, "type": "float", "dynamic": False}
        edit_config(folder, quantization_config={**WEIGHT_ONLY["modelopt"], "kv_cache_scheme": scheme})
    else:
        own = {"quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": "FP8"}
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    fp8, kinds = jnp.dtype(jnp.float8_e4m3fn), {}
    for name in ("stored", "compute", "fp8"):
        model = load_model(folder, cache_format=name)[0]
        kinds[name] = {format.dtype for format in model.cache_formats}
        assert float(model.layers[1].self_attn.k_scale[...]) == 0.25
    assert kinds == {"stored": {fp8}, "compute": {model.layers[0].self_attn.dtype}, "fp8": {fp8}}
    with pytest.raises(ValueError, match="cache_format must be 'stored', 'compute' or 'fp8', got 'int8'"):
        load_model(folder, cache_format="int8")


def test_the_file_of_modelopt_counts_without_a_section(make_folder):
    folder, _ = make_folder("modelopt")
    edit_config(folder, quantization_config=None)
    own = {"quant_algo": "W4A16_NVFP4", "exclude_modules": ["lm_head", "*self_attn*", "model.layers.1*", "*.gate"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    assert load_model(folder)[0].layers[0].mlp.config.activation_format_1 == "bf16"


@pytest.mark.parametrize(
    ("kind", "change", "messages"),
    [
        ("modelopt", lambda t: t.pop(UP + "weight_scale"), ["1 tensors missing", UP + "weight_scale"]),
        ("modelopt", lambda t: t.pop(UP + "weight_scale_2"), ["1 tensors missing", UP + "weight_scale_2"]),
        ("modelopt", lambda t: t.pop(UP + "input_scale"), [UP + "input_scale is missing", "per_token"]),
        ("modelopt", put(UP + "input_scale", np.float32(0)), [UP + "input_scale = 0.0", "model.safetensors"]),
        ("modelopt", put(UP + "input_scale", np.float32(np.nan)), [UP + "input_scale = nan"]),
        ("modelopt", put(UP + "input_scale", np.ones(2, np.float32)), [UP + "input_scale", "(2,)", "expected ()"]),
        ("modelopt", put(UP + "input_scale", np.float64(1)), [UP + "input_scale", "F64", "F32"]),
        ("modelopt", put(UP + "weight_scale_2", np.float32(0)), [UP + "weight_scale_2", "0.0", "positive"]),
        ("modelopt", put(UP + "weight_scale_2", np.float32(-1)), [UP + "weight_scale_2", "-1.0"]),
        ("modelopt", put(UP + "weight_scale_2", np.float32(np.inf)), [UP + "weight_scale_2", "inf"]),
        ("modelopt", put(UP + "weight_scale_2", np.ones(3, np.float32)), [UP + "weight_scale_2", "(3,)"]),
        ("modelopt", spoil(UP + "weight_scale", (3, 1), 0x7F), [UP + "weight_scale", "nan", "model.safetensors"]),
        ("modelopt", put(UP + "weight_scale", np.ones((16, 2), np.float32)), [UP + "weight_scale", "F32", "F8_E4M3"]),
        ("modelopt", put(UP + "weight", np.ones((16, 8), np.uint8)), [UP + "weight", "(16, 8)", "(16, 16)"]),
        ("modelopt", put(UP + "weight", np.ones((16, 32), np.float32)), [UP + "weight", "F32", "U8"]),
        ("compressed", lambda t: t.pop(UP + "weight_packed"), ["1 tensors missing", UP + "weight_packed"]),
        ("compressed", put(UP + "weight_global_scale", np.zeros(1, np.float32)), [UP + "weight_global_scale", "0.0"]),
        ("compressed", put(UP + "weight_global_scale", np.full(1, np.inf, np.float32)), [UP + "weight_global_scale"]),
        ("compressed", put(UP + "input_global_scale", np.zeros(1, np.float32)), [UP + "input_global_scale = 0.0"]),
        ("compressed", put(UP + "weight", np.ones((16, 32), np.float32)), ["1 unexpected", UP + "weight"]),
        ("fp8", lambda t: t.pop(UP + "weight_scale_inv"), ["1 tensors missing", UP + "weight_scale_inv"]),
        ("fp8", put(UP + "weight_scale_inv", np.ones((2, 1), np.float32)), [UP + "weight_scale_inv", "(2, 1)"]),
        ("fp8", put(UP + "weight_scale_inv", np.zeros((1, 1), np.float32)), [UP + "weight_scale_inv", "0.0"]),
    ],
)  # fmt: skip
def test_broken_tensors_are_named(make_folder, kind, change, messages):
    folder, _ = make_folder(kind)
    edit(folder, change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for message in messages:
        assert message in str(error.value)


def test_promises_that_the_tensors_do_not_keep(tmp_path, make_folder):
    folder, _ = make_folder("modelopt", chosen=lambda name: False)
    with pytest.warns(UserWarning, match=r"modules are not as the config says: .*experts: the config says modelopt"):
        load_model(folder)
    with pytest.raises(ValueError, match=r"mlp\.experts is not quantized, although --quantization says that it is"):
        load_model(folder, quantization=REFERENCE)
    with pytest.raises(ValueError, match="needs a quantization config"):
        edit_config(folder, quantization_config=None)
        load_model(folder, quantization=REFERENCE)
    with pytest.raises(ValueError, match="input_scales must be 'stored' or 'per_token', got 'none'"):
        load_model(folder, input_scales="none")


def test_a_truncated_shard_loads_nothing(tmp_path):
    config = dataclasses.replace(CONFIG)
    save_model(Qwen3Moe(config, rngs=nnx.Rngs(0)), config, tmp_path, max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} is not a readable safetensors file"):
        load_model(tmp_path)
    save_file({"lm_head.weight": np.ones((32, 32), np.int64)}, shard)
    with pytest.raises(ValueError, match="lists tensors that are in no file"):
        load_model(tmp_path)
