"""The calls of `engine.Engine`'s programs that bench_model times on several devices: prefills and decode steps.

Every device has requests and pages of its own, as in the engine. Programs are compiled on the first call.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from experiments.cases.model_calls import STEPS, Call, Calls, Options, randomized
from experiments.cases.models import last_layers
from fp4jax.engine.drawing import drawing_on_host
from fp4jax.engine.rank_blocks import Slots
from fp4jax.engine.rank_programs import RankPrograms


def prefill_calls(
    model: Any, tokens: int, chunk: int, page_size: int, compiler_options: Options, *, mesh: Mesh
) -> Calls:  # fmt: skip
    """A prefill of one prompt of `tokens` random tokens on every device, in chunks of at most `chunk`."""
    ranks, bucket, width = mesh.size, min(tokens, chunk), -(-tokens // page_size)
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (ranks, -(-tokens // bucket), bucket)).astype(np.int32)
    everywhere = lambda number: np.full(ranks, number, np.int32)  # noqa: E731

    def made(model):
        """The prefill of a model, its programs, and its caches."""
        programs = RankPrograms(model, mesh, steps=1, draws=False, compiler_options=compiler_options)
        chunks = [  # ids, starts, counts
            programs.put((ids[:, i], everywhere(i * bucket), everywhere(min(bucket, tokens - i * bucket))))
            for i in range(ids.shape[1])
        ]
        zeros, table = programs.put((everywhere(0), np.tile(np.arange(width, dtype=np.int32), (ranks, 1))))
        drawing = programs.put(drawing_on_host([], ranks))
        caches = [programs.empty_caches(1, width, page_size)]

        def run():
            x = counts = None
            for ids, starts, counts in chunks:
                x, caches[0] = programs.prefill(ids, starts, counts, zeros, caches[0], table)
            return programs.head(x, counts, zeros, drawing, draws=False).tokens

        return run, programs, caches[0]

    run, programs, caches = made(model)
    cache_bytes = _bytes_on_a_device(caches)
    run_ends, *_ = made(last_layers(model, 0))
    run()
    return Calls(Call(run), [(1, Call(run_ends))], lambda: programs.executables, cache_bytes, True)


def decode_calls(
    model: Any, requests: int, context: int, steps: int, page_size: int, compiler_options: Options, *, mesh: Mesh
) -> Calls:  # fmt: skip
    """`steps` decode steps of requests with `context` filled places each, `requests` of them on every device."""
    programs = RankPrograms(model, mesh, steps=steps, draws=False, compiler_options=compiler_options)
    every, width = mesh.size * requests, -(-(context + STEPS + 1) // page_size)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, every).astype(np.int32)
    lengths, limits = (np.full(every, n, np.int32) for n in (context, context + STEPS + 1))
    pages = np.arange(requests * width, dtype=np.int32).reshape(requests, width)
    start, table = programs.put(
        (Slots(tokens, lengths, limits, drawing_on_host([], every)), np.tile(pages, (mesh.size, 1)))
    )
    state = [start, randomized(programs.empty_caches(requests, requests * width, page_size))]

    def restart():
        state[0] = start

    def run():
        slots, caches = state
        chosen, *state[:] = programs.decode(requests, slots, caches, table, draws=False)
        return chosen.tokens

    run()
    ends = _decode_ends(model, mesh, requests, steps, compiler_options, start, table)
    return Calls(
        Call(run, restart), [(1, ends)], lambda: programs.executables, _bytes_on_a_device(state[1]), True, steps
    )


def _decode_ends(model, mesh, requests, steps, compiler_options, start, table) -> Call:
    """The same call of a model without decoder layers: embedding, head, and the choice of the likeliest tokens."""
    ends = RankPrograms(last_layers(model, 0), mesh, steps=steps, draws=False, compiler_options=compiler_options)
    return Call(lambda: ends.decode(requests, start, [], table, draws=False)[0].tokens)


def _bytes_on_a_device(caches: Any) -> int:
    return sum(leaf.nbytes // len(leaf.sharding.device_set) for leaf in jax.tree.leaves(caches))
