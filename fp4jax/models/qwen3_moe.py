"""Qwen3-MoE: grouped-query attention with an RMSNorm on every query and key head, routed SwiGLU experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from fp4jax.layers import MoEBlock, RoutingConfig
from fp4jax.layers.attention import Attention
from fp4jax.layers.linear import MLP
from fp4jax.models.decoder import Decoder
from fp4jax.models.hf_config import check_shapes, read_hf, write_hf

MODEL_TYPE = "qwen3_moe"
VL_MODEL_TYPE = "qwen3_vl_moe"  # sees images too; for text it is the same model


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """Shapes and constants, under the names of Hugging Face's `config.json`. `dtype` is what the model computes in."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.decoder_sparse_step < 1:
            raise ValueError(f"decoder_sparse_step must be at least 1, got {self.decoder_sparse_step}")
        check_shapes(self)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has experts: not listed in `mlp_only_layers`, and every `decoder_sparse_step`-th one."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Read a parsed `config.json`, see `hf_config.read_hf`; of Qwen3-VL-MoE the part of the text model."""
        if config.get("model_type") == VL_MODEL_TYPE:
            config = _text_config(config)
        absent = {"rope_theta": 1e4, "norm_topk_prob": False}
        return read_hf(cls, config, model_type=MODEL_TYPE, absent=absent, renamed={"num_experts": "num_local_experts"})

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` reads back to an equal config."""
        return write_hf(self, model_type=MODEL_TYPE, architecture="Qwen3MoeForCausalLM")


class Qwen3Moe(Decoder):
    """See `Decoder`."""

    @staticmethod
    def make_attention(config: Qwen3MoeConfig, **parts: Any) -> Attention:
        """With norms on heads."""
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return Attention(config.hidden_size, *heads, theta=config.rope_theta, norm_eps=config.rms_norm_eps, **parts)

    @staticmethod
    def make_mlp(config: Qwen3MoeConfig, layer: int, **parts: Any) -> nnx.Module:
        """Experts without shared ones."""
        if not config.is_moe_layer(layer):
            return MLP(config.hidden_size, config.intermediate_size, **parts)
        router = RoutingConfig(config.num_experts, config.num_experts_per_tok, renormalize=config.norm_topk_prob)
        path = f"model.layers.{layer}.mlp"
        return MoEBlock(config.hidden_size, config.moe_intermediate_size, router, path=path, **parts)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen3-VL-MoE's `text_config` as the config of a Qwen3-MoE.

    Its router always divides by the sum of the chosen. Text has the same position along all three axes of its RoPE
    (`mrope_section`), which then turns like the usual one.
    """
    text = config.get("text_config")
    expected = f"{VL_MODEL_TYPE}_text"
    if not isinstance(text, Mapping) or text.get("model_type") != expected:
        found = text.get("model_type") if isinstance(text, Mapping) else text
        raise ValueError(f"text_config of {VL_MODEL_TYPE} must have model_type {expected!r}, got {found!r}")
    outer = {key: config[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if config.get(key) is not None}
    return {"rope_theta": 5e5, **text, **outer, "model_type": MODEL_TYPE, "norm_topk_prob": True}
