"""Language models of published sizes with random weights, made on the device layer by layer.

Expert weights are drawn as NVFP4 codes and scales, so that the experts of one layer never exist in bf16. Every layer
has arrays of its own and a router of its own.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from tqdm import tqdm

from configs import qwen3_30b_a3b
from fp4jax.layers import BlockFP8Linear, Linear, MoEBlock, NVFP4Linear, RMSNorm
from fp4jax.models import DeepseekV3, DeepseekV3Config, Ernie45Moe, Ernie45MoeConfig, Qwen3Moe, Qwen3MoeConfig
from fp4jax.models.decoder import Decoder, DecoderConfig
from fp4jax.nvfp4 import BLOCK_SIZE, NVFP4Tensor

EXPERTS = {"w4a16": "bf16", "w4a4": "nvfp4"}  # name of a mode -> the format of the experts' activations
DENSE = ("bf16", "fp8", "nvfp4")
_STAYS_PLAIN = ("gate", "shared_expert_gate")  # as when a checkpoint is quantized while it is loaded

# `config.json` of baidu/ERNIE-4.5-21B-A3B-PT and deepseek-ai/DeepSeek-V3, as far as the models read it.
_ERNIE_21B = {
    "model_type": "ernie4_5_moe", "vocab_size": 103424, "hidden_size": 2560, "intermediate_size": 12288,
    "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4, "moe_num_experts": 64, "moe_k": 6,
    "moe_intermediate_size": 1536, "moe_num_shared_experts": 2, "moe_layer_start_index": 1, "moe_layer_end_index": 27,
    "moe_layer_interval": 1, "rms_norm_eps": 1e-05, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "use_bias": False, "hidden_act": "silu",
}  # fmt: skip
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512,
    "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128, "n_group": 8,
    "topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "max_position_embeddings": 163840, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "moe_layer_freq": 1,
    "attention_bias": False, "hidden_act": "silu", "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"},
}  # fmt: skip
_TINY = {
    "model_type": "qwen3_moe", "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "intermediate_size": 64, "norm_topk_prob": True, "rope_theta": 1e6, "max_position_embeddings": 32768,
    "torch_dtype": "float32",
}  # fmt: skip

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-30b": dict(qwen3_30b_a3b.get_config().model),
    "ernie-21b": _ERNIE_21B,
    "deepseek-v3": _DEEPSEEK_V3,
    "tiny": _TINY,
}
MODELS = tuple(PUBLISHED)
_CLASSES: dict[str, tuple[type[Decoder], Any]] = {
    "qwen3_moe": (Qwen3Moe, Qwen3MoeConfig),
    "ernie4_5_moe": (Ernie45Moe, Ernie45MoeConfig),
    "deepseek_v3": (DeepseekV3, DeepseekV3Config),
}
_USUAL_LAYERS = {"deepseek-v3": 3}  # 61 layers do not fit on one GPU


def usual_layers(name: str) -> int:
    """The number of layers that a model is measured with: all of them, or as many as one GPU has memory for."""
    return _USUAL_LAYERS.get(name, PUBLISHED[name]["num_hidden_layers"])


def hf_config(name: str, layers: int) -> dict[str, Any]:
    """The content of the model's `config.json` with this many layers.

    With fewer layers than the published model all of them have experts: the first layers of ERNIE-4.5 and DeepSeek-V3,
    which have none, are left out.
    """
    config = {**PUBLISHED[name], "num_hidden_layers": layers}
    if layers < PUBLISHED[name]["num_hidden_layers"]:
        starts = {"first_k_dense_replace": 0, "moe_layer_start_index": 0, "moe_layer_end_index": layers - 1}
        config |= {key: value for key, value in starts.items() if key in config}
    return config


def model_config(name: str, layers: int) -> DecoderConfig:
    """The config object of a model with this many layers; see `hf_config`."""
    config = hf_config(name, layers)
    return _CLASSES[config["model_type"]][1].from_hf(config)


def abstract_model(config: DecoderConfig) -> Any:
    """The model of a config with ShapeDtypeStructs in place of arrays."""
    make = next(model for model, of in _CLASSES.values() if isinstance(config, of))
    return nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0)))


def random_model(config: DecoderConfig, experts: str, dense: str, seed: int = 0) -> Any:
    """Make a model with random weights on the first device, its experts in NVFP4.

    Linear layers are normally distributed, and the magnitude of the experts' weights is such that a layer's result is
    about as large as its input.

    Args:
      config: the sizes.
      experts: a key of `EXPERTS`; in w4a4 activations have a scale per token.
      dense: what the linear layers beside the experts run as, one of `DENSE`. As when a checkpoint is quantized while
        it is loaded, routers, embeddings and the head stay plain.
      seed: the seed of all weights.
    """
    model, keys = abstract_model(config), _keys(seed)
    std = config.initializer_range
    for part in (model.embed_tokens, model.norm, model.lm_head):
        if part is not None:
            _fill(part, keys, std)
    for layer in tqdm(model.layers, desc="making layers", unit="layer", leave=False):
        _fill(layer, keys, std)
        if dense != "bf16":
            _convert_linear_layers(layer, BlockFP8Linear if dense == "fp8" else NVFP4Linear)
        for block in (node for _, node in nnx.iter_graph(layer) if isinstance(node, MoEBlock)):
            formats: dict[str, Any] = dict(activation_format_1=EXPERTS[experts], activation_format_2=EXPERTS[experts])
            block.configure(dataclasses.replace(block.config, **formats))  # also packs the weights for the kernel
        jax.block_until_ready(jax.tree.leaves(nnx.state(layer)))
    return model


def last_layers(model: Any, count: int) -> Any:
    """A model with only the last `count` layers of `model`, and the same arrays."""
    part = nnx.merge(*nnx.split(model))
    part.layers = nnx.List(list(part.layers)[len(part.layers) - count :])
    part.config = dataclasses.replace(model.config, num_hidden_layers=max(1, count))
    return part


def state_bytes(module: Any) -> int:
    """Bytes of all arrays of a module on a device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(nnx.state(module)))


def _keys(seed: int) -> Iterator[jax.Array]:
    key = jax.random.key(seed, impl="rbg")  # much faster than the default for gigabytes of weights
    number = 0
    while True:
        yield jax.random.fold_in(key, number)
        number += 1


def _fill(module: Any, keys: Iterator[jax.Array], std: float) -> None:
    """Set all parameters of a module to random values; norms become 1, and correction biases 0."""
    nodes = dict(nnx.iter_graph(module))
    for path, param in list(nodes.items()):
        if not isinstance(param, nnx.Param):
            continue
        owner, struct = nodes[path[:-1]], param.get_value()
        if isinstance(owner, MoEBlock) and path[-1] in ("w13", "w2"):
            param.set_value(_random_nvfp4(next(keys), struct.shape, path[-1] == "w13"))
        elif isinstance(owner, RMSNorm):
            param.set_value(jnp.ones(struct.shape, struct.dtype))
        elif path[-1] == "correction_bias":
            param.set_value(jnp.zeros(struct.shape, struct.dtype))
        else:
            param.set_value(_normal(next(keys), struct.shape, struct.dtype, std))


def _convert_linear_layers(layer: Any, kind: Any) -> None:
    """Replace every Linear of a decoder layer but the router by a quantized one."""
    nodes: dict[Any, Any] = dict(nnx.iter_graph(layer))
    for path, node in list(nodes.items()):
        if isinstance(node, Linear) and path[-1] not in _STAYS_PLAIN:
            setattr(nodes[path[:-1]], str(path[-1]), kind.from_linear(node))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype, std):
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_nvfp4(key: jax.Array, shape: tuple[int, int, int], scale_per_row: bool) -> NVFP4Tensor:
    """Random codes and block scales [E, N, K], made one expert at a time; the values have variance 1 / K or so."""
    experts, n, k = shape

    def expert(key):
        codes, scales = jax.random.split(key)
        scale_bytes = jax.random.randint(scales, (n, k // BLOCK_SIZE), 32, 77).astype(jnp.uint8)  # 2^-3 to 2^2.6
        return jax.random.bits(codes, (n, k // 2), jnp.uint8), lax.bitcast_convert_type(scale_bytes, jnp.float8_e4m3fn)

    qdata, block_scale = lax.map(expert, jax.random.split(key, experts))
    # Random codes times these scales have a magnitude of about 5.
    global_scale = jnp.full((experts, n if scale_per_row else 1, 1), 1 / (5 * k**0.5), jnp.float32)
    return NVFP4Tensor(qdata, block_scale, global_scale)
