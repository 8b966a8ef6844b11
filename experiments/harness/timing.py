"""Measuring: device time of compiled functions, ceilings of the device, and rows and files of results.

On a GPU, device time is the time of the kernels as CUPTI reports it, without the host and without the gaps between
launches. On a CPU it is the host's time until `jax.block_until_ready` returns. A row of results is a flat dictionary;
it holds the floor and the baseline that its time is compared with.
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

# The L2 cache of an H100 by its data sheet. Functions with inputs below twice this size run on several copies of them.
_L2_BYTES = 50 * 2**20
_MAX_ROTATION = 8


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The rates that this device reaches, measured in the same run.

    Attributes:
      copy_bytes_per_s: bytes read plus bytes written per second, by a large elementwise operation.
      bf16_flops: FLOP/s of a large bf16 matrix product.
    """

    copy_bytes_per_s: float
    bf16_flops: float

    def floor_us(self, num_bytes: float, flops: float = 0) -> float:
        """The least time in microseconds for this many bytes and FLOPs: the larger of both at the ceilings."""
        return max(num_bytes / self.copy_bytes_per_s, flops / self.bf16_flops) * 1e6


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A context manager that yields a list, which gets an entry for every program that XLA compiles meanwhile."""
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
    """A context manager that notes errors of a device that runs out of memory, instead of letting them pass.

    The block ends at the error. The exception is not kept, so that the arrays that only the block held are freed. Other
    errors pass.

    Args:
      failures: the dictionary that gets an entry {name: text of the error} for every name; None: the error passes.
      names: the names that could not be measured.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # A program whose input is the result of a program that failed reports INTERNAL, and quotes the first error.
        ran_out = "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)
        if failures is None or not ran_out:
            raise
        failures.update(dict.fromkeys(names, f"out of memory: {str(error).splitlines()[0]}"))


def on_gpu() -> bool:
    """Whether JAX's default device is a GPU."""
    return jax.devices()[0].platform == "gpu"


def device_us(compiled: Any, args: Sequence[Any], *, iterations: int = 10) -> list[float]:
    """Microseconds of device time of `compiled(*args)`, one number per iteration, after a call that is not timed.

    Raises:
      RuntimeError: no kernel ran on the GPU.
    """
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
    """Wrap a function so that one call runs it on several copies of its inputs, one after the other.

    Without copies, inputs that fit in the L2 cache would be read from there and not from memory. There are as many
    copies as make the inputs twice as large as the cache, at most 8; on a CPU there is one.

    Returns:
      The wrapped function, its arguments, and the number of copies (repeats). With one copy the function is `fn`
      itself.
    """
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(args))
    repeats = min(_MAX_ROTATION, max(1, -(-2 * _L2_BYTES // max(1, size))))
    if not on_gpu() or repeats == 1:
        return fn, list(args), 1
    copies = [args] + [jax.tree.map(lambda a: a.copy(), args) for _ in range(repeats - 1)]

    once = jax.jit(fn)  # JAX traces and lowers the function once, not once per copy

    def run(copies):
        return [once(*copy) for copy in copies]

    return run, [copies], repeats


def compile_all(
    jobs: dict[Any, tuple[Any, Any, int]], failures: dict[Any, str] | None = None
) -> dict[Any, tuple[Any, Any, int]]:
    """Compile functions: each is traced and lowered in turn, and XLA compiles them in parallel.

    Args:
      jobs: {name: (function, arguments, repeats)}, the values as `rotated` returns them.
      failures: where functions that run out of memory are noted; they are left out of the result. None: the error
        passes.

    Returns:
      `jobs` with compiled functions.
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
    """The result of a function of `compile_all` for the first copy of its inputs."""
    result = compiled(*args)
    return result[0] if repeats > 1 else result


@jax.jit
def mismatch(a: Any, b: Any, valid: Any) -> jax.Array:
    """The fraction of elements that differ between two results, f32 (); for trees, that of the worst pair of leaves.

    Args:
      a: a result.
      b: another result with the same number of elements in every leaf.
      valid: a boolean array that matches the first axes of a leaf; elements where it is False do not count. None: all
        count. It is ignored for leaves whose first axes have another shape.
    """
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
    """Measure functions in turns, so that a change of the device's clock affects all of them.

    Args:
      candidates: {name: (compiled function, arguments, repeats)}, the values as `compile_all` returns them. A candidate
        that runs out of memory is removed, so that its inputs are freed.
      rounds: the number of turns of 10 iterations.
      failures: where candidates that run out of memory are noted. None: the error passes.

    Returns:
      {name: median microseconds of one call of the original function}. A candidate that ran out of memory has no entry.
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
    """Measure the ceilings on random data.

    Args:
      copy_mib: MiB that are read, and as many written; None: 512 on a GPU, 64 on a CPU.
      matmul: the size of the square matrices; None: 8192 on a GPU, 512 on a CPU.
    """
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
    """One row of results.

    Args:
      op: the operation.
      implementation: which implementation of it was measured.
      shape: its sizes.
      us: its time in microseconds; None: it was not measured, and `error` says why.
      num_bytes: the bytes that it must read and write.
      flops: the FLOPs that it must compute.
      ceilings: the device's ceilings, which give the floor.
      baseline: the name of what it is compared with.
      baseline_us: the time of the baseline in microseconds.
      error: the error of the result, in the measure of the experiment; or the reason why there is no time.

    Returns:
      The time, TFLOP/s, GB/s, the floor and how many percent of the time it is, and the ratio to the baseline.
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
    """Rows as aligned text; a row without a time shows the reason instead."""
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
    """Write the JSON file of an experiment: the rows, and the device, versions and date that they were measured with.

    Args:
      path: the file; its folder is made.
      experiment: the name of the script.
      rows: the rows of results.
      inputs: a sentence that says what the data was.
      ceilings: the device's ceilings, if they were measured.
    """
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
    """The short hash of the Git commit, with a + if files differ from it; "unknown" outside of a Git checkout."""
    root = Path(__file__).parents[2]
    try:
        run = lambda *args: subprocess.run(  # noqa: E731
            ["git", *args], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
