"""Measures the grouped GEMM with NVFP4 weights against bf16 and 4-bit peers: time, TFLOP/s, weight bandwidth, floor.

    python experiments/bench_gemm.py                              # everything; about 6 minutes on an H100
    python experiments/bench_gemm.py --shapes=32x2048x7168 --m=16,64 --distributions=uniform
    python experiments/bench_gemm.py --sweep                      # tunes, and rewrites pallas_kernels/gemm/tuned.json

A shape is ExKxN: E experts on the device, each with weights [N, K]; m is the mean number of rows per expert. The time
of the kernel includes making its list of tasks on the device.

Baselines are measured in turns with the kernel: bf16 through a padded einsum (cuBLAS), through lax.ragged_dot and
through JAX's Pallas ragged dot (one configuration each), and tokamax's int4 GEMM if it is installed.

Results are checked before they are timed, with NaN in every pad: the error must be at most 3e-3 of the f32 product with
dequantized weights, and SwiGLU in the epilogue must give the same bits as the two ops one after the other. What runs
out of memory is left out, and its row says so. Writes bench_gemm.json and bench_gemm.png into --output_dir.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments.cases import gemm as gemm_cases
from experiments.cases.gemm import GemmShape, Inputs
from experiments.cases.gemm_report import plot, ratios
from experiments.harness import outputs, script, timing
from fp4jax.grouped_gemm import unpack_weights
from fp4jax.implementations import Implementation
from fp4jax.nvfp4 import dequantize
from pallas_kernels.gemm import choice as gemm_choice, grouped_gemm as masked_gemm
from pallas_kernels.gemm.config import TuningConfig

_SHAPES = flags.DEFINE_list(
    "shapes", None, "Shapes, as ExKxN; default: two GEMMs of DeepSeek-V3 and of Qwen3-30B (CPU: 4x128x128)."
)
_M = flags.DEFINE_list(
    "m", None, "Mean rows per expert; default: 1,4,16,64,256,1024 for multinomial rows, 64 for others (CPU: 4)."
)
_DISTRIBUTIONS = flags.DEFINE_list(
    "distributions",
    None,
    "How rows are distributed over the experts: multinomial, uniform, one_hot; default: all three.",
)
_BASELINES = flags.DEFINE_bool("baselines", True, "Also time the bf16 and int4 baselines.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 2, "Rounds of 10 iterations per implementation; implementations take turns.", lower_bound=1
)
_SWEEP = flags.DEFINE_bool(
    "sweep", False, "Time many configurations and rewrite the tuning table, instead of the benchmark."
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_gemm", "Folder for the JSON and PNG files.")

_INPUTS = (
    "random codes, block scales of 2^-3 to 2^2.6, a global scale per row, normal bf16 x; multinomial rows with a fixed "
    "seed, the same number for every expert, or all rows on one expert (another one every time); inputs below twice "
    "the L2 cache rotate"
)
_DEFAULT_SHAPES = ("32x7168x4096", "32x2048x7168", "64x2048x1536", "64x768x2048")
_SKEWED_M = (64,)
_FUSED_M = (64, 1024)
_MAX_ERROR = 3e-3
# Milliseconds at m = 1, 4, 16, 64, 256, 1024 with multinomial rows on an H100 80GB SXM. They were measured before this
# project's kernels existed, and are quoted here, not measured again. FP4_PEER_MS: the fastest of the public Triton
# MXFP4 kernels that serve gpt-oss on Hopper (two versions, 4 and 8 warps), median of replays of a CUDA graph.
# PROTOTYPE_MS: this project's feasibility study, without the time to make the list of tasks.
FP4_PEER_MS = {
    (32, 7168, 4096): (0.132, 0.185, 0.202, 0.365, 0.938, 3.297),
    (32, 2048, 7168): (0.066, 0.104, 0.114, 0.206, 0.530, 1.748),
    (64, 2048, 1536): (0.041, 0.062, 0.058, 0.093, 0.247, 0.759),
    (64, 768, 2048): (0.027, 0.035, 0.038, 0.058, 0.145, 0.471),
}
PROTOTYPE_MS = {
    (32, 7168, 4096): (0.115, 0.185, 0.189, 0.238, 0.713, 2.45),
    (32, 2048, 7168): (0.057, 0.096, 0.102, 0.128, 0.369, 1.25),
}
_PEER_M = (1, 4, 16, 64, 256, 1024)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    folder = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "bench_gemm.json", "bench_gemm.png")
    gpu = timing.on_gpu()
    shapes = [_parse_shape(s) for s in _SHAPES.value or (_DEFAULT_SHAPES if gpu else ("4x128x128",))]
    try:
        rows_per_expert = [int(m) for m in _M.value or (_PEER_M if gpu else (4,))]
    except ValueError as error:
        raise app.UsageError(f"--m: {error}") from error
    if min(rows_per_expert) < 1:
        raise app.UsageError(f"--m must be positive, got {min(rows_per_expert)}")
    distributions = _DISTRIBUTIONS.value or gemm_cases.DISTRIBUTIONS
    if unknown := set(distributions) - set(gemm_cases.DISTRIBUTIONS):
        raise app.UsageError(f"--distributions: {sorted(unknown)} unknown; choose of {gemm_cases.DISTRIBUTIONS}")
    if _SWEEP.value:
        sweep(shapes, rows_per_expert)
        return
    ceilings = timing.measure_ceilings()
    print(f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 matmul {ceilings.bf16_flops / 1e12:.1f} TFLOP/s")
    rows, wrong = [], []
    cells = [
        (d, m) for d in distributions for m in rows_per_expert
        if d == "multinomial" or _M.value or not gpu or m in _SKEWED_M
    ]  # fmt: skip
    progress = tqdm(total=len(shapes) * len(cells), unit="cell")
    for distribution, (experts, k, n) in itertools.product(distributions, shapes):
        packed = gemm_cases.random_weights(experts, n, k)
        make_dense = functools.cache(lambda packed=packed: jax.block_until_ready(gemm_cases.densify(packed)))
        dense = make_dense if _BASELINES.value else None
        for m in [m for d, m in cells if d == distribution]:
            shape = GemmShape(experts, k, n, m, distribution)
            progress.set_description(f"{experts}x{k}x{n} m={m} {distribution}")
            found, bad = run_cell(gemm_cases.make_inputs(shape, packed, dense), ceilings)
            rows += found
            wrong += bad
            # Written after every cell, so that a stopped run leaves what it has measured.
            timing.save_results(folder / "bench_gemm.json", "bench_gemm", rows, inputs=_INPUTS, ceilings=ceilings)
            progress.update()
    progress.close()
    print(timing.format_table(rows))
    print(ratios(rows))
    plot(rows, ceilings, folder / "bench_gemm.png")
    print(f"wrote {folder}/bench_gemm.json and bench_gemm.png")
    if wrong:
        sys.exit("wrong results, not timed: " + "; ".join(wrong))


def _parse_shape(text):
    try:
        experts, k, n = (int(size) for size in text.split("x"))
    except ValueError as error:
        raise app.UsageError(f"--shapes: {text!r} is not ExKxN") from error
    if min(experts, k, n) < 1 or k % 64 or n % 64:
        raise app.UsageError(f"--shapes: {text}: E must be positive, K and N positive multiples of 64")
    return experts, k, n


def run_cell(inputs: Inputs, ceilings: timing.Ceilings) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one shape and distribution, and a line of text for each of our ops whose result was wrong."""
    gpu, shape = timing.on_gpu(), inputs.shape
    implementation: Implementation = "mosaic_gpu" if gpu else "xla"
    ours = gemm_cases.our_functions(inputs, implementation, poisoned=False)
    fused = {}
    if shape.distribution == "multinomial" and (shape.m in _FUSED_M or not gpu) and shape.n % 128 == 0:
        fused = gemm_cases.fused_functions(inputs, implementation, poisoned=False)
    others = gemm_cases.bf16_baselines(inputs, gpu)
    if gpu and _BASELINES.value and shape.distribution == "multinomial" and gemm_cases.has_tokamax(shape):
        others["tokamax int4"] = lambda: gemm_cases.tokamax_int4(inputs)
    hot_copies = 8 if shape.distribution == "one_hot" and gpu else 0
    failures: dict[str, str] = {}
    compiled = compile_calls({**_as_made(ours), **_as_made(fused), **others}, shape, hot_copies, failures)
    mine = {name: compiled[name] for name in (*ours, *fused) if name in compiled}
    errors, wrong = check(inputs, implementation, mine, hot_copies, failures)
    del mine
    for name in (*wrong, *(name for name in failures if name in compiled)):
        del compiled[name]
    us: dict[str, float | None] = {
        name: time / max(1, hot_copies)
        for name, time in timing.interleaved_us(compiled, rounds=_ROUNDS.value, failures=failures).items()
    }
    bf16 = {name: time for name, time in us.items() if name in others and name.endswith("bf16")}
    us |= dict.fromkeys(failures)
    errors |= failures
    rows = [make_row(name, shape, ours, fused, us, bf16, errors.get(name), ceilings) for name in us]
    return rows, [f"{name} {shape.as_dict()}: {text}" for name, text in wrong.items()]


def make_row(
    name: str,
    shape: GemmShape,
    ours: gemm_cases.Calls,
    fused: gemm_cases.Calls,
    us: dict[str, float | None],
    bf16: dict[str, Any],
    error: float | str | None,
    ceilings: timing.Ceilings,
) -> dict[str, Any]:
    """The row of one measured function.

    Args:
      name: the function.
      shape: the sizes.
      ours: this library's grouped GEMMs; their rows are compared with the fastest bf16.
      fused: this library's GEMMs with SwiGLU; their rows are compared with the masked GEMM alone.
      us: {function: microseconds, or None}.
      bf16: the microseconds of the bf16 baselines.
      error: the error of the result, or why there is no time.
      ceilings: the device's ceilings.
    """
    implementation, time = "mosaic_gpu" if timing.on_gpu() else "xla", us[name]
    common: dict[str, Any] = dict(num_bytes=shape.num_bytes, flops=shape.flops, ceilings=ceilings, error=error)
    if name in ours:
        fastest = min(bf16, key=lambda name: bf16[name]) if bf16 else None
        row = timing.result_row(
            name, implementation, shape.as_dict(), time, baseline=fastest,
            baseline_us=None if fastest is None else bf16[fastest], **common,
        )  # fmt: skip
        row["weight_gbps"] = None if time is None else round(shape.weight_bytes / time / 1e3, 1)
        row["fp4_peer_us"] = quoted_us(FP4_PEER_MS, shape)
        row["prototype_us"] = quoted_us(PROTOTYPE_MS, shape)
        return row
    if name in fused:
        common["num_bytes"] = gemm_cases.fused_bytes(shape, name)
        return timing.result_row(
            f"grouped_gemm_swiglu {name}", implementation, shape.as_dict(), time, baseline="masked_grouped_gemm",
            baseline_us=us.get("masked_grouped_gemm"), **common,
        )  # fmt: skip
    if name.endswith("bf16"):
        common["num_bytes"] = shape.num_bytes_bf16
    return timing.result_row("grouped_gemm", name, shape.as_dict(), time, **common)


def _as_made(calls: gemm_cases.Calls) -> dict[str, Callable[[], gemm_cases.Call]]:
    return {name: lambda call=call: call for name, call in calls.items()}


def compile_calls(
    makers: dict[str, Callable[[], gemm_cases.Call]], shape: GemmShape, hot_copies: int, failures: dict[str, str]
) -> dict[str, Any]:
    """Make and compile functions.

    Args:
      makers: {name: function that makes (function, arguments)}.
      shape: the sizes.
      hot_copies: the number of GEMMs per call with one-hot counts, each with another hot expert; 0: the counts are not
        one-hot.
      failures: where functions that run out of memory are noted.

    Returns:
      {name: (compiled function, arguments, repeats)}.
    """
    jobs = {}
    for name, make in makers.items():
        with timing.noting_out_of_memory(failures, name):
            call = make()
            if hot_copies:
                call = gemm_cases.with_hot_expert_rotated({name: call}, shape, hot_copies)[name]
            jobs[name] = jax.block_until_ready(timing.rotated(*call))
    return timing.compile_all(jobs, failures)


def check(
    inputs: Inputs, implementation: Implementation, compiled: dict[str, Any], hot_copies: int, failures: dict[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Check our ops on inputs with NaN in the pads.

    Args:
      inputs: the data.
      implementation: which implementation the ops were made with.
      compiled: our compiled ops.
      hot_copies: as in `compile_calls`.
      failures: where ops that run out of memory are noted.

    Returns:
      {op: its error; for a fused op the fraction of values that differ}, and {op with a wrong result: what is wrong}.
    """
    errors: dict[str, Any] = {}
    wrong = {}
    plain = gemm_cases.our_functions(inputs, implementation, poisoned=True)
    for name, (function, args, repeats) in compiled.items():
        limit = _MAX_ERROR if hot_copies or name in plain else 0
        with timing.noting_out_of_memory(failures, name):
            if hot_copies:  # only the contiguous form runs, which has no pads here
                error = relative_error(timing.first_result(function, args, repeats)[0], inputs)
            elif name in plain:
                error = relative_error(_call(function, plain[name][1], repeats), inputs)
            else:
                apart, given = gemm_cases.fused_functions(inputs, implementation, poisoned=True, fused=False)[name]
                valid = jnp.arange(inputs.shape.capacity) < inputs.counts[:, None]
                result = _call(function, given, repeats)
                error = float(timing.mismatch(result, jax.jit(apart)(*given), valid))
            errors[name] = error
            if not error <= limit:
                wrong[name] = f"error {error:.2e}, allowed is {limit}"
    return errors, wrong


def _call(compiled, args, repeats):
    """Call a compiled function that takes `repeats` copies of its arguments; the result for one of them."""
    return compiled([tuple(args)] * repeats)[0] if repeats > 1 else compiled(*args)


def quoted_us(figures: Mapping[tuple[int, int, int], tuple[float, ...]], shape: GemmShape) -> float | None:
    """The quoted time of this shape in microseconds, or None."""
    row = figures.get((shape.experts, shape.k, shape.n))
    if row is None or shape.m not in _PEER_M or shape.distribution != "multinomial":
        return None
    return round(1e3 * row[_PEER_M.index(shape.m)], 1)


@jax.jit
def _squared_error(result, x, one, result_rows, x_rows):
    """Squared norms of the difference to the f32 product, and of that product, over some rows of one expert."""
    weights = dequantize(unpack_weights(one), jnp.float32)
    expected = jnp.dot(x[x_rows].astype(jnp.float32), weights.T, precision="highest")
    got = result.reshape(-1, result.shape[-1])[result_rows].astype(jnp.float32)
    return jnp.sum((got - expected) ** 2), jnp.sum(expected**2)


def relative_error(result: jax.Array, inputs: Inputs) -> float:
    """The relative Frobenius error over 64 random rows of up to 8 experts, among them the one with the most rows."""
    counts = inputs.shape.counts()
    starts = np.concatenate([[0], np.cumsum(counts)])
    rng = np.random.default_rng(0)
    used = np.flatnonzero(counts)
    sums = np.zeros(2)
    for expert in {int(np.argmax(counts)), *(int(e) for e in rng.choice(used, min(7, len(used)), replace=False))}:
        rows = rng.integers(0, counts[expert], 64)
        first = expert * inputs.shape.capacity if result.ndim == 3 else starts[expert]
        one = jax.tree.map(lambda leaf, e=expert: leaf[e], inputs.packed)
        sums += np.asarray(_squared_error(result, inputs.x_rows, one, first + rows, starts[expert] + rows), np.float64)
    return float(np.sqrt(sums[0] / sums[1]))


# --- tuning ---


def candidates(experts: int, m: int, *, fused: bool) -> list[TuningConfig]:
    """Configurations to try for m rows per expert, among them the one that would be chosen without the table.

    Args:
      experts: the number of experts, E.
      m: mean rows per expert.
      fused: whether SwiGLU runs in the epilogue.
    """

    def some(sizes, *kinds):
        names = ("warpgroups", "row_tiles", "k_tiles", "num_stages", "in_flight")
        return [TuningConfig(s, **dict(zip(names, k, strict=True))) for s, k in itertools.product(sizes, kinds)]

    if m <= 2:
        found = some([(8,), (8, 16)], (2, 1, 4, 7, 1), (3, 1, 4, 6, 1), (4, 1, 4, 4, 0))
        found += [dataclasses.replace(config, own_store=False) for config in found]
    elif m <= 8:
        found = some([(8, 16)], (2, 2, 4, 4, 1), (3, 1, 4, 5, 0), (3, 1, 4, 6, 0), (4, 1, 2, 8, 0), (4, 1, 4, 4, 0))
    elif m <= 24:
        found = some([(16, 24, 32)], (2, 2, 4, 3, 1), (3, 1, 4, 4, 0), (4, 1, 2, 7, 0), (4, 1, 4, 3, 0))
    elif m <= 96:
        found = some([(48, 64, 80, 96), (56, 64, 72, 80), (56, 64, 72, 80, 96), (64, 80, 96)], (4, 1, 2, 4, 0))
    elif m <= 512:
        sizes = [(144,), (64, 144), (96, 144), (112, 144), (112, 128, 144), (96, 112, 128, 144), (104, 120, 136)]
        found = some(sizes, (2, 1, 2, 4, 1))
    else:
        sizes = [(96, 192), (64, 128, 192), (128, 184), (64, 176), (144, 176), (112, 144, 176)]
        found = some(sizes, (2, 1, 2, 3, 1))
        wide = TuningConfig((64, 256), num_stages=4, unroll=2, own_store=False)
        found += [wide, dataclasses.replace(wide, tile_m=(64, 128, 256)), dataclasses.replace(wide, tile_m=(128, 240))]
    if m <= gemm_choice.MOST_FEW_ROWS:
        found += gemm_choice.few_rows_configs(experts, m, fused=fused)
    return [config for config in dict.fromkeys(found) if not fused or config.tiles % 2 == 0]


def sweep(shapes: list[tuple[int, int, int]], rows_per_expert: list[int]) -> None:
    """Time the candidates of every shape and m, with and without SwiGLU, and store the fastest in the table.

    All configurations must give the same bits.
    """
    if any(experts == 1 for experts, _, _ in shapes):
        raise app.UsageError("--sweep: a single matrix (E = 1) is chosen by gemm_choice.dense, not by the table")
    if not timing.on_gpu():
        raise app.UsageError("--sweep needs a GPU")
    cells = list(itertools.product(shapes, rows_per_expert, (False, True)))
    for (experts, k, n), m, fused in tqdm(cells, unit="cell"):
        if fused and n % 128:
            continue
        packed = gemm_cases.random_weights(experts, n, k)
        inputs = gemm_cases.make_inputs(GemmShape(experts, k, n, m), packed)
        w_scale, act_scale = packed.global_scale[..., 0], jnp.full((experts, 1, 1), 0.01, jnp.float32)
        args = (inputs.x_masked(poisoned=False), packed.words, w_scale, inputs.counts)
        jobs: dict[Any, Any] = {}
        for config in candidates(experts, m, fused=fused):
            options: dict[str, Any] = dict(out="nvfp4_as_bf16", act_scale=act_scale) if fused else {}
            if masked_gemm.check_config(*args, config=config, **options) is None:
                call = lambda *a, c=config, o=options: masked_gemm.grouped_gemm(*a, config=c, **o)  # noqa: E731
                jobs[config] = timing.rotated(call, args)
        compiled = timing.compile_all(jobs)
        valid = jnp.arange(inputs.shape.capacity) < inputs.counts[:, None]
        results = ((config, timing.first_result(*run)) for config, run in compiled.items())
        _, reference = next(results)
        for config, result in results:  # all configurations have the same bits
            if timing.mismatch(result, reference, valid) != 0:
                raise RuntimeError(f"{config} and {next(iter(jobs))} differ for {experts}x{k}x{n}, m={m}")
        us = timing.interleaved_us(compiled, rounds=_ROUNDS.value)
        best = min(jobs, key=lambda config: us[config])
        for config, time in sorted(us.items(), key=lambda item: item[1]):
            tqdm.write(f"{experts}x{k}x{n} m={m} {'swiglu' if fused else ''} {time:8.2f} us  {config}")
        gemm_choice.save(experts, k, n, m, best, fused=fused)


if __name__ == "__main__":
    script.run(main)
