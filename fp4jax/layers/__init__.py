"""Flax NNX modules, thin layers over the pure functions: linear layers, MLP, RMSNorm and the expert layer."""

from fp4jax.layers.linear import (
    MLP as MLP,
    BlockFP8Linear as BlockFP8Linear,
    Linear as Linear,
    NVFP4Linear as NVFP4Linear,
    RMSNorm as RMSNorm,
)
from fp4jax.layers.moe_block import (
    ExpertAmax as ExpertAmax,
    MoEAux as MoEAux,
    MoEBlock as MoEBlock,
    RoutingConfig as RoutingConfig,
)
