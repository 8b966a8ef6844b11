"""Small models of every family, with weights that a forward pass can tell apart."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from stirred_models import stirred

from fp4jax.layers.latent_attention import Yarn
from fp4jax.models import DeepseekV3, DeepseekV3Config, Ernie45Moe, Ernie45MoeConfig, Qwen3Moe, Qwen3MoeConfig

QWEN3_MOE = Qwen3MoeConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    intermediate_size=48,
    rope_theta=1e4,
    max_position_embeddings=64,
    initializer_range=0.15,  # large enough for attention and routing to be far from uniform
    dtype="float32",
)
ERNIE45_MOE = Ernie45MoeConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, intermediate_size=48, rope_theta=1e4,
    max_position_embeddings=64, initializer_range=0.15, dtype="float32",
)  # fmt: skip
DEEPSEEK_V3 = DeepseekV3Config(
    vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_experts=8, num_experts_per_tok=3,
    moe_intermediate_size=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, q_lora_rank=24,
    intermediate_size=48, n_group=4, topk_group=2, routed_scaling_factor=2.5, first_k_dense_replace=1,
    max_position_embeddings=256, initializer_range=0.15, dtype="float32",
)  # fmt: skip
YARN = Yarn(
    factor=8.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5, mscale=1.0, mscale_all_dim=0.7
)


def make_qwen3_moe(seed=0, **changes):
    model = Qwen3Moe(dataclasses.replace(QWEN3_MOE, **changes), rngs=nnx.Rngs(seed))
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "norm" in str(path[-2]):  # all ones at the start; a swapped norm would go unnoticed
            rng = np.random.default_rng(len(str(path)))
            param.set_value(jnp.asarray(rng.uniform(0.5, 1.5, param.get_value().shape), param.get_value().dtype))
    return model


def make_ernie45_moe(**changes):
    return stirred(Ernie45Moe(dataclasses.replace(ERNIE45_MOE, **changes), rngs=nnx.Rngs(0)), bias=0.2)


def make_deepseek_v3(**changes):
    return stirred(DeepseekV3(dataclasses.replace(DEEPSEEK_V3, **changes), rngs=nnx.Rngs(0)), bias=0.3)


forward = nnx.jit(lambda model, ids: model(ids))  # one program per kind of model, instead of one per operation


def sample_ids(batch, length, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, QWEN3_MOE.vocab_size, (batch, length)), jnp.int32)
