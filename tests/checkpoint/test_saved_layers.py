"""Models whose layers are quantized are saved, and come back with the same bits, in every layout and mixture."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from quantization_sections import FP8, MODELOPT
from quantized_folders import EXPERTS, WEIGHT_ONLY, everything, fp8, make_folder, nvfp4, plain_folder
from safetensors.numpy import save_file
from small_folders import edit, edit_config, make_model
from small_models import forward
from tensor_files import read_tensors

from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.inspect import inspect_folder
from fp4jax.checkpoint.quantizer.convert import convert_folder
from fp4jax.layers import BlockFP8Linear, NVFP4Linear
from fp4jax.models import configure_experts, quantize_experts
from fp4jax.nvfp4 import NVFP4Tensor

__all__ = ["make_folder", "plain_folder"]  # fixtures
LAYOUTS = ("modelopt", "compressed_tensors")
IDS = jnp.asarray([[3, 7, 11, 30, 1, 0, 19]])
pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("error:.*modules are not as the config says"),
]


def state(model):
    """Every leaf of a model by its path; scales that are alike in all rows are one."""
    flat = nnx.to_flat_state(nnx.state(model))
    leaves = {path: jax.tree.leaves(variable.get_value()) for path, variable in flat}
    return {path: [np.asarray(leaf) for leaf in parts] for path, parts in leaves.items()}


def assert_same_model(first, second):
    one, other = state(first), state(second)
    assert one.keys() == other.keys()
    for path, leaves in one.items():
        for a, b in zip(leaves, other[path], strict=True):
            assert a.dtype == b.dtype, path
            b = np.broadcast_to(b, np.broadcast_shapes(a.shape, b.shape))
            assert np.broadcast_to(a, b.shape).tobytes() == b.tobytes(), path
    for block, copy in zip(first.moe_blocks(), second.moe_blocks(), strict=True):
        assert formats(block) == formats(copy)


def formats(block):
    """Of the activations of both GEMMs: as set, or as the scales say."""
    config = block.config
    given = config.activation_format_1, config.activation_format_2
    scales = block.input_scale_1, block.input_scale_2
    return [f or ("bf16" if scale is None else "nvfp4") for f, scale in zip(given, scales, strict=True)]


def round_trip(model, config, folder, layout="modelopt", **options):
    save_model(model, config, folder, layout=layout)
    assert inspect_folder(folder, **options)["loads"]
    loaded, _ = load_model(folder, **options)
    assert_same_model(model, loaded)
    return loaded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("calibrated", "layout"),
    [
        pytest.param(False, "modelopt", id="W4A16, modelopt"),
        pytest.param(False, "compressed_tensors", id="W4A16, compressed-tensors"),
        pytest.param(True, "modelopt", id="W4A4, modelopt"),
        pytest.param(True, "compressed_tensors", id="W4A4, compressed-tensors"),
    ],
)
def test_quantized_in_memory(tmp_path, layout, calibrated):
    model, config = make_model()
    quantize_experts(model, IDS if calibrated else None)
    loaded = round_trip(model, config, tmp_path, layout)
    assert isinstance(loaded.layers[0].mlp.w13.get_value(), NVFP4Tensor)
    names = read_tensors(tmp_path / "model.safetensors").keys()
    np.testing.assert_array_equal(np.asarray(forward(model, IDS)), np.asarray(forward(loaded, IDS)))
    end = "weight_packed" if layout == "compressed_tensors" else "weight_scale_2"
    assert f"{EXPERTS}3.down_proj.{end}" in names
    assert (tmp_path / "hf_quant_config.json").exists() == (layout == "modelopt")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_per_token_is_said_in_the_config(tmp_path, layout):
    """NVFP4 activations without a stored scale: the folder says so, and nothing needs to be asked for when loading."""
    model, config = make_model()
    quantize_experts(model)
    configure_experts(model, activation_format_1="nvfp4", activation_format_2="nvfp4")
    loaded = round_trip(model, config, tmp_path, layout)
    assert loaded.layers[0].mlp.config.activation_format_2 == "nvfp4"
    assert "scale per token" in inspect_folder(tmp_path)["plan"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["modelopt", "compressed"])
def test_a_loaded_folder(make_folder, tmp_path_factory, kind, layout):
    """Linear layers and experts, each with its own scales, whatever layout they came in; also a scale of the cache."""
    folder, _ = make_folder(kind, everything)
    edit(folder, lambda t: t.update({"model.layers.1.self_attn.k_proj.k_scale": np.array(0.25, np.float32)}))
    edit_config(folder, quantization_config={**json.loads((folder / "config.json").read_text())["quantization_config"],
                                             "ignore": ["lm_head", "*.mlp.gate", "*.1.mlp.down_proj"]})  # fmt: skip
    model, config = load_model(folder)
    assert isinstance(model.layers[0].self_attn.q_proj, NVFP4Linear)
    out = tmp_path_factory.mktemp("out")
    model.set_cache_dtype(jnp.float8_e4m3fn)
    loaded = round_trip(model, config, out, layout)
    assert loaded.layers[1].self_attn.k_scale[...] == 0.25
    assert {format.dtype for format in loaded.cache_formats} == {jnp.dtype(jnp.float8_e4m3fn)}


def spoil_reciprocals(tensors):
    """Scales that two reciprocals change, in every place that has one."""
    lossy = [np.float32(v) for v in np.linspace(0.005, 0.02, 1000, dtype=np.float32)]
    lossy = [v for v in lossy if np.float32(1) / (np.float32(1) / v) != v]
    for index, name in enumerate(sorted(n for n in tensors if n.endswith(("weight_scale_2", "input_scale")))):
        tensors[name] = np.array(lossy[index % len(lossy)])


def test_conversion_does_not_change_the_model(make_folder, tmp_path_factory):
    """ModelOpt to compressed-tensors: scales that are no reciprocals of reciprocals come from the metadata."""
    folder, _ = make_folder("modelopt")
    edit(folder, spoil_reciprocals)
    edit_config(
        folder, quantization_config={**MODELOPT, "ignore": ["lm_head", "*.mlp.gate", "*self_attn*", "*layers.1.*"]}
    )
    out = tmp_path_factory.mktemp("out")
    convert_folder(folder, out / "other", "compressed_tensors")
    first, second = load_model(folder)[0], load_model(out / "other")[0]
    assert_same_model(first, second)
    name = f"{EXPERTS}0.down_proj.weight_global_scale"  # one that was changed since is what it is
    edit(out / "other", lambda t: t.update({name: np.array([64], np.float32)}))
    assert load_model(out / "other")[0].layers[0].mlp.w2.get_value().global_scale[0] == 1 / 64


PLAIN = ["lm_head", "*.mlp.gate", "*self_attn*", "*layers.1.*"]
MIXTURES = {
    "gate and up": lambda name: ".experts." in name and "down" not in name,
    "down": lambda name: ".experts." in name and "down" in name,
}


@pytest.mark.parametrize(
    ("part", "activations", "layout"),
    [
        pytest.param("gate and up", "W4A4", "modelopt", marks=pytest.mark.slow),
        pytest.param("down", "W4A16", "compressed_tensors", marks=pytest.mark.slow),
        pytest.param("gate and up", "W4A16", "compressed_tensors", marks=pytest.mark.slow),
        pytest.param("down", "W4A4", "modelopt", marks=pytest.mark.slow),
        pytest.param("down", "W4A4", "compressed_tensors", marks=pytest.mark.slow),
    ],
)
def test_half_of_the_experts_quantized(make_folder, tmp_path_factory, part, activations, layout):
    """Runs like the same weights decoded, and can be saved."""
    base = WEIGHT_ONLY["modelopt"] if activations == "W4A16" else MODELOPT
    others = ["*down_proj"] if part == "gate and up" else ["*gate_proj", "*up_proj"]
    folder, decoded = make_folder("modelopt", MIXTURES[part], config={**base, "ignore": [*PLAIN, *others]})
    assert inspect_folder(folder)["loads"]
    model, config = load_model(folder, dtype="float32")
    out = tmp_path_factory.mktemp("out")
    plain = out / "plain"
    plain.mkdir()
    tensors = {name: np.asarray(value, np.float32) for name, value in read_tensors(folder / "model.safetensors").items()
               if not any(name.startswith(module) for module in decoded)}  # fmt: skip
    tensors |= {f"{module}.weight": value.astype(np.float32) for module, value in decoded.items()}
    save_file(tensors, plain / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "quantization_config"}))
    expected = forward(load_model(plain, dtype="float32")[0], IDS)
    off = float(jnp.abs(forward(model, IDS) - expected).max() / jnp.abs(expected).max())
    assert off < (2e-6 if activations == "W4A16" else 0.15)
    assert off > 1e-3 or activations == "W4A16"  # activations were quantized
    round_trip(model, config, out / layout, layout, dtype="float32")


@pytest.mark.parametrize("scales", ["float32", "ue8m0"])
def test_block_wise_fp8(make_folder, tmp_path_factory, scales):
    folder, _ = make_folder("fp8", lambda name: "self_attn" in name)
    ignored = ["lm_head", "*.mlp.*", "model.layers.0.mlp.experts"]
    edit_config(folder, quantization_config={**FP8, "scale_fmt": scales, "modules_to_not_convert": ignored})
    model, config = load_model(folder)
    attention = model.layers[0].self_attn
    assert isinstance(attention.q_proj, BlockFP8Linear) and attention.q_proj.power_of_two_scales == (scales == "ue8m0")
    round_trip(model, config, tmp_path_factory.mktemp("out"))


@pytest.mark.slow
def test_scale_fmt_changes_what_activations_are_rounded_to(make_folder):
    folder, _ = make_folder("fp8", lambda name: "self_attn" in name)
    found = []
    for scales in ("float32", "ue8m0"):
        edit_config(
            folder, quantization_config={**FP8, "scale_fmt": scales, "modules_to_not_convert": ["*.mlp.*", "lm_head"]}
        )
        found.append(np.asarray(load_model(folder)[0](IDS)))
    assert (found[0] != found[1]).any()


def test_fp8_linears_beside_nvfp4_experts(make_folder, tmp_path_factory):
    """Every layer differs from the rest: ModelOpt's layout has a name for each, the other one says what it lacks."""
    folder, _ = make_folder("modelopt", lambda name: ".experts." in name or "o_proj" in name)
    rng = np.random.default_rng(1)
    edit(folder, lambda t: [fp8(t, f"model.layers.{i}.self_attn.q_proj", rng) for i in range(2)])
    edit(folder, lambda t: nvfp4(t, "model.layers.1.self_attn.v_proj", "modelopt", rng))
    layers = {
        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        **{f"model.layers.{i}.self_attn.o_proj": {"quant_algo": "W4A16_NVFP4"} for i in range(2)},
        **{f"model.layers.{i}.self_attn.q_proj": {"quant_algo": "FP8_PB_WO", "group_size": 128} for i in range(2)},
        "model.layers.1.self_attn.v_proj": {"quant_algo": "NVFP4"},
    }
    mixed = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    edit_config(folder, quantization_config=mixed)
    model, config = load_model(folder)
    assert model.layers[0].self_attn.o_proj.activation_format == "bf16"
    out = tmp_path_factory.mktemp("out")
    round_trip(model, config, out / "modelopt")
    with pytest.raises(ValueError, match=r"self_attn.q_proj is block_wise_fp8, which the layout compressed_tensors"):
        save_model(model, config, out / "other", layout="compressed_tensors")
    assert not (out / "other").exists()


def test_linears_and_experts_with_other_activations(tmp_path):
    """W4A16 linear layers beside W4A4 experts: groups with targets in compressed-tensors."""
    model, config = make_model()
    quantize_experts(model, IDS)
    for layer in model.layers:
        layer.self_attn.q_proj = NVFP4Linear.from_linear(layer.self_attn.q_proj, activation_format="bf16")
    for layout in LAYOUTS:
        round_trip(model, config, tmp_path / layout, layout)


@pytest.mark.slow
def test_everything_quantized_while_loading(tmp_path):
    model, config = make_model(intermediate_size=64)
    save_model(model, config, tmp_path / "plain")
    asked = {"quantization": "mix_quant", "dense_quant_type": "block_wise_fp8", "moe_quant_type": "modelopt_fp4"}
    model, config = load_model(tmp_path / "plain", quantization=asked)
    round_trip(model, config, tmp_path / "out")


@pytest.mark.slow
def test_weights_packed_for_the_kernel_are_saved_unpacked(tmp_path, monkeypatch):
    """An expert size that the kernel does not have is padded in memory, not in the folder."""
    model, config = make_model(hidden_size=64, moe_intermediate_size=16)
    quantize_experts(model, IDS)
    save_model(model, config, tmp_path / "before")
    monkeypatch.setattr("fp4jax.implementations._sees_hopper_gpu", lambda: True)
    for block in model.moe_blocks():
        block.dtype = jnp.dtype("bfloat16")
        block._pack_or_unpack()
        assert not isinstance(block.w13.get_value(), NVFP4Tensor)
    save_model(model, config, tmp_path / "after")
    before, after = (read_tensors(tmp_path / f / "model.safetensors") for f in ("before", "after"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


def test_rows_with_scales_of_their_own_are_refused(tmp_path):
    model, config = make_model()
    quantize_experts(model)
    block = model.layers[0].mlp
    w13 = block.w13.get_value()
    scales = w13.global_scale.at[0, 3].multiply(2)
    block.w13.set_value(NVFP4Tensor(w13.qdata, w13.block_scale, scales))
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj have global scales of their own"):
        save_model(model, config, tmp_path / "out")


def test_a_plain_model_over_a_quantized_folder(tmp_path):
    """No config of the model before is left behind."""
    model, config = make_model()
    plain, _ = make_model()
    quantize_experts(model)
    save_model(model, config, tmp_path)
    save_model(plain, config, tmp_path)
    assert not (tmp_path / "hf_quant_config.json").exists()
    assert_same_model(plain, load_model(tmp_path)[0])


def test_types_of_the_file(tmp_path):
    model, config = make_model()
    quantize_experts(model, IDS)
    save_model(model, config, tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    module = f"{EXPERTS}0.up_proj."
    assert tensors[module + "weight"].dtype == np.uint8
    assert tensors[module + "weight_scale"].dtype == ml_dtypes.float8_e4m3fn
    assert tensors[module + "weight_scale_2"].shape == tensors[module + "input_scale"].shape == ()
