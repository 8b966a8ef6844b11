"""Quantization configs: from the checkpoint's config and the user's to a plan of how each module is stored and runs."""

from fp4jax.quant_config.methods import Method as Method, QuantizationPlan as QuantizationPlan, Refusal as Refusal
from fp4jax.quant_config.plan import plan_quantization as plan_quantization
