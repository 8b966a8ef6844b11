"""Times a prefill or a decode step of a language model: wall time, kernels, stages and memory, without its two ends.

The ends are the embedding and the head with the choice of a token. They are timed alone, and their time and kernels are
subtracted from those of the whole model.
"""

import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from experiments.cases.model_calls import STEPS, Call, Calls
from experiments.cases.models import last_layers
from experiments.harness import timing
from experiments.harness.graph_kernels import profile_kernels
from experiments.harness.model_stages import SCOPES, by_scope, scoped_layers
from experiments.harness.stages import compiler_options, stage_times

_ROUND_US = 50_000  # a round calls a function as often as fits in this time, for at most STEPS decode steps
_STAGE_LAYERS = 2
# Names of kernels that move tokens between GPUs, or let GPUs meet before that.
EXCHANGE = re.compile("dispatch|(?<!depermute_)combine|MultiGpuBarrier|ncclDevKernel")


def measure(calls: Calls, layers: int, rows: int, repeats: int, weights_bytes: int, profile: bool) -> dict[str, Any]:
    """The measured columns of a row, but for the stages.

    Args:
      calls: the calls, which have run once.
      layers: the decoder layers of the model.
      rows: the tokens that a prefill or a decode step computes.
      repeats: timed rounds.
      weights_bytes: bytes of the model's weights.
      profile: whether to profile the kernels on a GPU.
    """
    series = [(1, calls.whole), *calls.ends]
    counts = [_count(call, STEPS // calls.steps) for _, call in series]
    layers, rows = layers * calls.steps, rows * calls.steps
    rounds = [[] for _ in series]
    for _ in range(repeats):  # in turns, so that a host that is busy for a while slows all of them
        for times, (_, call), count in zip(rounds, series, counts, strict=True):
            times.append(_round_us(call, count))
    whole, *ends = (statistics.median(times) for times in rounds)
    of_ends = sum(number * us for (number, _), us in zip(calls.ends, ends, strict=True))
    found: dict[str, Any] = {
        "us_per_layer": round((whole - of_ends) / layers, 2), "tokens_per_s": round(1e6 * rows / whole, 1),
        "weights_gb": _gb(weights_bytes), "cache_gb": _gb(calls.cache_bytes),
        "peak_gb": _gb(_peak_bytes(calls, weights_bytes)),
    }  # fmt: skip
    if profile and timing.on_gpu():
        found |= _kernel_columns(calls, layers, counts)
        found["wall_over_kernels"] = round(found["us_per_layer"] / found["kernel_us_per_layer"], 3)
    return found


def measure_stages(make: Callable[[Any, Any], Calls], model: Any) -> dict[str, float]:
    """Microseconds per layer of each stage, from a profile of the model's last layers.

    Kernels in CUDA graphs do not tell which part of the program they come from. So these layers are compiled once more
    without graphs, and with scopes around their modules.

    Args:
      make: makes the calls of a model with options for XLA.
      model: the model.
    """
    layers = min(_STAGE_LAYERS, len(model.layers))
    with scoped_layers():  # programs are traced when they are first called
        calls = make(last_layers(model, layers), compiler_options())
        calls.whole.restart()
        jax.block_until_ready(calls.whole.run())
    calls.whole.restart()
    return by_scope(stage_times(calls.executables(), calls.whole.run, SCOPES), layers * calls.steps)


def _round_us(call: Call, count: int) -> float:
    """Microseconds per run of `count` runs that follow each other, until the last result is there."""
    call.restart()
    start, result = time.perf_counter(), None
    for _ in range(count):
        result = call.run()
    jax.block_until_ready(result)
    return 1e6 * (time.perf_counter() - start) / count


def _count(call: Call, most: int) -> int:
    """How often a round runs a function, at most `most` times, from the time of its second run."""
    _round_us(call, 1)
    return min(most, max(1, round(_ROUND_US / _round_us(call, 1))))


def _kernel_columns(calls: Calls, layers: int, counts: list[int]) -> dict[str, Any]:
    """Time and number of the layers' kernels, and the share of the whole model's kernels that CUDA graphs launched."""

    def profiled(call: Call, count: int):
        def run():
            call.restart()
            return [call.run() for _ in range(count)][-1]

        return profile_kernels(run)

    kernels = profiled(calls.whole, counts[0])
    us, number = (sum(k.us for k in kernels) / counts[0], len(kernels) / counts[0])
    for (times, call), count in zip(calls.ends, counts[1:], strict=True):
        found = profiled(call, count)
        us -= times * sum(k.us for k in found) / count
        number -= times * len(found) / count
    exchange = sum(k.us for k in kernels if EXCHANGE.search(k.name)) / counts[0]
    return {
        "exchange_us_per_layer": round(exchange / layers, 2), "kernel_us_per_layer": round(us / layers, 2),
        "kernels_per_layer": round(number / layers, 2),
        "in_graph": round(sum(k.in_graph for k in kernels) / len(kernels), 3),
    }  # fmt: skip


def _peak_bytes(calls: Calls, weights_bytes: int) -> int:
    """Bytes of the device that a call needs: what exists before it, its own cache, and the largest program's memory.

    JAX only knows the peak of the whole process, so the memory of a program is what XLA planned for it.
    """
    stats = jax.devices()[0].memory_stats() or {}
    there = stats.get("bytes_in_use", weights_bytes + (calls.cache_bytes if calls.resident_cache else 0))
    programs = [program.memory_analysis() for program in calls.executables()]
    planned = [p.temp_size_in_bytes + p.output_size_in_bytes - p.alias_size_in_bytes for p in programs if p is not None]
    return there + (0 if calls.resident_cache else calls.cache_bytes) + max(planned, default=0)


def _gb(number: float) -> float:
    return round(number / 1e9, 3)
