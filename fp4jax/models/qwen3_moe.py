"""Qwen3-MoE: a decoder with grouped-query attention, per-head q/k RMSNorm, RoPE and routed SwiGLU experts.

    h = h + o_proj(attention(rope(q_norm(q)), rope(k_norm(k)), v));   h = h + experts(norm(h))

Modules carry the names of the Hugging Face checkpoint, so that a parameter's path is its tensor's name.
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fp4jax.layers.dense import MLP, Linear, RMSNorm, dot, exact_precision
from fp4jax.layers.moe_block import ExpertAmax, MoEAux, MoEBlock, RoutingConfig

MODEL_TYPE = "qwen3_moe"
_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Qwen3MoeConfig:
    """Shapes and constants, under the names of Hugging Face's `config.json`. `dtype` is what the model computes in."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "moe_intermediate_size", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even (RoPE rotates pairs), got {self.head_dim}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {_DTYPES}, got {self.dtype!r}")
        if self.decoder_sparse_step < 1:
            raise ValueError(f"decoder_sparse_step must be at least 1, got {self.decoder_sparse_step}")
        if self.intermediate_size < 1 and not all(map(self.is_moe_layer, range(self.num_hidden_layers))):
            raise ValueError(f"dense layers need a positive intermediate_size, got {self.intermediate_size}")

    def is_moe_layer(self, layer: int) -> bool:
        """Whether `layer` has experts: not listed in `mlp_only_layers`, and every `decoder_sparse_step`-th one."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen3MoeConfig":
        """Read a parsed `config.json` of either generation; keys that only concern training or serving are ignored.

        RoPE: `rope_theta` at the top level, or inside `rope_parameters`. Type: `torch_dtype` or `dtype`.

        Raises:
          ValueError: naming a missing key, or a key whose value asks for something this model does not do.
        """
        _refuse_unsupported(config)
        values = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        if "num_experts" not in values and config.get("num_local_experts") is not None:
            values["num_experts"] = config["num_local_experts"]
        if "head_dim" not in values and {"hidden_size", "num_attention_heads"} <= values.keys():
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        for rope in (config.get("rope_scaling") or {}, config.get("rope_parameters") or {}):
            if "rope_theta" in rope:
                values["rope_theta"] = rope["rope_theta"]
        values.setdefault("rope_theta", 1e4)  # what absent keys mean to Hugging Face: this one, and
        values["dtype"] = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        values["mlp_only_layers"] = tuple(values.get("mlp_only_layers", ()))
        values.setdefault("norm_topk_prob", False)  # this one
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"config.json of {MODEL_TYPE} lacks {', '.join(missing)}")
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """The `config.json` that `from_hf` reads back to an equal config."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["mlp_only_layers"] = list(self.mlp_only_layers)
        values["torch_dtype"] = values.pop("dtype")
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": MODEL_TYPE,
            "hidden_act": "silu",
            "attention_bias": False,
            **values,
        }


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(f"model_type {config.get('model_type')!r} is not supported, expected {MODEL_TYPE!r}")
    ropes = [config.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    rope_types = [rope.get("rope_type", rope.get("type", "default")) for rope in ropes]
    for key, value, supported in (
        ("hidden_act", config.get("hidden_act", "silu"), "silu"),
        ("attention_bias", config.get("attention_bias", False), False),
        ("use_sliding_window", config.get("use_sliding_window") or False, False),
        *(("rope_type", rope_type, "default") for rope_type in rope_types),
    ):
        if value != supported:
            raise ValueError(f"{key}={value!r} is not supported by {MODEL_TYPE}, only {supported!r}")


class KVCache(NamedTuple):
    """Keys and values of all layers at a fixed maximum length; the first `length` positions are filled."""

    keys: Float[Array, "layers B heads S D"]
    values: Float[Array, "layers B heads S D"]
    length: Int[Array, ""]


class Output(NamedTuple):
    """Logits, the cache with the new positions added (None without one), and sums over the MoE layers."""

    logits: Float[Array, "B S V"]
    cache: KVCache | None
    aux: MoEAux


def rope(x: Float[Array, "B S heads D"], positions: Int[Array, "..."], theta: float) -> Float[Array, "B S heads D"]:
    """Rotate the pairs (x[i], x[i + D/2]) by position * theta^(-2i/D), positions [S] or [B, S]; float32 inside."""
    half = x.shape[-1] // 2
    frequency = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention(
    q: Float[Array, "B S heads D"],
    k: Float[Array, "B kv_heads K D"],
    v: Float[Array, "B kv_heads K D"],
    positions: Int[Array, "..."],
) -> Float[Array, "B S heads D"]:
    """Causal grouped-query attention: a query at position p ([S] or [B, S]) sees keys 0..p; softmax in float32."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    precision = exact_precision(q.dtype)
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    scores = jnp.einsum("bsngd,bnkd->bngsk", q, k, precision=precision, preferred_element_type=jnp.float32)
    visible = jnp.arange(k.shape[2]) <= positions.reshape(-1, 1, 1, length, 1)
    probabilities = jax.nn.softmax(jnp.where(visible, scores * dim**-0.5, -jnp.inf), axis=-1).astype(q.dtype)
    out = jnp.einsum("bngsk,bnkd->bsngd", probabilities, v, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).reshape(batch, length, heads, dim)


class Attention(nnx.Module):
    """Grouped-query attention with an RMSNorm on every query and key head before RoPE."""

    def __init__(self, config: Qwen3MoeConfig, *, rngs: nnx.Rngs, **kinds: Any):
        self.head_dim, self.theta = config.head_dim, config.rope_theta
        hidden, dim, std = config.hidden_size, config.head_dim, config.initializer_range
        q_size, kv_size = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.q_proj = Linear(hidden, q_size, stddev=std, rngs=rngs, **kinds)
        self.k_proj = Linear(hidden, kv_size, stddev=std, rngs=rngs, **kinds)
        self.v_proj = Linear(hidden, kv_size, stddev=std, rngs=rngs, **kinds)
        self.o_proj = Linear(q_size, hidden, stddev=std, rngs=rngs, **kinds)
        self.q_norm = RMSNorm(dim, eps=config.rms_norm_eps, **kinds)
        self.k_norm = RMSNorm(dim, eps=config.rms_norm_eps, **kinds)

    def __call__(
        self, x: jax.Array, start: jax.Array, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        q, k, v = (p(x).reshape(*x.shape[:2], -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        positions = start[..., None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        q, k = rope(self.q_norm(q), positions, self.theta), rope(self.k_norm(k), positions, self.theta)
        k, v = (jnp.swapaxes(part, 1, 2) for part in (k, v))  # heads first, as batched products want the long part
        if cache is not None:
            k, v = cache = (_write(cache[0], k, start), _write(cache[1], v, start))
            # Places beyond the newest token may hold anything: their weight is 0, and 0 * NaN must not reach a sum.
            v = jnp.where((jnp.arange(v.shape[2]) <= positions[..., -1:])[..., None, :, None], v, 0)
        out = attention(q, k, v, positions)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache


def _write(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """[B, heads, S, D] into [B, heads, length, D] from position `start` on, [] for all sequences or one each, [B]."""
    write = lambda old, new, start: jax.lax.dynamic_update_slice(old, new, (0, start, 0))  # noqa: E731
    return jax.vmap(write, in_axes=(0, 0, 0 if start.ndim else None))(cache, new.astype(cache.dtype), start)


class DecoderLayer(nnx.Module):
    """Attention and experts (or a dense MLP), each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: Qwen3MoeConfig, layer: int, *, rngs: nnx.Rngs, **kinds: Any):
        norm: dict[str, Any] = dict(eps=config.rms_norm_eps, **kinds)
        linear: dict[str, Any] = dict(stddev=config.initializer_range, rngs=rngs, **kinds)
        self.input_layernorm = RMSNorm(config.hidden_size, **norm)
        self.self_attn = Attention(config, rngs=rngs, **kinds)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, **norm)
        if config.is_moe_layer(layer):
            router = RoutingConfig(config.num_experts, config.num_experts_per_tok, renormalize=config.norm_topk_prob)
            path = f"model.layers.{layer}.mlp"
            self.mlp = MoEBlock(config.hidden_size, config.moe_intermediate_size, router, path=path, **linear)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, **linear)

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

    def __init__(self, config: Qwen3MoeConfig, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(dtype)
        shape = (config.vocab_size, config.hidden_size)
        values = jax.random.normal(rngs.params(), shape, jnp.float32) * config.initializer_range
        self.weight = nnx.Param(values.astype(param_dtype))

    def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S H"]:
        return self.weight[...][ids].astype(self.dtype)


class Qwen3Moe(nnx.Module):
    """The whole language model: `model(ids [B, S])` gives float32 logits [B, S, V].

    `param_dtype` is what the weights are stored in (None: the config's dtype); training keeps float32 masters.
    """

    def __init__(self, config: Qwen3MoeConfig, *, param_dtype: Any = None, rngs: nnx.Rngs):
        kinds: dict[str, Any] = dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(param_dtype or config.dtype))
        self.config = config
        self.embed_tokens = Embedding(config, rngs=rngs, **kinds)
        self.layers = nnx.List(
            [DecoderLayer(config, layer, rngs=rngs, **kinds) for layer in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kinds)
        self.lm_head = nnx.data(None)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.hidden_size, config.vocab_size, stddev=config.initializer_range, rngs=rngs, **kinds
            )

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
        c = self.config
        shape = (c.num_hidden_layers, batch, c.num_key_value_heads, max_length, c.head_dim)
        return KVCache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype), jnp.int32(0))

    def moe_blocks(self) -> list[MoEBlock]:
        """The expert blocks, first layer first."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoEBlock)]
