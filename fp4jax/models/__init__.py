"""Models, one file each, and what they share: the setup of their experts, and text generation."""

from fp4jax.models.deepseek_v3 import DeepseekV3 as DeepseekV3, DeepseekV3Config as DeepseekV3Config
from fp4jax.models.ernie45_moe import Ernie45Moe as Ernie45Moe, Ernie45MoeConfig as Ernie45MoeConfig
from fp4jax.models.expert_setup import (
    configure_experts as configure_experts,
    quantize_experts as quantize_experts,
    set_input_scales as set_input_scales,
)
from fp4jax.models.generation import generate as generate
from fp4jax.models.qwen3_moe import Qwen3Moe as Qwen3Moe, Qwen3MoeConfig as Qwen3MoeConfig
