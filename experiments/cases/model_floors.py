"""The least time of a decoder layer in prefill and in decode, from the sizes of the model and the rates of the device.

The bytes are the weights of the experts that are hit, the other weights once, and the keys and values of the filled
places once. The FLOPs are those of all matrix products. The floor is the larger of both times.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from experiments.cases.gemm import BYTES_PER_WEIGHT
from experiments.harness.timing import Ceilings
from fp4jax.attention.cache_formats import bytes_of
from fp4jax.block_fp8 import BLOCK
from fp4jax.layers import MoEBlock

# Bytes of a weight by what a linear layer runs as; a plain layer ("bf16") has those of the model's dtype.
_DENSE_BYTES = {"fp8": 1 + 4 / BLOCK**2, "nvfp4": BYTES_PER_WEIGHT}


class LayerSizes(NamedTuple):
    """The numbers of weights in one decoder layer; norms and biases are left out.

    Attributes:
      linear: weights of the linear layers beside the router and the routed experts.
      router: weights of the router; 0: the layer has no experts.
      expert: weights of one routed expert.
      experts: the number of routed experts, E.
      top_k: experts per token, k.
    """

    linear: int
    router: int = 0
    expert: int = 0
    experts: int = 0
    top_k: int = 0


class AttentionSizes(NamedTuple):
    """What attention costs, per layer.

    Attributes:
      cached: bytes of the cache per token.
      prefill: multiply-adds per pair of a query token and a key token in prefill, over all heads.
      decode: the same in decode. Latent attention multiplies with the cached latents there, instead of making the keys
        and values of all heads from them in every step.
    """

    cached: int
    prefill: int
    decode: int


class Work(NamedTuple):
    """The work of one call.

    Attributes:
      phase: "prefill" (one request of `tokens` tokens) or "decode" (one token for each of `requests` requests).
      requests: the number of requests.
      tokens: tokens of a prefill.
      context: filled places of every request before a decode step.
    """

    phase: str
    requests: int = 1
    tokens: int = 0
    context: int = 0

    @property
    def rows(self) -> int:
        """Tokens that go through the layer in one call."""
        return self.tokens if self.phase == "prefill" else self.requests

    @property
    def places(self) -> int:
        """Filled places of the cache that a call writes or reads, over all requests."""
        return self.tokens if self.phase == "prefill" else self.requests * (self.context + 1)

    @property
    def pairs(self) -> float:
        """Pairs of a query and a key that it sees."""
        return self.tokens * (self.tokens + 1) / 2 if self.phase == "prefill" else self.places


def layer_sizes(model: Any) -> list[LayerSizes]:
    """The sizes of every decoder layer of a model with plain weights, which may be ShapeDtypeStructs."""
    found = []
    for layer in model.layers:
        linear = router = 0
        block = layer.mlp if isinstance(layer.mlp, MoEBlock) else None
        for path, param in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
            shape = getattr(param.get_value(), "shape", ())
            if len(shape) != 2:  # norms and biases have one axis, and stacked experts three
                continue
            if path[-2:] == ("gate", "weight"):
                router += shape[0] * shape[1]
            else:
                linear += shape[0] * shape[1]
        if block is None:
            found.append(LayerSizes(linear))
            continue
        (experts, n, k), route = block.w13.get_value().shape, block.router_config
        expert = n * k + k * (n // 2)
        found.append(LayerSizes(linear, router, expert, experts, route.top_k))
    return found


def attention_sizes(model: Any) -> AttentionSizes:
    """The costs of a model's attention."""
    config = model.config
    cached = bytes_of(model.cache_formats[:1], 1, 1, 1)
    if hasattr(config, "kv_lora_rank"):
        prefill = config.num_attention_heads * (config.head_dim + config.v_head_dim)
        in_latent_space = 2 * config.kv_lora_rank + config.qk_rope_head_dim
        return AttentionSizes(cached, prefill, config.num_attention_heads * in_latent_space)
    both = config.num_attention_heads * 2 * config.head_dim
    return AttentionSizes(cached, both, both)


def experts_hit(experts: int, top_k: int, rows: int) -> float:
    """The expected number of experts that have at least one of `rows` tokens, each of which draws `top_k` of them."""
    return experts * (1 - (1 - top_k / experts) ** rows)


def layer_work(
    sizes: LayerSizes, attention: AttentionSizes, work: Work, experts: str, dense: str, dtype: Any, ranks: int = 1
) -> tuple[float, float]:
    """The bytes that a device must move for one decoder layer, and the FLOPs that it must compute.

    Args:
      sizes: the layer.
      attention: its attention.
      work: the call.
      experts: the experts' mode; "bf16" has plain weights, and all others have NVFP4 weights.
      dense: what the other linear layers run as.
      dtype: the dtype of plain weights.
      ranks: devices that the experts are split over, each with this work.
    """
    plain = jnp.dtype(dtype).itemsize
    hit = experts_hit(sizes.experts, sizes.top_k, work.rows * ranks) / ranks if sizes.experts else 0
    num_bytes = (
        hit * sizes.expert * (plain if experts == "bf16" else BYTES_PER_WEIGHT)
        + sizes.linear * _DENSE_BYTES.get(dense, plain)
        + sizes.router * plain
        + work.places * attention.cached
    )
    per_pair = attention.prefill if work.phase == "prefill" else attention.decode
    per_row = sizes.linear + sizes.router + sizes.top_k * sizes.expert
    return num_bytes, 2 * (work.rows * per_row + work.pairs * per_pair)


def floor_us(model: Any, work: Work, experts: str, dense: str, ceilings: Ceilings, ranks: int = 1) -> float:
    """The mean floor of a model's decoder layers in microseconds; see the module.

    Args:
      model: the model with plain weights, which may be ShapeDtypeStructs.
      work, experts, dense, ranks: as in `layer_work`.
      ceilings: the rates of the device.
    """
    attention, sizes = attention_sizes(model), layer_sizes(model)
    parts = [layer_work(layer, attention, work, experts, dense, model.config.dtype, ranks) for layer in sizes]
    return sum(ceilings.floor_us(*part) for part in parts) / len(parts)
