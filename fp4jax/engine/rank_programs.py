"""The programs of an `Engine`: every device computes its own requests, and only tokens for experts cross.

All arrays with a leading axis of requests or pages have those of device 0 first, then those of device 1, and so on.
With a mesh each program is one `shard_map` over its axis "ep", within which a device sees its own part. Dense weights
are the same on every device, experts are split.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from fp4jax.attention import CacheFormat, PageFormat
from fp4jax.engine.blocks import (
    choose,
    is_low_latency,
    one_step,
    placed_together,
    split,
    split_layer,
    with_fused_projections,
    without_layers,
)
from fp4jax.engine.drawing import Drawing
from fp4jax.expert_parallel.low_latency import check_no_copies
from fp4jax.layers.moe_block import MoEBlock
from fp4jax.sharded_moe import EP_AXIS


class Slots(NamedTuple):
    """Where the requests of a batch stand, on the devices.

    Attributes:
      last: i32 [B], the newest token, whose keys and values are not computed; -1: there is no request.
      lengths: i32 [B], its position.
      limits: i32 [B], the position of the last token that the request may have.
      drawing: how tokens are drawn, and which ones end the answer.
    """

    last: jax.Array
    lengths: jax.Array
    limits: jax.Array
    drawing: Drawing


class Chosen(NamedTuple):
    """Tokens that were chosen.

    Attributes:
      tokens: i32 [B] or [B, steps]; -1: none.
      logprobs: f32 of the same shape, the logarithm of the probability that the model gave the token.
    """

    tokens: jax.Array
    logprobs: jax.Array


class RankPrograms:
    """Compiles the programs, and runs them.

    Args:
      model: the language model; it stays as it is.
      mesh: a mesh with the one axis "ep", over which the experts are split; None: one device.
      steps: tokens that a call of `decode` gives every request.
      draws: whether programs that draw tokens are compiled too.
      compiler_options: options for XLA.
    """

    def __init__(
        self, model: Any, mesh: Mesh | None, *, steps: int, draws: bool, compiler_options: Any = None
    ):  # fmt: skip
        self.mesh, self.ranks, self.steps = mesh, 1 if mesh is None else mesh.size, steps
        self.variants = (False, True) if draws else (False,)
        self._options = compiler_options
        self._by_rank = None if mesh is None else NamedSharding(mesh, P(EP_AXIS))
        model = with_fused_projections(placed_together(model))
        _inside_shard_map(model)
        structures: dict[Any, Any] = {}
        self._embed = split(model.embed_tokens, structures)
        self._layers = [split_layer(layer, structures) for layer in model.layers]
        self._rest = split(without_layers(model), structures)
        self._whole = split(model, structures)
        self._low_latency = is_low_latency(model)
        self.formats: list[CacheFormat] = model.cache_formats
        self._compiled: dict[Any, Any] = {}

    # --- arrays ---

    def put(self, array: Any) -> Any:
        """Puts arrays of the host onto the devices, split over them along their first axis."""
        return jax.device_put(array, self._by_rank)

    def empty_caches(self, max_requests: int, num_pages: int, page: int) -> list[tuple[jax.Array, ...]]:
        """Returns the caches of all layers: `num_pages` pages and `max_requests` states on every device."""

        def zeros_of(format):
            requests = self.ranks if isinstance(format, PageFormat) else self.ranks * max_requests
            return format.zeros(requests, num_pages, page)

        placed: dict[str, Any] = {} if self._by_rank is None else {"out_shardings": self._by_rank}
        return jax.jit(lambda: [zeros_of(format) for format in self.formats], **placed)()

    # --- programs ---

    def embed(self, ids: jax.Array) -> jax.Array:
        """Embeds one chunk per device: ids i32 [R, bucket] -> [R, bucket, H]."""
        structure, weights = self._embed
        return self._run(("embed", ids.shape), functools.partial(_embed, structure=structure), weights, (ids,))

    def layer(self, index: int, x, starts, counts, slots, cache, table) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Runs a layer on one chunk per device.

        Args:
          index: of the layer.
          x: [R, bucket, H].
          starts, counts: i32 [R], the position of the first token, and the valid tokens; 0: the device has none.
          slots: i32 [R], the slot of the request on its device.
          cache: of the layer; donated.
          table: i32 [R, n], the pages of the request.
        """
        structure, weights = self._layers[index]
        run = functools.partial(_layer, structure=structure)
        return self._run(
            ("layer", structure, x.shape), run, weights, (x, starts, counts, slots, cache, table), donated=(4,)
        )  # fmt: skip

    def head(self, x, counts, positions, drawing: Drawing, draws: bool) -> Chosen:
        """Chooses the token behind one chunk per device; `positions` i32 [R] are those of these tokens."""
        structure, weights = self._rest
        run = functools.partial(_head, structure=structure, draws=draws)
        return self._run(("head", x.shape, draws), run, weights, (x, counts, positions, drawing))

    def change(self, slots: Slots, mask, values: Slots, first, joining) -> Slots:
        """Replaces the slots where `mask` holds; the newest token of slot `joining` of each device is its `first`.

        Args:
          slots: donated.
          mask: bool [R * M].
          values: of the same shapes as `slots`.
          first: i32 [R], on the devices.
          joining: i32 [R], a slot of each device; -1: none.
        """
        return self._run(("change",), _change, [], (slots, mask, values, first, joining), donated=(0,))

    def decode(self, size: int, slots: Slots, caches, table, draws: bool) -> tuple[Chosen, Slots, Any]:
        """Decodes `steps` tokens of the first `size` slots of every device.

        Args:
          size: slots that are computed.
          slots: where the requests stand.
          caches: donated.
          table: i32 [R * M, n].
          draws: whether tokens are drawn where the temperature is above 0.

        Returns:
          The tokens [R * size, steps], and the new slots and caches.
        """
        structure, weights = self._whole
        run = functools.partial(_decode, structure=structure, size=size, steps=self.steps, draws=draws)
        args = slots, caches, table
        found, last, lengths, caches = self._run(("decode", size, draws), run, weights, args, donated=(1,))
        return found, slots._replace(last=last, lengths=lengths), caches

    def _run(self, key: Any, fn: Callable[..., Any], weights: list[Any], args: tuple[Any, ...], donated=()) -> Any:
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = self._compiled[key] = self._compile(key, fn, weights, args, donated)
        return compiled(weights, *args)

    def _compile(self, key, fn, weights, args, donated):
        if self.mesh is not None:
            specs = [leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P() for leaf in weights]
            fn = jax.shard_map(
                fn, mesh=self.mesh, in_specs=(specs, *[P(EP_AXIS)] * len(args)), out_specs=P(EP_AXIS), check_vma=False
            )  # fmt: skip
        lowered = jax.jit(fn, donate_argnums=tuple(i + 1 for i in donated)).lower(weights, *args)
        compiled = lowered.compile(self._options)
        if self._low_latency and key[0] == "decode":
            check_no_copies(compiled)
        return compiled

    @property
    def programs(self) -> int:
        """Programs that were compiled."""
        return len(self._compiled)

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self._layers)


def _inside_shard_map(model: Any) -> None:
    """Makes a model compute one device's part: its expert blocks dispatch by themselves, its attention runs locally."""
    for layer in model.layers:
        layer.self_attn.implementation = None
    for block in model.moe_blocks():
        block.mesh = None


# --- what a device computes; requests and pages are its own ---


def _embed(weights, ids, *, structure):
    return structure.module(weights)(ids)


def _layer(weights, x, starts, counts, slots, cache, table, *, structure):
    layer = structure.module(weights)
    format = layer.self_attn.cache_format
    old = cache if isinstance(format, PageFormat) else tuple(part[slots] for part in cache)
    valid = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < counts[:, None]
    run_experts = functools.partial(MoEBlock.__call__, valid=valid)
    x, new, _ = layer(x, starts, format.of(old, table, counts), run_experts)
    if isinstance(format, PageFormat):
        return x, new.arrays
    at = jnp.where(counts > 0, slots, cache[0].shape[0])
    return x, tuple(part.at[at].set(one, mode="drop") for part, one in zip(cache, new.arrays, strict=True))


def _head(weights, x, counts, positions, drawing, *, structure, draws):
    last = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    return _chosen(structure.module(weights).head(last)[:, 0], drawing, positions, draws)


def _chosen(logits, drawing, positions, draws):
    tokens = choose(logits, drawing.params, positions, draws=draws)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    return Chosen(tokens, own - jax.nn.logsumexp(logits, axis=-1))


def _ended(tokens, positions, limits, drawing):
    return (positions >= limits) | jnp.any(tokens[:, None] == drawing.stop_ids, axis=1)


def _change(weights, slots, mask, values, first, joining):
    del weights

    def replaced(old, new):
        return jnp.where(mask.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    found = jax.tree.map(replaced, slots, values)
    joins = jnp.arange(mask.shape[0], dtype=jnp.int32) == joining
    ended = _ended(jnp.broadcast_to(first, joins.shape), found.lengths, found.limits, found.drawing)
    return found._replace(last=jnp.where(joins, jnp.where(ended, -1, first), found.last))


def _decode(weights, slots, caches, table, *, structure, size, steps, draws):
    model = structure.module(weights)
    formats = model.cache_formats
    now: Slots = jax.tree.map(lambda part: part[:size], slots)
    kept = [
        cache if isinstance(f, PageFormat) else tuple(part[:size] for part in cache)
        for f, cache in zip(formats, caches, strict=True)
    ]

    def step(index, carry):
        found, last, lengths, kept = carry
        runs = last >= 0
        logits, kept = one_step(model, last, lengths, kept, table[:size], runs)
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


def _with_first(whole, first):
    """`whole` with `first` in the place of its first entries. XLA:CPU crashes on whole.at[:n].set(first) here."""
    return jnp.concatenate([first, whole[first.shape[0] :]])
