"""Linear layers with the same input, computed as one product."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fp4jax.block_fp8 import BLOCK, BlockFP8Weights
from fp4jax.grouped_gemm.packed_weights import PackedWeights
from fp4jax.layers.linear import BlockFP8Linear, Linear, NVFP4Linear


class FusedLinear(nnx.Module):
    """Several linear layers of one input, whose weights stand below each other in one matrix.

    Args:
      linear: the layer with the common weight.
      sizes: the output size of every layer.
    """

    def __init__(self, linear: nnx.Module, sizes: Sequence[int]):
        self.linear: Any = linear
        self.sizes = tuple(sizes)

    def __call__(self, x: Float[Array, "... K"]) -> list[jax.Array]:
        """Returns the outputs of the layers, in their order."""
        ends = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes))]
        return jnp.split(self.linear(x), ends[:-1], axis=-1)


def fuse(*linears: Any) -> FusedLinear | None:
    """Returns the layers as one, with a copy of their weights; None if they do not compute alike.

    Layers fuse if they are of one kind and of the same settings: plain ones, block-wise FP8 of sizes that are multiples
    of 128, and NVFP4 whose weights are packed for the kernel and whose activations have the same scale.
    """
    first = linears[0]
    join = {Linear: _plain, BlockFP8Linear: _block_fp8, NVFP4Linear: _nvfp4}.get(type(first))
    if join is None or any(type(linear) is not type(first) or linear.dtype != first.dtype for linear in linears):
        return None
    weights = [linear.weight.get_value() for linear in linears]
    weight = join(linears, weights)
    if weight is None:
        return None
    one = nnx.merge(*nnx.split(first))
    one.weight = nnx.Param(weight)  # a parameter of its own: the old one still belongs to the old layer
    return FusedLinear(one, [w.shape[-2] for w in weights])


def _plain(linears, weights):
    return jnp.concatenate(weights) if len({w.dtype for w in weights}) == 1 else None


def _block_fp8(linears, weights):
    if len({linear.power_of_two_scales for linear in linears}) > 1 or any(w.shape[0] % BLOCK for w in weights):
        return None
    return BlockFP8Weights(*(jnp.concatenate([getattr(w, name) for w in weights]) for name in ("qdata", "block_scale")))


def _nvfp4(linears, weights):
    if not all(isinstance(w, PackedWeights) for w in weights) or not _quantize_alike(linears):
        return None
    scales = [jnp.broadcast_to(w.global_scale, (1, w.shape[1], 1)) for w in weights]
    return PackedWeights(jnp.concatenate([w.words for w in weights], axis=1), jnp.concatenate(scales, axis=1))


def _quantize_alike(linears):
    """Whether NVFP4 layers make the same activations of an input."""
    if len({linear.activation_format for linear in linears}) > 1:
        return False
    scales = {None if linear.input_scale is None else float(linear.input_scale[...]) for linear in linears}
    return linears[0].activation_format == "bf16" or len(scales) == 1
