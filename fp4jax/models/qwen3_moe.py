"""Qwen3-MoE: grouped-query attention with an RMSNorm on every query and key head, and routed SwiGLU experts.

Routing is the softmax of the router's logits; the k largest are chosen, and divided by their sum if `norm_topk_prob`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flax import nnx

from fp4jax.layers import MoEBlock, RoutingConfig
from fp4jax.layers.attention import Attention
from fp4jax.layers.mlp import MLP
from fp4jax.models.decoder import Decoder
from fp4jax.models.hf_config import check_shapes, read_hf, write_hf

MODEL_TYPE = "qwen3_moe"
VL_MODEL_TYPE = "qwen3_vl_moe"  # a Qwen3-MoE that reads images too; its text model is loaded


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """Shapes and constants of a Qwen3-MoE, with the field names of Hugging Face's `config.json`.

    `num_experts` may also be called `num_local_experts` in the file. `dtype` is the dtype that the model computes in.

    Raises:
      ValueError: a field has a value that no model can have.
    """

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
        """Whether a layer has experts instead of a dense MLP.

        It has experts if `mlp_only_layers` does not list it and its number, counted from 1, is a multiple of
        `decoder_sparse_step`.
        """
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Make a config from a parsed `config.json`; `hf_config.read_hf` explains the rules.

        The file of a Qwen3-VL-MoE, which reads images too, gives the config of its text model.

        Raises:
          ValueError: a key is missing, or its value asks for something that this model does not support.
        """
        if config.get("model_type") == VL_MODEL_TYPE:
            config = _text_config(config)
        absent = {"rope_theta": 1e4, "norm_topk_prob": False}
        return read_hf(cls, config, model_type=MODEL_TYPE, absent=absent, renamed={"num_experts": "num_local_experts"})

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that `from_hf` reads back to an equal config."""
        return write_hf(self, model_type=MODEL_TYPE, architecture="Qwen3MoeForCausalLM")


class Qwen3Moe(Decoder):
    """Qwen3-MoE as a `Decoder`."""

    @staticmethod
    def make_attention(config: Qwen3MoeConfig, **parts: Any) -> Attention:
        """The grouped-query attention of a layer, with norms on the query and key heads."""
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return Attention(config.hidden_size, *heads, theta=config.rope_theta, norm_eps=config.rms_norm_eps, **parts)

    @staticmethod
    def make_mlp(config: Qwen3MoeConfig, layer: int, **parts: Any) -> nnx.Module:
        """The dense MLP or the expert block of a layer; the block has no shared experts."""
        if not config.is_moe_layer(layer):
            return MLP(config.hidden_size, config.intermediate_size, **parts)
        router = RoutingConfig(config.num_experts, config.num_experts_per_tok, renormalize=config.norm_topk_prob)
        path = f"model.layers.{layer}.mlp"
        return MoEBlock(config.hidden_size, config.moe_intermediate_size, router, path=path, **parts)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a Qwen3-VL-MoE config that describes its text model, as the config of a Qwen3-MoE.

    The router of Qwen3-VL-MoE always divides the chosen weights by their sum, so `norm_topk_prob` is True. Its RoPE
    uses three positions per token (`mrope_section`); for text all three are equal, and the result is the usual RoPE.
    """
    text = config.get("text_config")
    expected = f"{VL_MODEL_TYPE}_text"
    if not isinstance(text, Mapping) or text.get("model_type") != expected:
        found = text.get("model_type") if isinstance(text, Mapping) else text
        raise ValueError(f"text_config of {VL_MODEL_TYPE} must have model_type {expected!r}, got {found!r}")
    outer = {key: config[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype") if config.get(key) is not None}
    return {"rope_theta": 5e5, **text, **outer, "model_type": MODEL_TYPE, "norm_topk_prob": True}
