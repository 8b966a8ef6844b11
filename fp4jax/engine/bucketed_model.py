"""A language model that answers prompts of any length in programs that were compiled ahead of time.

Prefill runs one request at a time through three kinds of blocks: embedding, some decoder layers at a time, and head.
Each block is compiled for a few token counts (buckets), and layers of one structure share executables. A prompt above
the largest bucket runs in chunks, and each chunk attends to the earlier ones through the cache. Decoding runs a batch
of requests, each at its own position, in one executable per batch size. A call decodes several tokens of every request,
draws them on the device and stops requests at their stop tokens, so the device does not wait for the host.

The cache of keys and values lies in pages of `page_size` positions. The kernels of attention read the filled pages
only, so their time does not grow with `max_length`; the time to make and to copy a cache does.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fp4jax.block_graph import BlockGraph, Bucketed, ProgramStore, block_graph, check_buckets, compile_all
from fp4jax.block_graph.arguments import home_of
from fp4jax.engine.blocks import (
    Structure,
    choose,
    decode_steps as run_decode_steps,
    embed,
    groups_of,
    is_low_latency,
    placed_together,
    run_head,
    run_layers,
    split,
    split_layers,
    with_fused_projections,
    without_layers,
)
from fp4jax.engine.cache import Cache, PagedCaches
from fp4jax.engine.drawing import Drawing, Sampling, drawing_of
from fp4jax.expert_parallel.low_latency import check_no_copies
from fp4jax.models.decoder import Decoder

_DECODE_STEPS = 8


class Prefilled(NamedTuple):
    """The result of a prefill.

    logits: f32 [1, V], for the token after the prompt. cache: keys and values of the prompt. length: the
    number of tokens in the prompt, which are the filled positions of the cache.
    """

    logits: jax.Array
    cache: Cache
    length: int


class BucketedModel:
    """Prefills prompts and generates answers with a model, in executables of fixed token counts.

    The weights and settings of `model` are taken when the object is made: configure and quantize the model before. The
    projections to queries, keys and values are copied into one matrix, and so are those to gate and up of dense MLPs;
    everything else is shared with `model`.

    Args:
      model: the language model.
      buckets: token counts that prefill is compiled for, ascending.
      batch_buckets: numbers of requests that decoding is compiled for, ascending.
      max_length: the most tokens of a request, prompt and answer together.
      page_size: positions of a page of the cache. The kernels of attention need a multiple of 64.
      decode_steps: tokens that a call of `decode` decodes for every request. None: 8; or 1 if the experts keep their
        receive buffers (`low_latency`).
      draws: whether requests may have a temperature above 0. Then programs are compiled that draw tokens; they take
        some 35 passes over the logits more.
      compiler_options: options for XLA that every executable is compiled with.
      store: where executables are looked for, and saved for later processes; None: nowhere.

    Raises:
      ValueError: `max_length` is below 1 or above the model's number of positions; `page_size` or `decode_steps` is
        below 1; buckets are not positive and ascending.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        buckets: Sequence[int],
        batch_buckets: Sequence[int] = (1, 2, 4, 8),
        max_length: int,
        page_size: int = 64,
        decode_steps: int | None = None,
        draws: bool = False,
        compiler_options: Mapping[str, str | bool] | None = None,
        store: ProgramStore | None = None,
    ):
        if not 1 <= max_length <= model.config.max_position_embeddings:
            raise ValueError(f"max_length must be 1..{model.config.max_position_embeddings}, got {max_length}")
        if page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {page_size}")
        if decode_steps is None:
            decode_steps = 1 if is_low_latency(model) else _DECODE_STEPS
        if decode_steps < 1:
            raise ValueError(f"decode_steps must be at least 1, got {decode_steps}")
        buckets, batch_buckets = check_buckets(buckets), check_buckets(batch_buckets)
        self.config, self.max_length, self.decode_steps = model.config, max_length, decode_steps
        options: dict[str, Any] = dict(
            static_argnames=("structure",), compiler_options=compiler_options, store=store
        )  # fmt: skip
        counted: dict[str, Any] = dict(count_argname="num_tokens", **options)
        structures: dict[Any, Structure] = {}
        model = with_fused_projections(placed_together(model))
        layers = list(model.layers)
        self._embed = split(model.embed_tokens, structures)
        self._groups = [(group, *split_layers(layers[group], structures)) for group in groups_of(layers)]
        self._rest = split(without_layers(model), structures)
        self._whole = split(model, structures)
        self.embed = block_graph(
            embed, buckets=buckets, in_axes=(None, 1), out_axes=1, name="embedding", **options
        )  # fmt: skip
        self.layers = block_graph(
            run_layers, buckets=buckets, in_axes=(None, 1, None, None, None), out_axes=(1, None), name="layers",
            donate_argnums=(3,), **counted,
        )  # fmt: skip
        self.head = block_graph(run_head, buckets=buckets, in_axes=(None, 1), out_axes=None, name="head", **counted)
        decoding: dict[str, Any] = dict(
            in_axes=(None, 0, 0, None, None, None), out_axes=(0, 0, 0, None), donate_argnums=(4,),
            count_argname="num_tokens", static_argnames=("structure", "steps", "draws"),
            compiler_options=compiler_options, check_compiled=check_no_copies if is_low_latency(model) else None,
            store=store,
        )  # fmt: skip
        self.decoders = {
            size: block_graph(run_decode_steps, buckets=(size,), name=f"decode of {size}", **decoding)
            for size in batch_buckets
        }
        whole, weights = self._whole
        home = home_of(weights)
        self._decoding: dict[str, Any] = dict(structure=whole, steps=decode_steps, draws=draws)
        self._run_embedding = self.embed.bind(self._embed[1], structure=self._embed[0])
        self._run_groups = [(group, self.layers.bind(w, structure=structure)) for group, structure, w in self._groups]
        self._run_head = self.head.bind(self._rest[1], structure=self._rest[0])
        self._run_decoders = {size: d.bind(weights, **self._decoding) for size, d in self.decoders.items()}
        self._drawing = functools.partial(drawing_of, home=home)
        self._greedy = functools.cache(lambda size: self._drawing([], size))
        # First positions of chunks are kept on the device: 0 for every prompt, then multiples of the largest bucket.
        self._start_of = functools.lru_cache(1024)(lambda start: jax.device_put(np.int32(start), home))
        placed: dict[str, Any] = {} if home is None else {"out_shardings": home}
        self._caches = PagedCaches(model, max_length, page_size, home)
        self._choose_first = jax.jit(functools.partial(choose, draws=draws), **placed)

    @property
    def graphs(self) -> list[BlockGraph]:
        """All blocks of the model, whose `stats` a report can show."""
        return [self.embed, self.layers, self.head, *self.decoders.values()]

    def warm_up(self, *, workers: int = 1, progress: bool = True) -> None:
        """Compiles every program that `prefill` and `generate` use, so that they never compile afterwards.

        Args:
          workers: threads that compile in parallel; 1 compiles in the calling thread.
          progress: whether to show a progress bar.
        """
        one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        x = jax.ShapeDtypeStruct((1, 1, self.config.hidden_size), jnp.dtype(self.config.dtype))
        start, cache, table = self._start_of(0), self.empty_cache(1), self._caches.table(1)
        todo = dict(self.embed.compilations(self._embed[1], one, structure=self._embed[0]))
        for size, decoder in self.decoders.items():  # decode steps take longest to compile, so they start early
            batch, numbers = self.empty_cache(size), jax.ShapeDtypeStruct((size,), jnp.int32)
            todo |= decoder.compilations(
                self._whole[1], numbers, numbers, self._greedy(size), batch, self._caches.table(size), **self._decoding
            )
        for group, structure, weights in self._groups:  # of one structure have equal keys, and are compiled once
            todo |= self.layers.compilations(weights, x, start, cache[group], table, structure=structure)
        todo |= self.head.compilations(self._rest[1], x, structure=self._rest[0])
        compile_all(todo, workers=workers, progress=progress)
        for size in self.decoders:
            batch = self.empty_cache(size)
            jax.block_until_ready(self._caches.insert(batch, cache, np.int32(0)))
        logits = jax.device_put(np.zeros((1, self.config.vocab_size), np.float32), home_of(self._whole[1]))
        jax.block_until_ready(self._choose_first(logits, self._greedy(1).params, np.zeros(1, np.int32)))

    def prefill(self, ids: Sequence[int]) -> Prefilled:
        """Runs a prompt through the model, and returns the logits of the next token and the prompt's cache.

        Args:
          ids: token ids, 1 to `max_length` - 1 of them.

        Raises:
          ValueError: the prompt is empty, leaves no room for one more token, or has an id outside of the vocabulary.
        """
        if not 1 <= len(ids) < self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens; 1..{self.max_length - 1} fit max_length={self.max_length}"
            )
        prompt = np.asarray(ids)
        if prompt.dtype.kind not in "iu" or prompt.min() < 0 or prompt.max() >= self.config.vocab_size:
            raise ValueError(f"token ids are whole numbers from 0 to {self.config.vocab_size - 1}, got {prompt}")
        cache, logits, largest = self.empty_cache(1), None, self.layers.buckets[-1]
        table = self._caches.table(1)
        for start in range(0, len(ids), largest):
            chunk = prompt[start : start + largest].astype(np.int32)
            bucket = next(b for b in self.layers.buckets if b >= len(chunk))
            padded = jax.device_put(np.pad(chunk, (0, bucket - len(chunk)))[None])
            x = self._run_embedding(Bucketed(padded, len(chunk)))
            for group, run in self._run_groups:
                x, cache[group] = run(x, self._start_of(start), cache[group], table)
            logits = self._run_head(x)
        assert logits is not None
        return Prefilled(logits, cache, len(ids))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> list[list[int]]:
        """Continues every prompt by `max_new_tokens` tokens, or up to a stop token, which the answer then ends with.

        Args:
          prompts: token ids of each prompt; at least one prompt, and at most the largest of `batch_buckets`.
          max_new_tokens: the most tokens to generate per prompt, at least 1.
          sampling: how tokens are drawn: one for each prompt; or one for all, where prompt i has the seed `seed` + i;
            or None: the likeliest tokens, and no stop tokens.

        Returns:
          The generated ids of each prompt, without the prompt.

        Raises:
          ValueError: there are no or too many prompts, or not as many `sampling`; `max_new_tokens` is below 1; a prompt
            and its answer exceed `max_length`; a temperature is above 0 without `draws`; or `prefill` refuses a prompt.
        """
        size = next((s for s in self.decoders if s >= len(prompts)), None)
        if not prompts or size is None:
            raise ValueError(f"generate takes 1 to {max(self.decoders)} prompts, got {len(prompts)}")
        longest = max(map(len, prompts)) + max_new_tokens
        if max_new_tokens < 1 or longest > self.max_length:
            raise ValueError(f"{longest} tokens with {max_new_tokens} new ones; at most max_length={self.max_length}")
        if sampling is None or isinstance(sampling, Sampling):
            sampling = sampling or Sampling()
            sampling = [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(len(prompts))]
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(sampling)} sampling settings for {len(prompts)} prompts")
        if not self._decoding["draws"] and any(s.temperature > 0 for s in sampling):
            raise ValueError("a temperature above 0 needs BucketedModel(..., draws=True)")
        first, batch = [], self.empty_cache(size)
        for slot, prompt in enumerate(prompts):
            done = self.prefill(prompt)
            params = self._drawing([sampling[slot]], 1).params
            first.append(self._choose_first(done.logits, params, np.full(1, len(prompt), np.int32)))
            batch = self._caches.insert(batch, done.cache, np.int32(slot))
        tokens = [np.concatenate([np.asarray(token) for token in first])[:, None]]
        running = [token not in s.stop_ids for (token,), s in zip(tokens[0].tolist(), sampling, strict=True)]
        last, lengths = np.full(size, -1, np.int32), np.zeros(size, np.int32)
        last[: len(prompts)] = np.where(running, tokens[0][:, 0], -1)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        newest, places = (Bucketed(jax.device_put(a), len(prompts)) for a in (last, lengths))
        drawing, found = self._drawing(sampling, size), []
        for _ in range(-(-(max_new_tokens - 1) // self.decode_steps)):
            # A call is enqueued before the tokens of the one before it are looked at, so that none waits for the host.
            if len(found) > 1 and not self._still_running(found[-2], len(prompts)):
                break
            step, newest, places, batch = self.decode(newest, places, batch, drawing)
            found.append(step.values)
        answers = np.concatenate([*tokens, *(np.asarray(f)[: len(prompts)] for f in found)], axis=1)
        return [[t for t in row[:max_new_tokens] if t >= 0] for row in answers.tolist()]

    def _still_running(self, tokens, number):
        """Whether one of the first requests had not ended with the tokens [size, steps] of a call."""
        return bool((np.asarray(tokens)[:number, -1] >= 0).any())

    def decode(
        self, last: Bucketed, lengths: Bucketed, batch: Cache, drawing: Drawing | None = None
    ) -> tuple[Bucketed, Bucketed, Bucketed, Cache]:
        """Decodes `decode_steps` tokens of every request of a batch.

        Args:
          last: the newest token of each request, i32 [size], where size is one of `batch_buckets`; -1: the request has
            ended, and costs nothing but its place.
          lengths: the position of this token in its request, i32 [size].
          batch: the cache of the batch; it is donated and cannot be used afterwards.
          drawing: how tokens are drawn; None: the likeliest ones, without stop tokens.

        Returns:
          The new tokens i32 [size, decode_steps], with -1 behind a stop token; then `last`, `lengths` and `batch` for
          the next call. `last` is -1 for a request that has ended.
        """
        size = last.values.shape[0]
        drawing = self._greedy(size) if drawing is None else drawing
        return self._run_decoders[size](last, lengths, drawing, batch, self._caches.table(size))

    def cache_bytes(self, batch: int) -> int:
        """Returns the bytes of a cache for `batch` requests."""
        return self._caches.bytes(batch)

    def empty_cache(self, batch: int) -> Cache:
        """Returns a cache of zeros for `batch` requests of up to `max_length` positions each.

        Raises:
          MemoryError: a device says that it has less memory left.
        """
        return self._caches.empty(batch)
