"""The grouped GEMM with NVFP4 weights against bf16 and 4-bit peers: time, TFLOP/s, weight bandwidth, percent of floor.

    python experiments/bench_gemm.py                              # everything; about 8 minutes on an H100
    python experiments/bench_gemm.py --shapes=32x2048x7168 --m=16,64 --distributions=uniform
    python experiments/bench_gemm.py --sweep                      # tune, rewrite pallas_kernels/tuned_gemm.json

Shapes are ExKxN: E experts on the device with weights [N, K]; m is the mean number of rows per expert. The kernel makes
its task list on the device, inside the timing. Baselines run interleaved with it: bf16 through a padded einsum (cuBLAS),
lax.ragged_dot and JAX's Pallas ragged dot, and tokamax's int4 where it is installed. A kernel whose result is not
within 3e-3 of f32 on dequantized weights is reported and not timed. Writes bench_gemm.json and bench_gemm.png.
"""

import concurrent.futures
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments import gemm_cases
from experiments.gemm_cases import GemmShape, Inputs
from fp4jax import benchmarking
from fp4jax.grouped_gemm import unpack_weights
from fp4jax.nvfp4 import dequantize
from pallas_kernels import gemm_config, masked_gemm
from pallas_kernels.gemm_config import TuningConfig

_SHAPES = flags.DEFINE_list("shapes", None, "ExKxN; default: the four of the peers' table (CPU: 4x128x128).")
_M = flags.DEFINE_list("m", None, "Mean rows per expert; default: 1,4,16,64,256,1024 (CPU: 4).")
_DISTRIBUTIONS = flags.DEFINE_list("distributions", None, "Of the rows over the experts; default: all three.")
_BASELINES = flags.DEFINE_bool("baselines", True, "Also time the other implementations.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Rounds of 10 iterations per implementation, in turns.", lower_bound=1)
_SWEEP = flags.DEFINE_bool("sweep", False, "Time many configurations and rewrite the tuning table.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for JSON and PNG; default: output/bench_gemm.")

_INPUTS = (
    "random codes, block scales of 2^-3 to 2^2.6, a global scale per row, normal bf16 x, NaN in every pad; multinomial "
    "rows with a fixed seed, the same number for every expert, or all rows on one; inputs below twice the L2 cache rotate"
)
_DEFAULT_SHAPES = ("32x7168x4096", "32x2048x7168", "64x2048x1536", "64x768x2048")
_FUSED_M = (64, 1024)
_MAX_ERROR = 3e-3
# Milliseconds at m = 1, 4, 16, 64, 256, 1024 of the best public Triton MXFP4 kernels for Hopper (two versions, 4 and 8
# warps), multinomial rows, median of graph replays on an H100 SXM, 2026-10: quoted, not measured here.
FP4_PEER_MS = {
    (32, 7168, 4096): (0.132, 0.185, 0.202, 0.365, 0.938, 3.297),
    (32, 2048, 7168): (0.066, 0.104, 0.114, 0.206, 0.530, 1.748),
    (64, 2048, 1536): (0.041, 0.062, 0.058, 0.093, 0.247, 0.759),
    (64, 768, 2048): (0.027, 0.035, 0.038, 0.058, 0.145, 0.471),
}
_PEER_M = (1, 4, 16, 64, 256, 1024)


def main(argv):
    del argv
    gpu = benchmarking.on_gpu()
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
    ceilings = benchmarking.measure_ceilings()
    print(f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 matmul {ceilings.bf16_flops / 1e12:.1f} TFLOP/s")
    folder = Path(_OUTPUT_DIR.value or "output/bench_gemm")
    rows, wrong = [], []
    progress = tqdm(total=len(shapes) * len(distributions) * len(rows_per_expert), unit="cell")
    for experts, k, n in shapes:
        packed = gemm_cases.random_weights(experts, n, k)
        dense = gemm_cases.densify(packed) if _BASELINES.value else None
        for distribution, m in itertools.product(distributions, rows_per_expert):
            shape = GemmShape(experts, k, n, m, distribution)
            progress.set_description(f"{experts}x{k}x{n} m={m} {distribution}")
            found, bad = run_cell(gemm_cases.make_inputs(shape, packed, dense), ceilings)
            rows += found
            wrong += bad
            # After every cell, so that a run that is stopped leaves what it measured.
            benchmarking.save_results(folder / "bench_gemm.json", "bench_gemm", rows, inputs=_INPUTS, ceilings=ceilings)
            progress.update()
    progress.close()
    print(benchmarking.format_table(rows))
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


def run_cell(inputs: Inputs, ceilings: benchmarking.Ceilings) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of one shape and distribution, and a line of text for each of our ops whose result was wrong."""
    gpu, shape = benchmarking.on_gpu(), inputs.shape
    ours = gemm_cases.our_functions(inputs)
    fused = {}
    if shape.distribution == "multinomial" and shape.m in _FUSED_M and shape.n % 128 == 0 and gpu:
        fused = gemm_cases.fused_functions(inputs)
    others = gemm_cases.bf16_baselines(inputs, gpu)
    if gpu and _BASELINES.value and shape.distribution == "multinomial" and gemm_cases.has_tokamax():
        others["tokamax int4"] = gemm_cases.tokamax_int4(inputs)
    jobs = {name: benchmarking.rotated(*call) for name, call in {**ours, **fused, **others}.items()}
    compiled = _compile_all(jobs)
    errors, wrong = {}, []
    for op in ours:
        fn, args, repeats = compiled[op]
        result = fn(*args)
        errors[op] = relative_error(result[0] if repeats > 1 else result, inputs)
        if not errors[op] <= _MAX_ERROR:
            wrong.append(f"{op} {shape.as_dict()}: relative error {errors[op]:.2e}")
            del compiled[op]
    us = benchmarking.interleaved_us(compiled, rounds=_ROUNDS.value)
    bf16 = {name: us[name] for name in others if name.endswith("bf16")}
    fastest = min(bf16, key=lambda name: bf16[name]) if bf16 else None
    rows = []
    common = dict(num_bytes=shape.num_bytes, flops=shape.flops, ceilings=ceilings)
    for name, time in us.items():
        if name in ours:
            row = benchmarking.result_row(
                name, "mosaic_gpu" if gpu else "xla", shape.as_dict(), time, error=errors[name], baseline=fastest,
                baseline_us=None if fastest is None else bf16[fastest], **common,
            )  # fmt: skip
            row["weight_gbps"] = round(shape.weight_bytes / time / 1e3, 1)
            row["fp4_peer_us"] = peer_us(shape)
        elif name in fused:
            alone = us.get("masked_grouped_gemm")
            row = benchmarking.result_row(
                f"grouped_gemm_swiglu {name}", "mosaic_gpu", shape.as_dict(), time,
                baseline="masked_grouped_gemm", baseline_us=alone, **common,
            )  # fmt: skip
        else:
            moved = shape.num_bytes_bf16 if name in bf16 else shape.num_bytes
            row = benchmarking.result_row("grouped_gemm", name, shape.as_dict(), time, **{**common, "num_bytes": moved})
        rows.append(row)
    return rows, wrong


def peer_us(shape: GemmShape) -> float | None:
    """The quoted figure of the FP4 peer for this cell, if there is one."""
    figures = FP4_PEER_MS.get((shape.experts, shape.k, shape.n))
    if figures is None or shape.m not in _PEER_M or shape.distribution != "multinomial":
        return None
    return 1e3 * figures[_PEER_M.index(shape.m)]


def _compile_all(jobs):
    """Lower one after another (Python), compile in parallel (XLA leaves the interpreter alone)."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = {}
        for key, (fn, args, repeats) in jobs.items():
            futures[key] = (pool.submit(jax.jit(fn).lower(*args).compile), args, repeats)
        return {key: (future.result(), args, repeats) for key, (future, args, repeats) in futures.items()}


def relative_error(result: jax.Array, inputs: Inputs) -> float:
    """Relative Frobenius error against f32 on dequantized weights: the largest and the median expert, 128 rows each."""
    counts = inputs.shape.counts()
    starts = np.concatenate([[0], np.cumsum(counts)])
    difference = norm = 0.0
    for expert in {int(np.argsort(counts)[i]) for i in (-1, len(counts) // 2)}:
        rows = min(int(counts[expert]), 128)
        if rows == 0:
            continue
        one = jax.tree.map(lambda leaf: leaf[expert], inputs.packed)  # noqa: B023
        weights = dequantize(unpack_weights(one), jnp.float32)
        x = inputs.x_rows[starts[expert] : starts[expert] + rows].astype(jnp.float32)
        expected = np.asarray(jnp.dot(x, weights.T, precision="highest"), np.float64)
        got = result[expert, :rows] if result.ndim == 3 else result[starts[expert] : starts[expert] + rows]
        difference += np.sum((np.asarray(got.astype(jnp.float32), np.float64) - expected) ** 2)
        norm += np.sum(expected**2)
    return float(np.sqrt(difference / norm))


# --- tuning ---


def candidates(m: int, *, fused: bool) -> list[TuningConfig]:
    """Configurations worth trying for m rows per expert."""
    if m <= 2:
        found = [TuningConfig(t, w, 1, 4, s, 1, f, own)
                 for t, (w, s, f, own) in itertools.product(
                     ((8,), (8, 16)), ((2, 7, 1, True), (3, 6, 1, False), (4, 4, 0, False), (4, 4, 0, True)))]  # fmt: skip
    elif m <= 8:
        found = [TuningConfig((8, 16), w, r, q, s, 1, f)
                 for w, r, q, s, f in ((2, 2, 4, 4, 1), (3, 1, 4, 5, 0), (3, 1, 4, 6, 0), (4, 1, 2, 8, 0), (4, 1, 4, 4, 0))]  # fmt: skip
    elif m <= 24:
        found = [TuningConfig((16, 24, 32), w, r, q, s, 1, f)
                 for w, r, q, s, f in ((2, 2, 4, 3, 1), (3, 1, 4, 4, 0), (4, 1, 2, 7, 0), (4, 1, 4, 3, 0))]  # fmt: skip
    elif m <= 96:
        sizes = ((48, 64, 80, 96), (56, 64, 72, 80), (56, 64, 72, 80, 96), (64, 80, 96))
        found = [TuningConfig(t, 4, 1, 2, 4, 1, 0) for t in sizes]
    elif m <= 512:
        sizes = ((144,), (64, 144), (96, 144), (80, 112, 144), (136,), (64, 128))
        found = [TuningConfig(t, 2, 1, 2, 4) for t in sizes]
    else:
        sizes = ((96, 192), (64, 128, 192), (64, 128, 184), (64, 176), (64, 128, 176))
        found = [TuningConfig(t, 2, 1, 2, 3) for t in sizes]
        found += [TuningConfig(t, 2, 1, 1, 4, 2, 1, False) for t in ((64, 256), (64, 128, 256), (128, 240))]
    return [config for config in found if not fused or config.tiles % 2 == 0]


def sweep(shapes: list[tuple[int, int, int]], rows_per_expert: list[int]) -> None:
    """Time the candidates of every cell with multinomial rows and keep the fastest, with and without SwiGLU."""
    if not benchmarking.on_gpu():
        raise app.UsageError("--sweep needs a GPU")
    cells = list(itertools.product(shapes, rows_per_expert, (False, True)))
    for (experts, k, n), m, fused in tqdm(cells, unit="cell"):
        if fused and n % 128:
            continue
        packed = gemm_cases.random_weights(experts, n, k)
        inputs = gemm_cases.make_inputs(GemmShape(experts, k, n, m), packed, None)
        w_scale, act_scale = packed.global_scale[..., 0], jnp.full((experts, 1, 1), 0.01, jnp.float32)
        args = (inputs.x_masked, packed.words, w_scale, inputs.counts)
        jobs = {}
        for config in candidates(m, fused=fused):
            options = dict(out="nvfp4_as_bf16", act_scale=act_scale) if fused else {}
            if masked_gemm.check_config(*args, config=config, **options) is None:
                call = lambda *a, c=config, o=options: masked_gemm.grouped_gemm(*a, config=c, **o)  # noqa: E731
                jobs[config] = benchmarking.rotated(call, args)
        us = benchmarking.interleaved_us(_compile_all(jobs), rounds=_ROUNDS.value)
        best = min(us, key=lambda config: us[config])
        for config, time in sorted(us.items(), key=lambda item: item[1]):
            tqdm.write(f"{experts}x{k}x{n} m={m} {'swiglu' if fused else ''} {time:8.2f} us  {config}")
        gemm_config.save(k, n, m, best, fused=fused)


def plot(rows: list[dict[str, Any]], ceilings: benchmarking.Ceilings, path: Path) -> None:
    """Roofline: TFLOP/s over FLOP per byte, one colour per shape; ours filled, the fastest bf16 hollow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    ours = [r for r in rows if r["op"] == "masked_grouped_gemm" and r["shape"]["distribution"] == "multinomial"]
    shapes = sorted({(r["shape"]["E"], r["shape"]["K"], r["shape"]["N"]) for r in ours})
    for colour, key in zip(itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"]), shapes, strict=False):
        chosen = [r for r in ours if (r["shape"]["E"], r["shape"]["K"], r["shape"]["N"]) == key]
        intensity = [GemmShape(*key, r["shape"]["m"]).flops / GemmShape(*key, r["shape"]["m"]).num_bytes for r in chosen]
        axis.plot(intensity, [r["tflops"] for r in chosen], "o-", color=colour, label="E={} K={} N={}".format(*key))
        based = [(i, r) for i, r in zip(intensity, chosen, strict=True) if r["baseline_us"]]
        axis.plot(
            [i for i, _ in based], [r["tflops"] * r["us"] / r["baseline_us"] for _, r in based], "o--", color=colour,
            markerfacecolor="none", linewidth=0.8,
        )  # fmt: skip
    low, high = axis.get_xlim() if not ours else (0.5, 4000)
    intensity = np.geomspace(low, high, 100)
    roof = np.minimum(intensity * ceilings.copy_bytes_per_s, ceilings.bf16_flops) / 1e12
    axis.plot(intensity, roof, color="black", linewidth=1, label="roofline (measured copy, measured bf16 matmul)")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte (4-bit weights once, x, result)", ylabel="TFLOP/s")
    axis.set_title("Grouped GEMM, NVFP4 weights (filled) and fastest bf16 (hollow)")
    axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    app.run(main)
