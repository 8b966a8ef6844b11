"""Folders converted between the two NVFP4 layouts: what they hold, and that nothing is lost on the way back."""

import json

import ml_dtypes
import numpy as np
import pytest
from quantization_sections import COMPRESSED, MODELOPT
from quantized_folders import EXPERTS, NAMES, everything, make_folder, plain_folder, put
from safetensors.numpy import save_file
from small_folders import edit, edit_config, make_model
from tensor_files import read_tensors

from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.inspect import inspect_folder
from fp4jax.checkpoint.quantizer import convert
from fp4jax.checkpoint.quantizer.convert import convert_folder

__all__ = ["make_folder", "plain_folder"]  # fixtures

pytestmark = pytest.mark.usefixtures("quick_compile")

F32 = np.float32
LAYOUT = {"modelopt": "modelopt", "compressed": "compressed_tensors"}
OTHER = {"modelopt": "compressed", "compressed": "modelopt"}
METADATA = "fp4jax.original"


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_tensors(file)
    return found


def header_of(file):
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def survives(scale):
    return F32(1) / (F32(1) / scale) == scale


def random_scales(folder, kind, rng):
    """Scales of all magnitudes; returns how many of them two reciprocals change."""
    lost = []

    def change(tensors):
        for name, value in tensors.items():
            if name.endswith(NAMES[kind][2:]):
                value[...] = F32(rng.uniform(1, 2) * 2.0 ** rng.integers(-60, 60))
                lost.append(not survives(value.reshape(())))

    edit(folder, change)
    return sum(lost), len(lost)


def split_in_two(folder):
    """Shards with an index, as other tools write them."""
    tensors = read_tensors(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt", "by": "someone"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(value.nbytes for value in tensors.values())
    index = {"metadata": {"total_size": size, "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", OTHER)
def test_there_and_back_again(make_folder, tmp_path_factory, kind, sharded, rng):
    """Every file of every kind, byte for byte: also scales whose double reciprocal is another number."""
    folder, _ = make_folder(kind, everything)
    lost, total = random_scales(folder, kind, rng)
    assert 0 < lost < total
    if kind == "modelopt":
        extra = {"producer": {"name": "modelopt", "version": "0.29"}, "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head*"],
        }}  # fmt: skip
        (folder / "hf_quant_config.json").write_text(json.dumps(extra, indent=2) + "\n")
    edit(folder, lambda t: t.update({"model.layers.1.self_attn.k_proj.k_scale": np.array(0.25, np.float32)}))
    edit_config(folder, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()), indent=2) + "\n")
    (folder / "tokenizer.json").write_text("{}")
    if sharded:
        split_in_two(folder)
    before = contents(folder)
    out = tmp_path_factory.mktemp("out")
    convert_folder(folder, out / "there", LAYOUT[OTHER[kind]])
    convert_folder(out / "there", out / "back", LAYOUT[kind])
    convert_folder(out / "back", out / "again", LAYOUT[OTHER[kind]])
    assert contents(out / "back") == before
    assert contents(out / "again") == contents(out / "there")
    report = inspect_folder(out / "there")
    assert report["loads"] and not report["disagreements"]
    assert (out / "there" / "hf_quant_config.json").exists() == (OTHER[kind] == "modelopt")


@pytest.mark.parametrize("kind", OTHER)
def test_tensors_of_the_other_layout(make_folder, tmp_path_factory, kind):
    """Exactly the contract's names, the same codes and block scales, reciprocals; the same model when loaded."""
    folder, _ = make_folder(kind, everything)
    out = tmp_path_factory.mktemp("out") / "other"
    convert_folder(folder, out, LAYOUT[OTHER[kind]])
    before, after = tensors_of(folder), tensors_of(out)
    for name, value in before.items():
        module, _, end = name.rpartition(".")
        quantized = f"{module}.{NAMES[kind][2]}" in before
        new = f"{module}.{dict(zip(NAMES[kind], NAMES[OTHER[kind]], strict=True))[end]}" if quantized else name
        found = after.pop(new)
        if quantized and end in NAMES[kind][2:]:
            assert found.shape == (() if OTHER[kind] == "modelopt" else (1,))
            assert found.reshape(()) == F32(1) / value.reshape(())
        else:
            assert found.dtype == value.dtype and found.tobytes() == value.tobytes() and found.shape == value.shape
    assert not after
    w13 = [np.asarray(load_plain(f).layers[0].mlp.w13.get_value().qdata) for f in (folder, out)]
    np.testing.assert_array_equal(*w13)


def load_plain(folder):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_model(folder)[0]


@pytest.mark.parametrize("kind", OTHER)
def test_what_was_changed_since_is_not_taken_from_the_metadata(make_folder, tmp_path_factory, kind, rng):
    folder, _ = make_folder(kind)
    random_scales(folder, kind, rng)
    out = tmp_path_factory.mktemp("out")
    convert_folder(folder, out / "there", LAYOUT[OTHER[kind]])
    file = out / "there" / "model.safetensors"
    kept = json.loads(header_of(file)["__metadata__"][METADATA])
    name = sorted(kept["scales"])[0]
    assert "config" in kept and name.endswith(NAMES[OTHER[kind]][2:])
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little") + header_of(file)[name]["data_offsets"][0]
    content[start : start + 4] = F32(3).tobytes()
    file.write_bytes(content)
    edit_config(out / "there", quantization_config={"modelopt": MODELOPT, "compressed": COMPRESSED}[OTHER[kind]])
    convert_folder(out / "there", out / "back", LAYOUT[kind])
    module, _, end = name.rpartition(".")
    before, after = tensors_of(folder), tensors_of(out / "back")
    changed = f"{module}.{dict(zip(NAMES[OTHER[kind]], NAMES[kind], strict=True))[end]}"
    for name, value in before.items():
        expected = F32(1) / F32(3) if name == changed else value
        assert after[name].tobytes() == expected.tobytes(), name
    section = json.loads((out / "back" / "config.json").read_text())["quantization_config"]
    assert section != json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.gate" in section["ignore"]


@pytest.mark.parametrize("kind", OTHER)
def test_weight_only_stays_weight_only(make_folder, tmp_path_factory, kind):
    """No input scales, and plain activations in the config of either layout."""
    config = {"modelopt": {**MODELOPT, "quant_algo": "W4A16_NVFP4"}, "compressed": json.loads(json.dumps(COMPRESSED))}[
        kind
    ]
    if kind == "compressed":
        config["config_groups"]["group_0"]["input_activations"] = None
    folder, _ = make_folder(kind, config=config)
    edit(folder, lambda t: [t.pop(name) for name in list(t) if name.endswith(NAMES[kind][3])])
    out = tmp_path_factory.mktemp("out")
    convert_folder(folder, out / "there", LAYOUT[OTHER[kind]])
    model = load_model(out / "there")[0]  # no warning: the config says what the tensors are
    assert model.layers[0].mlp.config.activation_format_1 == "bf16"
    convert_folder(out / "there", out / "back", LAYOUT[kind])
    assert tensors_of(out / "back").keys() == tensors_of(folder).keys()


def test_a_conversion_that_was_stopped_goes_on(make_folder, tmp_path_factory, monkeypatch):
    folder, _ = make_folder("modelopt")
    split_in_two(folder)
    out = tmp_path_factory.mktemp("out")
    convert_folder(folder, out / "whole", "compressed_tensors")
    whole, done = convert._convert_file, []

    def stopping(source, *arguments):
        if done:
            raise KeyboardInterrupt
        done.append(source)
        whole(source, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_convert_file", stopping)
        with pytest.raises(KeyboardInterrupt):
            convert_folder(folder, out / "parts", "compressed_tensors")
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_model(out / "parts")
    convert_folder(folder, out / "parts", "compressed_tensors")
    assert contents(out / "parts") == contents(out / "whole")


UP = EXPERTS + "2.up_proj."


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("modelopt", put(UP + "weight_scale_2", F32(0)), r"2\.up_proj\.weight_scale_2 has 0\.0; it must be positive"),
        ("modelopt", put(UP + "input_scale", F32(np.nan)), r"2\.up_proj\.input_scale has nan"),
        ("modelopt", put(UP + "input_scale", F32(1e-45)), r"2\.up_proj\.input_scale has 1\.4\d+e-45"),
        ("modelopt", put(UP + "input_scale", np.ones(2, F32)), r"input_scale has shape \(2,\)"),
        ("modelopt", put(UP + "weight_scale_2", np.float64(1)), r"weight_scale_2 .*F64"),
        ("modelopt", lambda t: t.pop(UP + "weight_scale"), r"2\.up_proj\.weight_scale is missing"),
        ("modelopt", put("lm_head.weight", np.ones((32, 32), ml_dtypes.float8_e4m3fn)), "is F8_E4M3 and not of"),
        ("modelopt", put("model.x.weight_packed", np.ones((32, 16), np.uint8)), "has both layouts"),
        ("compressed", put(UP + "weight", np.ones((16, 32), F32)), r"2\.up_proj\.weight stands beside the NVFP4 layer"),
        ("compressed", lambda t: t.pop(UP + "weight_global_scale"), r"2\.up_proj\.weight_packed is U8 and not of an"),
    ],
)  # fmt: skip
def test_broken_folders_are_refused(make_folder, tmp_path_factory, kind, change, message):
    folder, _ = make_folder(kind)
    edit(folder, change)
    out = tmp_path_factory.mktemp("out") / "there"
    with pytest.raises(ValueError, match=message):
        convert_folder(folder, out, LAYOUT[OTHER[kind]])
    assert not (out / "config.json").exists()


def test_configs_that_cannot_be_converted_are_refused(make_folder, tmp_path_factory):
    folder, _ = make_folder("modelopt")
    out = tmp_path_factory.mktemp("out")
    with pytest.raises(ValueError, match="has the layout modelopt already"):
        convert_folder(folder, out / "a", "modelopt")
    for config, message in (
        (None, "neither config.json nor hf_quant_config.json says"),
        ({**MODELOPT, "kv_cache_quant_algo": "NVFP4"}, "a cache in 'NVFP4' cannot be converted"),
        ({**MODELOPT, "quant_algo": "MIXED_PRECISION", "quantized_layers": {"model.layers.0.mlp.experts": "NVFP4",
          "model.layers.1": "W4A16_NVFP4"}}, r"activations \['bf16 stored', 'nvfp4 stored'\]"),
    ):  # fmt: skip
        edit_config(folder, quantization_config=config)
        with pytest.raises(ValueError, match=message):
            convert_folder(folder, out / "a", "compressed_tensors")
    plain = tmp_path_factory.mktemp("plain")
    save_model(*make_model(), plain)
    with pytest.raises(ValueError, match="has no NVFP4 layers"):
        convert_folder(plain, out / "a", "compressed_tensors")
    assert not (out / "a").exists()


@pytest.mark.parametrize("home", ["compression_config", "text_config"])
def test_a_section_in_another_place_is_converted_too(make_folder, tmp_path_factory, home):
    """As the loader finds it there; the output says so in the usual place only."""
    folder, _ = make_folder("compressed")
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    inner = section if home == "compression_config" else {"quantization_config": section}
    edit_config(folder, quantization_config=None, **{home: inner})
    out = tmp_path_factory.mktemp("out") / "there"
    convert_folder(folder, out, "modelopt")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "NVFP4"
    assert "compression_config" not in config and config.get("text_config", {}) == {}
    assert inspect_folder(out)["loads"]


def test_stacked_experts_are_said_not_to_be_converted(make_folder, tmp_path_factory):
    folder, _ = make_folder("modelopt")
    edit(folder, lambda t: t.update({"model.layers.0.mlp.experts.down_proj_weight_scale_2": np.ones(4, np.float32)}))
    with pytest.raises(ValueError, match="has stacked NVFP4 experts"):
        convert_folder(folder, tmp_path_factory.mktemp("out") / "a", "compressed_tensors")
