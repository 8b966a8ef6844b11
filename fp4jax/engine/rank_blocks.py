"""What one device of an `Engine` computes in each program: its requests, pages and slots are the only ones it sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fp4jax.attention import PageFormat
from fp4jax.engine.blocks import choose, last_valid, layers_of, step_of, valid_tokens
from fp4jax.engine.drawing import Drawing
from fp4jax.sharded_moe import EP_AXIS


class Slots(NamedTuple):
    """The state of the requests of a batch, as arrays with one entry per request.

    Attributes:
      last: i32 [B], the newest token, whose keys and values are not computed; -1: there is no request.
      lengths: i32 [B], its position.
      limits: i32 [B], the position of the last token that the request may have.
      drawing: how tokens are drawn, and which ones end the answer.
    """

    last: Any
    lengths: Any
    limits: Any
    drawing: Drawing


class Chosen(NamedTuple):
    """Tokens that were chosen.

    Attributes:
      tokens: i32 [B] or [B, steps]; -1: none.
      logprobs: f32 of the same shape, the logarithm of the probability that the model gave the token.
    """

    tokens: Any
    logprobs: Any


def embed(weights, ids, *, structure):
    """Embeds a chunk: ids [1, bucket] -> [1, bucket, H]."""
    return structure.module(weights)(ids)


def layers(weights, x, starts, counts, slots, caches, table, *, structure):
    """Runs some layers on a chunk; the arguments are those of `RankPrograms.prefill`."""
    layers = structure.module(weights)
    formats = [layer.self_attn.cache_format for layer in layers]
    old = [
        cache if isinstance(f, PageFormat) else tuple(part[slots] for part in cache)
        for f, cache in zip(formats, caches, strict=True)
    ]
    x, kept = layers_of(layers)(x, starts, old, table, counts, valid_tokens(x, counts))

    def put(cache, new):
        at = jnp.where(counts > 0, slots, cache[0].shape[0])
        return tuple(part.at[at].set(one, mode="drop") for part, one in zip(cache, new, strict=True))

    caches = [
        new if isinstance(f, PageFormat) else put(cache, new)
        for f, cache, new in zip(formats, caches, kept, strict=True)
    ]
    return x, caches


def head(weights, x, counts, positions, drawing, *, structure, draws):
    """Chooses the token behind a chunk; see `RankPrograms.head`."""
    return _chosen(structure.module(weights).head(last_valid(x, counts))[:, 0], drawing, positions, draws)


def _chosen(logits, drawing, positions, draws):
    tokens = choose(logits, drawing.params, positions, draws=draws)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return Chosen(tokens, own - jax.nn.logsumexp(logits, axis=-1))


def _ended(tokens, positions, limits, drawing):
    return (positions >= limits) | jnp.any(tokens[:, None] == drawing.stop_ids, axis=1)


def change(weights, slots, mask, values, first, joining):
    """Replaces slots; see `RankPrograms.change`."""
    del weights

    def replaced(old, new):
        return jnp.where(mask.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    found = jax.tree.map(replaced, slots, values)
    joins = jnp.arange(mask.shape[0], dtype=jnp.int32) == joining
    ended = _ended(jnp.broadcast_to(first, joins.shape), found.lengths, found.limits, found.drawing)
    return found._replace(last=jnp.where(joins, jnp.where(ended, -1, first), found.last))


def decode(weights, slots, caches, table, *, structure, size, steps, draws):
    """Decodes some tokens of every request; see `RankPrograms.decode`."""
    model = structure.module(weights)
    one_step, formats = step_of(model), model.cache_formats
    now: Slots = jax.tree.map(lambda part: part[:size], slots)
    kept = [
        cache if isinstance(f, PageFormat) else tuple(part[:size] for part in cache)
        for f, cache in zip(formats, caches, strict=True)
    ]

    def step(index, carry):
        found, last, lengths, kept = carry
        runs = last >= 0
        logits, kept = one_step(last, lengths, kept, table[:size], runs)
        chosen = _chosen(logits, now.drawing, lengths + 1, draws)
        tokens = jnp.where(runs, chosen.tokens, -1)
        put = lambda every, one: jax.lax.dynamic_update_slice_in_dim(every, one[:, None], index, 1)  # noqa: E731
        found = Chosen(put(found.tokens, tokens), put(found.logprobs, chosen.logprobs))
        ended = _ended(tokens, lengths + 1, now.limits, now.drawing)
        return found, jnp.where(ended, -1, tokens), lengths + runs.astype(jnp.int32), kept

    shape = size, steps
    start = Chosen(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32)), now.last, now.lengths, kept
    found, last, lengths, kept = jax.lax.fori_loop(0, steps, step, start) if steps > 1 else step(0, start)
    last, lengths = _with_first(slots.last, last), _with_first(slots.lengths, lengths)
    caches = [
        new if isinstance(f, PageFormat) else tuple(map(_with_first, cache, new))
        for f, cache, new in zip(formats, caches, kept, strict=True)
    ]
    return found, last, lengths, caches


def gather(weights, chosen):
    """Brings the tokens of all devices to each of them."""
    del weights
    return jax.tree.map(lambda part: jax.lax.all_gather(part, EP_AXIS, tiled=True), chosen)


def _with_first(whole, first):
    """`whole` with `first` in the place of its first entries. XLA:CPU crashes on whole.at[:n].set(first) here."""
    return jnp.concatenate([first, whole[first.shape[0] :]])
