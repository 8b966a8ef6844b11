"""ERNIE-4.5-MoE: grouped-query attention, routed experts with a correction bias, and shared experts for every token.

Routing: the score of an expert for a token is the softmax of the router's logits. The experts with the largest sum of
score and stored correction bias are chosen. The weight of a chosen expert is its score without the bias, divided by
the sum of the chosen scores. RoPE rotates neighbouring values (2i, 2i + 1) of a head together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flax import nnx

from fp4jax.layers import MoEBlock, RoutingConfig
from fp4jax.layers.attention import Attention
from fp4jax.layers.mlp import MLP
from fp4jax.models.decoder import Decoder
from fp4jax.models.hf_config import check_shapes, read_hf, write_hf

MODEL_TYPE = "ernie4_5_moe"
_RENAMED = {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"}
# Hugging Face's model divides by max(sum of the chosen scores, moe_norm_min). The largest score is at least
# 1 / experts, so a bound this small never matters, and the router here leaves it out.
_NORM_MIN = 1e-12


@dataclass(frozen=True)
class Ernie45MoeConfig:
    """Shapes and constants of an ERNIE-4.5-MoE, with the field names of Hugging Face's `config.json`.

    Two fields have two names in such files: `num_experts` is also `moe_num_experts`, and `num_experts_per_tok` is also
    `moe_k`. `dtype` is the dtype that the model computes in.

    Raises:
      ValueError: a field has a value that no model can have, or `moe_norm_min` is larger than is supported.
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
    moe_num_shared_experts: int = 2
    moe_layer_start_index: int = 1
    moe_layer_end_index: int = -1
    moe_layer_interval: int = 1
    moe_norm_min: float = _NORM_MIN
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.moe_layer_interval < 1:
            raise ValueError(f"moe_layer_interval must be at least 1, got {self.moe_layer_interval}")
        if not 0 <= self.moe_norm_min <= _NORM_MIN:
            raise ValueError(f"moe_norm_min={self.moe_norm_min} is not supported, only up to {_NORM_MIN}")
        if self.moe_num_shared_experts < 0:
            raise ValueError(f"moe_num_shared_experts must not be negative, got {self.moe_num_shared_experts}")
        check_shapes(self)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer has experts instead of a dense MLP.

        It has experts if its index is between `moe_layer_start_index` and `moe_layer_end_index` (-1: the last layer),
        both included, and its number, counted from 1, is a multiple of `moe_layer_interval`.
        """
        end = self.num_hidden_layers - 1 if self.moe_layer_end_index == -1 else self.moe_layer_end_index
        return self.moe_layer_start_index <= layer <= end and (layer + 1) % self.moe_layer_interval == 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Ernie45MoeConfig":
        """Make a config from a parsed `config.json`; `hf_config.read_hf` explains the rules.

        Raises:
          ValueError: a key is missing, or its value asks for something that this model does not support.
        """
        return read_hf(cls, config, model_type=MODEL_TYPE, absent={}, renamed=_RENAMED)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that `from_hf` reads back to an equal config."""
        return {
            **write_hf(self, model_type=MODEL_TYPE, architecture="Ernie4_5_MoeForCausalLM", renamed=_RENAMED),
            "use_bias": False,
        }


class Ernie45Moe(Decoder):
    """ERNIE-4.5-MoE as a `Decoder`."""

    TENSOR_NAMES: ClassVar[dict[str, str]] = {"correction_bias": "moe_statics.e_score_correction_bias"}

    @staticmethod
    def make_attention(config: Ernie45MoeConfig, **parts: Any) -> Attention:
        """The grouped-query attention of a layer, whose RoPE rotates neighbouring values."""
        heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        return Attention(config.hidden_size, *heads, theta=config.rope_theta, interleaved=True, **parts)

    @staticmethod
    def make_mlp(config: Ernie45MoeConfig, layer: int, **parts: Any) -> nnx.Module:
        """The dense MLP or the expert block of a layer.

        The shared experts of a block are one MLP whose intermediate size is the sum of theirs.
        """
        if not config.is_moe_layer(layer):
            return MLP(config.hidden_size, config.intermediate_size, **parts)
        shared = config.moe_intermediate_size * config.moe_num_shared_experts
        router = RoutingConfig(config.num_experts, config.num_experts_per_tok, correction_bias=True)
        return MoEBlock(
            config.hidden_size, config.moe_intermediate_size, router, shared_intermediate_size=shared or None,
            path=f"model.layers.{layer}.mlp", **parts,
        )  # fmt: skip
