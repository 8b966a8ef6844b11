"""Folders of Qwen3-VL-MoE: the text model, as the plain folder of the same weights gives it."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from small_folders import assert_same_params, edit, edit_config, make_model
from small_models import forward

from fp4jax.checkpoint import load_model, save_model
from fp4jax.models import Qwen3MoeConfig

pytestmark = pytest.mark.usefixtures("quick_compile")

TEXT = {
    "vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 24,
    "mlp_only_layers": [1], "decoder_sparse_step": 1, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "hidden_act": "silu", "attention_bias": False, "model_type": "qwen3_vl_moe_text",
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    "dtype": "bfloat16",
}  # fmt: skip
CONFIG = {
    "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", "image_token_id": 30,
    "text_config": TEXT, "vision_config": {"model_type": "qwen3_vl_moe", "depth": 2, "hidden_size": 48},
    "tie_word_embeddings": False,
}  # fmt: skip
LAYER = "model.language_model.layers.0.mlp.experts"


def into_vision_model(tensors):
    """The names, the stacked experts ([E, H, 2I] and [E, I, H]) and some of the other tensors of the real folders."""
    for name in [name for name in tensors if name != "lm_head.weight"]:
        tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)
    take = lambda e, name: tensors.pop(f"{LAYER}.{e}.{name}_proj.weight").T  # noqa: E731
    gate_up = np.stack([np.concatenate([take(e, "gate"), take(e, "up")], axis=1) for e in range(4)])
    down = np.stack([take(e, "down") for e in range(4)])
    tensors[f"{LAYER}.gate_up_proj"] = np.ascontiguousarray(gate_up)
    tensors[f"{LAYER}.down_proj"] = np.ascontiguousarray(down)
    tensors["model.visual.blocks.0.attn.qkv.weight"] = np.ones((3, 48), np.float32)
    tensors["model.visual.patch_embed.proj.weight"] = np.ones((48, 3, 2, 16, 16), np.float32)


@pytest.fixture
def folder(tmp_path):
    save_model(*make_model(), tmp_path)
    edit(tmp_path, into_vision_model)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_the_text_model_of_the_plain_folder(folder):
    expected, _ = make_model()
    model, config = load_model(folder)
    assert_same_params(model, expected)
    assert config.norm_topk_prob and config.rope_theta == 1e6 and not config.tie_word_embeddings
    ids = jnp.arange(12, dtype=jnp.int32)[None]
    np.testing.assert_array_equal(np.asarray(forward(model, ids)), np.asarray(forward(expected, ids)))
    assert load_model(folder, dtype="float32")[1].dtype == "float32"


def test_its_config_is_that_of_the_model(folder):
    assert load_model(folder)[1] == make_model()[1]
    newer = {key: value for key, value in TEXT.items() if key not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [4, 2, 2]}
    assert Qwen3MoeConfig.from_hf({**CONFIG, "text_config": newer}) == make_model()[1]


def test_what_it_does_not_hold_is_refused(folder):
    edit_config(folder, text_config={**TEXT, "rope_scaling": {"rope_type": "yarn"}})
    with pytest.raises(ValueError, match="rope_type='yarn'"):
        load_model(folder)
    edit_config(folder, text_config={**TEXT, "model_type": "qwen3_5_moe_text"})
    with pytest.raises(
        ValueError, match=r"text_config of qwen3_vl_moe must have .*'qwen3_vl_moe_text', got 'qwen3_5_moe"
    ):
        load_model(folder)
    edit_config(folder, text_config=None)
    with pytest.raises(ValueError, match=r"'qwen3_vl_moe_text', got None"):
        load_model(folder)
    edit_config(folder, model_type="ernie4_5_moe_vl")
    with pytest.raises(ValueError, match="model_type 'ernie4_5_moe_vl' is not supported, only qwen3_moe, qwen3_vl_moe"):
        load_model(folder)
