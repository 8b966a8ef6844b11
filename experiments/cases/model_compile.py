"""Measures in a fresh process how long it takes to compile all programs that serve a model.

    python -m experiments.cases.model_compile qwen3-30b 48 w4a16 bf16 [STORE]

The arguments are the model, its decoder layers, how its experts run, what its linear layers run as, and a folder for a
`ProgramStore`. The model has random weights. Then the clock starts: `engine.BucketedModel` is made and compiles its
programs for two prefills and two batch sizes, in as many threads as there are cores. The last line of the output is a
JSON object with the columns of `Compiled`. With a store, JAX's compilation cache is off. `bench_model` starts this
process four times.
"""

import json
import os
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax

from experiments.cases.models import model_config, random_model
from experiments.harness import timing
from experiments.harness.cold_start import starts
from experiments.harness.graph_kernels import KEEP_GRAPHS
from fp4jax.block_graph import ProgramStore
from fp4jax.engine import BucketedModel

# Token counts of the prefills, and batch sizes of the decode steps.
_ON_GPU: dict[str, Any] = dict(buckets=(2048, 8192), batch_buckets=(1, 32))
_ON_CPU: dict[str, Any] = dict(buckets=(8, 16), batch_buckets=(1, 2))


class Compiled(NamedTuple):
    """What a process found.

    Attributes:
      seconds: seconds to make the `BucketedModel` and to compile all of its programs.
      lowering_s: seconds to trace and lower each program, summed over all programs. Threads wait for Python's lock in
        this time, so that the sum exceeds `seconds` where many of them trace at the same time.
      compiling_s: seconds in XLA or in the compilation cache, summed over all programs.
      programs: the number of compiled programs.
      weights_s: seconds to make the weights, which are not part of `seconds`.
      peak_gb: the most memory of the device that was in use, in GB; None where JAX does not know it.
    """

    seconds: float
    lowering_s: float
    compiling_s: float
    programs: int
    weights_s: float
    peak_gb: float | None


def compile_model(name: str, layers: int, experts: str, dense: str, store: str | None = None) -> Compiled:
    """Make a model with random weights and compile all programs that serve it; see `random_model`."""
    if store is not None:
        jax.config.update("jax_enable_compilation_cache", False)
    start = time.perf_counter()
    model = random_model(model_config(name, layers), experts, dense)
    middle = time.perf_counter()
    gpu = timing.on_gpu()
    sizes = _ON_GPU if gpu else _ON_CPU
    served = BucketedModel(
        model, max_length=sizes["buckets"][-1], compiler_options=KEEP_GRAPHS if gpu else None,
        store=None if store is None else ProgramStore(store), **sizes,
    )  # fmt: skip
    served.warm_up(workers=os.cpu_count() or 1)
    end = time.perf_counter()
    took = [seconds for graph in served.graphs for seconds in graph.stats.seconds]
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return Compiled(
        round(end - middle, 2), round(sum(t.lowering for t in took), 2), round(sum(t.compiling for t in took), 2),
        len(took), round(middle - start, 2), None if peak is None else round(peak / 1e9, 3),
    )  # fmt: skip


def compile_columns(name: str, layers: int, experts: str, dense: str) -> tuple[dict[str, Any], str]:
    """Compile a model in processes: at first, with JAX's compilation cache, and with the programs in a store.

    A third process, which is not reported, fills the store: it and JAX's cache exclude each other.

    Returns:
      The measured columns of a row of bench_model, or its `error`; and a sentence about where the time went.
    """
    command = [sys.executable, "-m", "experiments.cases.model_compile", name, str(layers), experts, dense]
    try:
        with tempfile.TemporaryDirectory() as store:
            first, second, _, third = (
                Compiled(**answer) for answer in starts(command, command, *[[*command, store]] * 2)
            )
    except RuntimeError as error:
        return {"error": f"failed: {error}"}, f"{name}, {experts}, {dense}: {error}"
    columns = {
        "seconds": first.seconds, "seconds_from_cache": second.seconds, "seconds_from_store": third.seconds,
        "programs": first.programs, "peak_gb": first.peak_gb,
    }  # fmt: skip
    return columns, (
        f"{name}, {experts}, {dense}: {first.seconds} s to compile {first.programs} programs, {second.seconds} s from "
        f"the cache, {third.seconds} s from a store; summed over threads, {first.lowering_s}, {second.lowering_s} and "
        f"{third.lowering_s} s of tracing, {first.compiling_s}, {second.compiling_s} and {third.compiling_s} s of XLA "
        f"or reading; and {first.weights_s} s to make the weights"
    )


if __name__ == "__main__":
    print(json.dumps(compile_model(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])._asdict()))
