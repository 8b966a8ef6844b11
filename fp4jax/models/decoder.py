"""What all models share: embedding, layers of attention and experts (or a dense MLP), norm, head, and a cache.

    h = h + attention(norm(h));   h = h + mlp(norm(h))

Modules carry the names of Hugging Face checkpoints, so that a parameter's path is its tensor's name.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fp4jax.layers.linear import Linear, RMSNorm, dot
from fp4jax.layers.moe_block import ExpertAmax, MoEAux, MoEBlock


@runtime_checkable
class DecoderConfig(Protocol):
    """What this module reads of a model's config."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    dtype: str


class KVCache(NamedTuple):
    """Keys and values of all layers (or what `cache_parts` says); the first `length` positions are filled."""

    keys: Float[Array, "layers B heads_k S D"]
    values: Float[Array, "layers B heads_v S V"]
    length: Int[Array, ""]


class Output(NamedTuple):
    """Logits, the cache with the new positions added (None without one), and sums over the MoE layers."""

    logits: Float[Array, "B S V"]
    cache: KVCache | None
    aux: MoEAux


class DecoderLayer(nnx.Module):
    """Attention and experts (or a dense MLP), each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, self_attn: Any, mlp: Any, **kinds: Any):
        norm: dict[str, Any] = dict(eps=config.rms_norm_eps, **kinds)
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        self.mlp = mlp

    def __call__(
        self,
        x: jax.Array,
        start: jax.Array,
        cache: tuple[jax.Array, jax.Array] | None,
        run_experts: Callable[[MoEBlock, jax.Array], tuple[jax.Array, Any]] = MoEBlock.__call__,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None, Any]:
        """x [B, S, H] from position `start` ([] or [B]) on -> its successor, the cache with it, what experts report."""
        attended, cache = self.self_attn(self.input_layernorm(x), start, cache)
        x = x + attended
        hidden, report = self.post_attention_layernorm(x), None
        if isinstance(self.mlp, MoEBlock):
            hidden, report = run_experts(self.mlp, hidden)
        else:
            hidden = self.mlp(hidden)
        return x + hidden, cache, report


class Embedding(nnx.Module):
    """Token embeddings; also the output projection when embeddings are tied."""

    def __init__(self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(dtype)
        shape = (config.vocab_size, config.hidden_size)
        values = jax.random.normal(rngs.params(), shape, jnp.float32) * config.initializer_range
        self.weight = nnx.Param(values.astype(param_dtype))

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S H"]:
        return self.weight[...][ids].astype(self.dtype)


class Decoder(nnx.Module):
    """The whole language model: `model(ids [B, S])` gives float32 logits [B, S, V].

    A subclass says what a layer's attention and MLP are. `param_dtype` is what the weights are stored in (None: the
    config's dtype); training keeps float32 masters.
    """

    # Parameters that checkpoints of a model call otherwise: last part of the path -> the end of the tensor's name.
    TENSOR_NAMES: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Any, *, param_dtype: Any = None, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(param_dtype or config.dtype))
        self.config = config
        self.embed_tokens = Embedding(config, rngs=rngs, **kinds)
        parts: dict[str, Any] = dict(stddev=config.initializer_range, rngs=rngs, **kinds)
        self.layers = nnx.List(
            [
                DecoderLayer(
                    config, self.make_attention(config, **parts), self.make_mlp(config, layer, **parts), **kinds
                )
                for layer in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kinds)
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, stddev=config.initializer_range, rngs=rngs, **kinds
            )

    @staticmethod
    def cache_parts(config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, dim) of the two arrays that a layer's cache holds: keys and values."""
        part = config.num_key_value_heads, config.head_dim
        return part, part

    @staticmethod
    def make_attention(config: Any, **parts: Any) -> nnx.Module:
        """The attention of every layer; parts: dtype, param_dtype, stddev and rngs."""
        raise NotImplementedError

    @staticmethod
    def make_mlp(config: Any, layer: int, **parts: Any) -> nnx.Module:
        """The experts or the dense MLP of a layer."""
        raise NotImplementedError

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S V"]:
        return self.forward(ids).logits

    def forward(self, ids: Int[Array, "B S"], cache: KVCache | None = None) -> Output:
        """Logits of `ids`, which continue `cache` where one is given; its caller keeps length + S within its size.

        Raises:
          ValueError: for more positions than the cache, or the model, has.
        """
        limit = self.config.max_position_embeddings if cache is None else cache.keys.shape[3]
        if ids.shape[1] > limit:
            raise ValueError(f"{ids.shape[1]} positions exceed the {limit} of the {'cache' if cache else 'model'}")
        x, cache, layer_aux = self._decode(ids, cache, MoEBlock.__call__)
        dropped = sum((a.dropped for a in layer_aux), start=jnp.int32(0))
        aux = MoEAux(dropped, sum((a.balance_loss for a in layer_aux), start=jnp.float32(0)))
        return Output(self.head(x), cache, aux)

    def head(self, x: Float[Array, "B S H"]) -> Float[Array, "B S V"]:
        """Float32 logits of what the last layer gives."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if not isinstance(head, Linear | Embedding):  # stored quantized
            return head(self.norm(x)).astype(jnp.float32)
        return dot(self.norm(x), head.weight[...], dtype=head.dtype, out_dtype=jnp.float32)

    def calibrate(self, ids: Int[Array, "B S"]) -> list[ExpertAmax]:
        """Largest inputs of the experts' GEMMs on sample text, one entry per MoE layer; needs plain expert weights."""
        return self._decode(ids, None, MoEBlock.calibrate)[2]

    def _decode(
        self, ids: jax.Array, cache: KVCache | None, run_experts: Callable[[MoEBlock, jax.Array], tuple[jax.Array, Any]]
    ) -> tuple[jax.Array, KVCache | None, list[Any]]:
        """Hidden states before the last norm, the extended cache, and what each MoE layer reports."""
        x = self.embed_tokens(ids)
        start = jnp.int32(0) if cache is None else cache.length
        kept, reports = [], []
        for index, layer in enumerate(self.layers):
            old = None if cache is None else (cache.keys[index], cache.values[index])
            x, new, report = layer(x, start, old, run_experts)
            kept.append(new)
            if report is not None:
                reports.append(report)
        if cache is not None:
            keys, values = (jnp.stack(part) for part in zip(*kept, strict=True))
            cache = KVCache(keys, values, start + ids.shape[1])
        return x, cache, reports

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty cache for `max_length` positions."""
        layers, dtype = self.config.num_hidden_layers, self.config.dtype
        keys, values = (
            jnp.zeros((layers, batch, heads, max_length, dim), dtype) for heads, dim in self.cache_parts(self.config)
        )
        return KVCache(keys, values, jnp.int32(0))

    def moe_blocks(self) -> list[MoEBlock]:
        """The expert blocks, first layer first."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoEBlock)]
