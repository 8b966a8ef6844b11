"""DeepSeek-V3: latent attention, routed experts in groups, and shared experts that every token visits.

Routing: the score of an expert for a token is sigmoid(logit). The sum of an expert's score and a stored correction
bias decides whether it is chosen. A group of experts counts with the sum of its two largest such sums; the router
keeps the best `topk_group` groups and chooses the best experts among them. The weight of a chosen expert is its score
(without the bias), divided by the sum of the chosen scores if `norm_topk_prob`, times `routed_scaling_factor`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from flax import nnx

from fp4jax.layers import MoEBlock, RoutingConfig
from fp4jax.layers.latent_attention import LatentAttention, Yarn
from fp4jax.layers.mlp import MLP
from fp4jax.models.decoder import Decoder
from fp4jax.models.hf_config import as_fields, check_shapes, check_types, read_hf, write_hf

MODEL_TYPE = "deepseek_v3"
_RENAMED = {"num_experts": "n_routed_experts"}
# Values of keys that a file lacks, as Hugging Face's config class sets them.
_ABSENT = {
    "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3, "n_shared_experts": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DeepseekV3Config:
    """Shapes and constants of a DeepSeek-V3, with the field names of Hugging Face's `config.json`.

    Two fields differ from the file: `num_experts` is its `n_routed_experts`, and `yarn` holds its `rope_scaling`.
    `dtype` is the dtype that the model computes in.

    Raises:
      ValueError: a field has a value that no model can have.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    intermediate_size: int = 0
    n_shared_experts: int = 1
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    yarn: Yarn | None = None
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: str = "bfloat16"

    @property
    def head_dim(self) -> int:
        """The size of a head's query and key: the part without RoPE plus the part with it."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_key_value_heads(self) -> int:
        """The number of heads with keys and values of their own: all attention heads."""
        return self.num_attention_heads

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "moe_layer_freq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.qk_rope_head_dim < 2 or self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even (RoPE rotates pairs), got {self.qk_rope_head_dim}")
        check_shapes(self)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer has experts: the first `first_k_dense_replace` layers have a dense MLP instead.

        Of the layers after them, those whose index is a multiple of `moe_layer_freq` have experts.
        """
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DeepseekV3Config":
        """Make a config from a parsed `config.json`; `hf_config.read_hf` explains the rules.

        RoPE may be scaled by YaRN (`rope_scaling` with type "yarn").

        Raises:
          ValueError: a key is missing, or its value asks for something that this model does not support.
        """
        for key, supported in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
            if config.get(key, supported) != supported:
                raise ValueError(f"{key}={config[key]!r} is not supported by {MODEL_TYPE}, only {supported!r}")
        absent = _ABSENT if "q_lora_rank" in config else {**_ABSENT, "q_lora_rank": 1536}  # null: no q_lora_rank
        ropes = ("default", "yarn")
        found = read_hf(cls, config, model_type=MODEL_TYPE, absent=absent, renamed=_RENAMED, rope_types=ropes)
        scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        if scaling.get("rope_type", scaling.get("type", "default")) != "yarn":
            return found
        for key, supported in (("attention_factor", None), ("truncate", True)):
            if scaling.get(key, supported) not in (None, supported):
                raise ValueError(f"rope_scaling of type yarn: {key}={scaling[key]!r} is not supported")
        names = {field.name for field in dataclasses.fields(Yarn)}
        values = {key: value for key, value in scaling.items() if key in names and value is not None}
        check_types(Yarn, values, f"{MODEL_TYPE}, rope_scaling")
        try:
            yarn = Yarn(**as_fields(Yarn, values))
        except TypeError as error:
            raise ValueError(f"rope_scaling of type yarn: {error}") from error
        return dataclasses.replace(found, yarn=yarn)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that `from_hf` reads back to an equal config."""
        values = write_hf(self, model_type=MODEL_TYPE, architecture="DeepseekV3ForCausalLM", renamed=_RENAMED)
        yarn = values.pop("yarn")
        values |= {
            "num_key_value_heads": self.num_key_value_heads,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        }
        return values if yarn is None else {**values, "rope_scaling": {"type": "yarn", **dataclasses.asdict(yarn)}}


class DeepseekV3(Decoder):
    """DeepSeek-V3 as a `Decoder`; a layer's cache holds one latent and one shared rotated key per token."""

    TENSOR_NAMES: ClassVar[dict[str, str]] = {"correction_bias": "gate.e_score_correction_bias"}

    @staticmethod
    def make_attention(config: DeepseekV3Config, **parts: Any) -> LatentAttention:
        """The latent attention of a layer."""
        return LatentAttention(
            config.hidden_size, config.num_attention_heads, q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank, qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim, v_head_dim=config.v_head_dim, theta=config.rope_theta,
            interleaved=config.rope_interleave, yarn=config.yarn, **parts,
        )  # fmt: skip

    @staticmethod
    def make_mlp(config: DeepseekV3Config, layer: int, **parts: Any) -> nnx.Module:
        """The dense MLP or the expert block of a layer.

        The shared experts of a block are one MLP whose intermediate size is the sum of theirs.
        """
        if not config.is_moe_layer(layer):
            return MLP(config.hidden_size, config.intermediate_size, **parts)
        router = RoutingConfig(
            config.num_experts, config.num_experts_per_tok, scoring="sigmoid", renormalize=config.norm_topk_prob,
            correction_bias=True, num_groups=config.n_group, topk_groups=config.topk_group,
            routed_scaling_factor=config.routed_scaling_factor,
        )  # fmt: skip
        shared = config.moe_intermediate_size * config.n_shared_experts
        return MoEBlock(
            config.hidden_size, config.moe_intermediate_size, router, shared_intermediate_size=shared or None,
            path=f"model.layers.{layer}.mlp", **parts,
        )  # fmt: skip
