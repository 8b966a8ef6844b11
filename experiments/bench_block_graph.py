"""Measures blocks that are compiled ahead of time for a few token counts (buckets): time per call, start-up, padding.

    python experiments/bench_block_graph.py                     # on a GPU: layers of Qwen3-30B in NVFP4; some minutes
    JAX_PLATFORMS=cpu python experiments/bench_block_graph.py   # a tiny model: checks that it runs, not how fast
    python experiments/bench_block_graph.py --trace=lengths.txt --max_buckets=8     # plans buckets for these lengths

It has three parts.

Blocks: the time per call of a prefill and of a decode step of a model with a few layers. Each is compiled in buckets
with XLA's command buffers (CUDA graphs), in buckets without them, for exactly the measured token counts, and for the
largest bucket only. A call starts without waiting for the result of the call before it.

Start: the seconds to compile everything, in a first process, and in a second one that finds the first one's programs in
JAX's compilation cache.

Plans: how many rows are computed for the token counts of --trace (one per line; default: a mix of chats and documents)
with planned buckets, with powers of two, and with the default of the serving system that fp4jax is compared with.

Writes bench_block_graph.json and .png into --output_dir, on a GPU also bench_block_graph_timeline.png; and plan.json,
which --block_graph_sizes takes.

--block_graph_sizes, or FD_BLOCK_WISE_CUDA_GRAPH_SIZES, sets the buckets of the first two parts. --noblock_graph, or
FD_USE_BLOCK_WISE_CUDA_GRAPH=0, measures only blocks compiled for exact token counts. --block_graph_debug, or
FD_BLOCK_WISE_DEBUG=1, prints every compilation and a summary.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from flax import nnx
from tqdm import tqdm

from configs import qwen3_30b_a3b
from experiments.harness import block_graph_flags, block_report, outputs, script, timing
from experiments.harness.block_graph_report import block_table, plan_table, plot, plot_timelines
from experiments.harness.cold_start import starts
from experiments.harness.flag_values import integers
from experiments.harness.graph_kernels import KEEP_GRAPHS, Kernel, kernel_columns, profile_kernels
from fp4jax.block_graph import Bucketed, planner as bucket_planner
from fp4jax.engine import BucketedModel
from fp4jax.models import Qwen3Moe, Qwen3MoeConfig, configure_experts, quantize_experts

_TOKENS = flags.DEFINE_list(
    "tokens", None, "Token counts of the timed prefills; default: 1,100,300,700,1500 (CPU: 3,12)."
)
_BATCH = flags.DEFINE_list("batch", None, "Batch sizes of the timed decode steps; default: 1,8 (CPU: 2).")
_LAYERS = flags.DEFINE_integer("layers", 2, "Decoder layers of the model.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 25, "Timed rounds; the median counts.", lower_bound=1)
_TRACE = flags.DEFINE_string("trace", None, "File with one token count per line, to plan buckets for.")
_MAX_BUCKETS = flags.DEFINE_integer("max_buckets", 5, "Largest number of buckets of a plan.", lower_bound=1)
_GRANULARITY = flags.DEFINE_integer("granularity", 8, "Buckets of a plan are multiples of it.", lower_bound=1)
_ONLY_WARM_UP = flags.DEFINE_bool("only_warm_up", False, "Compile everything, print the seconds, and stop.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_block_graph", "Folder for the JSON and PNG files.")

_CALLS = 20  # calls between two readings of the clock
_NO_COMMAND_BUFFERS = {"xla_gpu_enable_command_buffer": ""}
_INPUTS = (
    "Qwen3-30B layers with random weights, experts in NVFP4 with activation scales per token (CPU: a tiny model in "
    "float32); random token ids; wall time per call of 20 calls that follow each other, median of rounds in turns"
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    files = ("plan.json", "bench_block_graph.json", "bench_block_graph.png", "bench_block_graph_timeline.png")
    folder = outputs.check_folder("output_dir", _OUTPUT_DIR.value, *files)
    gpu = timing.on_gpu()
    options = block_graph_flags.block_graph_options(buckets=bucket_planner.REFERENCE_BUCKETS if gpu else (8, 16))
    tokens = integers("tokens", _TOKENS.value or ((1, 100, 300, 700, 1500) if gpu else (3, 12)))
    batches = integers("batch", _BATCH.value or ((1, 8) if gpu else (2,)))
    if options.enabled and max(tokens) > options.buckets[-1]:
        raise app.UsageError(f"--tokens: {max(tokens)} is above the largest bucket, {options.buckets[-1]}")
    try:
        calls = example_trace() if _TRACE.value is None else bucket_planner.read_trace(Path(_TRACE.value))
        plan = bucket_planner.plan_buckets(calls, _MAX_BUCKETS.value, granularity=_GRANULARITY.value)
    except (OSError, ValueError) as error:
        raise app.UsageError(f"--trace: {error}") from error
    config = model_config(gpu, _LAYERS.value)
    if 2 * max(options.buckets) > config.max_position_embeddings:
        limit = config.max_position_embeddings // 2
        raise app.UsageError(f"bucket sizes up to {limit} fit the model of the benchmark, got {max(options.buckets)}")
    model = make_model(config)
    make = functools.partial(
        BucketedModel, model, batch_buckets=batches, max_length=2 * max(options.buckets), decode_steps=1
    )  # fmt: skip
    if _ONLY_WARM_UP.value:
        served = make(buckets=options.buckets)
        seconds = {"seconds": round(warm_up(served, options.debug), 2)}
        every = [took for graph in served.graphs for took in graph.stats.seconds]
        seconds["lowering_s"] = round(sum(took.lowering for took in every), 2)
        seconds["compiling_s"] = round(sum(took.compiling for took in every), 2)
        print(json.dumps(seconds))
        return
    folder.mkdir(parents=True, exist_ok=True)
    bucket_planner.save_plan(plan, folder / "plan.json")
    rows = plan_rows(calls, plan)
    print(plan_table(rows))
    keep = KEEP_GRAPHS if gpu else None
    made_with: dict[str, dict[str, Any]] = {}
    if options.enabled:
        made_with["graph"] = dict(buckets=options.buckets, compiler_options=keep)
        made_with["graph, no command buffers"] = dict(buckets=options.buckets, compiler_options=_NO_COMMAND_BUFFERS)
        made_with["padded to the largest"] = dict(buckets=options.buckets[-1:], compiler_options=keep)
        rows += start_rows(options.buckets, batches)
    made_with["exact"] = dict(buckets=sorted(set(tokens)), compiler_options=keep)
    variants: dict[str, BucketedModel] = {}
    failures: dict[tuple[str, str], str] = {}
    for name, settings in made_with.items():
        with timing.noting_out_of_memory(failures, (name, "compiling")):
            variant = make(**settings)
            warm_up(variant, options.debug and name != "exact")
            variants[name] = variant
    timelines: dict[str, list[Kernel]] = {}
    rows += failed_rows(failures, 0) + block_rows(variants, tokens, batches, timelines)
    timing.save_results(folder / "bench_block_graph.json", "bench_block_graph", rows, inputs=_INPUTS)
    print(block_table(rows))
    plot(rows, folder / "bench_block_graph.png")
    if timelines:
        plot_timelines(timelines, folder / "bench_block_graph_timeline.png")
    print(f"wrote {folder}/bench_block_graph.json and bench_block_graph.png")


def model_config(gpu: bool, layers: int) -> Qwen3MoeConfig:
    """The config of Qwen3-30B with a smaller vocabulary on a GPU, of a tiny model otherwise."""
    if gpu:
        real = dict(qwen3_30b_a3b.get_config().model)
        return Qwen3MoeConfig.from_hf({**real, "vocab_size": 32768, "num_hidden_layers": layers})
    return Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, dtype="float32",
    )  # fmt: skip


def make_model(config: Qwen3MoeConfig) -> Qwen3Moe:
    """A model with random weights and its experts in NVFP4."""
    model = Qwen3Moe(config, rngs=nnx.Rngs(0))
    quantize_experts(model)
    configure_experts(model, activation_format_1="nvfp4", activation_format_2="nvfp4")
    return model


def warm_up(served: BucketedModel, debug: bool) -> float:
    """Compile everything and return the seconds that it took; `debug` prints every compilation."""
    if debug:
        block_report.watch(served.graphs)
    start = time.perf_counter()
    served.warm_up(workers=os.cpu_count() or 1)
    return time.perf_counter() - start


# --- blocks ---


def block_rows(
    variants: dict[str, BucketedModel],
    tokens: Sequence[int],
    batches: Sequence[int],
    timelines: dict[str, list[Kernel]],
) -> list[dict[str, Any]]:
    """Measure every block, variant and token count: the wall time per call and, on a GPU, the kernels.

    Args:
      variants: {name of a variant: the model that it compiled}.
      tokens: the token counts of prefills.
      batches: the batch sizes of decode steps.
      timelines: is filled with the kernels of two decode steps of every variant and batch size, on a GPU.
    """
    rows = []
    counts = [(n, False) for n in tokens] + [(n, True) for n in batches]
    for number, decode in tqdm(counts, unit="count"):
        calls: dict[tuple[str, str], tuple[int, Callable[[], Any]]] = {}
        failures: dict[tuple[str, str], str] = {}
        for name, served in variants.items():
            if decode and name in ("padded to the largest", "exact"):
                continue
            with timing.noting_out_of_memory(failures, (name, "decode step" if decode else "prefill")):
                found = decode_calls(served, number) if decode else prefill_calls(served, number)
                calls |= {(name, block): call for block, call in found.items()}
        times = wall_us(calls, failures)
        rows += failed_rows(failures, number)
        for (name, block), (bucket, call) in calls.items():
            row: dict[str, Any] = {
                "part": "blocks", "block": block, "variant": name, "tokens": number, "bucket": bucket,
                **times[name, block],
            }  # fmt: skip
            if timing.on_gpu():
                kernels = profile_kernels(lambda call=call: [call() for _ in range(_CALLS)][-1])
                row |= kernel_columns(kernels, _CALLS)
                row["over_kernels"] = round(row["us"] / row["kernel_us"], 3)
                if decode:
                    timelines[f"{name}, {number} requests"] = kernels[-2 * len(kernels) // _CALLS :]
            rows.append(row)
    return rows


def failed_rows(failures: dict[tuple[str, str], str], tokens: int) -> list[dict[str, Any]]:
    """The rows of blocks that ran out of memory, which have no time; `failures` has keys (variant, block)."""
    return [
        {"part": "blocks", "block": block, "variant": name, "tokens": tokens, "bucket": 0, "us": None, "error": error}
        for (name, block), error in failures.items()
    ]


def prefill_calls(served: BucketedModel, tokens: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """The prefill of a prompt, as {block: (bucket, function that calls it)}."""
    bucket = next(b for b in served.layers.buckets if b >= tokens)
    ids = np.random.default_rng(0).integers(0, served.config.vocab_size, tokens).tolist()
    return {"prefill": (bucket, lambda: served.prefill(ids).logits)}


def decode_calls(served: BucketedModel, number: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """The decode step of a batch of `number` requests, all at position 10, as {block: (batch size, function)}."""
    size = next(s for s in served.decoders if s >= number)
    batch = [served.empty_cache(size)]
    last, lengths = (Bucketed(jax.device_put(np.full(size, v, np.int32)), number) for v in (1, 10))

    def run():
        chosen, *_, batch[0] = served.decode(last, lengths, batch[0])
        return chosen.values

    return {"decode step": (size, run)}


def wall_us(calls: dict[Any, tuple[int, Callable[[], Any]]], failures: dict[Any, str]) -> dict[Any, dict[str, float]]:
    """Measure functions in runs of calls that follow each other without waiting.

    All functions take turns for --repeats rounds, after one round that is not timed, so that a host that is busy for a
    while slows all of them.

    Args:
      calls: {name: (bucket, function)}. A function that runs out of memory is removed.
      failures: where functions that run out of memory are noted.

    Returns:
      {name: medians of `us` (microseconds per call until the result is there) and `host_us` (until the call returns)}.
      If both are the same, the device waited for the host.
    """
    wall: dict[Any, list[float]] = {name: [] for name in calls}
    host: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(_REPEATS.value + 1):
        for name in list(calls):
            with timing.noting_out_of_memory(failures, name):
                until_return, until_result = _call_us(calls[name][1])
                host[name].append(until_return)
                wall[name].append(until_result)
            if name in failures:
                del calls[name]
    median = lambda times: round(float(np.median(times[1:])), 1)  # noqa: E731
    return {name: {"us": median(wall[name]), "host_us": median(host[name])} for name in calls}


def _call_us(call: Callable[[], Any]) -> tuple[float, float]:
    """Microseconds per call of several calls: until the last one returns, and until its result is there."""
    start, result = time.perf_counter(), None
    for _ in range(_CALLS):
        result = call()
    until_return = 1e6 * (time.perf_counter() - start) / _CALLS
    jax.block_until_ready(result)
    return until_return, 1e6 * (time.perf_counter() - start) / _CALLS


def start_rows(buckets: Sequence[int], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Measure how long two processes, one after the other, take to compile everything; they share a compilation cache.

    A row's `lowering_s` and `compiling_s` are sums over all programs and threads, and include waiting for Python's
    lock.

    Raises:
      RuntimeError: a process failed.
    """
    command = [
        sys.executable, __file__, "--only_warm_up", f"--layers={_LAYERS.value}",
        f"--block_graph_sizes={','.join(map(str, buckets))}", f"--tokens={buckets[0]}",
        f"--batch={','.join(map(str, batches))}",
    ]  # fmt: skip
    rows = []
    for start, answer in zip(("first", "second"), starts(command, command), strict=True):
        rows.append({"part": "start", "start": start, **answer})
        print(f"{start} start: {answer['seconds']:.1f} s to compile everything")
    return rows


# --- plans ---


def example_trace() -> dict[int, int]:
    """The lengths of made-up prompts, 90% chats and 10% documents, as {tokens: calls}."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([rng.normal(90, 25, 9000), rng.normal(1400, 120, 1000)]).astype(int).clip(1, 2048)
    return {int(n): int(c) for n, c in zip(*np.unique(tokens, return_counts=True), strict=True)}


def plan_rows(calls: dict[int, int], plan: bucket_planner.BucketPlan) -> list[dict[str, Any]]:
    """What three sets of buckets cost for a trace: the planned ones, powers of two, and the serving system's default.

    Args:
      calls: the trace, {tokens: calls}.
      plan: the planned buckets.
    """
    candidates = {
        "planned": plan.buckets,
        "powers of two": bucket_planner.powers_of_two(plan.buckets[-1], len(plan.buckets)),
        "reference system": bucket_planner.REFERENCE_BUCKETS,
    }
    rows = []
    for name, buckets in candidates.items():
        tokens, padded = bucket_planner.work(buckets, calls)
        rows.append({"part": "plans", "plan": name, "buckets": list(buckets), "tokens": tokens, "padded": padded})
    return rows


if __name__ == "__main__":
    script.run(main)
