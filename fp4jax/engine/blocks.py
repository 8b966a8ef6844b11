"""The functions that `BucketedModel` compiles, each of a list of weights, and the lists of weights that they take."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
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

_LAYERS_PER_PROGRAM = 8


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


def run_layers(weights, x, start, cache, table, *, structure, num_tokens):
    """Runs some decoder layers on a chunk of one request; tokens from `num_tokens` on are pads -> x, cache.

    Args:
      weights: of the layers.
      x: [1, S, H].
      start: i32 [], the position of the first token.
      cache: of the layers.
      table: i32 [1, n], the request's pages.
      structure: of the layers.
      num_tokens: i32 [], how many tokens are valid.
    """
    counts = jnp.reshape(num_tokens, 1)
    return layers_of(structure.module(weights))(x, start, cache, table, counts, valid_tokens(x, counts))


def run_head(weights, x, *, structure, num_tokens):
    """Computes the logits [1, V] for the token after the last of `num_tokens` valid ones."""
    return structure.module(weights).head(last_valid(x, jnp.reshape(num_tokens, 1)))[:, 0]


def valid_tokens(x, counts):
    """Which of the tokens of x [B, S, H] are among the first `counts` i32 [B] of their row: bool [B, S]."""
    return jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < counts[:, None]


def last_valid(x, counts):
    """The hidden states [B, 1, H] of the last of the first `counts` i32 [B] tokens, of x [B, S, H]."""
    return jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)


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
    run_layers, keeps = layers_of(model.layers), is_low_latency(model)

    def step(last, lengths, cache, table, runs):
        x, buffers = model.embed_tokens(jnp.maximum(last, 0)[:, None]), ReceiveBuffers() if keeps else None
        x, kept = run_layers(x, lengths, cache, table, runs.astype(jnp.int32), runs, buffers)
        return model.head(x)[:, 0], kept

    return step


def layers_of(layers):
    """Returns a function that runs decoder layers on some tokens of every request.

    It maps (x, starts, cache, table, counts, valid, buffers) to (x, cache):
      x: [B, S, H], hidden states.
      starts: i32 [B] or [], the position of each request's first token.
      cache: of these layers.
      table: i32 [B, n], each request's pages.
      counts: i32 [B], the valid tokens of each request.
      valid: bool [B] or [B, S], which tokens are valid.
      buffers: empty receive buffers, which the layers then share; None: the layers make their own.
    """
    structures: dict[Any, Structure] = {}
    parts = [(layer, *split_layers([layer], structures)) for layer in layers]

    def run(x, starts, cache, table, counts, valid, buffers=None):
        kept = []
        for (layer, structure, weights), old in zip(parts, cache, strict=True):
            if buffers is None:
                x, arrays = _traced_layer(weights, x, starts, old, table, counts, valid, structure=structure)
            else:
                x, arrays, aux = _run_layer(layer, x, starts, old, table, counts, valid, buffers)
                buffers = buffers if aux is None else aux.buffers
            kept.append(arrays)
        return x, kept

    return run


def _run_layer(layer, x, starts, old, table, counts, valid, buffers=None):
    old = layer.self_attn.cache_format.of(old, table, counts)
    x, new, aux = layer(x, starts, old, functools.partial(MoEBlock.__call__, valid=valid, buffers=buffers))
    return x, new.arrays, aux


@functools.partial(jax.jit, static_argnames="structure")
def _traced_layer(weights, x, starts, old, table, counts, valid, *, structure):
    """Runs one layer; JAX traces layers of one structure once per program."""
    (layer,) = structure.module(weights)
    return _run_layer(layer, x, starts, old, table, counts, valid)[:2]


def is_low_latency(model):
    """Returns whether the experts of a model keep their receive buffers in decode steps."""
    return any(block.config.low_latency for block in model.moe_blocks())


def groups_of(layers):
    """Splits decoder layers into slices that a program of prefill computes: up to 8 layers of one structure each.

    A program of all layers would start late: XLA looks at every argument and kernel of a program before it launches the
    first one, which takes 3 ms for 48 layers, 10 ms on two GPUs. Programs of single layers would ask too much of the
    host when there are few tokens. Groups of one size and structure share a program.
    """
    structures: dict[Any, Structure] = {}
    kinds = [split_layers([layer], structures)[0] for layer in layers]
    runs = itertools.groupby(range(len(kinds)), key=lambda index: id(kinds[index]))
    parts = (part for _, run in runs for part in itertools.batched(run, _LAYERS_PER_PROGRAM))
    return [slice(part[0], part[-1] + 1) for part in parts]


@contextlib.contextmanager
def _without_names(layers: Sequence[DecoderLayer]) -> Iterator[None]:
    """Gives the layers' experts a common name meanwhile, so that layers that differ only in it share executables."""
    blocks = [layer.mlp for layer in layers if isinstance(layer.mlp, MoEBlock)]
    paths = [block.path for block in blocks]
    for block in blocks:
        block.path = "mlp"
    try:
        yield
    finally:
        for block, path in zip(blocks, paths, strict=True):
            block.path = path


def split_layers(layers, structures):
    """Returns `split` of a list of decoder layers, the same structure for lists that differ only in layers' names."""
    with _without_names(layers):
        return split(nnx.List(layers), structures)


def without_layers(model):
    """Returns a model without decoder layers, as the head block needs it; its arrays are those of `model`."""
    head = nnx.merge(*nnx.split(model))
    head.layers = nnx.List([])
    return head
