"""The functions that `BucketedModel` compiles, each of a list of weights, and the lists of weights that they take."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from fp4jax.block_graph.arguments import home_of, place_of
from fp4jax.engine.sampling import draw
from fp4jax.expert_parallel.low_latency import ReceiveBuffers
from fp4jax.layers.attention import Attention
from fp4jax.layers.mlp import MLP
from fp4jax.layers.moe_block import MoEBlock
from fp4jax.models.decoder import DecoderLayer


def placed_together(model):
    """Returns the model with every uncommitted weight put at the home of the committed ones; see `home_of`.

    Often only the experts were committed to devices, by `configure_experts`. A model without committed weights comes
    back as it is.
    """
    graphdef, state = nnx.split(model)
    home = home_of(state)
    if home is None:
        return model
    put = lambda leaf: leaf if place_of(leaf) is not None else jax.device_put(leaf, home)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(put, state))


def with_fused_projections(model):
    """Returns a model whose layers compute projections of the same input as one product. `model` stays as it is."""
    fused = nnx.merge(*nnx.split(model))
    for layer in fused.layers:
        shared = layer.mlp.shared_experts if isinstance(layer.mlp, MoEBlock) else layer.mlp
        for module in (layer.self_attn, shared):
            # A subclass may use the single projections.
            if isinstance(module, Attention | MLP) and type(module) in (Attention, MLP):
                module.fuse_projections()
    return fused


class Structure:
    """Rebuilds a module from the list of its weights.

    Modules that differ only in the values of their weights share one object, so that comparing the static arguments of
    two executables is a comparison of identities.
    """

    def __init__(self, graphdef, treedef):
        self._graphdef, self._treedef = graphdef, treedef

    def module(self, weights):
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, weights))


def split(module, structures):
    """Returns (structure, weights) of a module; `structures` holds one `Structure` for modules of one kind."""
    graphdef, state = nnx.split(module)
    weights, treedef = jax.tree.flatten(state)
    return structures.setdefault((graphdef, treedef), Structure(graphdef, treedef)), weights


def embed(weights, ids, *, structure):
    """Embeds token ids [B, S] -> hidden states [B, S, H]."""
    return structure.module(weights)(ids)


def run_layer(weights, x, start, cache, table, *, structure, num_tokens):
    """Runs one decoder layer on the tokens of one request; those from `num_tokens` on are pads -> x, cache."""
    layer, valid = structure.module(weights), jnp.arange(x.shape[1], dtype=jnp.int32) < num_tokens
    old = layer.self_attn.cache_format.of(cache, table, jnp.reshape(num_tokens, 1))
    x, new, _ = layer(x, start, old, functools.partial(MoEBlock.__call__, valid=valid))
    return x, new.arrays


def run_head(weights, x, *, structure, num_tokens):
    """Computes the logits [B, V] for the token after the last of `num_tokens` valid ones."""
    last = jax.lax.dynamic_slice_in_dim(x, num_tokens - 1, 1, axis=1)
    return structure.module(weights).head(last)[:, 0]


def choose(logits, params, positions, *, draws):
    """The next token of every request, from logits [B, V]; without `draws` all temperatures count as 0."""
    return draw(logits, params, positions) if draws else jnp.argmax(logits, axis=-1).astype(jnp.int32)


def decode_steps(weights, last, lengths, drawing, cache, table, *, structure, steps, draws, num_tokens):
    """Decodes `steps` tokens of every request; see `BucketedModel.decode`.

    `num_tokens` counts the valid requests; `draws` is that of `choose`.
    """
    model = structure.module(weights)
    one_step, valid = step_of(model), jnp.arange(last.shape[0], dtype=jnp.int32) < num_tokens

    def step(index, carry):
        tokens, last, lengths, cache = carry
        runs = valid & (last >= 0)
        logits, cache = one_step(last, lengths, cache, table, runs)
        found = jnp.where(runs, choose(logits, drawing.params, lengths + 1, draws=draws), -1)
        ends = jnp.any(found[:, None] == drawing.stop_ids, axis=1)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, found[:, None], index, 1)
        return tokens, jnp.where(ends, -1, found), lengths + runs.astype(jnp.int32), cache

    carry = jnp.full((last.shape[0], steps), -1, jnp.int32), last, lengths, cache
    return jax.lax.fori_loop(0, steps, step, carry) if steps > 1 else step(0, carry)


def step_of(model):
    """Returns the function (last, lengths, cache, table, runs) -> (logits [B, V], cache) that decodes one token.

    The logits are those behind the tokens `last`, and the new cache has these tokens in it.
    """
    structures: dict[Any, Structure] = {}
    layers = [split_layer(layer, structures) for layer in model.layers]
    low_latency = is_low_latency(model)

    def step(last, lengths, cache, table, runs):
        x, kept, buffers = model.embed_tokens(jnp.maximum(last, 0)[:, None]), [], ReceiveBuffers()
        for layer, (structure, weights), old in zip(model.layers, layers, cache, strict=True):
            if low_latency:
                x, arrays, aux = _layer_step(layer, x, lengths, old, table, runs, buffers)
                buffers = buffers if aux is None else aux.buffers
            else:
                x, arrays = _traced_layer_step(weights, x, lengths, old, table, runs, structure=structure)
            kept.append(arrays)
        return model.head(x)[:, 0], kept

    return step


def _layer_step(layer, x, lengths, old, table, runs, buffers=None):
    old = layer.self_attn.cache_format.of(old, table, runs.astype(jnp.int32))
    x, new, aux = layer(x, lengths, old, functools.partial(MoEBlock.__call__, valid=runs, buffers=buffers))
    return x, new.arrays, aux


@functools.partial(jax.jit, static_argnames="structure")
def _traced_layer_step(weights, x, lengths, old, table, runs, *, structure):
    """A step of one layer; JAX traces layers of one structure once."""
    return _layer_step(structure.module(weights), x, lengths, old, table, runs)[:2]


def is_low_latency(model):
    """Returns whether the experts of a model keep their receive buffers in decode steps."""
    return any(block.config.low_latency for block in model.moe_blocks())


@contextlib.contextmanager
def _without_name(layer: DecoderLayer) -> Iterator[None]:
    """Gives the layer's experts a common name meanwhile, so that layers that differ only in it share executables."""
    if not isinstance(layer.mlp, MoEBlock):
        yield
        return
    path, layer.mlp.path = layer.mlp.path, "mlp"
    try:
        yield
    finally:
        layer.mlp.path = path


def split_layer(layer, structures):
    """Returns `split` of a decoder layer, the same structure for layers that differ only in their name."""
    with _without_name(layer):
        return split(layer, structures)


def without_layers(model):
    """Returns a model without decoder layers, as the head block needs it; its arrays are those of `model`."""
    head = nnx.merge(*nnx.split(model))
    head.layers = nnx.List([])
    return head
