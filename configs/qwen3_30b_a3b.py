"""The sizes of Qwen3-30B-A3B: 30.5 B parameters, of which a token uses 3.3 B.

They are the `config.json` of Qwen/Qwen3-30B-A3B, for tests and benchmarks; a checkpoint brings its own config.json.
This command counts the parameters without allocating them. It takes a few seconds and prints 30532122624:

    python -c "
    import jax; from flax import nnx
    from configs.qwen3_30b_a3b import get_config
    from fp4jax.models import Qwen3Moe, Qwen3MoeConfig
    config = Qwen3MoeConfig.from_hf(dict(get_config().model))
    model = nnx.eval_shape(lambda: Qwen3Moe(config, rngs=nnx.Rngs(0)))
    print(sum(x.size for x in jax.tree.leaves(nnx.state(model))))"
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The section `model`, with the names of Hugging Face's `config.json`."""
    config = ConfigDict()
    config.model = ConfigDict(
        dict(
            model_type="qwen3_moe",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
            hidden_act="silu",
            attention_bias=False,
            torch_dtype="bfloat16",
        )
    )
    return config
