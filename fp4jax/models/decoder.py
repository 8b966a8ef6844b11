"""The decoder-only language model that all models of this folder share, and its cache of keys and values.

The model is a token embedding, a stack of decoder layers, a last RMSNorm and an output projection (head) to logits.
A decoder layer adds two terms to its input h [B, S, H]; its mlp is an expert block or a dense SwiGLU MLP:

    h = h + attention(norm(h))
    h = h + mlp(norm(h))

Modules and parameters have the names of Hugging Face checkpoints, so a parameter's path is the name of its tensor.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from fp4jax.attention import CacheFormat, KeyValuePages, LayerState, PageFormat
from fp4jax.layers.attention import Attention
from fp4jax.layers.linear import Linear, RMSNorm, dot
from fp4jax.layers.moe_block import ExpertAmax, MoEAux, MoEBlock


@runtime_checkable
class DecoderConfig(Protocol):
    """The fields that `Decoder` reads of a model's config; every config class of this folder has them."""

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

    def to_hf(self) -> dict[str, Any]:
        """The content of a Hugging Face `config.json` for this model."""
        ...


class KVCache(NamedTuple):
    """The cache of all layers of a model, made by `Decoder.init_cache`.

    Attributes:
      layers: the arrays of every layer, which its `cache_format` describes. Keys and values are [B, heads, S, size] for
        B sequences and S positions that there is room for.
      length: i32 (), the number of positions that are filled; they come first. All sequences have the same length.
    """

    layers: list[tuple[jax.Array, ...]]
    length: Int[Array, ""]


class Output(NamedTuple):
    """What `Decoder.forward` returns.

    Attributes:
      logits: float32 logits of every position; V is the size of the vocabulary.
      cache: the cache that was passed in, with the new positions added; None if no cache was passed in.
      aux: dropped routes and balance losses, summed over the MoE layers.
    """

    logits: Float[Array, "B S V"]
    cache: KVCache | None
    aux: MoEAux


# Runs an expert block: (block, its input, residual=what is added to the result) -> (result, a report).
RunExperts = Callable[..., tuple[jax.Array, Any]]


class DecoderLayer(nnx.Module):
    """One decoder layer: attention, then the mlp, each applied to an RMSNorm of its input and added to that input.

    Args:
      config: sizes and the epsilon of the norms.
      self_attn: the attention module. `self_attn(x, start, cache)` returns the result and the updated cache.
      mlp: an `MoEBlock`, or a module that maps [B, S, H] to [B, S, H].
      kinds: `dtype` and `param_dtype` of the norms.
    """

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
        cache: KeyValuePages | LayerState | None,
        run_experts: RunExperts = MoEBlock.__call__,
    ) -> tuple[jax.Array, KeyValuePages | LayerState | None, Any]:
        """Apply the layer to the positions from `start` on.

        Args:
          x: hidden states [B, S, H].
          start: the position of x[:, 0]: i32 () for all sequences, or i32 [B] with one position per sequence.
          cache: the layer's cache, of its `self_attn.cache_format`; None: the tokens of x attend to each other only.
          run_experts: the function that is called with the expert block, its input and `residual`, what it adds to its
            result; `calibrate` passes another one.

        Returns:
          The hidden states [B, S, H], the updated cache (or None), and the second result of `run_experts`; the
          last is None if the layer has a dense MLP.
        """
        attended, cache = self.self_attn(self.input_layernorm(x), start, cache)
        x = x + attended
        hidden = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MoEBlock):
            x, report = run_experts(self.mlp, hidden, residual=x)
            return x, cache, report
        return x + self.mlp(hidden), cache, None


class Embedding(nnx.Module):
    """Token embeddings: a table [V, H] with one row per token id.

    If a model ties its embeddings, its head multiplies with the same table.
    """

    def __init__(self, config: DecoderConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(dtype)
        shape = (config.vocab_size, config.hidden_size)
        values = jax.random.normal(rngs.params(), shape, jnp.float32) * config.initializer_range
        self.weight = nnx.Param(values.astype(param_dtype))

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S H"]:
        return self.weight[...][ids].astype(self.dtype)


class Decoder(nnx.Module):
    """A decoder-only language model: `model(ids)` maps token ids [B, S] to float32 logits [B, S, V].

    A subclass overrides `make_attention` and `make_mlp`, which make the two parts of a layer.

    Args:
      config: the model's config, which has at least the fields of `DecoderConfig`.
      param_dtype: the dtype that the weights are stored in; None: the config's `dtype`, in which the model computes.
        Training stores float32 weights, whatever dtype the model computes in.
      rngs: the source of the random initial weights.
    """

    # Parameters whose tensors have another name in checkpoints: last part of the path -> end of the tensor's name.
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

    @property
    def cache_formats(self) -> list[CacheFormat]:
        """What every layer keeps of the tokens before: pages of keys and values, or the state of a recurrent layer."""
        return [layer.self_attn.cache_format for layer in self.layers]

    def set_cache_dtype(self, dtype: Any) -> None:
        """Sets the type that keys and values are cached in: the compute dtype, or e4m3 with the layers' scales.

        Latent attention keeps its latents in the compute dtype.
        """
        for layer in self.layers:
            if isinstance(layer.self_attn, Attention):
                layer.self_attn.cache_dtype = jnp.dtype(dtype)

    @staticmethod
    def make_attention(config: Any, **parts: Any) -> nnx.Module:
        """The attention module of a layer; a subclass must override this.

        Args:
          config: the model's config.
          parts: `dtype`, `param_dtype`, `stddev` of the initial weights, and `rngs`.
        """
        raise NotImplementedError

    @staticmethod
    def make_mlp(config: Any, layer: int, **parts: Any) -> nnx.Module:
        """The expert block or the dense MLP of a layer; a subclass must override this.

        Args:
          config: the model's config.
          layer: the index of the layer, from 0.
          parts: `dtype`, `param_dtype`, `stddev` of the initial weights, and `rngs`.
        """
        raise NotImplementedError

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S V"]:
        return self.forward(ids).logits

    def forward(self, ids: Int[Array, "B S"], cache: KVCache | None = None) -> Output:
        """Compute the logits of `ids` [B, S], which continue the tokens in `cache` if there is one.

        The caller makes sure that the length of the cache plus S does not exceed the positions that the cache has room
        for: the length is only known at run time, so this function cannot check it.

        Raises:
          ValueError: S exceeds the positions of the cache or, without a cache, the model's max_position_embeddings.
        """
        limit = self.config.max_position_embeddings if cache is None else self._places(cache)
        if ids.shape[1] > limit:
            raise ValueError(f"{ids.shape[1]} positions exceed the {limit} of the {'cache' if cache else 'model'}")
        x, cache, layer_aux = self._decode(ids, cache, MoEBlock.__call__)
        dropped = sum((a.dropped for a in layer_aux), start=jnp.int32(0))
        aux = MoEAux(dropped, sum((a.balance_loss for a in layer_aux), start=jnp.float32(0)))
        return Output(self.head(x), cache, aux)

    def head(self, x: Float[Array, "B S H"]) -> Float[Array, "B S V"]:
        """Apply the last norm and the output projection: hidden states of the last layer -> float32 logits."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if not isinstance(head, Linear | Embedding):  # a quantized head is a module of its own
            return head(self.norm(x)).astype(jnp.float32)
        return dot(self.norm(x), head.weight[...], dtype=head.dtype, out_dtype=jnp.float32)

    def calibrate(self, ids: Int[Array, "B S"]) -> list[ExpertAmax]:
        """Measure the largest inputs of the experts' GEMMs on the token ids of a sample text.

        Returns one entry per MoE layer, first layer first. The expert weights must not be quantized yet.
        """
        return self._decode(ids, None, MoEBlock.calibrate)[2]

    def _decode(
        self, ids: jax.Array, cache: KVCache | None, run_experts: RunExperts
    ) -> tuple[jax.Array, KVCache | None, list[Any]]:
        """Run the embedding and all layers.

        Returns the hidden states [B, S, H] before the last norm, the extended cache (or None), and a list with the
        second result of `run_experts` for every MoE layer.
        """
        x = self.embed_tokens(ids)
        start = jnp.int32(0) if cache is None else cache.length
        kept, reports = [], []
        table = jnp.arange(ids.shape[0], dtype=jnp.int32)[:, None]  # a page per sequence
        for layer, format, arrays in zip(
            self.layers, self.cache_formats, [None] * len(self.layers) if cache is None else cache.layers, strict=True
        ):
            old = None if arrays is None else format.of(arrays, table)
            x, new, report = layer(x, start, old, run_experts)
            kept.append(new)
            if report is not None:
                reports.append(report)
        if cache is not None:
            cache = KVCache([new.arrays for new in kept], start + ids.shape[1])
        return x, cache, reports

    def init_cache(self, batch: int, max_length: int) -> KVCache:
        """Make an empty cache with room for `max_length` positions of `batch` sequences."""
        return KVCache([format.zeros(batch, 1, max_length) for format in self.cache_formats], jnp.int32(0))

    def _places(self, cache: KVCache) -> int:
        """The positions that a cache has room for."""
        for arrays, format in zip(cache.layers, self.cache_formats, strict=True):
            if isinstance(format, PageFormat):
                return arrays[0].shape[2]
        return self.config.max_position_embeddings

    def place_attention(self, mesh: Mesh | None) -> None:
        """Chooses XLA for the attention of a model on several devices, as its kernels would not be split over them."""
        for layer in self.layers:
            layer.self_attn.implementation = None if mesh is None or mesh.size == 1 else "xla"

    def moe_blocks(self) -> list[MoEBlock]:
        """The expert blocks of the model, first layer first; layers with a dense MLP have none."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoEBlock)]
