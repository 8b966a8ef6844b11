"""The programs of an `Engine`: every device computes its own requests, and only tokens for experts cross.

All arrays with a leading axis of requests or pages have those of device 0 first, then those of device 1, and so on.
With a mesh each program is one `shard_map` over its axis "ep", within which a device sees its own part. Dense weights
are the same on every device, experts are split.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from fp4jax.attention import CacheFormat, PageFormat
from fp4jax.block_graph import ProgramStore, make_program
from fp4jax.engine import rank_blocks
from fp4jax.engine.blocks import (
    groups_of,
    is_low_latency,
    placed_together,
    split,
    split_layers,
    with_fused_projections,
    without_layers,
)
from fp4jax.engine.cache import check_free
from fp4jax.engine.drawing import Drawing
from fp4jax.engine.rank_blocks import Chosen, Slots
from fp4jax.expert_parallel.low_latency import check_no_copies
from fp4jax.sharded_moe import EP_AXIS


class RankPrograms:
    """Compiles the programs, and runs them.

    Args:
      model: the language model; it stays as it is.
      mesh: a mesh with the one axis "ep", over which the experts are split; None: one device.
      steps: tokens that a call of `decode` gives every request.
      draws: whether programs that draw tokens are compiled too.
      compiler_options: options for XLA.
      store: where programs are looked for, and saved for later processes; None: nowhere.
    """

    def __init__(
        self, model: Any, mesh: Mesh | None, *, steps: int, draws: bool, compiler_options: Any = None,
        store: ProgramStore | None = None,
    ):  # fmt: skip
        self.mesh, self.ranks, self.steps = mesh, 1 if mesh is None else mesh.size, steps
        self.variants = (False, True) if draws else (False,)
        self._options, self._store = compiler_options, store
        self._by_rank = None if mesh is None else NamedSharding(mesh, P(EP_AXIS))
        model = with_fused_projections(placed_together(model))
        _inside_shard_map(model)
        structures: dict[Any, Any] = {}
        self._embed = split(model.embed_tokens, structures)
        layers = list(model.layers)
        self._groups = [(group, *split_layers(layers[group], structures)) for group in groups_of(layers)]
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
        """Returns the caches of all layers: `num_pages` pages and `max_requests` states on every device.

        Raises:
          MemoryError: a device says that it has less memory left.
        """
        size = self.cache_bytes(max_requests, num_pages, page)
        whose = f"{max_requests} requests and {num_pages} pages of {page} positions"
        check_free(size, self._by_rank, whose, "fewer requests, fewer pages (num_pages) or a smaller max_length")
        placed: dict[str, Any] = {} if self._by_rank is None else {"out_shardings": self._by_rank}
        return jax.jit(lambda: self._zeros(self.ranks, max_requests, num_pages, page), **placed)()

    def cache_bytes(self, max_requests: int, num_pages: int, page: int) -> int:
        """Returns the bytes of a device's part of the caches; the arguments are those of `empty_caches`."""
        made = jax.eval_shape(lambda: self._zeros(1, max_requests, num_pages, page))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))

    def _zeros(self, ranks, max_requests, num_pages, page):
        requests = [ranks if isinstance(f, PageFormat) else ranks * max_requests for f in self.formats]
        return [f.zeros(number, num_pages, page) for f, number in zip(self.formats, requests, strict=True)]

    # --- programs ---

    def prefill(self, ids, starts, counts, slots, caches, table) -> tuple[jax.Array, Any]:
        """Runs one chunk per device through the model.

        Args:
          ids: i32 [R, bucket].
          starts, counts: i32 [R], the position of the first token, and the valid tokens; 0: the device has none.
          slots: i32 [R], the slot of the request on its device.
          caches: donated.
          table: i32 [R, n], the pages of the request.

        Returns:
          The hidden states [R, bucket, H], and the new caches.
        """
        x, kept = self._call(self._embedding(ids.shape[1]), ids), []
        for group in self._groups:
            x, new = self._call(self._layers(group, ids.shape[1]), x, starts, counts, slots, caches[group[0]], table)
            kept += new
        return x, kept

    def head(self, x, counts, positions, drawing: Drawing, draws: bool) -> Chosen:
        """Chooses the token behind one chunk per device.

        Args:
          x: [R, bucket, H], from `prefill`.
          counts: i32 [R], the valid tokens.
          positions: i32 [R], those of the tokens that are chosen.
          drawing: how they are drawn.
          draws: whether any temperature is above 0.
        """
        return self._call(self._head(x.shape[1], draws), x, counts, positions, drawing)

    def change(self, slots: Slots, mask, values: Slots, first, joining) -> Slots:
        """Replaces the slots where `mask` holds; the newest token of slot `joining` of each device is its `first`.

        Args:
          slots: donated.
          mask: bool [R * M].
          values: of the same shapes as `slots`.
          first: i32 [R], on the devices.
          joining: i32 [R], a slot of each device; -1: none.
        """
        return self._call(_CHANGE, slots, mask, values, first, joining)

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
        found, last, lengths, caches = self._call(self._decoding(size, draws), slots, caches, table)
        return found, slots._replace(last=last, lengths=lengths), caches

    def on_every_host(self, chosen: Chosen) -> Chosen:
        """Returns the tokens of all devices where every process can read them."""
        return chosen if jax.process_count() == 1 else self._call(_gathering(chosen.tokens.shape), chosen)

    def compilations(
        self, buckets: Sequence[int], sizes: Sequence[int], slots: Slots, caches: Any, table: jax.Array
    ) -> dict[Any, Callable[[], None]]:
        """Returns {key: function that compiles one program} for all programs, as `compile_all` takes them.

        Args:
          buckets: token counts of chunks.
          sizes: numbers of slots that `decode` computes.
          slots, caches, table: as `decode` takes them.
        """
        struct = functools.partial(jax.ShapeDtypeStruct, sharding=self._by_rank)
        numbers, found = struct((self.ranks,), jnp.int32), {}
        rows = struct((self.ranks, table.shape[1]), jnp.int32)
        drawing = jax.tree.map(lambda part: struct((self.ranks, *part.shape[1:]), part.dtype), slots.drawing)

        def add(program, *args):
            found[program.key] = functools.partial(self._compile, program, args)

        def add_gathering(*shape):
            if jax.process_count() > 1:
                add(_gathering(shape), Chosen(struct(shape, jnp.int32), struct(shape, jnp.float32)))

        for draws in self.variants:  # decode takes longest to compile, so it starts early
            for size in sizes:
                add(self._decoding(size, draws), slots, caches, table)
                add_gathering(self.ranks * size, self.steps)
        for bucket in buckets:
            ids = struct((self.ranks, bucket), jnp.int32)
            hidden = jax.eval_shape(self._embedding(bucket).run, self._embed[1], ids)
            x = struct(hidden.shape, hidden.dtype)
            add(self._embedding(bucket), ids)
            for group in self._groups:
                add(self._layers(group, bucket), x, numbers, numbers, numbers, caches[group[0]], rows)
            for draws in self.variants:
                add(self._head(bucket, draws), x, numbers, numbers, drawing)
        add_gathering(self.ranks)
        add(_CHANGE, slots, struct(slots.last.shape, jnp.bool_), slots, numbers, numbers)
        return found

    def _embedding(self, bucket):
        structure, weights = self._embed
        return _Program(("embed", bucket), functools.partial(rank_blocks.embed, structure=structure), weights)

    def _layers(self, group, bucket):
        _, structure, weights = group
        run = functools.partial(rank_blocks.layers, structure=structure)
        return _Program(("layers", structure, bucket), run, weights, (4,))

    def _head(self, bucket, draws):
        structure, weights = self._rest
        run = functools.partial(rank_blocks.head, structure=structure, draws=draws)
        return _Program(("head", bucket, draws), run, weights)

    def _decoding(self, size, draws):
        structure, weights = self._whole
        run = functools.partial(rank_blocks.decode, structure=structure, size=size, steps=self.steps, draws=draws)
        return _Program(("decode", size, draws), run, weights, (1,))

    def _call(self, program: "_Program", *args: Any) -> Any:
        if program.key not in self._compiled:
            self._compile(program, args)
        return self._compiled[program.key](program.weights, *args)

    def _compile(self, program: "_Program", args: tuple[Any, ...]) -> None:
        run = program.run
        if self.mesh is not None:
            of = lambda leaf: leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else P()  # noqa: E731
            run = jax.shard_map(
                run, mesh=self.mesh, in_specs=([of(leaf) for leaf in program.weights], *[P(EP_AXIS)] * len(args)),
                out_specs=P(EP_AXIS) if program.splits else P(), check_vma=False,
            )  # fmt: skip
        donated = tuple(i + 1 for i in program.donated)
        kind = str(program.key[0])
        self._compiled[program.key] = make_program(
            lambda: jax.jit(run, donate_argnums=donated).lower(program.weights, *args), options=self._options,
            check=check_no_copies if self._low_latency and kind == "decode" else None, store=self._store,
            name=f"engine-{kind}", structs=(program.weights, args),
            made_from=(program.run, program.donated, program.splits, self.mesh is None),
        ).program  # fmt: skip

    @property
    def executables(self) -> list[jax.stages.Compiled]:
        """The programs that were compiled."""
        return list(self._compiled.values())


class _Program(NamedTuple):
    """What a program computes on one device: run(weights, *args), of which `donated` are changed in place.

    splits: whether each device has a part of the result; else all have all of it.
    """

    key: tuple[Any, ...]
    run: Callable[..., Any]
    weights: list[Any]
    donated: tuple[int, ...] = ()
    splits: bool = True


def _inside_shard_map(model: Any) -> None:
    """Makes a model compute one device's part: its expert blocks dispatch by themselves, its attention runs locally."""
    for layer in model.layers:
        layer.self_attn.implementation = None
    for block in model.moe_blocks():
        block.mesh = None


_CHANGE = _Program(("change",), rank_blocks.change, [], (0,))


def _gathering(shape: tuple[int, ...]) -> _Program:
    return _Program(("gather", shape), rank_blocks.gather, [], splits=False)
