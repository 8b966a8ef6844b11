"""What the quantization section of a checkpoint's config says about each module."""

from fp4jax.quant_config.methods import Method as Method, QuantizationPlan as QuantizationPlan, Refusal as Refusal
from fp4jax.quant_config.plan import plan_quantization as plan_quantization
