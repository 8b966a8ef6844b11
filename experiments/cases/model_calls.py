"""The calls of `engine.BucketedModel` that bench_model times: a prefill, a decode step, and the same without layers.

Executables are compiled on the first call, not by `warm_up`, which would also compile the decode step of the whole
model in order to time a prefill.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.cases.models import last_layers
from fp4jax.attention.cache_formats import FP8
from fp4jax.block_graph import Bucketed
from fp4jax.engine import BucketedModel

STEPS = 24  # the most decode steps that follow each other; their tokens lie behind the context


class Call(NamedTuple):
    """A function to time.

    Attributes:
      run: starts the work and returns a result that may not be there yet.
      restart: called before a series of runs, outside of the timing.
    """

    run: Callable[[], Any]
    restart: Callable[[], None] = lambda: None


class Calls(NamedTuple):
    """A prefill or a decode step of a model.

    Attributes:
      whole: the whole model.
      ends: parts of it that are no decoder layers, each with how often the whole runs it.
      executables: returns the compiled programs of the model.
      cache_bytes: bytes of the cache on a device.
      resident_cache: whether the cache exists before a call; a prefill makes its own.
      steps: how often a call runs every layer.
    """

    whole: Call
    ends: list[tuple[int, Call]]
    executables: Callable[[], list[jax.stages.Compiled]]
    cache_bytes: int
    resident_cache: bool
    steps: int = 1


Options = dict[str, Any] | None


# --- the cache: only the next two functions know how the engine stores keys and values ---


def serve(
    model: Any, *, requests: int, tokens: int, bucket: int, page_size: int, steps: int = 1, compiler_options: Options
) -> BucketedModel:
    """Make a `BucketedModel` with room for this many requests at a time, each of this many tokens.

    Args:
      model: the model.
      requests: the batch size of decoding.
      tokens: the most tokens of a request.
      bucket: the token count that prefill is compiled for.
      page_size: positions of a page.
      steps: decode steps of a call.
      compiler_options: options for XLA.
    """
    return BucketedModel(
        model, buckets=(bucket,), batch_buckets=(requests,), max_length=tokens, decode_steps=steps,
        page_size=page_size, compiler_options=compiler_options,
    )  # fmt: skip


def filled_cache(served: BucketedModel, requests: int, context: int) -> Any:
    """A cache for a batch in which `context` places of every request hold random keys and values.

    All places are filled, those behind `context` too: what they hold must not matter.
    """
    del context
    return randomized(served.empty_cache(requests))


def randomized(cache: Any) -> Any:
    """A cache of random keys and values in place of `cache`, which is donated."""
    keys = iter(jax.random.split(jax.random.key(1, impl="rbg"), 10_000))
    return jax.tree.map(lambda zeros: _randomized(zeros, next(keys)), cache)


@functools.partial(jax.jit, donate_argnums=0)
def _randomized(zeros, key):
    drawn = jnp.float32 if zeros.dtype == FP8 else zeros.dtype
    return jax.random.normal(key, zeros.shape, drawn).astype(zeros.dtype)


# --- calls ---


def prefill_calls(model: Any, tokens: int, chunk: int, page_size: int, compiler_options: Options) -> Calls:
    """A prefill of one request of `tokens` random tokens, in chunks of at most `chunk`, by `BucketedModel.prefill`."""
    bucket = min(tokens, chunk)
    served = serve(
        model, requests=1, tokens=tokens + 1, bucket=bucket, page_size=page_size, compiler_options=compiler_options
    )  # fmt: skip
    ids: Any = np.random.default_rng(0).integers(0, served.config.vocab_size, tokens).astype(np.int32)
    done = served.prefill(ids)
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(done.cache))
    del done
    ends = serve(
        last_layers(model, 0), requests=1, tokens=tokens + 1, bucket=bucket, page_size=page_size,
        compiler_options=compiler_options,
    )  # fmt: skip
    run, run_ends = (Call(lambda m=m: m.prefill(ids).logits) for m in (served, ends))
    return Calls(run, [(1, run_ends)], lambda: _executables(served), cache_bytes, False)


def decode_calls(
    model: Any, requests: int, context: int, steps: int, page_size: int, compiler_options: Options
) -> Calls:
    """`steps` decode steps of requests with `context` filled places each, by one call of `BucketedModel.decode`.

    The requests start with different random tokens, so that they are routed differently. Each step takes the tokens,
    positions and cache of the step before it.
    """
    served = serve(
        model, requests=requests, tokens=context + STEPS + 1, bucket=1, page_size=page_size, steps=steps,
        compiler_options=compiler_options,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, served.config.vocab_size, requests).astype(np.int32)
    last, lengths = (Bucketed(jax.device_put(a), requests) for a in (tokens, np.full(requests, context, np.int32)))
    state: list[Any] = [last, lengths, filled_cache(served, requests, context)]
    cache_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state[2]))

    def restart():
        state[:2] = last, lengths

    def run():
        tokens, *state[:] = served.decode(*state)
        return tokens.values

    ends = _decode_ends(model, last.values, compiler_options)
    return Calls(Call(run, restart), [(steps, ends)], lambda: _executables(served), cache_bytes, True, steps)


def _executables(served: BucketedModel) -> list[jax.stages.Compiled]:
    return [program for graph in served.graphs for program in graph.executables]


def _decode_ends(model: Any, tokens: jax.Array, compiler_options: Options) -> Call:
    """A decode step without decoder layers: the embedding, the head, and the choice of the likeliest token."""
    graphdef, state = nnx.split(last_layers(model, 0))

    def step(state, tokens):
        ends = nnx.merge(graphdef, state)
        return jnp.argmax(ends.head(ends.embed_tokens(tokens[:, None]))[:, 0], axis=-1).astype(jnp.int32)

    compiled = jax.jit(step).lower(state, tokens).compile(compiler_options=compiler_options)
    chosen = [tokens]

    def run():
        chosen[0] = compiled(state, chosen[0])
        return chosen[0]

    return Call(run)
