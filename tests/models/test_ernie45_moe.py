"""ERNIE-4.5-MoE: logits of a folder against float64, names of tensors, configs of both generations, buckets."""

import json

import jax.numpy as jnp
import model_oracles
import numpy as np
import pytest
from small_models import forward, make_ernie45_moe as make_model
from tensor_files import read_tensors

from fp4jax.checkpoint import load_model, save_model
from fp4jax.engine import BucketedModel
from fp4jax.models import Ernie45MoeConfig, configure_experts, quantize_experts

pytestmark = pytest.mark.usefixtures("quick_compile")

ATOL = 2e-5  # float32 against float64, of logits up to 3


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(tie_word_embeddings=False, moe_num_shared_experts=0, num_experts_per_tok=3),
        # Which layers have experts is tested below, for every setting.
        pytest.param(
            dict(moe_layer_start_index=0, moe_layer_end_index=1, num_key_value_heads=1), marks=pytest.mark.slow
        ),
        dict(moe_layer_interval=2, head_dim=8),
    ],
    ids=["first layer dense", "no shared experts", "last layer dense", "every second layer sparse"],
)
def test_logits_equal_the_float64_forward(tmp_path, changes):
    model = make_model(**changes)
    save_model(model, model.config, tmp_path)
    loaded, config = load_model(tmp_path)
    assert config == model.config
    ids = jnp.asarray(np.random.default_rng(2).integers(0, 96, (2, 12)), jnp.int32)
    found = np.asarray(forward(loaded, ids))
    values, tensors = json.loads((tmp_path / "config.json").read_text()), read_tensors(tmp_path / "model.safetensors")
    for sequence, logits in zip(np.asarray(ids), found, strict=True):
        np.testing.assert_allclose(logits, model_oracles.ernie45_moe(values, tensors, sequence), rtol=0, atol=ATOL)
    assert np.abs(found).max() > 1


def test_tensors_have_the_published_names(tmp_path):
    model = make_model(dtype="bfloat16")
    save_model(model, model.config, tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight" in tensors and "lm_head.weight" not in tensors
    layer = {name.removeprefix("model.layers.1.") for name in tensors if name.startswith("model.layers.1.")}
    experts = {f"mlp.experts.{e}.{name}_proj.weight" for e in range(8) for name in ("gate", "up", "down")}
    shared = {f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
    attention = {f"self_attn.{name}_proj.weight" for name in "qkvo"}
    others = {"input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight",
              "mlp.moe_statics.e_score_correction_bias"}  # fmt: skip
    assert layer == experts | shared | attention | others
    bias = tensors["model.layers.1.mlp.moe_statics.e_score_correction_bias"]
    assert bias.dtype == np.float32 and bias.shape == (1, 8)  # a bias rounded to bf16 would choose others
    assert tensors["model.layers.1.mlp.shared_experts.up_proj.weight"].shape == (64, 64)  # two experts wide


def test_configs_of_hugging_face():
    """As published for 21B; RoPE inside rope_parameters and the type under dtype in newer files."""
    published = {
        "model_type": "ernie4_5_moe", "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288,
        "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "moe_num_experts": 64, "moe_k": 6,
        "moe_intermediate_size": 1536, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
        "moe_layer_end_index": 27, "moe_layer_interval": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "rope_theta": 500000.0, "use_bias": False, "moe_capacity": [64, 64, 64],
    }  # fmt: skip
    config = Ernie45MoeConfig.from_hf(published)
    assert config.head_dim == 128 and config.num_experts == 64 and config.num_experts_per_tok == 6
    assert [config.is_moe_layer(layer) for layer in (0, 1, 27)] == [False, True, True]
    newer = {key: value for key, value in published.items() if key not in ("rope_theta", "torch_dtype")}
    newer |= {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}, "dtype": "bfloat16"}
    assert Ernie45MoeConfig.from_hf(newer) == config == Ernie45MoeConfig.from_hf(config.to_hf())
    for key, value, message in (
        ("use_bias", True, "use_bias=True"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("moe_norm_min", 0.1, "moe_norm_min=0.1"),
        ("moe_layer_interval", 0, "moe_layer_interval"),
        ("model_type", "ernie4_5", "expected 'ernie4_5_moe'"),
        ("rope_scaling", {"type": "yarn"}, "rope_type='yarn'"),
    ):
        with pytest.raises(ValueError, match=message):
            Ernie45MoeConfig.from_hf({**published, key: value})
    with pytest.raises(ValueError, match=r"lacks num_experts$"):
        Ernie45MoeConfig.from_hf({key: value for key, value in published.items() if key != "moe_num_experts"})


@pytest.mark.slow
def test_served_in_buckets_with_quantized_experts():
    model = make_model()
    quantize_experts(model)
    configure_experts(model, activation_format_1="nvfp4", activation_format_2="nvfp4")
    served = BucketedModel(model, buckets=(8,), batch_buckets=(1,), max_length=32)
    prompt = np.random.default_rng(3).integers(0, 96, 11).tolist()
    expected = np.asarray(forward(model, jnp.asarray([prompt], jnp.int32)))[0, -1]
    np.testing.assert_allclose(
        np.asarray(served.prefill(prompt).logits)[0], expected, atol=1e-4 * np.abs(expected).max()
    )
