"""Serves many requests at a time: they join, leave and are cancelled between calls of compiled programs.

A step of the engine computes chunks of prompts on every device that has some, up to a budget of tokens, and decodes
`decode_steps` tokens of all requests whose prompts are done. It reads the tokens of the step before, so that devices
compute while the host plans. Programs decide by themselves where answers end, so a step that is enqueued early decodes
nothing beyond.

With a mesh every device has requests, pages and slots of its own; only tokens for experts cross (`rank_programs`).
"""

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from fp4jax.attention import PageFormat
from fp4jax.block_graph import ProgramStore, check_buckets
from fp4jax.engine.blocks import is_low_latency
from fp4jax.engine.drawing import Sampling
from fp4jax.engine.rank_programs import RankPrograms
from fp4jax.engine.requests import Generated, QueueFull, Request
from fp4jax.engine.runner import Call, Runner
from fp4jax.engine.scheduler import Scheduler
from fp4jax.sharded_moe import expert_mesh

_DECODE_STEPS = 8


@dataclasses.dataclass
class EngineReport:
    """What an engine has done.

    Attributes:
      prompt_tokens: tokens of prompts that began to run, those after a preemption included.
      shared_tokens: those of them whose keys and values were found in pages of earlier requests.
      generated_tokens: tokens that were generated.
      preemptions: requests that had to wait again, as there were no pages.
      waiting, running, decoding: requests that wait; that run; and those of them whose prompts are complete.
      pages_in_use, pages: pages of requests that run, and all pages, over all devices.
      programs: compiled programs.
    """

    prompt_tokens: int
    shared_tokens: int
    generated_tokens: int
    preemptions: int
    waiting: int
    running: int
    decoding: int
    pages_in_use: int
    pages: int
    programs: int


class Engine:
    """Continuous batching.

    The weights and settings of `model` are taken when the engine is made, as by `BucketedModel`.

    Args:
      model: the language model. With a mesh its experts must be split over it (`configure_experts`, `load_model`).
      max_requests: requests that a device runs at a time.
      max_length: the most tokens of a request, prompt and answer together.
      num_pages: pages of a device; None: enough for `max_requests` requests of `max_length`.
      page_size: positions of a page.
      prefill_buckets: token counts that prefill is compiled for, ascending. A longer prompt runs in chunks of the
        largest.
      prefill_tokens: the most tokens of prompts that a step computes on each device, pads included; at least one chunk
        is computed in any case. More let prompts begin earlier, and requests that decode wait longer for their next
        tokens. None: the largest of `prefill_buckets`.
      decode_buckets: numbers of requests that decoding is compiled for, ascending; None: `max_requests`.
      mesh: a mesh with the one axis "ep"; None: one device.
      decode_steps: tokens that a step decodes for every request; None: 8, or 1 for experts that keep receive buffers.
      draws: whether requests may have a temperature above 0. A step without such requests does not pay for them.
      max_waiting: waiting requests from which on `submit` raises `QueueFull`; None: any number may wait.
      compiler_options: options for XLA.
      store: where programs are looked for, and saved for later processes; None: nowhere.

    Raises:
      ValueError: sizes are not positive or do not fit each other or the model, or the experts are not on the mesh.
      MemoryError: a device says that it has less memory left than its cache takes.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_requests: int,
        max_length: int,
        num_pages: int | None = None,
        page_size: int = 64,
        prefill_buckets: Sequence[int] = (128, 512, 2048),
        prefill_tokens: int | None = None,
        decode_buckets: Sequence[int] | None = None,
        mesh: Mesh | None = None,
        decode_steps: int | None = None,
        draws: bool = True,
        max_waiting: int | None = None,
        compiler_options: Any = None,
        store: ProgramStore | None = None,
    ):
        if not 1 <= max_length <= model.config.max_position_embeddings:
            raise ValueError(f"max_length must be 1..{model.config.max_position_embeddings}, got {max_length}")
        sizes = check_buckets(decode_buckets or (max_requests,))
        if min(max_requests, page_size) < 1 or sizes[-1] != max_requests:
            raise ValueError(
                f"max_requests={max_requests} and page_size={page_size} must be positive, and max_requests the largest "
                f"of decode_buckets, got {sizes}"
            )
        pages = -(-max_length // page_size)
        num_pages = max_requests * pages if num_pages is None else num_pages
        if num_pages < pages:
            raise ValueError(f"num_pages={num_pages} are too few: a request of max_length={max_length} takes {pages}")
        if prefill_tokens is not None and prefill_tokens < 1:
            raise ValueError(f"prefill_tokens must be at least 1, got {prefill_tokens}")
        mesh = None if mesh is None else expert_mesh(mesh)
        if any(block.mesh != mesh for block in model.moe_blocks()):
            raise ValueError("the experts are not on this mesh; call configure_experts(model, mesh=mesh) before")
        if decode_steps is None:
            decode_steps = 1 if is_low_latency(model) else _DECODE_STEPS
        self.config, self.max_length, self._max_waiting = model.config, max_length, max_waiting
        programs = RankPrograms(
            model, mesh, steps=decode_steps, draws=draws, compiler_options=compiler_options, store=store
        )
        self._runner = Runner(
            programs, buckets=check_buckets(prefill_buckets), sizes=sizes, num_pages=num_pages, page_size=page_size,
            table_width=pages,
        )  # fmt: skip
        self.decode_steps, self._draws = decode_steps, draws
        self._prefill_tokens = prefill_tokens or self._runner.buckets[-1]
        self._scheduler = Scheduler(
            programs.ranks, max_requests, num_pages, page_size, self._runner.buckets[-1],
            shares=all(isinstance(f, PageFormat) for f in programs.formats),
        )  # fmt: skip
        self.cache_bytes = programs.cache_bytes(max_requests, num_pages, page_size)  # of a device
        self._requests: dict[int, Request] = {}
        self._in_flight: deque[Call] = deque()
        self._events: list[Generated] = []
        self._submitted = self._generated = 0

    # --- requests ---

    def submit(
        self,
        prompt_ids: Sequence[int],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        seed: int = 0,
        stop_ids: Sequence[int] = (),
        logprobs: bool = False,
    ) -> int:
        """Adds a request, and returns its number.

        Args:
          prompt_ids: token ids, at least one.
          max_new_tokens: the most tokens to generate, at least 1.
          temperature, top_p, top_k, min_p, seed, stop_ids: see `Sampling`.
          logprobs: whether `Generated.logprobs` is filled.

        Raises:
          ValueError: the request is longer than `max_length`; an id is outside of the vocabulary; a value is out of
            range; or the temperature is above 0 without `draws`.
          QueueFull: `max_waiting` requests wait already.
        """
        prompt = np.asarray(prompt_ids)
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu" or not prompt.size:
            raise ValueError(f"prompt_ids must be a list of at least one token id, got {prompt_ids!r}")
        if prompt.min() < 0 or prompt.max() >= self.config.vocab_size:
            raise ValueError(f"token ids are whole numbers from 0 to {self.config.vocab_size - 1}, got {prompt_ids!r}")
        if max_new_tokens < 1 or prompt.size + max_new_tokens > self.max_length:
            raise ValueError(
                f"{prompt.size} tokens and {max_new_tokens} new ones; at least one new token, and together at most "
                f"max_length={self.max_length}"
            )
        sampling = Sampling(temperature, top_k, top_p, min_p, seed, tuple(stop_ids))
        if temperature > 0 and not self._draws:
            raise ValueError("a temperature above 0 needs Engine(..., draws=True)")
        if self._max_waiting is not None and len(self._scheduler.waiting) >= self._max_waiting:
            raise QueueFull(f"{self._max_waiting} requests wait already")
        request = Request(self._submitted, prompt.tolist(), prompt.size, max_new_tokens, sampling, logprobs)
        self._submitted += 1
        self._requests[request.id] = request
        self._scheduler.waiting.append(request)
        return request.id

    def cancel(self, id: int) -> None:
        """Ends a request; the next step says so. Does nothing for a request that has ended.

        Raises:
          KeyError: no request has this number.
        """
        if not 0 <= id < self._submitted:
            raise KeyError(f"there is no request {id}")
        request = self._requests.get(id)
        if request is None:
            return
        if request.slot >= 0:
            self._leave(request)
        else:
            self._scheduler.waiting.remove(request)
        self._end(request, [], "cancelled", None)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs, and `step` has nothing more to say."""
        return not (self._requests or self._in_flight or self._events)

    def step(self) -> list[Generated]:
        """Starts the next programs, and returns what those of the step before have generated."""
        before = len(self._in_flight)
        self._scheduler.admit()
        self._prefill()
        while (rank := self._scheduler.find_pages(self.decode_steps)) is not None:
            self._read(len(self._in_flight))  # their tokens must be known before a request can wait again
            before = 0
            if self._scheduler.find_pages(self.decode_steps) == rank:
                self._runner.vacate(self._scheduler.running[rank][-1])
                self._scheduler.preempt(rank)
        if requests := self._scheduler.advance(self.decode_steps):
            self._in_flight.append(self._runner.decode(requests))
        started = len(self._in_flight) - before
        self._read(before if started else len(self._in_flight))
        events, self._events = self._events, []
        return events

    def _prefill(self) -> None:
        """Starts prefills of chunks until the step's budget of tokens is spent."""
        spent = 0
        while tokens := self._scheduler.next_chunk_tokens():
            bucket = self._runner.bucket_of(tokens)
            if spent and spent + bucket > self._prefill_tokens:
                return
            spent += bucket
            call = self._runner.prefill(self._scheduler.next_chunks())
            if call is not None:
                self._in_flight.append(call)

    def run(self) -> dict[int, list[int]]:
        """Runs until no request is left; returns the tokens that each request has generated meanwhile."""
        found: dict[int, list[int]] = {id: [] for id in self._requests}
        while not self.is_idle:
            for event in self.step():
                found.setdefault(event.id, []).extend(event.tokens)
        return found

    def warm_up(self, *, workers: int = 1, progress: bool = False) -> None:
        """Compiles every program, and runs each once without requests. Nothing compiles afterwards.

        Args:
          workers: threads that compile in parallel; 1 compiles in the calling thread.
          progress: whether to show a progress bar.
        """
        self._runner.warm_up(workers=workers, progress=progress)

    def time_decode(self, calls: int) -> float:
        """Measures the decode program alone: seconds per call of `calls` calls that follow each other.

        Each repeats the latest call, with the requests that it had, and changes nothing; a model with states of
        recurrent layers cannot repeat one.
        """
        assert all(isinstance(f, PageFormat) for f in self._runner.programs.formats)
        return self._runner.time_decode(calls)

    def report(self) -> EngineReport:
        """Returns what the engine has done."""
        scheduler = self._scheduler
        running = [request for rank in scheduler.running for request in rank]
        pages = sum(pool.num_pages for pool in scheduler.pools)
        used = pages - sum(pool.available for pool in scheduler.pools)
        return EngineReport(
            scheduler.prompt_tokens, scheduler.shared_tokens, self._generated, scheduler.preemptions,
            len(scheduler.waiting), len(running), sum(request.is_decoding for request in running), used, pages,
            len(self._runner.programs.executables),
        )  # fmt: skip

    # --- results ---

    def _read(self, count: int) -> None:
        """Waits for the oldest `count` calls, and turns their tokens into events."""
        for _ in range(count):
            call = self._in_flight.popleft()
            tokens, logprobs = (np.asarray(part).reshape(len(part), -1) for part in call.chosen)
            for request, row in call.rows:
                if request.id not in self._requests:  # it ended or was cancelled after the call began
                    continue
                new = [t for t in tokens[row].tolist() if t >= 0]
                if not new:
                    continue
                request.tokens += new
                self._generated += len(new)
                given = logprobs[row, : len(new)].tolist() if request.wants_logprobs else None
                if new[-1] in request.sampling.stop_ids:
                    reason = "stop"
                else:
                    reason = "length" if len(request.tokens) == request.most_tokens else None
                if reason is None:
                    self._events.append(Generated(request.id, new, None, given))
                    continue
                if request.slot >= 0:
                    self._scheduler.leave(request)
                self._end(request, new, reason, given)

    def _leave(self, request: Request) -> None:
        """Takes a request that still runs from its device."""
        self._runner.vacate(request)
        request.computed = min(request.computed, len(request.tokens) - 1)
        self._scheduler.leave(request)

    def _end(self, request: Request, tokens: list[int], reason: Any, logprobs: list[float] | None) -> None:
        del self._requests[request.id]
        if logprobs is None and request.wants_logprobs:
            logprobs = []
        self._events.append(Generated(request.id, tokens, reason, logprobs))
