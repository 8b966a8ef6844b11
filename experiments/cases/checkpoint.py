"""A synthetic checkpoint for measurements: a Hugging Face folder of a Qwen3-MoE with random NVFP4 experts.

It has any number of layers and is written shard by shard, so it may be larger than the memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

_SHARD_BYTES = 500_000_000


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3-MoE, named as in `config.json`; the defaults are Qwen3-30B's, but with a small vocabulary."""

    hidden_size: int = 2048
    moe_intermediate_size: int = 768
    num_experts: int = 128
    num_attention_heads: int = 32
    num_key_value_heads: int = 4
    head_dim: int = 128
    vocab_size: int = 8192


def layers_for(num_bytes: int, shape: Shape = Shape()) -> int:
    """The number of layers whose experts take about `num_bytes` bytes in NVFP4, at least 1."""
    per_expert = 3 * shape.hidden_size * shape.moe_intermediate_size * 9 // 16
    return max(1, round(num_bytes / (per_expert * shape.num_experts)))


def write_checkpoint(folder: Path, layers: int, shape: Shape = Shape(), *, entry_per_projection: bool = False) -> None:
    """Write config.json, the shards, and the index over the shards.

    The experts are in ModelOpt's layout without activation scales (W4A16); everything else is bf16.

    Args:
      folder: the folder to write; it is made.
      layers: the number of decoder layers.
      shape: the sizes of the model.
      entry_per_projection: whether the config has an entry for every projection of every expert, as ModelOpt writes it
        for models whose layers differ.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ignore = ["lm_head", "*self_attn*", "*.gate"]
    quantization: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "ignore": ignore}
    if entry_per_projection:
        modules = [name.removesuffix(".weight") for name, _, kind in _names(layers, shape) if kind == "codes"]
        entry = {"quant_algo": "W4A16_NVFP4", "group_size": 16}
        quantization |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": {module: entry for module in modules}}
    config: dict[str, Any] = {
        "model_type": "qwen3_moe", "num_hidden_layers": layers, "num_experts_per_tok": min(8, shape.num_experts),
        "intermediate_size": 0, "torch_dtype": "bfloat16", **vars(shape),
        "quantization_config": quantization,
    }  # fmt: skip
    weight_map: dict[str, str] = {}
    shard: dict[str, np.ndarray] = {}
    tensors = list(_names(layers, shape))
    random = np.random.default_rng(0).integers(0, 256, 1 << 24, np.uint8)

    def flush():
        file = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
        save_file(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    size = 0
    for name, dims, kind in tqdm(tensors, desc="writing", unit="tensor"):
        count = int(np.prod(dims))
        if kind == "codes":
            array = _bytes(random, count).reshape(dims)
        elif kind == "blocks":
            array = (_bytes(random, count) % 32 + 32).reshape(dims).view(ml_dtypes.float8_e4m3fn)
        elif kind == "scale":
            array = np.array(1e-3, np.float32)
        else:
            array = (_bytes(random, count).astype(np.float32) / 2560 - 0.05).reshape(dims).astype(ml_dtypes.bfloat16)
        shard[name] = array
        size += array.nbytes
        if size > _SHARD_BYTES:
            flush()
            size = 0
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))


def _bytes(random: np.ndarray, count: int) -> np.ndarray:
    return random[:count] if count <= random.size else np.resize(random, count)


def _names(layers: int, shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape and kind of every tensor; the kinds are "codes", "blocks", "scale" and "plain" (bf16)."""
    hidden, inter = shape.hidden_size, shape.moe_intermediate_size
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden), "plain"
    yield "lm_head.weight", (shape.vocab_size, hidden), "plain"
    yield "model.norm.weight", (hidden,), "plain"
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, dims in {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (shape.head_dim,),
            "self_attn.k_norm": (shape.head_dim,),
            "post_attention_layernorm": (hidden,),
            "mlp.gate": (shape.num_experts, hidden),
        }.items():
            yield f"{prefix}{name}.weight", dims, "plain"
        for expert in range(shape.num_experts):
            for name, n, k in (("gate", inter, hidden), ("up", inter, hidden), ("down", hidden, inter)):
                module = f"{prefix}mlp.experts.{expert}.{name}_proj."
                yield module + "weight", (n, k // 2), "codes"
                yield module + "weight_scale", (n, k // 16), "blocks"
                yield module + "weight_scale_2", (), "scale"
