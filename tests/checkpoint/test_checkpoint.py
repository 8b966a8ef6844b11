"""Saving and loading: names, exact bytes, shards, both layouts of experts, and errors that name what is wrong."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from small_folders import assert_same_params, edit, edit_config, make_model, params

from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.folder_config import end_token_ids, quantization_plan
from fp4jax.models import Qwen3Moe, configure_experts

pytestmark = pytest.mark.usefixtures("quick_compile")

EXPERT = "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    save_model(*make_model(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000], ids=["one file", "shards"])
def test_round_trip_is_exact(tmp_path, tied, shard_bytes):
    model, config = make_model(tie_word_embeddings=tied)
    save_model(model, config, tmp_path, max_shard_bytes=shard_bytes)
    loaded, loaded_config = load_model(tmp_path)
    assert loaded_config == config
    assert_same_params(loaded, model)
    files = sorted(path.name for path in tmp_path.glob("*"))
    if shard_bytes == 1 << 30:
        assert files == ["config.json", "model.safetensors"]
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {name for name in files if name.startswith("model-")}
        assert len(set(index["weight_map"].values())) > 1
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in params(model).values())


def test_file_holds_the_names_and_rows_of_hugging_face(folder):
    """Every expert apart, [out, in], gate in the first half of w13's rows."""
    tensors, model = load_file(folder / "model.safetensors"), make_model()[0]
    w13, w2 = (np.asarray(p.get_value()) for p in (model.layers[0].mlp.w13, model.layers[0].mlp.w2))
    for e in range(4):
        prefix = f"model.layers.0.mlp.experts.{e}."
        np.testing.assert_array_equal(tensors[prefix + "gate_proj.weight"], w13[e, :16])
        np.testing.assert_array_equal(tensors[prefix + "up_proj.weight"], w13[e, 16:])
        np.testing.assert_array_equal(tensors[prefix + "down_proj.weight"], w2[e])
    assert "model.layers.1.mlp.gate_proj.weight" in tensors  # the dense layer
    assert tensors["model.embed_tokens.weight"].dtype == ml_dtypes.bfloat16


def test_stacked_experts_load_to_the_same_model(folder):
    """The newer layout: gate_up_proj [E, 2I, H] and down_proj [E, H, I] in one tensor each."""
    expected, _ = load_model(folder)

    def stack(tensors):
        take = lambda e, name: tensors.pop(f"model.layers.0.mlp.experts.{e}.{name}_proj.weight")  # noqa: E731
        gate_up = [np.concatenate([take(e, "gate"), take(e, "up")]) for e in range(4)]
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.stack(gate_up)
        tensors["model.layers.0.mlp.experts.down_proj"] = np.stack([take(e, "down") for e in range(4)])

    edit(folder, stack)
    assert_same_params(load_model(folder)[0], expected)


def test_float32_keeps_the_values(folder):
    plain, _ = load_model(folder)
    wide, config = load_model(folder, dtype="float32")
    assert config.dtype == "float32" and wide.norm(jnp.ones(32)).dtype == jnp.float32
    for path, value in params(wide).items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, params(plain)[path].astype(np.float32))


def test_every_expert_goes_to_the_device_that_owns_it(folder, make_mesh):
    expected, _ = load_model(folder)
    loaded, _ = load_model(folder, mesh=make_mesh(4))
    assert_same_params(loaded, expected)
    w2 = loaded.layers[0].mlp.w2.get_value()
    for device, shard in enumerate(w2.addressable_shards):
        assert shard.index[0] == slice(device, device + 1)
    assert loaded.embed_tokens.weight[...].sharding.is_fully_replicated


def test_redundant_tensors_are_skipped(tmp_path):
    model, config = make_model(tie_word_embeddings=True)
    save_model(model, config, tmp_path)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    edit(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))
    assert_same_params(load_model(tmp_path)[0], model)


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda t: t.pop(EXPERT), ["1 tensors missing", EXPERT, "0 unexpected: none"]),
        (lambda t: t.update(extra=np.ones(2, np.float32)), ["0 tensors missing: none", "1 unexpected: extra"]),
        (lambda t: t.update({EXPERT: t[EXPERT].T.copy()}), ["model.safetensors", EXPERT, "(32, 16)", "(16, 32)"]),
        (lambda t: t.update({EXPERT: t[EXPERT].view(np.uint8)}), [EXPERT, "U8", "BF16"]),
        (lambda t: t.clear(), ["35 tensors missing", "and 27 more"]),
    ],
    ids=["missing", "unexpected", "shape", "type", "empty"],
)
def test_tensors_that_do_not_fit_are_named(folder, change, messages):
    edit(folder, change)
    with pytest.raises(ValueError) as error:
        load_model(folder)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="llama"), "config.json: model_type 'llama' is not supported, only qwen3_moe"),
        (dict(quantization_config={"quant_method": "gptq"}), "quant_method='gptq'"),
        (dict(hidden_size=None), "lacks hidden_size"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5 is not supported"),
        (dict(rope_parameters={"full_attention": {"rope_theta": 3.0}}), r"single kinds of layers \(full_attention\)"),
        (dict(layer_types=5), "layer_types=5 must be a list"),
        (dict(mlp_bias=True), "mlp_bias=True is not supported"),
        (dict(use_sliding_window=True), "use_sliding_window=True is not supported"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "layer_types with 'sliding_attention'"),
    ],
)
def test_configs_that_cannot_be_loaded_are_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


def test_end_tokens_have_three_homes(folder):
    """All that config.json, its text_config and generation_config.json name, as a number or a list."""
    assert end_token_ids(folder) == set()
    edit_config(folder, eos_token_id=[3, 4], text_config={"eos_token_id": 5})
    assert end_token_ids(folder) == {3, 4, 5}
    generation = folder / "generation_config.json"
    for value, found in ((6, {3, 4, 5, 6}), ([3, 7], {3, 4, 5, 7}), (None, {3, 4, 5})):
        generation.write_text(json.dumps({"eos_token_id": value}))
        assert end_token_ids(folder) == found
    for bad in ("</s>", [1.5], [True], -1):
        generation.write_text(json.dumps({"eos_token_id": bad}))
        with pytest.raises(ValueError, match=r"eos_token_id of generation_config.json has .*, which is no token id"):
            end_token_ids(folder)


def test_two_files_about_quantization(folder):
    """config.json is followed; a note says where ModelOpt's own file tells something else."""
    file, section = folder / "hf_quant_config.json", {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}
    edit_config(folder, quantization_config=section)
    for algo, differs in (("W4A16_NVFP4", False), ("NVFP4", True), ("FP9", True)):
        file.write_text(json.dumps({"quantization": {"quant_algo": algo}}))
        plan = quantization_plan(folder, None)
        assert plan.dense.activations == "bf16"
        assert any("hf_quant_config.json says something else" in note for note in plan.notes) == differs
    edit_config(folder, quantization_config=None)
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert quantization_plan(folder, None).dense.activations == "nvfp4"


def test_missing_and_broken_files_are_named(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load_model(tmp_path_factory.mktemp("empty"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_model(folder)


def test_incomplete_shards_are_named(tmp_path):
    save_model(*make_model(), tmp_path, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    index.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], "ghost": "model-00001-of-00009.st"}}))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00009\.st does not exist, but"):
        load_model(tmp_path)
    first = min(values["weight_map"].values())
    index.write_text(json.dumps({**values, "weight_map": {**values["weight_map"], "ghost": first}}))
    with pytest.raises(ValueError, match="lists tensors that are in no file: ghost"):
        load_model(tmp_path)


def test_saving_again_in_one_file_wins_over_older_shards(tmp_path):
    old, config = make_model()
    new = Qwen3Moe(config, rngs=nnx.Rngs(1))
    save_model(old, config, tmp_path, max_shard_bytes=20_000)
    save_model(new, config, tmp_path)
    assert_same_params(load_model(tmp_path)[0], new)
    save_model(old, config, tmp_path, max_shard_bytes=20_000)
    assert_same_params(load_model(tmp_path)[0], old)


def test_the_index_decides_which_file_a_tensor_is_read_from(tmp_path):
    model, config = make_model()
    save_model(model, config, tmp_path, max_shard_bytes=20_000)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    other = tmp_path / max(set(weight_map.values()) - {weight_map["model.embed_tokens.weight"]})
    stale = load_file(other)
    stale["model.embed_tokens.weight"] = np.zeros((32, 32), ml_dtypes.bfloat16)
    save_file(stale, other)
    assert_same_params(load_model(tmp_path)[0], model)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path, content):
    save_model(*make_model(), tmp_path, max_shard_bytes=20_000)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", jnp.float32, np.float32, np.dtype("float32")])
def test_dtype_as_a_name_or_a_type(folder, dtype):
    model, config = load_model(folder, dtype=dtype, quantization=None)
    assert config.dtype == "float32" and {p.dtype for p in params(model).values()} == {np.dtype("float32")}


@pytest.mark.slow
def test_a_mesh_of_explicit_axes_works(folder):
    """The default of jax.make_mesh."""
    mesh = jax.make_mesh((2,), ("ep",), devices=jax.devices()[:2])
    ids = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    alone, on_mesh = load_model(folder)[0](ids), load_model(folder, mesh=mesh)[0](ids)
    np.testing.assert_allclose(np.asarray(on_mesh, np.float32), np.asarray(alone, np.float32), atol=0.02)
    model, _ = load_model(folder)
    configure_experts(model, mesh=mesh)
    np.testing.assert_array_equal(np.asarray(model(ids)), np.asarray(on_mesh))


def test_a_mesh_of_other_axes_is_refused_before_anything_is_read(folder):
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(ValueError, match="one axis 'ep'"):
        load_model(folder, mesh=jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]))
