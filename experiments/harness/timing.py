"""Measuring: device time of compiled functions, ceilings of the device, rows and files of results.

Device time is what the kernels take (CUPTI), without launch gaps and without the host; on a machine without a GPU it is
host time around `block_until_ready`. A result row is flat and names what it was compared with: a benchmark without a
floor and a baseline in the same table is not one.
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The data sheet's L2 size of an H100 is 50 MB: inputs that sum to less are rotated.
_L2_BYTES = 50 * 2**20
_MAX_ROTATION = 8


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this device reaches: a copy, bytes read plus written per second, and a bf16 matrix product in FLOP/s."""

    copy_bytes_per_s: float
    bf16_flops: float

    def floor_us(self, num_bytes: float, flops: float = 0) -> float:
        """Least time for that much traffic and arithmetic, in microseconds."""
        return max(num_bytes / self.copy_bytes_per_s, flops / self.bf16_flops) * 1e6


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows by an entry for every program that XLA compiles inside the context."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def noting_out_of_memory(failures: dict[Any, str] | None, *names: Any) -> Iterator[None]:
    """Where the device runs out of memory, the block inside ends, and `failures` says so of every name.

    The exception is gone afterwards, and with it all that only the block held on the device. Every other error passes,
    and so does this one where `failures` is None.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # A program that is given the result of one that failed reports INTERNAL, and quotes the reason.
        ran_out = "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
        if failures is None or not ran_out:
            raise
        failures.update(dict.fromkeys(names, f"out of memory: {str(error).splitlines()[0]}"))


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.devices()[0].platform == "gpu"


def device_us(compiled: Any, args: Sequence[Any], *, iterations: int = 10) -> list[float]:
    """Microseconds of device time of `compiled(*args)`, one figure per iteration, after a warm-up call."""
    if on_gpu():
        from jax.experimental.mosaic.gpu import profiler  # needs a GPU build of jaxlib

        _, found = profiler.measure(compiled, iterations=iterations)(*args)
        if found is None:
            raise RuntimeError("no kernel ran: nothing to measure")
        return [1e3 * float(ms) for ms in np.atleast_1d(found)]
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(iterations):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(1e6 * (time.perf_counter() - start))
    return times


def rotated(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[Callable[..., Any], list[Any], int]:
    """A function that runs `fn` on several copies of its inputs in turn -> (function, its arguments, repeats).

    Inputs that fit the L2 cache would be read from there the second time. Copies are made until they exceed it.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(args))
    repeats = min(_MAX_ROTATION, max(1, -(-2 * _L2_BYTES // max(1, size))))
    if not on_gpu() or repeats == 1:
        return fn, list(args), 1
    copies = [args] + [jax.tree.map(lambda a: a.copy(), args) for _ in range(repeats - 1)]

    once = jax.jit(fn)  # traced and lowered once, called for every copy

    def run(copies):
        return [once(*copy) for copy in copies]

    return run, [copies], repeats


def compile_all(
    jobs: dict[Any, tuple[Any, Any, int]], failures: dict[Any, str] | None = None
) -> dict[Any, tuple[Any, Any, int]]:
    """Name -> (function, args, repeats) with every function compiled: lowered in turn, compiled in parallel.

    A job that runs out of memory is noted in `failures` and left out; without that argument it raises.
    """
    compiled = {}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = {}
        for key, (fn, args, repeats) in jobs.items():
            with noting_out_of_memory(failures, key):
                futures[key] = (pool.submit(jax.jit(fn).lower(*args).compile), args, repeats)
        for key, (future, args, repeats) in futures.items():
            with noting_out_of_memory(failures, key):
                compiled[key] = (future.result(), args, repeats)
    return compiled


def first_result(compiled: Any, args: Sequence[Any], repeats: int) -> Any:
    """What a function of `compile_all` gives for its first set of inputs."""
    result = compiled(*args)
    return result[0] if repeats > 1 else result


@jax.jit
def mismatch(a: Any, b: Any, valid: Any) -> jax.Array:
    """Share of elements that differ among those that `valid` selects (broadcast from the left), of the worst leaf."""
    worst = jnp.float32(0)
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        p, q = (jax.lax.bitcast_convert_type(v, jnp.uint8) if v.dtype == jnp.float8_e4m3fn else v for v in (p, q))
        different = p.reshape(q.shape) != q
        if valid is not None and different.shape[: valid.ndim] == valid.shape:
            chosen = valid.reshape(valid.shape + (1,) * (different.ndim - valid.ndim))
            share = jnp.sum(different & chosen) / jnp.maximum(1, jnp.sum(valid) * (different.size // valid.size))
        else:
            share = jnp.mean(different)
        worst = jnp.maximum(worst, share)
    return worst


def interleaved_us(
    candidates: dict[Any, tuple[Any, Sequence[Any], int]], *, rounds: int = 3, failures: dict[Any, str] | None = None
) -> dict[Any, float]:
    """Median device time in microseconds of each name -> (compiled, args, repeats inside), measured in turns.

    A candidate that runs out of memory is noted in `failures`, removed from `candidates`, so that its inputs are free
    for the others, and has no time; without that argument it raises.
    """
    times: dict[Any, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name in list(candidates):
            with noting_out_of_memory(failures, name):
                times[name] += _us_per_repeat(*candidates[name])
            if failures and name in failures:
                del candidates[name]
    return {name: statistics.median(times[name]) for name in candidates}


def _us_per_repeat(compiled: Any, args: Sequence[Any], repeats: int) -> list[float]:
    return [us / repeats for us in device_us(compiled, args)]


def measure_ceilings(*, copy_mib: int | None = None, matmul: int | None = None) -> Ceilings:
    """Copy bandwidth and bf16 matrix rate, on random data. Defaults: 1 GiB and 8192^3 on a GPU, less on a CPU."""
    copy_mib = copy_mib or (512 if on_gpu() else 64)
    matmul = matmul or (8192 if on_gpu() else 512)
    words = jax.random.bits(jax.random.key(0), (copy_mib * 2**18,), jnp.uint32)
    copy_us = statistics.median(device_us(jax.jit(lambda x: x + 1), (words,)))
    a, b = (jax.random.normal(jax.random.key(i), (matmul, matmul), jnp.bfloat16) for i in (1, 2))
    dot_us = statistics.median(device_us(jax.jit(lambda a, b: a @ b), (a, b)))
    return Ceilings(2 * words.nbytes / copy_us * 1e6, 2 * matmul**3 / dot_us * 1e6)


def result_row(
    op: str,
    implementation: str,
    shape: dict[str, Any],
    us: float | None,
    *,
    num_bytes: float,
    flops: float = 0,
    ceilings: Ceilings,
    baseline: str | None = None,
    baseline_us: float | None = None,
    error: float | str | None = None,
) -> dict[str, Any]:
    """One flat row: time, TFLOP/s, GB/s, floor and percent of it, and the ratio to a named baseline.

    error: of the result; or, where `us` is None, why there is no time.
    """
    floor = ceilings.floor_us(num_bytes, flops)
    return {
        "op": op,
        "implementation": implementation,
        "shape": shape,
        "us": None if us is None else round(us, 3),
        "tflops": None if us is None else round(flops / us / 1e6, 2),
        "gbps": None if us is None else round(num_bytes / us / 1e3, 1),
        "floor_us": round(floor, 3),
        "percent_of_floor": None if us is None else round(100 * floor / us, 1),
        "baseline": baseline,
        "baseline_us": None if baseline_us is None else round(baseline_us, 3),
        "speedup": None if us is None or baseline_us is None else round(baseline_us / us, 2),
        "error": error,
    }


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text; one without a time says why."""
    head = ("op", "shape", "impl", "us", "GB/s", "TFLOP/s", "floor us", "% floor", "baseline", "x faster")
    lines: list[tuple[str, ...]] = [head]
    for r in rows:
        shape = " ".join(f"{k}={v}" for k, v in r["shape"].items())
        if r["us"] is None:
            reason = str(r["error"]).partition(":")[0]
            measured = (reason, "", "", f"{r['floor_us']:.1f}", "")
        else:
            measured = (
                f"{r['us']:.1f}", f"{r['gbps']:.0f}", f"{r['tflops']:.0f}", f"{r['floor_us']:.1f}",
                f"{r['percent_of_floor']:.0f}",
            )  # fmt: skip
        ratio = "" if r["speedup"] is None else f"{r['speedup']:.2f}"
        lines.append((r["op"], shape, r["implementation"], *measured, r["baseline"] or "", ratio))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    numeric = set(range(3, 8)) | {9}
    return "\n".join(
        "  ".join(c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def save_results(
    path: Path, experiment: str, rows: Sequence[dict[str, Any]], *, inputs: str, ceilings: Ceilings | None = None
) -> None:
    """Write the JSON file of an experiment; `inputs` says in a sentence what the data was."""
    content = {
        "experiment": experiment,
        "device": jax.devices()[0].device_kind,
        "num_devices": jax.device_count(),
        "jax": jax.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "inputs": inputs,
        "ceilings": None if ceilings is None else dataclasses.asdict(ceilings),
        "rows": list(rows),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _commit() -> str:
    """Short hash of the checkout, with a + where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
