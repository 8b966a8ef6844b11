"""Folders that this project quantizes: every byte against the formulas, activation scales against float64, resuming."""

import functools
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import model_oracles
import numpy as np
import pytest
from python_runs import ROOT, run_python
from refusals import check_refusals
from safetensors import safe_open
from small_folders import add_tokenizer, edit, edit_config
from small_models import YARN, forward, make_deepseek_v3, make_ernie45_moe, make_qwen3_moe
from tensor_files import read_tensors

import oracles
from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.inspect import inspect_folder
from fp4jax.checkpoint.quantizer import quantize
from fp4jax.checkpoint.quantizer.quantize import Recipe, quantize_folder
from fp4jax.checkpoint.storage import tensor_file
from fp4jax.layers import NVFP4Linear

pytestmark = pytest.mark.usefixtures("quick_compile")

IDS = np.random.default_rng(3).integers(0, 96, (2, 5)).astype(np.int32)  # few: not every expert is hit
F32 = np.float32
EXPERTS = "model.layers.0.mlp.experts."
ENDS = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed_tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


def make_source(folder, make=make_qwen3_moe, **changes):
    model = make(**changes)
    save_model(model, model.config, folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A layer with experts, a dense one; float32."""
    return make_source(tmp_path_factory.mktemp("source"), mlp_only_layers=(1,))


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= read_tensors(file)
    return found


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_quantized(name, dense):
    stays = "lm_head" in name or "embed" in name or "norm" in name or name.endswith((".gate.weight", "bias"))
    return ".experts." in name or (dense and not stays)


def oracle_weight(w, recipe, amax):
    """-> packed codes, block scale bytes, the global scale as it is stored."""
    divisor = F32(1536 if recipe.four_over_six else 2688)
    decode, encode = F32(amax) / divisor, divisor / F32(amax)
    if recipe.four_over_six:
        made = oracles.quantize_four_over_six(w, decode)
    elif recipe.layout == "modelopt":
        made = oracles.quantize_modelopt(w, decode)
    else:
        made = oracles.quantize_compressed_tensors(w, encode)
    return *made, np.array(decode) if recipe.layout == "modelopt" else np.array([encode])


RECIPES = [
    Recipe(),
    Recipe(layout="compressed_tensors", quantize_dense=True),
    Recipe(four_over_six=True, shared_scales=False, quantize_dense=True),
    Recipe(layout="compressed_tensors", four_over_six=True, shared_scales=False),
]


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        pytest.param(RECIPES[0], "bfloat16", id="modelopt"),
        pytest.param(RECIPES[1], "float32", id="compressed, dense", marks=pytest.mark.slow),
        pytest.param(RECIPES[2], "float32", id="modelopt, dense, 4/6", marks=pytest.mark.slow),
        pytest.param(RECIPES[3], "bfloat16", id="compressed, 4/6", marks=pytest.mark.slow),
    ],
)
def test_tensors_are_exactly_those_of_the_contract(tmp_path, recipe, dtype):
    """Names, types, shapes and bytes: of quantized weights by the formulas, of all others as they were."""
    make_source(tmp_path / "in", mlp_only_layers=(1,), dtype=dtype)
    quantize_folder(tmp_path / "in", tmp_path / "out", IDS, recipe)
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out")
    shared = 0
    for name, value in before.items():
        if not is_quantized(name, recipe.quantize_dense):
            found = after.pop(name)
            assert found.dtype == value.dtype and found.shape == value.shape and found.tobytes() == value.tobytes()
            continue
        module = name.removesuffix(".weight")
        w, amax = value.astype(F32), np.abs(value.astype(F32)).max()
        for together in (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")):
            this = module.rpartition(".")[2]
            if recipe.shared_scales and this in together:
                others = [np.abs(before[name.replace(this, other)].astype(F32)).max() for other in together]
                amax, shared = max(others), shared + (max(others) > amax)
        codes, block, scale = oracle_weight(w, recipe, amax)
        packed, block_scale, global_scale, input_scale = (after.pop(f"{module}.{e}") for e in ENDS[recipe.layout])
        assert packed.dtype == np.uint8 and block_scale.dtype == ml_dtypes.float8_e4m3fn
        np.testing.assert_array_equal(packed, codes, err_msg=name)
        np.testing.assert_array_equal(block_scale.view(np.uint8), block, err_msg=name)
        assert global_scale.dtype == input_scale.dtype == F32 and input_scale.shape == scale.shape
        assert global_scale.shape == scale.shape and global_scale.tobytes() == scale.tobytes(), name
    assert not after
    assert (shared > 0) == recipe.shared_scales  # some projections take the other's scale


@pytest.mark.slow
def test_the_first_projections_of_latent_attention_share_a_scale(tmp_path):
    """They have the same input, and serving systems multiply them as one; the ones behind them have inputs apart."""
    dense = dict(num_hidden_layers=1, first_k_dense_replace=1, q_lora_rank=32)
    make_source(tmp_path / "in", make_deepseek_v3, **dense)
    quantize_folder(tmp_path / "in", tmp_path / "out", IDS, Recipe(quantize_dense=True))
    before, after, attention = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "out"), "model.layers.0.self_attn."
    names = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj")
    scales = {n: np.abs(before[f"{attention}{n}.weight"].astype(F32)).max() / F32(2688) for n in names}
    assert len(set(scales.values())) == len(names)
    scales["q_a_proj"] = scales["kv_a_proj_with_mqa"] = max(scales["q_a_proj"], scales["kv_a_proj_with_mqa"])
    assert {n: after[f"{attention}{n}.weight_scale_2"] for n in names} == scales


@pytest.mark.parametrize("layout", ENDS)
def test_files_open_with_the_plain_libraries(source, tmp_path, layout):
    (tmp_path / "in").mkdir()
    shutil.copytree(source, tmp_path / "in", dirs_exist_ok=True)
    for name in ("tokenizer.json", "generation_config.json", "pytorch_model.bin", ".hidden"):
        (tmp_path / "in" / name).write_text("{}")
    out = tmp_path / "out"
    quantize_folder(tmp_path / "in", out, IDS, Recipe(layout=layout))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for file in files:
        with safe_open(out / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file}
        content = (out / file).read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:start]).items():
            if name != "__metadata__":
                width = {"F32": 4, "BF16": 2}.get(entry["dtype"], 1)
                assert (start + entry["data_offsets"][0]) % width == 0, name
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors_of(out).values())
    expected = {*files, "config.json", "model.safetensors.index.json", "tokenizer.json", "generation_config.json"}
    assert set(contents(out)) == expected | ({"hf_quant_config.json"} if layout == "modelopt" else set())

    plain = ["lm_head", "model.layers.0.mlp.gate"]
    plain += [f"model.layers.0.self_attn.{n}_proj" for n in "koqv"]
    plain += [f"model.layers.1.mlp.{n}_proj" for n in ("down", "gate", "up")]
    plain += [f"model.layers.1.self_attn.{n}_proj" for n in "koqv"]
    config = json.loads((out / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert section["ignore"] == plain
    if layout == "modelopt":
        assert (section["quant_method"], section["quant_algo"]) == ("modelopt", "NVFP4")
        assert json.loads((out / "hf_quant_config.json").read_text())["quantization"] == {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": plain,
        }  # fmt: skip
    else:
        assert (section["quant_method"], section["format"]) == ("compressed-tensors", "nvfp4-pack-quantized")
    report = inspect_folder(out)
    assert report["loads"] and not report["disagreements"] and report["scales"]["input_scales_missing"] == 0


def float64_amax(config, tensors, sequences):
    """{module: largest input} of every linear layer and expert, experts on all tokens; and which experts are hit."""
    found, hit = {}, set()

    def see(module, x):
        found[module] = max(found.get(module, 0), np.abs(x).max())

    def attention_of(w, p, h):
        for name in ("q_proj", "k_proj", "v_proj"):
            see(p + name, h)
        width = w[p + "o_proj.weight"].shape[1]
        bare = {**w, p + "o_proj.weight": np.eye(width)}
        attended = model_oracles.grouped_attention(config, bare, p, h, model_oracles.rotate)
        see(p + "o_proj", attended)
        return attended @ w[p + "o_proj.weight"].T

    def see_mlp(w, p, h):
        see(p + "gate_proj", h)
        see(p + "up_proj", h)
        act = model_oracles.silu(h @ w[p + "gate_proj.weight"].T) * (h @ w[p + "up_proj.weight"].T)
        see(p + "down_proj", act)

    def experts_of(w, p, h):
        logits = h @ w[p + "gate.weight"].T
        ids, weights = model_oracles.topk_softmax(logits, config["num_experts_per_tok"], config["norm_topk_prob"])
        hit.update(ids.ravel().tolist())
        for e in range(config["num_experts"]):
            see_mlp(w, f"{p}experts.{e}.", h)
        return model_oracles.experts(h, ids, weights, *model_oracles.stacked_experts(w, p, config["num_experts"]))

    def mlp(w, p, h):
        see_mlp(w, p, h)
        return plain_mlp(w, p, h)

    plain_mlp, model_oracles.mlp = model_oracles.mlp, mlp
    try:
        for ids in sequences:
            model_oracles.decoder(config, tensors, ids, attention_of, experts_of)
    finally:
        model_oracles.mlp = plain_mlp
    return found, hit


@pytest.mark.parametrize("layout", ENDS)
def test_input_scales_equal_those_of_a_float64_forward(source, tmp_path, layout):
    out = tmp_path / "out"
    quantize_folder(source, out, IDS, Recipe(layout=layout, quantize_dense=True))
    expected, hit = float64_amax(json.loads((source / "config.json").read_text()), tensors_of(source), IDS)
    assert len(hit) < 8  # some experts saw nothing by routing, and are calibrated all the same
    tensors = tensors_of(out)
    found = {name.rsplit(".", 1)[0]: value for name, value in tensors.items() if name.endswith(ENDS[layout][3])}
    assert found.keys() == expected.keys()
    for module, value in found.items():
        scale = value.reshape(()) if layout == "modelopt" else 1 / value.reshape(())
        np.testing.assert_allclose(scale, expected[module] / 2688, rtol=2e-5, err_msg=module)


def plain_weights(tensors):
    """Dequantized in float64, under the plain names."""
    found = dict(tensors)
    for name in tensors:
        if name.endswith(".weight_scale_2"):
            module = name.removesuffix(".weight_scale_2")
            scale, block = found.pop(name), found.pop(f"{module}.weight_scale")
            found[f"{module}.weight"] = oracles.dequantize(tensors[f"{module}.weight"], block.view(np.uint8), scale)
            found.pop(f"{module}.input_scale")
    return found


MODELS = {
    "qwen3": (make_qwen3_moe, model_oracles.qwen3_moe, dict(mlp_only_layers=(1,))),
    "ernie": (make_ernie45_moe, model_oracles.ernie45_moe, dict(num_hidden_layers=2)),
    "deepseek": (make_deepseek_v3, model_oracles.deepseek_v3, dict(q_lora_rank=32, yarn=YARN)),
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized_model(tmp_path_factory):
    """name -> a folder with all linear layers in NVFP4, ids, and the float64 logits of the dequantized weights."""

    @functools.cache
    def make(name):
        make_model, oracle, changes = MODELS[name]
        source = make_source(tmp_path_factory.mktemp("in"), make_model, **changes)
        out, ids = tmp_path_factory.mktemp("out"), np.arange(60) * 7 % 96
        quantize_folder(source, out, np.repeat(IDS, 4, axis=1), Recipe(quantize_dense=True))
        config = json.loads((out / "config.json").read_text())
        return out, jnp.asarray(ids, jnp.int32)[None], oracle(config, plain_weights(tensors_of(out)), ids)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "ernie", "deepseek"])
def test_every_model_computes_with_the_weights_in_its_folder(quantized_model, tmp_path, name):
    """Without quantized activations the logits are those of the float64 forward."""
    out, ids, expected = quantized_model(name)
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    weight_only = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ["lm_head", "*.gate"]}
    edit_config(tmp_path, quantization_config=weight_only)
    model, _ = load_model(tmp_path)
    assert isinstance(model.layers[-1].self_attn.o_proj, NVFP4Linear)
    found = np.asarray(forward(model, ids)[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_calibrated_scales_serve_as_well_as_scales_per_token(quantized_model, name):
    out, ids, expected = quantized_model(name)
    error = {
        kind: model_oracles.calc_diff(forward(load_model(out, input_scales=kind)[0], ids)[0], expected)
        for kind in ("stored", "per_token")
    }
    assert 0 < error["stored"] < 1.5 * error["per_token"], error


def test_stacked_experts_become_single_ones(source, tmp_path):
    """Newer folders stack the experts; quantized layouts know them one by one."""
    shutil.copytree(source, tmp_path / "in")

    def stack(tensors):
        take = lambda e, name: tensors.pop(f"{EXPERTS}{e}.{name}_proj.weight")  # noqa: E731
        tensors[EXPERTS + "gate_up_proj"] = np.stack(
            [np.concatenate([take(e, "gate"), take(e, "up")]) for e in range(8)]
        )
        tensors[EXPERTS + "down_proj"] = np.stack([take(e, "down") for e in range(8)])

    edit(tmp_path / "in", stack)
    quantize_folder(source, tmp_path / "single", IDS)
    quantize_folder(tmp_path / "in", tmp_path / "stacked", IDS)
    assert contents(tmp_path / "single") == contents(tmp_path / "stacked")


# --- stopping and going on ---


class Stopped(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(source, tmp_path, monkeypatch):
    """Stopped before any file gets its name, one after the other, with the pieces that a killed process leaves."""
    quantize_folder(source, tmp_path / "whole", IDS)
    expected = contents(tmp_path / "whole")
    publish, layers, ran, run = tensor_file.publish, [], [], quantize.HiddenStates.run_layer
    monkeypatch.setattr(quantize.HiddenStates, "run_layer", lambda self, *a: (ran.append(a[0]), run(self, *a))[1])
    for stop in range(1, 50):
        count = 0

        def stopping(content, part, file):
            nonlocal count
            count += 1
            if count == stop:  # noqa: B023
                content.close()
                raise Stopped
            publish(content, part, file)

        out = tmp_path / str(stop)
        with monkeypatch.context() as patch:
            patch.setattr(tensor_file, "publish", stopping)
            try:
                quantize_folder(source, out, IDS)
            except Stopped:
                with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
                    load_model(out)
                layers.append(len(list(out.glob("*.safetensors"))))
            else:
                break
        if 1 < stop < 4:
            (out / "model-00002-of-00003.safetensors.part").write_bytes(b"half of it")
            (out / ".unfinished" / "hidden_1.npy.part").write_bytes(b"half of it")
        ran.clear()
        quantize_folder(source, out, IDS)
        assert ran == [0, 1][max(layers[-1] - 1, 0) :]  # layers that were finished are not run again
        assert contents(out) == expected
    assert layers == [0, 0, 1, 2, 3, 3, 3]  # settings, files, hf_quant_config.json, index, config.json
    assert contents(tmp_path / str(stop)) == expected


def test_going_on_otherwise_is_refused(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "_quantize_layer", lambda *a: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            quantize_folder(source, out, IDS)
    begun = contents_deep(out)
    for ids, recipe, message in (
        (IDS, Recipe(four_over_six=True), "begun with four_over_six = False, which now is True; delete the folder"),
        (IDS, Recipe(layout="compressed_tensors"), "layout = 'modelopt', which now is 'compressed_tensors'"),
        (IDS[:1], Recipe(), r"calibration = '\(2, 5\) ids"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize_folder(source, out, ids, recipe)
    other = make_source(tmp_path / "other", mlp_only_layers=(1,))
    with pytest.raises(ValueError, match=r"begun with source file (config\.json|model\.safetensors)"):
        quantize_folder(other, out, IDS)
    assert contents_deep(out) == begun
    quantize_folder(source, out, IDS)
    with pytest.raises(ValueError, match="out is not empty, and no unfinished run"):
        quantize_folder(source, out, IDS)


def contents_deep(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_file_that_was_cut_is_named(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "finish", lambda *a: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            quantize_folder(source, out, IDS)
    file = out / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors has \d+ bytes, its header says"):
        quantize_folder(source, out, IDS)
    assert not (out / "config.json").exists()


# --- what cannot be quantized ---


def set_value(name, index, value):
    def change(tensors):
        tensors[name][index] = value

    return change


def huge(tensors):
    for name in ("gate", "up"):
        tensors[f"{EXPERTS}3.{name}_proj.weight"] *= F32(1e25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_value(EXPERTS + "2.up_proj.weight", (3, 1), np.nan), r"experts\.2\.up_proj\.weight has nan"),
        (set_value(EXPERTS + "2.down_proj.weight", (3, 1), np.inf), r"experts\.2\.down_proj\.weight has inf"),
        (set_value("model.norm.weight", 3, np.nan), r"model\.safetensors: tensor model\.norm\.weight has numbers that"),
        (set_value("model.layers.0.mlp.gate.weight", 3, np.nan), r"layers\.0\.mlp\.gate\.weight has numbers that"),
        (huge, r"the input of model\.layers\.0\.mlp\.experts\.3\.down_proj has inf: only finite"),
        (lambda t: t.pop(EXPERTS + "1.up_proj.weight"), r"1 tensors missing: .*1\.up_proj"),
    ],
    ids=["nan", "inf", "norm", "router", "activations", "missing"],
)
def test_broken_folders_are_refused_and_leave_no_model(source, tmp_path, change, message):
    shutil.copytree(source, tmp_path / "in")
    edit(tmp_path / "in", change)
    with pytest.raises(ValueError, match=message):
        quantize_folder(tmp_path / "in", tmp_path / "out", IDS)
    assert not (tmp_path / "out" / "config.json").exists() and not list(tmp_path.glob("out/*.part"))


def test_what_is_refused_before_anything_is_written(source, tmp_path):
    out = tmp_path / "out"
    narrow = make_source(tmp_path / "narrow", mlp_only_layers=(1,), intermediate_size=40)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight: K = 40 is no multiple of 16"):
        quantize_folder(narrow, out, IDS, Recipe(quantize_dense=True))
    with pytest.raises(ValueError, match="is the folder that is read"):
        quantize_folder(source, source / ".." / source.name, IDS)
    for ids, message in (
        (np.array([[96]]), "ids .* below 96"), (np.array([[-1]]), "ids .* below 96"), (IDS[:0], "calibration needs"),
        (np.zeros((1, 65), int), "sequences of 65 tokens exceed 64"), (IDS[0], "calibration needs ids"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            quantize_folder(source, out, ids)
    assert not out.exists()
    out.write_text("")
    with pytest.raises(ValueError, match="is a file; the output is a folder"):
        quantize_folder(source, out, IDS)
    out.unlink()
    quantize_folder(source, out, IDS)
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj\.weight is quantized already \(modelopt\)"):
        quantize_folder(out, tmp_path / "again", IDS)


def test_what_the_model_does_not_know_is_copied(source, tmp_path):
    """But not scales that an earlier quantization left behind, under the name of one that is made."""
    shutil.copytree(source, tmp_path / "in")
    scale, other = EXPERTS + "1.up_proj.input_scale", "model.layers.2.enorm.weight"
    edit(tmp_path / "in", lambda t: t.update({scale: np.array(7, F32), other: np.ones(3, F32)}))
    for folder in (source, tmp_path / "in"):
        quantize_folder(folder, tmp_path / f"out_{folder.name}", IDS)
    plain, found = tensors_of(tmp_path / f"out_{source.name}"), tensors_of(tmp_path / "out_in")
    np.testing.assert_array_equal(found.pop(other), np.ones(3))
    assert found.keys() == plain.keys() and found[scale] == plain[scale]
    assert inspect_folder(tmp_path / "out_in")["loads"]


def test_dead_experts_get_usable_scales(source, tmp_path):
    """Weights of zeros: scales of 1 for weights and inputs."""
    shutil.copytree(source, tmp_path / "in")
    edit(tmp_path / "in", lambda t: [t[f"{EXPERTS}5.{n}_proj.weight"].fill(0) for n in ("gate", "up", "down")])
    quantize_folder(tmp_path / "in", tmp_path / "out", IDS)
    tensors = tensors_of(tmp_path / "out")
    assert tensors[EXPERTS + "5.down_proj.input_scale"] == tensors[EXPERTS + "5.up_proj.weight_scale_2"] == 1
    assert inspect_folder(tmp_path / "out")["loads"]


@pytest.mark.parametrize(("amax", "scale"), [(1e-32, 2.0**-100), (1e35, 2.0**100), (2688.0, 1.0)])
def test_scales_stay_within_what_can_be_loaded(amax, scale):
    """Of weights and of inputs; compressed-tensors keeps the reciprocal."""
    assert quantize._scale("w", F32(amax), 2688.0, "modelopt") == F32(scale)
    assert quantize._scale("w", F32(amax), 2688.0, "compressed_tensors") == F32(1 / scale)


# --- the script ---


def run_script(name, *arguments):
    command = [ROOT / "experiments" / f"{name}.py", *arguments]
    done = run_python(*command, settings={"jax_disable_most_optimizations": True}, warnings="error", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def by_script(tmp_path_factory):
    """A folder with a tokenizer of 32 words, and what the script made of it and a text of them."""
    folder = tmp_path_factory.mktemp("script")
    source, text = make_source(folder / "in", mlp_only_layers=(1,)), folder / "text.txt"
    add_tokenizer(source)
    text.write_text("".join(f"w{i * i % 31}\n" for i in range(80)))
    said = run_script(
        "quantize_checkpoint", f"--model={source}", f"--output={folder}/out", f"--calibration={text}",
        "--sequence_length=16", "--calibration_tokens=70",
    )  # fmt: skip
    assert "4 sequences of 16 tokens" in said and f"{folder}/out is complete" in said
    return source, folder / "out"


@pytest.mark.slow
def test_the_script_cuts_the_text_into_sequences(by_script, tmp_path):
    source, out = by_script
    ids = np.array([i * i % 31 for i in range(64)]).reshape(4, 16)
    quantize_folder(source, tmp_path / "expected", ids)
    assert contents(out).keys() == contents(tmp_path / "expected").keys()
    assert "tokenizer.json" in contents(out)
    found, expected = tensors_of(out), tensors_of(tmp_path / "expected")
    for name, value in expected.items():
        if name.endswith("input_scale"):  # computed by another process, under other settings of the compiler
            np.testing.assert_allclose(found[name], value, rtol=1e-5)
        else:
            assert found[name].tobytes() == value.tobytes()


@pytest.mark.slow
def test_the_other_scripts_take_the_folder(by_script, tmp_path):
    """Convert, inspect, generate."""
    made = by_script[1]
    run_script("quantize_checkpoint", f"--model={made}", f"--output={tmp_path}/out", "--layout=compressed_tensors")
    for folder in (made, tmp_path / "out"):
        said = run_script("inspect_checkpoint", f"--model={folder}")
        assert ": loads" in said and "differ:" not in said
        said = run_script("generate", f"--model={folder}", "--prompt=w3 w1", "--max_new_tokens=2", "--noblock_graph")
        assert "experts NVFP4Tensor" in said


@pytest.mark.slow
def test_the_committed_model_still_writes_code(tmp_path):
    """Bytes as tokens; everything but the head in NVFP4."""
    source, out = ROOT / "experiments" / "checkpoints" / "tiny_lm", tmp_path / "out"
    run_script(
        "quantize_checkpoint", f"--model={source}", f"--output={out}",
        f"--calibration={ROOT}/experiments/text/corpora.py", "--sequence_length=256", "--calibration_tokens=2048",
        "--quantize_dense", "--four_over_six",
    )  # fmt: skip
    prompt = "--prompt=def read_lines(path):\n"
    run_script("generate", f"--model={out}", prompt, "--max_new_tokens=12", f"--json={tmp_path}/a.json")
    assert json.loads((tmp_path / "a.json").read_text())["text"].startswith("    ")


def test_bad_flags_are_refused(tmp_path, source):
    made, empty = tmp_path / "made", tmp_path / "empty.txt"
    quantize_folder(source, made, IDS)
    empty.write_text("")
    latin = tmp_path / "latin.txt"
    latin.write_bytes("w1 é".encode("latin-1"))
    output = f"--output={tmp_path}/out"
    check_refusals(
        "quantize_checkpoint",
        {
            (f"--model={tmp_path}", output): "model.safetensors does not exist",
            (f"--model={source}", output): "--calibration is missing",
            (f"--model={source}", output, f"--calibration={tmp_path}/none.txt"): "No such file",
            (f"--model={source}", output, f"--calibration={empty}"): "empty.txt has no text",
            (f"--model={source}", output, f"--calibration={latin}"): "latin.txt is not UTF-8 text: byte 0xe9",
            (f"--model={source}", output, f"--calibration={tmp_path}"): "cannot be read: Is a directory",
            (f"--model={source}", f"--output={empty}"): f"--output={empty}: {empty} is not a folder",
            (f"--model={made}", output): "has the layout modelopt already",
            (f"--model={made}", output, f"--calibration={empty}"): "can only be converted",
            (f"--model={made}", f"--output={made}", "--layout=compressed_tensors"): "is the folder that is read",
            (f"--model={source}", output, "--layout=awq"): "--layout",
            (f"--model={source}", output, "stray"): "unexpected arguments",
        },
    )
    assert not (tmp_path / "out").exists()
