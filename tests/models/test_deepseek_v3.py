"""DeepSeek-V3: logits of a folder against float64, cached decoding, published names and config, quantized layers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import model_oracles
import numpy as np
import pytest
from flax import nnx
from small_models import DEEPSEEK_V3 as CONFIG, YARN, forward, make_deepseek_v3 as make_model
from tensor_files import read_tensors

from experiments.cases.models import PUBLISHED
from fp4jax.checkpoint import load_model, save_model
from fp4jax.engine import BucketedModel
from fp4jax.layers import BlockFP8Linear
from fp4jax.layers.latent_attention import Yarn
from fp4jax.models import DeepseekV3Config

pytestmark = pytest.mark.usefixtures("quick_compile")

continued = nnx.jit(lambda model, ids, cache: model.forward(ids, cache))


def sample_ids(length, batch=2):
    return jnp.asarray(np.random.default_rng(2).integers(0, 96, (batch, length)), jnp.int32)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        pytest.param(
            dict(q_lora_rank=None, n_group=1, topk_group=1, norm_topk_prob=False, rope_interleave=False),
            marks=pytest.mark.slow,
        ),
        pytest.param(dict(yarn=YARN, first_k_dense_replace=0), marks=pytest.mark.slow),
        dict(yarn=dataclasses.replace(YARN, mscale_all_dim=1.0), n_shared_experts=2, tie_word_embeddings=True),
    ],
    ids=["plain", "no groups, queries straight from x", "yarn", "yarn as published, two shared experts"],
)
def test_logits_equal_the_float64_forward(tmp_path, changes):
    model = make_model(**changes)
    save_model(model, model.config, tmp_path)
    loaded, config = load_model(tmp_path)
    assert config == model.config
    ids = sample_ids(20)
    found = np.asarray(forward(loaded, ids))
    values, tensors = json.loads((tmp_path / "config.json").read_text()), read_tensors(tmp_path / "model.safetensors")
    for sequence, logits in zip(np.asarray(ids), found, strict=True):
        expected = model_oracles.deepseek_v3(values, tensors, sequence)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_cached_decode_equals_the_full_sequence():
    """A prompt of 8, then single tokens; places that are not filled hold NaN. A token costs rank + rope dim values."""
    model, ids = make_model(yarn=YARN), sample_ids(12)
    full, cache, parts = np.asarray(forward(model, ids)), model.init_cache(2, 16), []
    assert [[part.shape for part in layer] for layer in cache.layers] == [[(2, 1, 16, 32), (2, 1, 16, 8)]] * 2
    cache = cache._replace(layers=jax.tree.map(lambda part: part + jnp.nan, cache.layers))
    for some in (slice(0, 8), *(slice(i, i + 1) for i in range(8, 12))):
        logits, cache, _ = continued(model, ids[:, some], cache)
        parts.append(np.asarray(logits))
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, rtol=0, atol=1e-5 * np.abs(full).max())


@pytest.mark.slow
def test_served_in_buckets():
    model = make_model()
    served = BucketedModel(model, buckets=(8,), batch_buckets=(2,), max_length=40)
    prompts = [np.asarray(sample_ids(n, 1))[0].tolist() for n in (11, 3)]
    for prompt, answer in zip(prompts, served.generate(prompts, 4), strict=True):
        rows = np.asarray(forward(model, jnp.asarray([prompt + answer[:-1]], jnp.int32)))[0, len(prompt) - 1 :]
        best = np.sort(rows, axis=-1)
        clear = best[:, -1] - best[:, -2] > 1e-4
        assert clear.sum() >= 2 and (np.asarray(answer)[clear] == rows.argmax(-1)[clear]).all()


@pytest.mark.parametrize(
    ("trained", "beta_fast", "low", "high"),
    [(2**20, 2000.0, 3, 11), (2**40, 1e9, 4, 15)],  # the second would end at 23, behind the last dimension
)
def test_the_ramp_of_yarn_ends_at_the_last_dimension(trained, beta_fast, low, high):
    """Not at the last pair: 16 dimensions are 8 pairs."""
    yarn = Yarn(factor=4.0, original_max_position_embeddings=trained, beta_fast=beta_fast, beta_slow=1.0)
    slow = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    expected = 1e4 ** (-np.arange(8) / 8) * (1 - slow + slow / 4)
    np.testing.assert_allclose(yarn.frequency(1e4, 16), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("first", "freq", "expected"),
    [(0, 1, [1, 1, 1, 1]), (0, 2, [1, 0, 1, 0]), (1, 2, [0, 0, 1, 0]), (3, 1, [0, 0, 0, 1]), (2, 3, [0, 0, 0, 1])],
)
def test_which_layers_have_experts(first, freq, expected):
    """From `first_k_dense_replace` on those whose index is a multiple of `moe_layer_freq`."""
    config = dataclasses.replace(CONFIG, num_hidden_layers=4, first_k_dense_replace=first, moe_layer_freq=freq)
    assert [config.is_moe_layer(layer) for layer in range(4)] == [bool(e) for e in expected]


def test_published_config_and_names(tmp_path):
    """config.json as it is published for 671B, but for what only training reads."""
    published = PUBLISHED["deepseek-v3"]
    config = DeepseekV3Config.from_hf(published)
    assert config.num_experts == 256 and config.head_dim == 192
    assert config.yarn is not None and config.yarn.rotation_scale == 1
    assert config.yarn.score_scale == pytest.approx((0.1 * np.log(40) + 1) ** 2)
    assert DeepseekV3Config.from_hf(config.to_hf()) == config
    assert [config.is_moe_layer(layer) for layer in (0, 2, 3, 60)] == [False, False, True, True]
    absent = {
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
    }
    lacking = DeepseekV3Config.from_hf({key: value for key, value in published.items() if key not in absent})
    assert {key: getattr(lacking, key) for key in absent} == absent  # what Hugging Face takes for them
    assert DeepseekV3Config.from_hf({**published, "q_lora_rank": None}).q_lora_rank is None
    scaled = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0}
    yarn = DeepseekV3Config.from_hf({**published, "rope_scaling": scaled}).yarn
    assert yarn is not None and yarn.rotation_scale == pytest.approx(0.1 * np.log(40) + 1)  # without mscale
    for key, value, message in (
        ("scoring_func", "softmax", "scoring_func='softmax'"),
        ("topk_method", "greedy", "topk_method='greedy'"),
        ("rope_scaling", {"type": "linear"}, "rope_type='linear'"),
        ("rope_scaling", {"type": "yarn"}, "rope_scaling of type yarn: .*factor"),
        ("rope_scaling", {"type": "yarn", "factor": "40"}, r"factor='40' must be of type float"),
        ("rope_scaling", {"type": "yarn", "factor": 4, "attention_factor": 1.7}, r"attention_factor=1\.7 is not"),
        ("rope_scaling", {"type": "yarn", "factor": 4, "truncate": False}, "truncate=False is not"),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 0, "original_max_position_embeddings": 64},
            "factor must be positive",
        ),
        ("rope_scaling", "yarn", "rope_scaling='yarn' must be an object"),
        ("rms_norm_eps", -1.0, "rms_norm_eps must be positive"),
        ("num_attention_heads", 0, "num_attention_heads must be at least 1"),
        ("kv_lora_rank", 0, "kv_lora_rank must be at least 1"),
        ("qk_rope_head_dim", 7, "qk_rope_head_dim must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepseekV3Config.from_hf({**published, key: value})
    model = make_model(dtype="bfloat16")
    save_model(model, model.config, tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    layer = {name.removeprefix("model.layers.1.") for name in tensors if name.startswith("model.layers.1.")}
    assert layer - {name for name in layer if ".experts." in name} == {
        "input_layernorm.weight", "post_attention_layernorm.weight", "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias", "self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight",
        "self_attn.q_b_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight",
        *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    }  # fmt: skip
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == np.float32


@pytest.mark.slow
def test_fp8_linears_and_nvfp4_experts(tmp_path):
    model = make_model()
    save_model(model, model.config, tmp_path)
    mixed = {"quantization": "mix_quant", "dense_quant_type": "block_wise_fp8", "moe_quant_type": "modelopt_fp4"}
    loaded, _ = load_model(tmp_path, quantization=mixed)
    attention = loaded.layers[1].self_attn
    assert all(isinstance(m, BlockFP8Linear) for m in (attention.q_a_proj, attention.kv_b_proj, attention.o_proj))
    assert isinstance(loaded.layers[1].mlp.shared_experts.up_proj, BlockFP8Linear)
    ids = sample_ids(12)
    assert model_oracles.calc_diff(forward(loaded, ids), forward(model, ids)) < 0.1
