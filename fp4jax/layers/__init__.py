"""Flax NNX modules, thin layers over the pure functions: linear layers, MLP, RMSNorm and the expert layer."""

from fp4jax.layers.calibration import ExpertAmax as ExpertAmax
from fp4jax.layers.linear import (
    BlockFP8Linear as BlockFP8Linear,
    Linear as Linear,
    NVFP4Linear as NVFP4Linear,
    RMSNorm as RMSNorm,
)
from fp4jax.layers.mlp import MLP as MLP
from fp4jax.layers.moe_block import (
    MoEAux as MoEAux,
    MoEBlock as MoEBlock,
)
from fp4jax.layers.routing_config import RoutingConfig as RoutingConfig
