"""Flax NNX modules, thin over the pure functions: dense layers and the expert layer."""

from fp4jax.layers.linear import (
    MLP as MLP,
    BlockFP8Linear as BlockFP8Linear,
    Linear as Linear,
    NVFP4Linear as NVFP4Linear,
    RMSNorm as RMSNorm,
)
from fp4jax.layers.moe_block import (
    EP_AXIS as EP_AXIS,
    ExpertAmax as ExpertAmax,
    ExpertSettings as ExpertSettings,
    MoEAux as MoEAux,
    MoEBlock as MoEBlock,
    RoutingConfig as RoutingConfig,
    expert_mesh as expert_mesh,
)
