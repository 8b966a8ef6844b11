"""Requests that arrive at random, and what a user of an `Engine` sees of them: times to the first and to each token."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fp4jax.engine import Engine


@dataclasses.dataclass
class Arrival:
    """A request of a trace.

    Attributes:
      second: when it arrives, after the start.
      prompt: its token ids.
      new_tokens: the number of tokens that it generates.
      token_seconds: when its tokens were known, one entry per token; filled by `replay`.
    """

    second: float
    prompt: list[int]
    new_tokens: int
    token_seconds: list[float] = dataclasses.field(default_factory=list)


def poisson_trace(
    count: int, rate: float, vocabulary: int, *, prompt: float, answer: float, longest: int, seed: int = 0
) -> list[Arrival]:
    """Makes `count` requests that arrive independently of each other, `rate` of them a second.

    Args:
      count: requests.
      rate: requests per second; infinity: all arrive at once.
      vocabulary: token ids are drawn below this.
      prompt, answer: medians of the numbers of tokens. They are log-normal with a deviation of 0.6 of the logarithm.
      longest: the most tokens of prompt and answer together; longer ones are cut.
      seed: the same seed gives the same requests, and the same order of arrivals at every rate.
    """
    rng, found, now = np.random.default_rng(seed), [], 0.0
    for _ in range(count):
        now += rng.exponential() / rate
        lengths = np.exp(rng.normal(np.log([prompt, answer]), 0.6))
        tokens = int(np.clip(lengths[0], 1, longest - 1))
        new = int(np.clip(lengths[1], 1, longest - tokens))
        found.append(Arrival(now, rng.integers(0, vocabulary, tokens).tolist(), new))
    return found


def replay(
    engine: Engine, trace: Sequence[Arrival], progress: Callable[[int], Any] = lambda tokens: None
) -> dict[str, Any]:
    """Submits every request when it arrives, and runs the engine until all have their answers.

    Args:
      engine: an engine that is warmed up and idle.
      trace: the requests; their `token_seconds` are filled.
      progress: called with the number of new tokens after every step.

    Returns:
      seconds: from the start to the last token; tokens_per_s: generated tokens per second; first_token_ms and
      token_ms: {"p50", "p99"} of the time from the arrival to the first token, and of the time per token behind it;
      most_pages: the largest share of pages that were in use; steps: steps of the engine.
    """
    waiting, by_id = sorted(trace, key=lambda arrival: arrival.second)[::-1], {}
    steps, most_pages, start = 0, 0.0, time.perf_counter()
    while waiting or not engine.is_idle:
        now = time.perf_counter() - start
        while waiting and waiting[-1].second <= now:
            arrival = waiting.pop()
            by_id[engine.submit(arrival.prompt, arrival.new_tokens)] = arrival
        if engine.is_idle:
            time.sleep(max(0.0, waiting[-1].second - now))
            continue
        events, steps = engine.step(), steps + 1
        now = time.perf_counter() - start
        for event in events:
            by_id[event.id].token_seconds += [now] * len(event.tokens)
        progress(sum(len(event.tokens) for event in events))
        report = engine.report()
        most_pages = max(most_pages, report.pages_in_use / report.pages)
    took = max(arrival.token_seconds[-1] for arrival in trace)
    first = [arrival.token_seconds[0] - arrival.second for arrival in trace]
    several = [a.token_seconds for a in trace if len(a.token_seconds) > 1]
    behind = [(seconds[-1] - seconds[0]) / (len(seconds) - 1) for seconds in several]
    return {
        "seconds": round(took, 3),
        "tokens_per_s": round(sum(len(arrival.token_seconds) for arrival in trace) / took, 1),
        "first_token_ms": _percentiles(first), "token_ms": _percentiles(behind),
        "most_pages": round(most_pages, 3), "steps": steps,
    }  # fmt: skip


def _percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {f"p{p}": round(1000 * float(np.percentile(seconds, p)), 3) for p in (50, 99)}
