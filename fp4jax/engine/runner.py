"""Runs the programs of an `Engine`: makes their arrays from requests, and keeps the caches and the slots."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from fp4jax.block_graph import compile_all
from fp4jax.engine.drawing import Drawing, Sampling, drawing_on_host
from fp4jax.engine.rank_blocks import Chosen, Slots
from fp4jax.engine.rank_programs import RankPrograms
from fp4jax.engine.requests import Request
from fp4jax.engine.scheduler import Chunk


class Call(NamedTuple):
    """A program that runs, and which rows of its result belong to which request."""

    rows: list[tuple[Request, int]]
    chosen: Chosen


class Runner:
    """Runs prefills and decode steps of requests that a `Scheduler` has placed.

    Args:
      programs: the programs.
      buckets: token counts of chunks.
      sizes: numbers of slots that decode computes; the largest is the number of slots of a device.
      num_pages, page_size: pages of a device, and their positions.
      table_width: the most pages of a request.
    """

    def __init__(
        self,
        programs: RankPrograms,
        *,
        buckets: Sequence[int],
        sizes: Sequence[int],
        num_pages: int,
        page_size: int,
        table_width: int,
    ):
        self.programs, self.buckets, self._sizes = programs, buckets, sizes
        self._max_requests, self._table_width = sizes[-1], table_width
        self._caches = programs.empty_caches(self._max_requests, num_pages, page_size)
        every = programs.ranks * self._max_requests
        self._table = np.zeros((every, table_width), np.int32)
        self._slots: Slots = programs.put(self._slots_of([None] * every))
        self._latest: tuple[int, Slots, jax.Array, bool] | None = None  # the arguments of the latest decode program
        self._changed: dict[int, Request | None] = {}  # slots whose request is new or gone, over all devices

    def warm_up(self, *, workers: int = 1, progress: bool = False) -> None:
        """Compiles every program, and runs each once without requests. Nothing compiles afterwards.

        Args:
          workers: threads that compile in parallel; 1 compiles in the calling thread.
          progress: whether to show a progress bar.
        """
        programs, nobody = self.programs, [None] * self.programs.ranks
        zeros, table = programs.put(np.zeros(len(nobody), np.int32)), programs.put(self._table)
        drawing = programs.put(self._drawing(nobody))
        todo = programs.compilations(self.buckets, self._sizes, self._slots, self._caches, table)
        compile_all(todo, workers=workers, progress=progress)
        for draws in programs.variants:
            for size in self._sizes:
                _, self._slots, self._caches = programs.decode(size, self._slots, self._caches, table, draws)
        for bucket in self.buckets:
            x, counts = self._run_chunks(nobody, bucket)
            for draws in programs.variants:
                programs.head(x, counts, zeros, drawing, draws)
        self._apply_changes(zeros, np.full(len(nobody), -1, np.int32))
        jax.block_until_ready(self._caches)

    def prefill(self, chunks: Sequence[Chunk | None]) -> Call | None:
        """Computes a chunk on every device that has one.

        Returns:
          The call that chooses the tokens behind prompts that are complete now; None if there are none.
        """
        bucket = self.bucket_of(max(len(chunk.tokens) for chunk in chunks if chunk is not None))
        x, counts = self._run_chunks(chunks, bucket)
        done = [chunk if chunk is not None and chunk.is_last else None for chunk in chunks]
        if not any(done):
            return None
        requests = [None if chunk is None else chunk.request for chunk in done]
        positions = np.asarray([0 if r is None else r.started_with for r in requests], np.int32)
        drawing, draws = self.programs.put(self._drawing(requests)), self._draws(requests)
        chosen = self.programs.head(x, counts, self.programs.put(positions), drawing, draws)
        for request in filter(None, requests):
            self._changed[self._index(request)] = request
        joining = np.asarray([-1 if r is None else r.slot for r in requests], np.int32)
        self._apply_changes(chosen.tokens, joining)
        return self._started(Call([(r, rank) for rank, r in enumerate(requests) if r is not None], chosen))

    def bucket_of(self, tokens: int) -> int:
        """Returns the bucket that computes a chunk of so many tokens."""
        return next(b for b in self.buckets if b >= tokens)

    def _run_chunks(self, chunks: Sequence[Chunk | None], bucket: int) -> tuple[jax.Array, jax.Array]:
        """Runs chunks through the model, and returns the hidden states [R, bucket, H], and their valid tokens [R]."""
        ids = np.zeros((len(chunks), bucket), np.int32)
        numbers = np.zeros((3, len(chunks)), np.int32)
        table = np.zeros((len(chunks), self._table_width), np.int32)
        for rank, chunk in enumerate(chunks):
            if chunk is not None:
                ids[rank, : len(chunk.tokens)] = chunk.tokens
                numbers[:, rank] = chunk.start, len(chunk.tokens), chunk.request.slot
                table[rank, : len(chunk.request.pages)] = chunk.request.pages
        ids, starts, counts, slots, table = self.programs.put((ids, *numbers, table))
        x, self._caches = self.programs.prefill(ids, starts, counts, slots, self._caches, table)
        return x, counts

    def decode(self, requests: Sequence[Request]) -> Call:
        """Decodes the next tokens of these requests."""
        if self._changed:
            nobody = np.full(self.programs.ranks, -1, np.int32)
            self._apply_changes(self.programs.put(nobody), nobody)
        for request in requests:
            self._table[self._index(request), : len(request.pages)] = request.pages
        size = next(s for s in self._sizes if s > max(request.slot for request in requests))
        table, draws = self.programs.put(self._table.copy()), self._draws(requests)
        self._latest = size, self._slots, table, draws
        chosen, self._slots, self._caches = self.programs.decode(size, self._slots, self._caches, table, draws)
        return self._started(Call([(r, r.rank * size + r.slot) for r in requests], chosen))

    def time_decode(self, calls: int) -> float:
        """Seconds per call of the latest decode program, run `calls` times again.

        Each call computes what the latest one has computed, and writes the same keys and values to the same places.
        """
        assert self._latest is not None, "no request has been decoded"
        size, slots, table, draws = self._latest
        jax.block_until_ready(self._caches)
        start, chosen = time.perf_counter(), None
        for _ in range(calls):
            chosen, _, self._caches = self.programs.decode(size, slots, self._caches, table, draws)
        jax.block_until_ready(chosen)
        return (time.perf_counter() - start) / calls

    def vacate(self, request: Request) -> None:
        """Takes a request out of its slot, before the next program runs."""
        self._changed[self._index(request)] = None

    def _apply_changes(self, first: jax.Array, joining: np.ndarray) -> None:
        """Puts the requests of `_changed` into their slots on the devices; see `RankPrograms.change`."""
        requests: list[Request | None] = [None] * len(self._table)
        mask = np.zeros(len(requests), bool)
        for index, request in self._changed.items():
            requests[index], mask[index] = request, True
        self._changed = {}
        put = self.programs.put
        self._slots = self.programs.change(
            self._slots, put(mask), put(self._slots_of(requests)), first, put(joining)
        )  # fmt: skip

    def _slots_of(self, requests: Sequence[Request | None]) -> Slots:
        last = np.full(len(requests), -1, np.int32)
        lengths = np.asarray([0 if r is None else r.started_with for r in requests], np.int32)
        limits = np.asarray([0 if r is None else r.most_tokens - 1 for r in requests], np.int32)
        return Slots(last, lengths, limits, self._drawing(requests))

    def _drawing(self, requests: Sequence[Request | None]) -> Drawing:
        settings = [Sampling() if r is None else r.sampling for r in requests]
        return drawing_on_host(settings, len(settings))

    def _draws(self, requests: Sequence[Request | None]) -> bool:
        return any(r is not None and r.sampling.temperature > 0 for r in requests)

    def _index(self, request: Request) -> int:
        """The request's slot among those of all devices."""
        return request.rank * self._max_requests + request.slot

    def _started(self, call: Call) -> Call:
        """Has the results of a call sent to the host as soon as they are there."""
        chosen = self.programs.on_every_host(call.chosen)
        for array in chosen:
            array.copy_to_host_async()
        return call._replace(chosen=chosen)
