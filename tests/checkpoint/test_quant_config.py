"""Which config wins, what every module runs as, and what is refused: tables of pairs of configs and their plans."""

import json
import time

import pytest
from quantization_sections import COMPRESSED, FLOAT4, FP8, MODELOPT, REFERENCE, USERS

from fp4jax.quant_config import Method, plan_quantization
from fp4jax.quant_config.methods import BF16, FP8_ONLINE, FP8_STORED, NVFP4_ONLINE, disagreements

W4A4, W4A16 = Method("nvfp4", "modelopt", "nvfp4"), Method("nvfp4", "modelopt", "bf16")
PACKED = Method("nvfp4", "compressed_tensors", "nvfp4")
DECODED = Method("bf16", "block_wise_fp8", "bf16")
CHECKPOINTS = {"none": None, "fp8": FP8, "modelopt": MODELOPT, "compressed": COMPRESSED}
REFUSED = "needs a quantization config"


@pytest.mark.parametrize(
    ("checkpoint", "user", "expected"),
    [
        # (linear layers, experts), who decided
        ("none", "none", (BF16, BF16, "none")),
        ("none", "fp8", (FP8_ONLINE, BF16, "--quantization")),
        ("none", "reference", REFUSED),
        ("none", "online", (FP8_ONLINE, NVFP4_ONLINE, "--quantization")),
        ("none", "experts", REFUSED),
        ("none", "nothing", (BF16, BF16, "--quantization")),
        ("fp8", "none", (FP8_STORED, DECODED, "checkpoint")),
        ("fp8", "fp8", (FP8_STORED, DECODED, "checkpoint")),
        ("fp8", "reference", (FP8_STORED, DECODED, "checkpoint")),
        ("fp8", "online", (FP8_STORED, DECODED, "checkpoint")),
        ("fp8", "experts", (FP8_STORED, DECODED, "checkpoint")),
        ("fp8", "nothing", (FP8_STORED, DECODED, "checkpoint")),
        ("modelopt", "none", (W4A4, W4A4, "checkpoint")),
        ("modelopt", "fp8", (W4A4, W4A4, "checkpoint")),
        ("modelopt", "reference", (FP8_ONLINE, W4A4, "--quantization")),
        ("modelopt", "online", (FP8_ONLINE, NVFP4_ONLINE, "--quantization")),
        ("modelopt", "experts", (BF16, W4A4, "--quantization")),
        ("modelopt", "nothing", (BF16, BF16, "--quantization")),
        ("compressed", "none", (PACKED, PACKED, "checkpoint")),
        ("compressed", "fp8", (PACKED, PACKED, "checkpoint")),
        ("compressed", "reference", (PACKED, PACKED, "checkpoint")),
        ("compressed", "online", (PACKED, PACKED, "checkpoint")),
        ("compressed", "experts", (PACKED, PACKED, "checkpoint")),
        ("compressed", "nothing", (PACKED, PACKED, "checkpoint")),
    ],
)
def test_precedence(checkpoint, user, expected):
    if expected is REFUSED:
        with pytest.raises(ValueError, match=REFUSED):
            plan_quantization(CHECKPOINTS[checkpoint], USERS[user])
        return
    plan = plan_quantization(CHECKPOINTS[checkpoint], USERS[user])
    dense, experts, source = expected
    assert (plan.dense, plan.experts) == (dense, experts)
    assert source in plan.source and plan.source in str(plan)
    overruled = source == "checkpoint" and user != "none"
    assert any("checkpoint's own config wins" in note for note in plan.notes) == overruled


@pytest.mark.parametrize("checkpoint", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("user", [None, USERS["online"]], ids=["none", "online"])
def test_dict_and_text_and_whole_files_are_the_same(checkpoint, user):
    plan = plan_quantization(checkpoint, user)
    text = None if user is None else json.dumps(user)
    assert plan_quantization({"model_type": "m", "quantization_config": checkpoint}, text) == plan
    assert (
        plan_quantization(
            {"model_type": "m", **({} if checkpoint is None else {"quantization_config": checkpoint})}, user
        )
        == plan
    )


def test_the_file_of_modelopt():
    """hf_quant_config.json has other keys than the section of config.json."""
    own = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16, "exclude_modules": ["lm_head"]}
    config = {"producer": {"name": "modelopt"}, "quantization": own}
    plan = plan_quantization(config, None)
    assert plan.dense == W4A4 and plan.method("lm_head") == BF16
    assert plan.fp8_cache and "FP8 (e4m3)" in str(plan)
    assert plan_quantization(config, REFERENCE).experts == W4A4


def test_a_quantized_cache_alone_leaves_the_weights_plain():
    plan = plan_quantization({"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}, None)
    assert plan.dense == plan.experts == BF16 and plan.fp8_cache and not plan.notes
    with pytest.raises(ValueError, match="quant_algo=None"):
        plan_quantization({"quant_method": "modelopt"}, None)


@pytest.mark.parametrize(
    ("scheme", "followed"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}, True),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}}, True),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "attn_head"}}, False),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, False),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": True}}, False),
        ({"kv_cache_quant_algo": "NVFP4"}, False),
        ({"kv_cache_quant_algo": None}, None),
    ],
)
def test_caches(scheme, followed):
    """FP8 with one scale per layer is followed. Of another format a note says that it is not; None is no format."""
    plan = plan_quantization({"quantization_config": {**MODELOPT, **scheme}}, None)
    assert plan.fp8_cache == bool(followed)
    assert any("the cache stays in the compute dtype" in note for note in plan.notes) == (followed is False)


def test_modules():
    plan = plan_quantization(MODELOPT, None)
    assert plan.method("model.layers.3.mlp.experts") == W4A4
    assert plan.method("model.layers.3.mlp.experts.7.gate_proj") == W4A4
    assert plan.method("model.layers.3.mlp.shared_experts.up_proj") == W4A4
    assert plan.method("model.layers.3.self_attn.q_proj") == plan.method("model.layers.0.mlp.gate") == BF16
    online = plan_quantization(None, USERS["online"])
    assert online.method("model.layers.3.self_attn.q_proj") == FP8_ONLINE
    assert online.method("model.layers.3.mlp.experts") == NVFP4_ONLINE
    for plain in ("lm_head", "model.layers.3.mlp.gate", "model.embed_tokens", "model.layers.3.mlp.shared_expert_gate"):
        assert online.method(plain) == BF16
    # What the checkpoint's own quantization left out is what dense_quant_type is for.
    assert plan_quantization(MODELOPT, REFERENCE).method("model.layers.3.self_attn.q_proj") == FP8_ONLINE


@pytest.mark.parametrize(
    ("pattern", "module", "matches"),
    [
        ("model.layers.1", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1", "model.layers.10.mlp.up_proj", False),
        ("*.up_proj", "model.layers.1.mlp.up_proj", True),
        ("model.layers.*.self_attn", "model.layers.1.self_attn.q_proj", True),
        ("re:.*up_proj", "model.layers.1.mlp.up_proj", True),
        ("re:up_proj", "model.layers.1.mlp.up_proj", False),
        ("lm_head", "model.lm_head_2", False),
    ],
)
def test_patterns(pattern, module, matches):
    plan = plan_quantization({**MODELOPT, "ignore": [pattern]}, None)
    assert (plan.ignored_by(module) == pattern) == matches
    assert plan.method(module) == (BF16 if matches else W4A4)


def test_mixed_precision():
    layers = {
        "model.layers.0.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.0.self_attn.q_proj": "W4A16_NVFP4",
        "model.layers.0.self_attn.v_proj": {"quant_algo": "FP8"},
        "model.layers.1.mlp.experts": {"quant_algo": "FP8_PB_WO"},
    }
    plan = plan_quantization(
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}, None
    )
    assert plan.method("model.layers.0.mlp.experts.3.up_proj") == W4A4
    assert plan.method("model.layers.0.self_attn.q_proj") == W4A16
    assert plan.method("model.layers.0.self_attn.k_proj") == BF16
    assert plan.method("model.layers.0.self_attn.v_proj") == FP8_STORED
    assert plan.method("model.layers.1.mlp.experts.0.up_proj") == DECODED


def mixed_plan(**layers):
    entries = {name.replace("__", "."): entry for name, entry in layers.items()}
    return plan_quantization({"quant_algo": "MIXED_PRECISION", "quantized_layers": entries}, None)


@pytest.mark.parametrize("algo", ["FP8_PB_WO", "FP8_PB_REAL_QUANT", "FP8_BLOCK_SCALES"])
def test_group_sizes_are_those_of_the_algorithm(algo):
    for size in ({}, {"group_size": None}, {"group_size": 128}):
        assert mixed_plan(a__q_proj={"quant_algo": algo, **size}).method("a.q_proj") == FP8_STORED
    assert mixed_plan(a={"quant_algo": "NVFP4", "group_size": 16}).method("a") == W4A4


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("INT4_AWQ", "quant_algo='INT4_AWQ'"),
        ({"quant_algo": "MXFP8", "group_size": 32}, "quant_algo='MXFP8'"),
        ({"quant_algo": "FP8_BLOCK_SCALES", "group_size": 64}, "quant_algo='FP8_BLOCK_SCALES' with group_size=64"),
        ({"quant_algo": "FP8", "group_size": 128}, "quant_algo='FP8' with group_size=128"),
        ({"quant_algo": "W4A16_NVFP4", "group_size": 32}, "quant_algo='W4A16_NVFP4' with group_size=32"),
        ({"quant_algo": "FP8_PB_WO", "scale_fmt": "UE8M0"}, "scale_fmt='UE8M0', which is not supported for FP8_PB_WO"),
        ({"quant_algo": "NVFP4", "dynamic": "yes"}, "dynamic='yes', which is not supported for NVFP4"),
    ],
)
def test_a_layer_is_refused_when_it_is_asked_for(entry, message):
    """Not before: configs also name layers that are never loaded, such as those that predict further tokens."""
    plan = mixed_plan(a__q_proj="NVFP4", b__q_proj=entry, c__experts__0__up_proj=entry)
    assert plan.method("a.q_proj") == W4A4 and plan.method("d.q_proj") == BF16
    for module, name in (("b.q_proj", "b.q_proj"), ("c.experts", "c.experts.0.up_proj")):
        with pytest.raises(ValueError, match=message) as error:
            plan.method(module)
        assert f"quantized_layers: {name} has" in str(error.value)
    assert "not supported" in str(plan)


def test_the_entry_that_names_a_module_goes_first():
    plan = plan_quantization(
        {
            "quant_algo": "MIXED_PRECISION", "ignore": ["a.mlp*", "b.q_proj"],
            "quantized_layers": {"a": "FP8", "a.mlp": "W4A16_NVFP4", "*.q_proj": "NVFP4",
                                 "c.experts.1.up_proj": "NVFP4"},
        },
        None,
    )  # fmt: skip
    assert plan.method("a.mlp") == W4A16  # named itself
    assert plan.method("a.mlp.up_proj") == plan.method("b.q_proj") == BF16  # ignored
    assert plan.method("a.norm") == FP8_STORED  # inside of one that is named
    assert plan.method("d.e.q_proj") == W4A4  # by a pattern
    assert plan.method("c.experts") == W4A4  # contains one that is named


def test_ten_thousands_of_entries_take_no_time():
    """The plan of a model of 94 layers with 128 experts, an entry per projection, as ModelOpt writes it."""
    names = [
        f"model.layers.{layer}.mlp.experts.{e}.{p}_proj"
        for layer in range(94)
        for e in range(128)
        for p in ("gate", "up", "down")
    ]
    config = {"quant_algo": "MIXED_PRECISION", "ignore": ["lm_head", *(f"a.{i}" for i in range(1000))]}
    plan = plan_quantization({**config, "quantized_layers": dict.fromkeys(names, "NVFP4")}, None)
    start = time.process_time()
    assert all(plan.method(name) == W4A4 for name in names)
    assert plan.method("model.layers.93.mlp.experts") == W4A4 and plan.method("model.layers.3.mlp.gate") == BF16
    assert time.process_time() - start < 5  # 0.3 s; a scan per look-up takes an hour
    assert len(str(plan)) < 1000 and "and 36093 more" in str(plan)


def test_powers_of_two_as_activation_scales():
    plan = plan_quantization({**FP8, "scale_fmt": "ue8m0"}, None)
    assert plan.dense == FP8_STORED._replace(activations="fp8_ue8m0") and plan.experts == DECODED
    assert "ue8m0" in str(plan)
    assert plan_quantization({**FP8, "scale_fmt": None}, None).dense == FP8_STORED


def test_a_checkpoint_may_say_mix_quant_itself():
    plan = plan_quantization({"quantization_config": USERS["online"]}, None)
    assert (plan.dense, plan.experts) == (FP8_ONLINE, NVFP4_ONLINE) and "checkpoint (mix_quant)" in plan.source
    assert plan_quantization(USERS["online"], USERS["nothing"]).experts == NVFP4_ONLINE  # the checkpoint wins
    with pytest.raises(ValueError, match=r"moe_quant_type='w4afp8' is not supported"):
        plan_quantization({"quantization_config": mixed(moe_quant_type="w4afp8")}, None)
    with pytest.raises(ValueError, match=r"the checkpoint's quantization section: quantization='wint2'"):
        plan_quantization({"quantization_config": {"quantization": "wint2"}}, None)


def test_sections_stand_in_several_places():
    assert plan_quantization({"model_type": "m", "compression_config": COMPRESSED}, None).dense == PACKED
    assert plan_quantization({"model_type": "m", "text_config": {"quantization_config": MODELOPT}}, None).dense == W4A4
    assert plan_quantization({"model_type": "m", "text_config": {"vocab_size": 3}}, None).source == "none"


def test_groups_may_have_targets():
    """Names or regular expressions; what no group names is plain, and what is ignored stays so."""
    dense, experts = {"weights": FLOAT4, "input_activations": FLOAT4}, {"weights": FLOAT4, "input_activations": None}
    groups = {"a": {**dense, "targets": ["re:.*self_attn.*"]}, "b": {**experts, "targets": [r"re:.*\.experts\..*"]}}
    plan = plan_quantization({**COMPRESSED, "config_groups": groups, "ignore": ["re:.*o_proj"]}, None)
    assert plan.method("model.layers.0.self_attn.q_proj") == PACKED
    assert plan.method("model.layers.0.mlp.experts.1.up_proj") == PACKED._replace(activations="bf16")
    assert plan.method("model.layers.0.self_attn.o_proj") == plan.method("model.layers.0.mlp.up_proj") == BF16


def test_a_group_is_refused_when_one_of_its_targets_is_asked_for():
    eight = {"weights": {"num_bits": 8, "type": "float"}, "targets": ["re:visual.*"]}
    groups = {**COMPRESSED["config_groups"], "vision": eight}
    plan = plan_quantization({**COMPRESSED, "config_groups": groups}, None)
    assert plan.method("model.layers.0.self_attn.q_proj") == PACKED
    with pytest.raises(ValueError, match=r"vision\.weights is"):
        plan.method("visual.blocks.0.mlp")


def test_both_lists_of_modelopt_count():
    plan = plan_quantization({**MODELOPT, "ignore": ["lm_head"], "exclude_modules": ["*.gate", "lm_head"]}, None)
    assert plan.ignore == ("lm_head", "*.gate")


def test_activations_may_have_a_scale_per_token():
    for activations, input_scales in ((True, "per_token"), ("local", "stored"), (False, "stored"), (None, "stored")):
        groups = {"g": {"weights": FLOAT4, "input_activations": {**FLOAT4, "dynamic": activations}}}
        for base, method in ((COMPRESSED, PACKED), (MODELOPT, W4A4)):
            plan = plan_quantization({**base, "config_groups": groups}, None)
            assert plan.dense == method._replace(input_scales=input_scales)


def test_an_algorithm_that_its_groups_contradict_is_followed():
    groups = {"g": {"weights": FLOAT4, "input_activations": FLOAT4}}
    plan = plan_quantization({**MODELOPT, "quant_algo": "W4A16_NVFP4", "config_groups": groups}, None)
    assert plan.dense == W4A16 and any("config_groups say activations in nvfp4" in note for note in plan.notes)


def test_disagreements_are_named():
    plan = plan_quantization(MODELOPT, None)
    attention, dense = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
    found = list(disagreements(plan, {attention: "modelopt", "model.layers.0.mlp.experts": "modelopt", dense: "bf16"}))
    assert found == [
        "model.layers.0.self_attn.q_proj: the config says bf16 (ignored as '*self_attn*'), the tensors are modelopt",
        "model.layers.0.mlp.up_proj: the config says modelopt, the tensors are bf16",
    ]


def test_weight_only_checkpoints():
    groups = {"group_0": {"weights": FLOAT4, "input_activations": None}}
    assert plan_quantization({**COMPRESSED, "config_groups": groups}, None).experts.activations == "bf16"
    assert plan_quantization({**MODELOPT, "quant_algo": "W4A16_NVFP4"}, None).experts == W4A16
    no_algo = {key: value for key, value in MODELOPT.items() if key != "quant_algo"}
    assert plan_quantization({**no_algo, "config_groups": groups}, None).experts == W4A16


def mixed(**keys):
    return {"quantization": "mix_quant", **keys}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ("{not json", "not JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "lacks the key 'quantization'"),
        ("wint2", "quantization='wint2' is not supported"),
        ('{"quantization": "block_wise_fp8", "is_moe_quantized": true}', "unknown key 'is_moe_quantized'=True"),
        (mixed(moe_quant_typ="modelopt_fp4"), "unknown key 'moe_quant_typ'='modelopt_fp4'"),
        (mixed(dense_quant_type="wint8"), "dense_quant_type='wint8' is not supported"),
        (mixed(moe_quant_type="w4afp8"), "moe_quant_type='w4afp8' is not supported"),
        (mixed(moe_quant_type="block_wise_fp8"), "moe_quant_type='block_wise_fp8' is not supported"),
        (mixed(is_moe_quantized="yes"), "is_moe_quantized='yes' must be of type bool"),
        (mixed(is_moe_quantized=True), "moe_quant_type does not say how"),
        (mixed(is_quantized=True), "dense_quant_type does not say how"),
        (mixed(kv_cache_quant_type="block_wise_fp8"), "kv_cache_quant_type='block_wise_fp8' is not supported"),
        (mixed(hadamard_block_size=64), "hadamard_block_size=64 is not supported, only 128"),
        (mixed(is_permuted=False), "is_permuted=False is not supported"),
        (mixed(moe_dynamic_quant=True), "moe_dynamic_quant=True is not supported"),
        (mixed(is_channel_wise=True), "is_channel_wise=True"),
        (mixed(has_zero_point=True), "has_zero_point=True"),
        (mixed(moe_quant_type="modelopt_fp4", image_moe_quant_type="wint8"), "image_moe_quant_type='wint8'"),
        (
            mixed(dense_quant_type="modelopt_fp4", is_quantized=True),
            "dense_quant_type='modelopt_fp4' with is_quantized",
        ),
        (
            mixed(moe_quant_type="modelopt_fp4", is_moe_quantized=True, moe_quant_config={"quant_algo": "INT8"}),
            "quant_algo='INT8'",
        ),
    ],
)
def test_refused_wishes(user, message):
    with pytest.raises(ValueError, match=message):
        plan_quantization(None, user)


def group_with(**changes):
    parts = {
        key: {**FLOAT4, **value} if key in ("weights", "input_activations") else value for key, value in changes.items()
    }
    return {**COMPRESSED, "config_groups": {"g": {"weights": FLOAT4, "input_activations": FLOAT4, **parts}}}


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method='gptq'"),
        ({**MODELOPT, "quant_algo": "FP8"}, "quant_algo='FP8'"),
        ({**MODELOPT, "group_size": 32}, "group_size=32"),
        ({**FP8, "weight_block_size": None}, "weight_block_size=None"),
        ({**FP8, "weight_block_size": [64, 128]}, r"weight_block_size=\[64, 128\]"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme='static'"),
        ({**COMPRESSED, "format": "pack-quantized"}, "format='pack-quantized'"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups must have groups"),
        ({**COMPRESSED, "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}}, r"g.weights is"),
        ({**COMPRESSED, "transform_config": {"a": 1}}, "transform_config"),
        ({**COMPRESSED, "sparsity_config": {"a": 1}}, "sparsity_config"),
        ({**COMPRESSED, "quantization_status": "frozen"}, "quantization_status='frozen'"),
        (group_with(weights={"symmetric": False}), r"g.weights: symmetric=False"),
        (group_with(weights={"group_size": 32}), r"g.weights: group_size=32 is not supported, only 16"),
        (group_with(weights={"actorder": "group"}), r"g.weights: actorder='group'"),
        (group_with(weights={"dynamic": True}), r"g.weights: dynamic=True"),
        (group_with(weights={"strategy": "channel"}), r"g.weights: strategy='channel'"),
        (group_with(input_activations={"dynamic": "global"}), r"g.input_activations: dynamic='global'"),
        (group_with(output_activations={"num_bits": 4}), r"g.output_activations is"),
        (group_with(targets=["MoELayer"]), r"g.targets has the class 'MoELayer'"),
        (group_with(targets=["re:["]), r"config_groups of the checkpoint: 're:\[' is not a regular expression"),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"re:(": "NVFP4"}},
            r"quantized_layers of the checkpoint: 're:\(' is not a regular expression",
        ),
        (group_with(targets="Linear"), r"g.targets='Linear' must be a list"),
        ({**FP8, "scale_fmt": "e5m2"}, "scale_fmt='e5m2'"),
        ({**FP8, "fmt": "e5m2"}, "fmt='e5m2'"),
        ({"quantization_config": {"bits": 4}}, r"names no quant_method; it has the keys \['bits'\]"),
        ({"bits": 4}, "names no quant_method"),
        ({"model_type": "m", "quantization_config": "modelopt"}, "quantization_config='modelopt' .* must be an object"),
    ],
)
def test_refused_checkpoints(checkpoint, message):
    with pytest.raises(ValueError, match=message):
        plan_quantization(checkpoint, None)


def test_unknown_keys_of_a_checkpoint_are_noted():
    assert any("shiny" in note for note in plan_quantization({**MODELOPT, "shiny": 1}, None).notes)
    assert (
        plan_quantization(None, mixed(moe_quant_type="modelopt_fp4", image_moe_quant_type="modelopt_fp4")).experts
        == NVFP4_ONLINE
    )
    assert plan_quantization(None, mixed(dense_quant_type="none")).dense == BF16
