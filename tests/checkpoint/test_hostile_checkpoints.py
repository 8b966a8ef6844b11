"""Folders that are broken, or that lie: each is refused, with a message that says what is wrong and where.

Beside those of test_checkpoint.py, test_quantized_checkpoints.py, test_stacked_experts.py and test_qwen3_vl_moe.py.
"""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from quantization_sections import COMPRESSED, FP8, MODELOPT
from quantized_folders import EXPERTS, UP, WEIGHT_ONLY, fp8, nvfp4, put
from safetensors.numpy import save_file
from small_folders import edit, edit_config, make_model
from tensor_files import read_tensors

from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.inspect import inspect_folder
from fp4jax.nvfp4 import dequantize

pytestmark = [
    pytest.mark.usefixtures("quick_compile"),
    pytest.mark.filterwarnings("ignore:.*modules are not as the config says"),
]
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GATE, Q = EXPERTS + "2.gate_proj.", "model.layers.0.self_attn.q_proj."
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
KV = "model.layers.0.self_attn.k_proj.k_scale"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder that loads: experts and the first layer's q_proj in ModelOpt's NVFP4."""
    folder = tmp_path_factory.mktemp("good")
    save_model(*make_model(), folder)
    rng = np.random.default_rng(0)

    def change(tensors):
        for name in sorted(tensors):
            if ".experts." in name or name == Q + "weight":
                nvfp4(tensors, name.removesuffix(".weight"), "modelopt", rng)

    edit(folder, change)
    edit_config(folder, quantization_config=MODELOPT)
    load_model(folder)
    assert inspect_folder(folder)["loads"]
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path, dirs_exist_ok=True)


# --- ways to break a folder: every one is a function of it ---


def header(change):
    """Rewrites the header of the weights after `change(entries)`, which may return bytes to be used instead."""

    def broken(folder):
        content = (folder / WEIGHTS).read_bytes()
        size = int.from_bytes(content[:8], "little")
        entries = json.loads(content[8 : 8 + size])
        text = change(entries)
        text = json.dumps(entries).encode() if text is None else text
        (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return broken


def entry(name, **changes):
    return header(lambda entries: entries[name].update(changes))


def moved(name, by, grow=0):
    """The tensor's bytes are said to start, and to end, elsewhere."""

    def change(entries):
        start, stop = entries[name]["data_offsets"]
        entries[name]["data_offsets"] = [start + by, stop + by + grow]

    return header(change)


def content(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def tensors(change):
    return lambda folder: edit(folder, change)


def without(*names):
    return tensors(lambda t: [t.pop(name) for name in names])


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def text(name, value):
    return lambda folder: (folder / name).write_text(value)


def shards(change_map=lambda weight_map: None, change_second=lambda tensors: None):
    """The folder in two files and an index, both changed."""

    def broken(folder):
        everything = read_tensors(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        first = {name: value for name, value in everything.items() if ".experts." in name}
        second = {name: value for name, value in everything.items() if ".experts." not in name}
        weight_map = {name: "a.safetensors" for name in first} | {name: "b.safetensors" for name in second}
        change_map(weight_map)
        change_second(second)
        save_file(first, folder / "a.safetensors")
        save_file(second, folder / "b.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return broken


def rename(change):
    def renamed(tensors):
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return lambda folder: edit(folder, renamed)


def compress_one_expert(tensors):
    """Expert 2 as compressed-tensors stores it, the others as ModelOpt does."""
    for projection in ("gate", "up", "down"):
        module = f"{EXPERTS}2.{projection}_proj."
        tensors[module + "weight_packed"] = tensors.pop(module + "weight")
        tensors[module + "weight_global_scale"] = np.float32(1) / tensors.pop(module + "weight_scale_2").reshape(1)
        tensors[module + "input_global_scale"] = np.float32(1) / tensors.pop(module + "input_scale").reshape(1)


def quantization(base, **changes):
    return config(quantization_config={**base, **changes})


GROUP = COMPRESSED["config_groups"]["group_0"]
NOT_READABLE = [WEIGHTS, "is not a readable safetensors file"]
HOSTILE = {
    # the file
    "empty file": (content(lambda c: b""), NOT_READABLE),
    "header longer than the file": (content(lambda c: (1 << 40).to_bytes(8, "little") + c[8:]), NOT_READABLE),
    "header shorter than it is": (content(lambda c: (20).to_bytes(8, "little") + c[8:]), NOT_READABLE),
    "header that is no JSON": (header(lambda entries: b"{'a': 1}" + b" " * 8), NOT_READABLE),
    "header that is a list": (header(lambda entries: b"[1, 2, 3]" + b" " * 7), NOT_READABLE),
    "entry without a type": (header(lambda entries: entries[NORM].pop("dtype") and None), NOT_READABLE),
    "type that does not exist": (entry(NORM, dtype="Q4_K"), [*NOT_READABLE, "Q4_K"]),
    "type that no weight has": (entry(NORM, dtype="I16"), [WEIGHTS, NORM, "I16", "expected (32,)", "BF16"]),
    "shape that its bytes do not have": (entry(NORM, shape=[64]), NOT_READABLE),
    "shape beyond all memory": (entry(NORM, shape=[1 << 62, 1 << 62]), NOT_READABLE),
    "overlapping tensors": (moved(NORM, -16), NOT_READABLE),
    "tensor with a gap before it": (moved(NORM, 8), NOT_READABLE),
    "tensor beyond the end of the file": (moved(NORM, 1 << 30), NOT_READABLE),
    "end before start": (moved(NORM, 0, grow=-128), NOT_READABLE),
    "bytes behind the last tensor": (content(lambda c: c + b"\0" * 16), NOT_READABLE),
    # shards
    "index that names no file": (shards(lambda m: m.update({NORM: 3})), [INDEX, NORM, "3", "name of a file"]),
    "index that leads out of the folder": (
        shards(lambda m: m.update({NORM: "../a.safetensors"})),
        [INDEX, NORM, "../a.safetensors", "same folder"],
    ),
    "index that names another shard": (
        shards(lambda m: m.update({NORM: "a.safetensors"})),
        [INDEX, NORM, "should be in a.safetensors", "in b.safetensors"],
    ),
    "tensor of two shards that the index does not know": (
        shards(lambda m: m.pop(UP + "weight"), lambda t: t.update({UP + "weight": np.zeros((16, 16), np.uint8)})),
        ["b.safetensors", UP + "weight", "is in a.safetensors too"],
    ),
    "shard that is not there": (
        lambda folder: (shards()(folder), (folder / "a.safetensors").unlink()),
        ["a.safetensors does not exist", INDEX],
    ),
    # NVFP4
    "global scale NaN": (
        tensors(put(UP + "weight_scale_2", np.float32(np.nan))),
        [WEIGHTS, UP + "weight_scale_2", "nan"],
    ),
    "global scale too small to compute with": (
        tensors(put(UP + "weight_scale_2", np.float32(1e-35))),
        [WEIGHTS, UP + "weight_scale_2", "e-35", "2^-100"],
    ),
    "global scale of another type": (
        tensors(lambda t: t.update({UP + "weight_scale_2": np.ones((), ml_dtypes.bfloat16)})),
        [WEIGHTS, UP + "weight_scale_2", "BF16", "F32"],
    ),
    "activation scale infinite": (
        tensors(put(UP + "input_scale", np.float32(np.inf))),
        [WEIGHTS, UP + "input_scale = inf"],
    ),
    "activation scale negative": (
        tensors(put(UP + "input_scale", np.float32(-2))),
        [WEIGHTS, UP + "input_scale = -2.0"],
    ),
    "activation scale of a linear layer zero": (
        tensors(put(Q + "input_scale", np.float32(0))),
        [WEIGHTS, Q + "input_scale = 0.0"],
    ),
    "block scales as bytes": (
        tensors(lambda t: t.update({UP + "weight_scale": t[UP + "weight_scale"].view(np.uint8)})),
        [WEIGHTS, UP + "weight_scale", "U8", "F8_E4M3"],
    ),
    "block scales of blocks of 32": (
        tensors(lambda t: t.update({UP + "weight_scale": t[UP + "weight_scale"][:, :1].copy()})),
        [WEIGHTS, UP + "weight_scale", "(16, 1)", "(16, 2)"],
    ),
    "block scales swizzled": (
        tensors(lambda t: t.update({UP + "weight_scale": np.zeros((128, 4), ml_dtypes.float8_e4m3fn)})),
        [WEIGHTS, UP + "weight_scale", "(128, 4)", "(16, 2)"],
    ),
    "weight on its side": (
        tensors(lambda t: t.update({EXPERTS + "2.down_proj.weight": t[EXPERTS + "2.down_proj.weight"].T.copy()})),
        [WEIGHTS, EXPERTS + "2.down_proj.weight", "(8, 32)", "(32, 8)"],
    ),
    "linear layer without block scales": (without(Q + "weight_scale"), ["1 tensors missing", Q + "weight_scale"]),
    "linear layer without codes": (
        without(Q + "weight"),
        ["missing", Q + "weight", "2 unexpected", Q + "weight_scale"],
    ),
    "no up projection": (
        without(*(UP + end for end in ("weight", "weight_scale", "weight_scale_2", "input_scale"))),
        ["3 tensors missing", UP + "weight", "0 unexpected"],
    ),
    "an expert is missing": (
        rename(lambda n: n.replace(".experts.3.", ".experts.9.")),
        [
            "9 tensors missing",
            EXPERTS + "3.down_proj.weight",
            "9 unexpected",
            EXPERTS + "9.down_proj.weight",
        ],
    ),
    "one expert too many": (
        tensors(lambda t: t.update({EXPERTS + "4.up_proj.weight": t[UP + "weight"]})),
        ["1 unexpected", EXPERTS + "4.up_proj.weight"],
    ),
    "gate in NVFP4 beside a plain up": (
        tensors(lambda t: [t.update({UP + "weight": np.ones((16, 32), ml_dtypes.bfloat16)})]),
        [EXPERTS + "0.gate_proj.weight is U8 (modelopt)", UP + "weight is BF16 (bf16)", "both be NVFP4 or both not"],
    ),
    "a cache scale of zero": (tensors(put(KV, np.float32(0))), [WEIGHTS, KV, "0.0", "positive"]),
    "a cache scale per head": (tensors(put(KV, np.ones(2, np.float32))), [WEIGHTS, KV, "(2,)", "expected ()"]),
    # names and sizes against config.json
    "more experts in the config": (config(num_experts=5), ["9 tensors missing", EXPERTS + "4.down_proj.weight"]),
    "fewer experts in the config": (config(num_experts=3), ["9 unexpected", EXPERTS + "3.down_proj.weight"]),
    "more experts per token than there are": (config(num_experts_per_tok=5), ["5", "4"]),
    "more layers in the config": (config(num_hidden_layers=3), ["missing", "model.layers.2.input_layernorm.weight"]),
    "another vocabulary": (config(vocab_size=31), [WEIGHTS, EMBEDDING, "(32, 32)", "(31, 32)"]),
    "no head, though not tied": (without(HEAD), ["1 tensors missing", HEAD]),
    "a head of its own, though tied": (
        config(tie_word_embeddings=True),
        [WEIGHTS, HEAD, EMBEDDING, "tie_word_embeddings"],
    ),
    "a prefix that nothing else has": (
        rename(lambda n: n.replace("model.norm", "transformer.norm")),
        ["1 tensors missing: model.norm.weight", "1 unexpected: transformer.norm.weight"],
    ),
    "a number as text": (config(num_hidden_layers="2"), ["num_hidden_layers='2'", "int"]),
    "a fraction of a head": (config(num_attention_heads=2.5), ["num_attention_heads=2.5", "int"]),
    "a number as a switch": (config(norm_topk_prob="false"), ["norm_topk_prob='false'", "bool"]),
    "a type that is not computed in": (config(torch_dtype="float64"), ["dtype must be one of", "float64"]),
    "a list of numbers that is none": (config(mlp_only_layers=1), ["mlp_only_layers=1", "list of whole numbers"]),
    "RoPE as text": (config(rope_scaling="yarn"), ["rope_scaling='yarn' must be an object"]),
    "no model type": (config(model_type=None), [CONFIG, "model_type None is not supported"]),
    "config that is a list": (text(CONFIG, "[]"), [CONFIG, "is not a JSON object"]),
    "config that is no text": (lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe{"), [CONFIG, "is not JSON"]),
    "config without end": (text(CONFIG, "[" * 100_000), [CONFIG, "is not JSON"]),
    # quantization configs
    "quantization config that is a name": (
        config(quantization_config="modelopt"),
        [CONFIG, "quantization_config", "'modelopt'"],
    ),
    "a method as a list": (quantization(MODELOPT, quant_method=["modelopt"]), ["quant_method=['modelopt']"]),
    "an algorithm as a list": (quantization(MODELOPT, quant_algo=["NVFP4"]), ["quant_algo=['NVFP4']"]),
    "a layer's algorithm as a list": (
        quantization(MODELOPT, quant_algo="MIXED_PRECISION", quantized_layers={Q[:-1]: ["x"]}),
        [Q[:-1] + " has quant_algo=['x']"],
    ),
    "an algorithm that does not exist": (quantization(MODELOPT, quant_algo="NVFP5"), ["quant_algo='NVFP5'"]),
    "groups of 32": (quantization(MODELOPT, group_size=32), ["group_size=32", "16"]),
    "groups of 128 of compressed-tensors": (
        quantization(COMPRESSED, config_groups={"g": {**GROUP, "weights": {**GROUP["weights"], "group_size": 128}}}),
        ["group_size=128", "16"],
    ),
    "integers of compressed-tensors": (
        quantization(COMPRESSED, config_groups={"g": {**GROUP, "weights": {"num_bits": 4, "type": "int"}}}),
        ["g.weights", "'int'"],
    ),
    "FP8 in blocks of 64": (
        quantization(FP8, weight_block_size=[64, 64]),
        ["weight_block_size=[64, 64]", "[128, 128]"],
    ),
    "FP8 blocks that are a number": (quantization(FP8, weight_block_size=128), ["weight_block_size=128", "[128, 128]"]),
    "exclude list that is a number": (quantization(MODELOPT, ignore=3), ["ignore=3", "list"]),
    "exclude list of numbers": (quantization(MODELOPT, ignore=[3]), ["ignore=[3]", "list"]),
    "exclude pattern that is no expression": (quantization(COMPRESSED, ignore=["re:*"]), ["ignore", "'re:*'"]),
    "groups that are a list": (quantization(COMPRESSED, config_groups=[1]), ["config_groups=[1]"]),
}


def test_there_are_more_than_thirty():
    assert len(HOSTILE) > 30


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_with_a_message(folder, name):
    """By the loader and by the report; nothing but ValueError or FileNotFoundError comes out of either."""
    breaks, messages = HOSTILE[name]
    breaks(folder)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_model(folder)
    for message in messages:
        assert message in str(error.value)
    try:
        report = inspect_folder(folder)
    except (ValueError, FileNotFoundError):
        return  # nothing to report on
    assert not report["loads"] and any(messages[-1] in problem for problem in report["problems"])


def decoded_weights(folder):
    block = load_model(folder)[0].layers[0].mlp
    return [np.asarray(dequantize(w.get_value(), np.float32)) for w in (block.w13, block.w2)]


def test_one_expert_by_another_tool(folder):
    """Both tools' NVFP4 is the same arithmetic: the experts run together."""
    expected = decoded_weights(folder)
    edit(folder, compress_one_expert)
    assert inspect_folder(folder)["loads"]
    for found, wanted in zip(decoded_weights(folder), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)  # reciprocals of reciprocals


def test_the_report_sees_scales_of_fp8(folder):
    edit(folder, lambda tensors: fp8(tensors, "model.layers.0.self_attn.k_proj", np.random.default_rng(0)))
    assert inspect_folder(folder)["loads"]
    edit(folder, put("model.layers.0.self_attn.k_proj.weight_scale_inv", np.zeros((1, 1), np.float32)))
    (problem,) = inspect_folder(folder)["problems"]
    assert "k_proj.weight_scale_inv has 0.0" in problem


BAD_INPUT = {GATE + "input_scale": np.float32(0), Q + "input_scale": np.float32(np.inf)}


@pytest.mark.parametrize("way", ["per_token", "weight only"])
def test_activation_scales_that_nobody_reads_may_be_anything(folder, way):
    edit(folder, lambda tensors: tensors.update({name: np.array(value) for name, value in BAD_INPUT.items()}))
    (zero, infinite) = inspect_folder(folder)["problems"]
    assert f"{GATE}input_scale = 0.0" in infinite + zero and f"{Q}input_scale = inf" in infinite + zero
    options = {"input_scales": "per_token"} if way == "per_token" else {}
    if way == "weight only":
        edit_config(folder, quantization_config=WEIGHT_ONLY["modelopt"])
    assert inspect_folder(folder, **options)["loads"]
    load_model(folder, **options)


def test_layers_that_are_never_read_may_be_broken(folder):
    """Layers that predict further tokens are not loaded, whatever they hold."""
    broken = {"model.layers.7.mlp.experts.0.up_proj." + end: value for end, value in (
        ("weight", np.zeros((16, 16), np.uint8)),
        ("weight_scale", np.full((16, 2), np.nan, ml_dtypes.float8_e4m3fn)),
        ("weight_scale_2", np.zeros((), np.float32)),
        ("weight_scale_inv", np.zeros((1, 1), np.float32)),
    )}  # fmt: skip
    edit(folder, lambda tensors: tensors.update(broken))
    report = inspect_folder(folder)
    assert report["loads"] and report["problems"] == [] and report["scales"]["layers"] == 13
    load_model(folder)


def test_all_problems_are_told_and_the_loader_says_how_many(folder):
    edit(folder, lambda tensors: [tensors.pop(f"{EXPERTS}{e}.down_proj.input_scale") for e in range(4)])
    edit(folder, put(Q + "input_scale", np.float32(-1)))
    edit(folder, put(UP + "weight_scale_2", np.float32(np.nan)))
    problems = inspect_folder(folder)["problems"]
    assert len(problems) == 3
    with pytest.raises(ValueError, match="and 1 more problem"):
        load_model(folder)


def test_sizes_that_nvfp4_does_not_have(tmp_path):
    """Experts of 24 columns are no whole number of blocks: refused at once, not at the first forward pass."""
    save_model(*make_model(moe_intermediate_size=24), tmp_path)
    asked = {"quantization": "mix_quant", "moe_quant_type": "modelopt_fp4"}
    report = inspect_folder(tmp_path, quantization=asked)
    assert not report["loads"] and "down_proj" in report["problems"][0] and "K = 24" in report["problems"][0]
    with pytest.raises(ValueError, match="K = 24 is no multiple of 16"):
        load_model(tmp_path, quantization=asked)

    def change(tensors):
        name = EXPERTS + "0.down_proj.weight"
        tensors[name] = np.zeros((32, 12), np.uint8)
        tensors[name + "_scale"] = np.ones((32, 1), ml_dtypes.float8_e4m3fn)
        tensors[name + "_scale_2"] = np.ones((), np.float32)

    edit(tmp_path, change)
    edit_config(tmp_path, num_experts=1, num_experts_per_tok=1, quantization_config=MODELOPT)
    with pytest.raises(ValueError, match="K = 24 is no multiple of 16"):
        load_model(tmp_path)
    assert "K = 24" in inspect_folder(tmp_path)["problems"][0]


def test_experts_that_do_not_divide_are_refused_before_anything_is_read(folder, make_mesh, monkeypatch):
    edit_config(folder, quantization_config=WEIGHT_ONLY["modelopt"])
    monkeypatch.setattr("fp4jax.checkpoint.load._fill", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match="4 experts cannot be split over 3 devices"):
        load_model(folder, mesh=make_mesh(3))


def test_exclude_lists_that_contradict_the_tensors_are_reported(folder):
    """They have been wrong in released checkpoints: the tensors decide, and a warning names the modules."""
    edit_config(folder, quantization_config={**WEIGHT_ONLY["modelopt"], "ignore": ["*.experts*"]})
    expected = r"layers\.0\.mlp\.experts: the config says bf16 \(ignored as '\*\.experts\*'\), the tensors are modelopt"
    with pytest.warns(UserWarning, match=expected):
        model, _ = load_model(folder)
    assert model.layers[0].mlp.w13.get_value().qdata.dtype == np.uint8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="nonsense"), "dtype must be bfloat16 or float32, as a name or a type, got 'nonsense'"),
        (dict(dtype="float16"), "dtype must be one of"),
        (dict(input_scales="x"), "input_scales must be 'stored' or 'per_token', got 'x'"),
        (dict(quantization={"quantization": ["x"]}), r"quantization=\['x'\] is not supported"),
    ],
)
def test_options_that_do_not_exist_are_refused_alike(folder, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load_model(folder, **options)
    assert inspect_folder(folder, **options)["problems"] == [str(error.value)]


def test_a_byte_order_mark_is_no_part_of_a_config(folder):
    (folder / CONFIG).write_text("\ufeff" + (folder / CONFIG).read_text(), encoding="utf-8")
    assert inspect_folder(folder)["loads"]


def two_kinds(first, second):
    layers = {first: "NVFP4", second: "W4A16_NVFP4"}
    return {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}


def test_layers_that_the_config_does_not_name_are_not_guessed(folder):
    """Entries under another prefix, say: the tensors are NVFP4, and what the activations are, nothing says."""
    edit_config(folder, quantization_config=two_kinds("x.layers.0.mlp.experts", "x.layers.1.mlp.experts"))
    with pytest.raises(ValueError, match="does not say what the activations are"):
        load_model(folder)
    problems = inspect_folder(folder)["problems"]
    for layer in (EXPERTS + "0.gate_proj", EXPERTS + "0.down_proj", Q[:-1]):
        assert any(p.startswith(layer) and "does not say what the activations are" in p for p in problems)
    edit_config(folder, quantization_config=two_kinds(EXPERTS[:-1], Q[:-1]))
    layer = load_model(folder)[0].layers[0]
    assert layer.mlp.config.activation_format_1 == "nvfp4" and layer.self_attn.q_proj.activation_format == "bf16"


def test_mixed_precision_whose_layers_stand_in_the_other_file(folder):
    alone = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    edit_config(folder, quantization_config=alone)
    with pytest.raises(ValueError, match="names no layer in quantized_layers"):
        load_model(folder)
    assert "names no layer" in inspect_folder(folder)["problems"][0]
    layers = dict.fromkeys((EXPERTS[:-1], Q[:-1]), "W4A16_NVFP4")
    file = {"quantization": {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}}
    (folder / "hf_quant_config.json").write_text(json.dumps(file))
    assert load_model(folder)[0].layers[0].mlp.config.activation_format_1 == "bf16"
    (folder / "hf_quant_config.json").unlink()
    group = {"weights": GROUP["weights"], "input_activations": None, "targets": ["re:.*"]}
    edit_config(folder, quantization_config={**alone, "config_groups": {"g": group}})
    assert load_model(folder)[0].layers[0].mlp.config.activation_format_1 == "bf16"
