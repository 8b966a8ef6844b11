"""Measures the memory-bound ops against their floor and against XLA, on sizes of real models.

    python experiments/bench_ops.py                    # everything; about 12 minutes on an H100, mostly compiling
    python experiments/bench_ops.py --models=deepseek-v3 --tokens=4096 --ops=permute,depermute
    python experiments/bench_ops.py --sweep            # tunes the kernels and rewrites pallas_kernels/simt/tuned.json

Each row holds the device time of one op and implementation. Its floor is the bytes that must move (each input read
once, each output written once) divided by the copy bandwidth, which is measured in the same run. The kernel and XLA's
implementation are measured in turns. A kernel whose result differs from XLA's is reported and not timed. Writes
bench_ops.json and bench_ops.png into --output_dir.
"""

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

from absl import app, flags
from tqdm import tqdm

from experiments.cases.ops import MODELS, OPS, Case, all_cases
from experiments.harness import outputs, script, timing
from experiments.harness.flag_values import choices, integers
from pallas_kernels.rows import (
    permute as permute_kernels,
    quantize as quantize_kernel,
    route_metadata as metadata_kernels,
)
from pallas_kernels.simt import tuning

_MODELS = flags.DEFINE_list("models", None, f"Models, of {', '.join(MODELS)}; default: all (CPU: qwen3-30b).")
_TOKENS = flags.DEFINE_list("tokens", None, "Token counts; default: 128,1024,4096,8192,16384 (CPU: 128).")
_OPS = flags.DEFINE_list("ops", None, f"Ops to measure, of {', '.join(OPS)}; default: all.")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 2, "Rounds of 10 iterations per implementation; implementations take turns.", lower_bound=1
)
_SWEEP = flags.DEFINE_bool("sweep", False, "Time every tuning configuration and rewrite the tuning table.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_ops", "Folder for the JSON and PNG files.")

_INPUTS = (
    "random: normal bf16 activations, random codes and scales, distinct experts per token drawn uniformly with a fixed "
    "seed; inputs smaller than twice the L2 cache are rotated"
)
_SWEEPS: dict[str, list[Any]] = {
    "quantize": [quantize_kernel.TuningConfig(blocks_per_lane=b) for b in (1, 2, 4)],
    "swiglu_quantize": [
        quantize_kernel.TuningConfig(blocks_per_lane=b, blocks_per_sm=s)
        for b, s in itertools.product((1, 2), (4, 6, 8, 16))
    ],
    "route_metadata": [metadata_kernels.TuningConfig(chunk=c) for c in (128, 256, 512, 1024)],
    "scatter_rows": [permute_kernels.TuningConfig(items_per_lane=i) for i in (1, 2, 4)],
    "scatter_decoded_rows": [permute_kernels.TuningConfig(items_per_lane=i) for i in (1, 2, 4)],
}
_SWEEP_SHAPES = (
    ("deepseek-v3", 128),
    ("qwen3-30b", 64),
    ("qwen3-30b", 4096),
    ("deepseek-v3", 8192),
    ("ernie-300b", 16384),
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    folder = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "bench_ops.json", "bench_ops.png")
    gpu = timing.on_gpu()
    models = choices("models", _MODELS.value, tuple(MODELS), tuple(MODELS) if gpu else ("qwen3-30b",))
    tokens = integers("tokens", _TOKENS.value or ((128, 1024, 4096, 8192, 16384) if gpu else (128,)))
    ops = choices("ops", _OPS.value, OPS, OPS)
    if _SWEEP.value:
        outputs.check_file("sweep", str(tuning.TABLE))
        sweep()
        return
    ceilings = timing.measure_ceilings()
    print(f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 matmul {ceilings.bf16_flops / 1e12:.1f} TFLOP/s")
    rows, wrong = [], []
    for name, count in tqdm(list(itertools.product(models, tokens)), desc="shapes", unit="shape"):
        found, bad = run_cases([case for case in all_cases(name, count) if case.op in ops], ceilings)
        rows += found
        wrong += bad
        # Written after every shape, so that a stopped run leaves what it has measured.
        timing.save_results(folder / "bench_ops.json", "bench_ops", rows, inputs=_INPUTS, ceilings=ceilings)
    print(timing.format_table(rows))
    plot(rows, folder / "bench_ops.png")
    print(f"wrote {folder}/bench_ops.json and bench_ops.png")
    if wrong:
        sys.exit("wrong results, not timed: " + "; ".join(wrong))


def run_cases(cases: list[Case], ceilings: timing.Ceilings) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the cases, and a line of text for every kernel whose result was wrong."""
    names = {id(c): [n for n in c.functions if n == "xla" or timing.on_gpu()] for c in cases}
    failures: dict[Any, str] = {}
    jobs = {}
    for case, name in ((c, n) for c in cases for n in names[id(c)]):
        with timing.noting_out_of_memory(failures, (id(case), name)):
            jobs[id(case), name] = timing.rotated(case.functions[name], case.args)
    compiled = timing.compile_all(jobs, failures)
    del jobs
    rows, wrong = [], []
    label = f"{cases[0].shape['model']} T={cases[0].shape['T']}"
    for case in tqdm(cases, desc=label, unit="op", leave=False):
        runs = {key: compiled.pop(key) for n in names[id(case)] if (key := (id(case), n)) in compiled}
        error = None
        if len(runs) == 2:
            with timing.noting_out_of_memory(failures):  # timing runs out of memory again and notes which one did
                ours, theirs = (timing.first_result(*runs[id(case), n]) for n in ("mosaic_gpu", "xla"))
                error = float(timing.mismatch(ours, theirs, case.valid))
                del ours, theirs
            if error is not None and not error <= case.max_mismatch:
                wrong.append(f"{case.op} {case.shape}: {error:.2e} of the values differ")
                continue
        us = timing.interleaved_us(runs, rounds=_ROUNDS.value, failures=failures)
        for name in names[id(case)]:
            other = us.get((id(case), "xla")) if name != "xla" else None
            rows.append(
                timing.result_row(
                    case.op, name, case.shape, us.get((id(case), name)), num_bytes=case.num_bytes, ceilings=ceilings,
                    error=failures.get((id(case), name), error), baseline=None if other is None else "xla",
                    baseline_us=other,
                )
            )  # fmt: skip
    return rows, wrong


def sweep() -> None:
    """Time every configuration of every kernel on the shapes of the sweep, and store the best of each shape class.

    The best configuration has the smallest sum of ratios to the fastest, over the shapes of the class.
    """
    if not timing.on_gpu():
        raise app.UsageError("--sweep needs a GPU")
    best: dict[tuple[str, str], dict[Any, list[float]]] = {}
    items_of = {}
    for name, tokens in _SWEEP_SHAPES:
        for case in all_cases(name, tokens):
            if case.tunable is None or case.kernel is None:
                continue
            jobs = {c: timing.rotated(case.tunable(c), case.args) for c in _SWEEPS[case.kernel]}
            us = timing.interleaved_us(timing.compile_all(jobs), rounds=_ROUNDS.value)
            key = (case.kernel, tuning.shape_class(case.items))
            items_of[key] = case.items
            fastest = min(us.values())
            for config, time in us.items():
                best.setdefault(key, {}).setdefault(config, []).append(time / fastest)
                print(f"{case.kernel:22} {name} T={tokens:6} {config}: {time:8.2f} us {time / fastest:.3f}")
    for (kernel, size), times in best.items():
        config = min(times, key=lambda c: sum(times[c]))
        print(f"{kernel} {size}: {config}")
        tuning.save(kernel, items_of[kernel, size], dataclasses.asdict(config))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw percent of the floor over tokens, for the kernels and XLA, with one panel per op.

    Routing metadata has few bytes, so its panel shows microseconds instead.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ops = sorted({r["op"] for r in rows})
    columns = min(4, len(ops))
    lines = -(-len(ops) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4 * columns, 3 * lines + 0.6), squeeze=False)
    for axis, op in itertools.zip_longest(axes.flat, ops):
        if op is None:
            axis.set_axis_off()
            continue
        value = "us" if op == "route_metadata" else "percent_of_floor"
        for model, style in zip(MODELS, ("o", "s", "^", "D", "v"), strict=True):
            for implementation, colour in (("mosaic_gpu", "tab:green"), ("xla", "tab:grey")):
                wanted = (op, implementation, model)
                chosen = [
                    r for r in rows
                    if (r["op"], r["implementation"], r["shape"]["model"]) == wanted and r["us"] is not None
                ]  # fmt: skip
                x = [r["shape"]["T"] for r in chosen]
                label = f"{model}, {'kernel' if implementation == 'mosaic_gpu' else 'XLA'}"
                axis.plot(x, [r[value] for r in chosen], style + "-", color=colour, markersize=4, label=label)
        axis.set(title=op, xlabel="tokens", xscale="log", ylabel="us" if value == "us" else "percent of floor")
        if value != "us":
            axis.axhline(100, color="black", linewidth=0.5)
            axis.set_ylim(0, 1.08 * max(110, *(r[value] for r in rows if r["op"] == op and r["us"] is not None)))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(MODELS), fontsize=8)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    script.run(main)
