"""The decoder against numpy float64, its cache against the full sequence, its formats against each other."""

import json

import jax
import jax.numpy as jnp
import model_oracles
import numpy as np
import pytest
from flax import nnx
from model_oracles import calc_diff
from safetensors.numpy import load_file
from small_models import QWEN3_MOE as CONFIG, make_qwen3_moe as make_model, sample_ids

from configs import qwen3_30b_a3b
from fp4jax import MoEConfig
from fp4jax.checkpoint import load_model, save_model
from fp4jax.checkpoint.match import model_params
from fp4jax.checkpoint.names import tensor_slots
from fp4jax.layers import MoEBlock
from fp4jax.models import (
    Qwen3Moe,
    Qwen3MoeConfig,
    configure_experts,
    generate,
    quantize_experts,
    set_input_scales,
)
from fp4jax.models.decoder import KVCache

pytestmark = pytest.mark.usefixtures("quick_compile")

# float32 against float64, two layers: measured 2e-6 of the largest logit.
ATOL = 2e-5


_forward = nnx.jit(lambda model, ids: model(ids))


_CHANGES = {
    "plain": dict(),
    "tied, weights not renormalised": dict(tie_word_embeddings=True, norm_topk_prob=False, num_experts_per_tok=3),
    "first layer dense": dict(mlp_only_layers=(0,), num_key_value_heads=4),
    "every second layer sparse": dict(decoder_sparse_step=2, num_key_value_heads=1, head_dim=8),
}


@pytest.mark.parametrize(
    ("changes", "differentiable"),
    [
        *(pytest.param(changes, False, id=f"pipeline-{name}") for name, changes in _CHANGES.items()),
        pytest.param(_CHANGES["plain"], True, id="dense-plain"),
        # What a config changes is outside of the experts, and tested with the pipeline.
        *(
            pytest.param(changes, True, id=f"dense-{name}", marks=pytest.mark.slow)
            for name, changes in _CHANGES.items()
            if changes
        ),
    ],
)
def test_logits_equal_the_float64_forward(tmp_path, changes, differentiable):
    model = make_model(**changes)
    configure_experts(model, differentiable=differentiable)
    save_model(model, model.config, tmp_path)
    ids = sample_ids(2, 12)
    found = np.asarray(_forward(model, ids))
    config, tensors = json.loads((tmp_path / "config.json").read_text()), load_file(tmp_path / "model.safetensors")
    for sequence, logits in zip(np.asarray(ids), found, strict=True):
        np.testing.assert_allclose(logits, model_oracles.qwen3_moe(config, tensors, sequence), rtol=0, atol=ATOL)


def test_cached_decode_equals_the_full_sequence():
    """A prompt of 8, then 4 single tokens: float32 logits within 1e-5 of one pass over all 12."""
    model, ids = make_model(), sample_ids(2, 12)
    forward = nnx.jit(lambda model, ids, cache: model.forward(ids, cache))
    full, cache, parts = _forward(model, ids), model.init_cache(2, 20), []
    for start, stop in [(0, 8), (8, 9), (9, 10), (10, 11), (11, 12)]:
        output = forward(model, ids[:, start:stop], cache)
        cache = output.cache
        parts.append(output.logits)
        assert int(cache.length) == stop
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, rtol=0, atol=1e-5)
    assert [[part.shape for part in layer] for layer in cache.layers] == [[(2, 2, 20, 16)] * 2] * 2
    poisoned = KVCache(jax.tree.map(lambda part: part.at[:, :, 12:].set(jnp.nan), cache.layers), cache.length)
    clean, dirty = (forward(model, ids[:, :1], c).logits for c in (cache, poisoned))
    np.testing.assert_array_equal(clean, dirty)


def test_a_cache_in_fp8():
    """Layer 0 caches e4m3(key / scale), for scales of its own; what follows uses the codes, times the scales."""
    model, ids, fp8 = make_model(), sample_ids(2, 12), jnp.float8_e4m3fn
    run = nnx.jit(lambda model, ids, cache: model.forward(ids, cache))
    plain = run(model, ids, model.init_cache(2, 16))
    model.set_cache_dtype(fp8)
    scales = (0.03, 0.002)  # the second one saturates many values
    for layer in model.layers:
        layer.self_attn.k_scale, layer.self_attn.v_scale = (nnx.Variable(jnp.float32(s)) for s in scales)
    coded, saturates = run(model, ids, model.init_cache(2, 16)), []
    for exact, codes, scale in zip(plain.cache.layers[0], coded.cache.layers[0], scales, strict=True):
        exact = np.asarray(exact, np.float64)[:, :, :12]
        assert codes.dtype == fp8
        found = np.asarray(codes, np.float64)[:, :, :12] * scale
        bound = np.maximum(np.abs(exact) / 16, scale * 2.0**-10)  # half a step of 3 bits, or of the smallest step 2^-9
        clipped = np.abs(exact) > 464 * scale
        np.testing.assert_allclose(found[clipped], np.copysign(448 * scale, exact)[clipped], rtol=1e-6)
        assert (np.abs(found - exact) <= bound * (1 + 1e-5))[~clipped].all()
        saturates.append(clipped.any())
    assert saturates == [False, True]
    for layer in model.layers:
        layer.self_attn.v_scale = nnx.Variable(jnp.float32(0.03))
    coded = run(model, ids, model.init_cache(2, 16))
    difference = np.linalg.norm(np.asarray(coded.logits - plain.logits)) / np.linalg.norm(np.asarray(plain.logits))
    assert 1e-3 < difference < 0.2  # 12 positions of a stirred model; 3 bits of mantissa


def test_a_later_token_changes_nothing_before_it():
    model, ids = make_model(), sample_ids(1, 10)
    changed = ids.at[0, 6].set((ids[0, 6] + 1) % CONFIG.vocab_size)
    first, second = _forward(model, ids), _forward(model, changed)
    np.testing.assert_array_equal(first[:, :6], second[:, :6])
    assert np.abs(np.asarray(first[:, 6:] - second[:, 6:])).max() > 0.01


@pytest.mark.slow
def test_greedy_generation_follows_the_full_forward():
    """Each new token is the argmax of a pass over everything before it (causality: one pass shows all of them)."""
    model, prompt = make_model(), sample_ids(2, 6)
    found = generate(model, prompt, max_new_tokens=6)
    np.testing.assert_array_equal(found[:, :6], prompt)
    np.testing.assert_array_equal(found[:, 6:], jnp.argmax(_forward(model, found)[:, 5:-1], axis=-1))


@pytest.mark.slow
def test_sampling_is_reproducible_and_follows_temperature():
    model, prompt = make_model(), jnp.tile(sample_ids(1, 4), (64, 1))
    draw = lambda seed, t: np.asarray(generate(model, prompt, max_new_tokens=3, temperature=t, seed=seed))  # noqa: E731
    np.testing.assert_array_equal(draw(1, 1.0), draw(1, 1.0))
    assert (draw(1, 1.0) != draw(2, 1.0)).any()
    np.testing.assert_array_equal(draw(1, 1e-4), generate(model, prompt, max_new_tokens=3))
    hot, warm = (len(np.unique(draw(1, t)[:, 4])) for t in (10.0, 0.5))
    assert hot > warm


def test_reports_of_experts_are_summed_over_layers():
    model, ids = make_model(), sample_ids(1, 6)
    configure_experts(model, capacity=1)
    both = nnx.jit(lambda model, ids: (model._decode(ids, None, MoEBlock.__call__)[2], model.forward(ids).aux))
    reports, aux = both(model, ids)
    assert len(reports) == 2 and all(int(report.dropped) > 0 for report in reports)
    assert int(aux.dropped) == sum(int(report.dropped) for report in reports)
    assert float(aux.balance_loss) == pytest.approx(sum(float(report.balance_loss) for report in reports), rel=1e-6)


def test_sampling_draws_a_new_key_every_step():
    """Nearly uniform draws from 96 tokens: with one key for two steps these would nearly always be equal."""
    model, prompt = make_model(num_hidden_layers=1, mlp_only_layers=(0,)), sample_ids(4, 3)
    drawn = np.asarray(generate(model, prompt, max_new_tokens=16, temperature=100.0))[:, 3:]
    assert all(len(np.unique(row)) >= 10 for row in drawn)
    for step in range(15):
        assert (drawn[:, step] != drawn[:, step + 1]).any()
    assert len(np.unique(drawn[:, 0])) > 1  # requests of a batch draw apart too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(max_new_tokens=0), "0 new tokens"),
        (dict(max_new_tokens=61), "65 tokens exceed max_position_embeddings=64"),
        (dict(max_new_tokens=1, temperature=-1.0), "-1.0"),
    ],
)
def test_generate_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        generate(make_model(), sample_ids(1, 4), **changes)


def test_too_many_positions_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="65 positions exceed the 64 of the model"):
        model(sample_ids(1, 65))
    with pytest.raises(ValueError, match="9 positions exceed the 8 of the cache"):
        model.forward(sample_ids(1, 9), model.init_cache(1, 8))


# calc_diff of logits against the float32 model with the same weights; measured on this model (in brackets) and doubled.
_THRESHOLDS = {
    "bf16": 2e-4,  # 8.1e-5
    "W4A16": 0.0125,  # 0.0063
    "W4A4": 0.022,  # 0.0111
    "W4A4 calibrated": 0.023,  # 0.0114
}


@pytest.mark.slow
def test_formats_agree_within_their_thresholds():
    ids, found = sample_ids(4, 32), {}
    exact = _forward(make_model(num_hidden_layers=1), ids)
    model = make_model(dtype="bfloat16", num_hidden_layers=1)
    found["bf16"] = _forward(model, ids)
    quantize_experts(model)
    found["W4A16"] = _forward(model, ids)
    configure_experts(model, activation_format_1="nvfp4", activation_format_2="nvfp4")
    found["W4A4"] = _forward(model, ids)
    calibrated = make_model(dtype="bfloat16", num_hidden_layers=1)
    quantize_experts(calibrated, sample_ids(4, 32, seed=1))
    configure_experts(calibrated, activation_format_1="nvfp4", activation_format_2="nvfp4")
    found["W4A4 calibrated"] = _forward(calibrated, ids)
    diffs = {name: calc_diff(logits, exact) for name, logits in found.items()}
    assert all(diffs[name] < _THRESHOLDS[name] for name in diffs), diffs
    assert diffs["bf16"] < diffs["W4A16"] < diffs["W4A4"], diffs  # every step loses something, none is a no-op


@pytest.mark.slow
@pytest.mark.parametrize("form", ["per_peer", "per_slot"])
def test_experts_on_a_mesh_agree_with_one_device(make_mesh, form):
    """Same weights and wire numerics on 1, 2 and 4 devices; 15 tokens do not divide by the devices."""
    model, ids = make_model(num_hidden_layers=1), sample_ids(1, 15)
    quantize_experts(model, sample_ids(2, 32, seed=1))
    configure_experts(model, activation_format_1="nvfp4", activation_format_2="nvfp4", wire_format="nvfp4")
    alone = nnx.jit(lambda m, i: m.forward(i))(model, ids)
    for devices in (1, 2, 4):
        configure_experts(model, mesh=make_mesh(devices), form=form)
        output = nnx.jit(lambda m, i: m.forward(i))(model, ids)
        assert int(output.aux.dropped) == 0
        assert calc_diff(output.logits, alone.logits) < 1e-6
    configure_experts(model, mesh=None)
    np.testing.assert_array_equal(_forward(model, ids), alone.logits)


def test_calibration_covers_experts_that_were_not_hit():
    model = make_model()
    few = sample_ids(1, 2)  # 2 tokens x 2 experts: at least 4 of the 8 experts stay idle
    amax = nnx.jit(lambda model, ids: model.calibrate(ids))(model, few)
    assert (np.asarray(amax[0].input_2) == 0).sum() >= 4
    quantize_experts(model, few)
    for block, seen in zip(model.moe_blocks(), amax, strict=True):
        scale_2, seen_2 = np.asarray(block.input_scale_2[...]), np.asarray(seen.input_2)
        assert scale_2.shape == (8, 1, 1) and block.input_scale_1[...].shape == ()
        expected = np.where(seen_2 > 0, seen_2, seen_2.max()).astype(np.float32) / np.float32(2688)
        np.testing.assert_allclose(scale_2[:, 0, 0], expected, rtol=1e-5)
        np.testing.assert_allclose(block.input_scale_1[...], np.float32(seen.input_1) / np.float32(2688), rtol=1e-5)


def _all_scales(model):
    return {
        f"{block.path}.experts.{e}.{projection}_proj.input_scale": 0.01 * (1 + e) * (2 if projection == "up" else 1)
        for block in model.moe_blocks()
        for e in range(8)
        for projection in ("gate", "up", "down")
    }


def test_given_scales_take_one_maximum_for_gemm_1():
    model = make_model()
    set_input_scales(model, _all_scales(model))
    for block in model.moe_blocks():
        np.testing.assert_allclose(block.input_scale_1[...], 0.16, rtol=1e-6)
        np.testing.assert_allclose(block.input_scale_2[...][:, 0, 0], 0.01 * np.arange(1, 9), rtol=1e-6)


@pytest.mark.parametrize("bad", [None, 0.0, float("nan"), float("inf"), -1.0])
def test_missing_or_broken_input_scale_is_refused_by_name(bad):
    model = make_model()
    scales, name = _all_scales(model), "model.layers.1.mlp.experts.5.down_proj.input_scale"
    if bad is None:
        del scales[name]
    else:
        scales[name] = bad
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        set_input_scales(model, scales)
    assert all(block.input_scale_1 is None for block in model.moe_blocks())  # nothing half done


_HF = {**CONFIG.to_hf(), "router_aux_loss_coef": 0.001, "transformers_version": "4.51.0", "rope_scaling": None}


def test_both_generations_of_config_json():
    older = {**_HF, "rope_theta": 5e5, "torch_dtype": "bfloat16"}
    newer = {k: v for k, v in _HF.items() if k not in ("rope_theta", "torch_dtype", "rope_scaling")}
    newer |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"}
    assert Qwen3MoeConfig.from_hf(older) == Qwen3MoeConfig.from_hf(newer)
    assert Qwen3MoeConfig.from_hf(older).rope_theta == 5e5
    assert Qwen3MoeConfig.from_hf(CONFIG.to_hf()) == CONFIG


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="llama"), "model_type 'llama'"),
        (dict(hidden_act="gelu"), "hidden_act='gelu'"),
        (dict(attention_bias=True), "attention_bias=True"),
        (dict(use_sliding_window=True), "use_sliding_window=True"),
        (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_type='yarn'"),
        (dict(rope_parameters={"rope_type": "linear", "rope_theta": 1.0}), "rope_type='linear'"),
        (dict(rope_parameters={"rope_type": "default"}, rope_scaling={"rope_type": "yarn"}), "rope_type='yarn'"),
        (dict(num_experts=None), "lacks num_experts"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3"),
        (dict(head_dim=15), "head_dim must be even .* 15"),
        (dict(torch_dtype="float64"), "'float64'"),
        (dict(mlp_only_layers=[1], intermediate_size=0), "intermediate_size, got 0"),
        (dict(num_experts_per_tok=9), "top_k=9"),
    ],
)
def test_unsupported_config_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Qwen3Moe(Qwen3MoeConfig.from_hf({**_HF, **changes}), rngs=nnx.Rngs(0)))


def test_real_model_has_the_published_names_and_size():
    """Qwen3-30B-A3B: the total_size of its published index, over 48 * (128 * 3 + 9) + 3 = 18,867 tensors."""
    config = Qwen3MoeConfig.from_hf(dict(qwen3_30b_a3b.get_config().model))
    model = nnx.eval_shape(lambda: Qwen3Moe(config, rngs=nnx.Rngs(0)))
    shapes = {path: param.get_value().shape for path, param in model_params(model).items()}
    slots = tensor_slots(shapes)
    assert len(slots) == 18_867
    assert 2 * sum(int(np.prod(slot.shape)) for slot in slots.values()) == 61_064_245_248
    for name, shape in {
        "model.embed_tokens.weight": (151936, 2048),
        "model.layers.0.input_layernorm.weight": (2048,),
        "model.layers.0.self_attn.q_proj.weight": (4096, 2048),
        "model.layers.0.self_attn.k_proj.weight": (512, 2048),
        "model.layers.0.self_attn.v_proj.weight": (512, 2048),
        "model.layers.0.self_attn.o_proj.weight": (2048, 4096),
        "model.layers.0.self_attn.q_norm.weight": (128,),
        "model.layers.47.self_attn.k_norm.weight": (128,),
        "model.layers.47.post_attention_layernorm.weight": (2048,),
        "model.layers.47.mlp.gate.weight": (128, 2048),
        "model.layers.47.mlp.experts.127.gate_proj.weight": (768, 2048),
        "model.layers.47.mlp.experts.127.up_proj.weight": (768, 2048),
        "model.layers.47.mlp.experts.127.down_proj.weight": (2048, 768),
        "model.norm.weight": (2048,),
        "lm_head.weight": (151936, 2048),
    }.items():
        assert tuple(slots[name].shape) == shape, name


@pytest.mark.slow
def test_quantized_model_is_a_pytree_for_jit_and_state():
    model, ids = make_model(dtype="bfloat16"), sample_ids(1, 8)
    quantize_experts(model)
    graphdef, state = nnx.split(model)
    logits = jax.jit(lambda state, ids: nnx.merge(graphdef, state)(ids))(state, ids)
    np.testing.assert_array_equal(logits, _forward(model, ids))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} >= {"uint8", "float8_e4m3fn", "bfloat16"}


@pytest.mark.slow
def test_training_settings_refuse_what_they_cannot_do(make_mesh):
    with pytest.raises(ValueError, match="differentiable=True"):
        MoEConfig(8, differentiable=True, activation_format_1="nvfp4")
    with pytest.raises(ValueError, match="differentiable=True"):
        configure_experts(make_model(), differentiable=True, mesh=make_mesh(2))
    model = make_model(num_hidden_layers=1, mlp_only_layers=())
    quantize_experts(model)
    configure_experts(model, differentiable=True)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp: differentiable=True"):
        model(sample_ids(1, 4))


@pytest.mark.slow
def test_loaded_onto_a_mesh_gives_the_same_logits(tmp_path, make_mesh):
    model, ids = make_model(), sample_ids(2, 8)
    save_model(model, model.config, tmp_path)
    mesh = make_mesh(4)
    sharded, _ = load_model(tmp_path, mesh=mesh)
    w13 = sharded.moe_blocks()[0].w13.get_value()
    assert [shard.data.shape for shard in w13.addressable_shards] == [(2, 64, 64)] * 4
    # The wire is bf16, so tokens are rounded once on their way.
    assert calc_diff(_forward(sharded, ids), _forward(model, ids)) < 1e-4


def test_absent_keys_mean_what_they_mean_to_hugging_face():
    config = Qwen3MoeConfig.from_hf({k: v for k, v in _HF.items() if k not in ("rope_theta", "norm_topk_prob")})
    assert config.rope_theta == 10_000.0 and config.norm_topk_prob is False
    newer = {k: v for k, v in _HF.items() if k != "rope_theta"} | {
        "rope_scaling": {"type": "default", "rope_theta": 7.0}
    }
    assert Qwen3MoeConfig.from_hf(newer).rope_theta == 7.0
