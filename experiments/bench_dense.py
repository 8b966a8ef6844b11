"""Measures linear layers: block-wise FP8 and NVFP4 kernels against the bf16 matrix product of cuBLAS.

    python experiments/bench_dense.py                              # everything; some minutes on an H100
    python experiments/bench_dense.py --shapes=7168x4096 --tokens=16,4096
    JAX_PLATFORMS=cpu python experiments/bench_dense.py            # XLA's paths on a tiny shape: checks that it runs

A shape KxN is a weight [N, K]. For each shape and number of tokens there is a row per function:

    bf16              bf16 through XLA, which calls cuBLAS
    block_fp8         FP8 blocks: quantizes bf16 activations, multiplies, gives bf16
    block_fp8 gemm    the matrix product of block_fp8 alone (GPU only)
    nvfp4 w4a16       NVFP4 weights, bf16 activations
    nvfp4 w4a4        NVFP4 weights and activations, with quantizing them

The floor is the larger of two times, at rates measured in the same run: the bytes at the copy bandwidth, and the FLOPs
at the bf16 ceiling (for FP8 twice that). The column error is |y - r|^2 / (|y|^2 + |r|^2), where r is the f32 product of
the decoded operands. A result whose error is larger than 1e-5 is reported and not timed. Writes bench_dense.json and
bench_dense.png into --output_dir.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax import lax
from tqdm import tqdm

from experiments.harness import outputs, script, timing
from experiments.harness.flag_values import integers
from fp4jax import nvfp4
from fp4jax.block_fp8 import block_fp8_matmul, dequantize_blocks, from_fp8, quantize_blocks, to_fp8
from fp4jax.grouped_gemm import contiguous_grouped_gemm, pack_weights
from pallas_kernels.fp8 import gemm as fp8_gemm, quantize as quantize_fp8

_SHAPES = flags.DEFINE_list("shapes", None, "Weights, as KxN; default: linear layers of DeepSeek-V3 and Qwen3-30B.")
_TOKENS = flags.DEFINE_list("tokens", None, "Token counts; default: 1,16,128,512,1024,4096 (CPU: 16).")
_ROUNDS = flags.DEFINE_integer(
    "rounds", 2, "Rounds of 10 iterations per function; functions take turns.", lower_bound=1
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_dense", "Folder for the JSON and PNG files.")

_DEFAULT_SHAPES = ("7168x4096", "16384x7168", "1536x24576", "2048x5120", "7168x576")
_MAX_ERROR = 1e-5  # rounding the results to bf16 alone causes about 2e-6
_INPUTS = "random normal bf16 activations and weights; inputs smaller than twice the L2 cache are rotated"


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    folder = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "bench_dense.json", "bench_dense.png")
    gpu = timing.on_gpu()
    shapes = [_parse_shape(s) for s in _SHAPES.value or (_DEFAULT_SHAPES if gpu else ("128x128",))]
    tokens = integers("tokens", _TOKENS.value or ((1, 16, 128, 512, 1024, 4096) if gpu else (16,)))
    ceilings = timing.measure_ceilings()
    print(f"copy {ceilings.copy_bytes_per_s / 1e12:.2f} TB/s, bf16 matmul {ceilings.bf16_flops / 1e12:.1f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []
    for k, n in tqdm(shapes, unit="shape"):
        weights = make_weights(k, n)
        for t in tqdm(tokens, unit="cell", desc=f"{k}x{n}", leave=False):
            found, bad = run_cell(k, n, t, weights, ceilings)
            rows += found
            wrong += bad
            # Written after every cell, so that a stopped run leaves what it has measured.
            timing.save_results(folder / "bench_dense.json", "bench_dense", rows, inputs=_INPUTS, ceilings=ceilings)
    print(timing.format_table(rows))
    plot(rows, folder / "bench_dense.png")
    print(f"wrote {folder}/bench_dense.json and bench_dense.png")
    if wrong:
        sys.exit("wrong results, not timed: " + "; ".join(wrong))


def _parse_shape(text: str) -> tuple[int, int]:
    try:
        k, n = (int(size) for size in text.split("x"))
    except ValueError as error:
        raise app.UsageError(f"--shapes: {text!r} is not KxN") from error
    if min(k, n) < 1 or k % 64 or n % 64:
        raise app.UsageError(f"--shapes: {text}: K and N must be positive multiples of 64")
    return k, n


def make_weights(k: int, n: int) -> dict[str, Any]:
    """The same random weight [N, K] as bf16, in FP8 blocks, and in NVFP4 in the form that will run."""
    w = jax.random.normal(jax.random.key(1), (n, k), jnp.bfloat16)
    fp4 = jax.jit(lambda w: nvfp4.quantize(w[None], global_scale="per_expert"))(w)
    packed = pack_weights(fp4) if timing.on_gpu() else fp4
    blocks = nvfp4.decode_blocks(fp4.qdata[0], fp4.block_scale[0])  # exact in bf16
    return {
        "bf16": w, "fp8": jax.jit(quantize_blocks)(w), "nvfp4": packed, "nvfp4 blocks": blocks,
        "nvfp4 scale": fp4.global_scale.reshape(()),
    }  # fmt: skip


def functions(x: jax.Array, weights: dict[str, Any]) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The functions to measure, as {name: (function, arguments)}."""
    implementation = "mosaic_gpu" if timing.on_gpu() else "xla"
    counts = jnp.full(1, x.shape[0], jnp.int32)

    def w4a4(x, w, counts):
        rows = nvfp4.quantize(x, global_scale="per_token", implementation=implementation)
        return contiguous_grouped_gemm(rows, w, counts, implementation=implementation)

    found: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "bf16": (_library_dot, (x, weights["bf16"])),
        "block_fp8": (functools.partial(block_fp8_matmul, implementation=implementation), (x, weights["fp8"])),
        "nvfp4 w4a16": (
            functools.partial(contiguous_grouped_gemm, implementation=implementation), (x, weights["nvfp4"], counts),
        ),
        "nvfp4 w4a4": (w4a4, (x, weights["nvfp4"], counts)),
    }  # fmt: skip
    if timing.on_gpu():
        values, scales = jax.jit(quantize_fp8.quantize)(x)
        operands = (values, weights["fp8"].qdata, scales, weights["fp8"].block_scale)
        found["block_fp8 gemm"] = (fp8_gemm.gemm, operands)
    return found


def _library_dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def run_cell(
    k: int, n: int, tokens: int, weights: dict[str, Any], ceilings: timing.Ceilings
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one shape and number of tokens, and a line of text for every wrong result."""
    x = jax.random.normal(jax.random.key(tokens), (tokens, k), jnp.bfloat16)
    failures: dict[str, str] = {}
    jobs = {}
    for name, call in functions(x, weights).items():
        with timing.noting_out_of_memory(failures, name):
            jobs[name] = timing.rotated(*call)
    compiled = timing.compile_all(jobs, failures)
    del jobs
    errors: dict[str, Any] = {}
    wrong = []
    for name, call in list(compiled.items()):
        with timing.noting_out_of_memory(failures, name):
            reference = expected(name.removesuffix(" gemm"), x, weights)
            errors[name] = float(_difference(timing.first_result(*call), reference))
        if name in failures:
            del compiled[name]
        elif not errors[name] <= _MAX_ERROR:
            wrong.append(f"{name} {k}x{n} T={tokens}: error {errors[name]:.2e}, allowed is {_MAX_ERROR}")
            del compiled[name]
    us: dict[str, float | None] = {**timing.interleaved_us(compiled, rounds=_ROUNDS.value, failures=failures)}
    us |= dict.fromkeys(failures)
    errors |= failures
    rows = []
    for name, time in us.items():
        per_weight = 2 if name == "bf16" else 1 if "fp8" in name else 0.5625
        per_input = 1 if name == "block_fp8 gemm" else 2
        rows.append(
            timing.result_row(
                name, "xla" if name == "bf16" or not timing.on_gpu() else "mosaic_gpu",
                {"K": k, "N": n, "T": tokens}, time, flops=2 * tokens * n * k, ceilings=ceilings, error=errors[name],
                num_bytes=per_weight * n * k + per_input * tokens * k + 2 * tokens * n,
                baseline=None if name == "bf16" else "bf16", baseline_us=None if name == "bf16" else us.get("bf16"),
            )
        )  # fmt: skip
        if "fp8" in name:  # FP8 products run at twice the bf16 rate
            floor = max(rows[-1]["floor_us"] / 2, ceilings.floor_us(per_weight * n * k))
            percent = None if time is None else round(100 * floor / time, 1)
            rows[-1] |= {"floor_us": round(floor, 3), "percent_of_floor": percent}
    return rows, wrong


@functools.partial(jax.jit, static_argnames="form")
def expected(form: str, x: jax.Array, weights: dict[str, Any]) -> jax.Array:
    """The f32 product of x and the weight after both are decoded from the format `form`."""
    scale = jnp.float32(1)
    if form == "bf16":
        w = weights["bf16"]
    elif form == "block_fp8":
        x, w = from_fp8(*to_fp8(x)), dequantize_blocks(weights["fp8"])
    else:
        w, scale = weights["nvfp4 blocks"], weights["nvfp4 scale"]
    if form == "nvfp4 w4a4":
        rows = nvfp4.quantize(x, global_scale="per_token", implementation="xla")
        x, scale = nvfp4.decode_blocks(rows.qdata, rows.block_scale), scale * rows.global_scale
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32) * scale


@jax.jit
def _difference(y: jax.Array, r: jax.Array) -> jax.Array:
    y = y.astype(jnp.float32)
    return jnp.mean((y - r) ** 2) / jnp.mean(y * y + r * r)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how many times as fast as cuBLAS in bf16 every function is, over tokens, with one panel per shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = list(dict.fromkeys((r["shape"]["K"], r["shape"]["N"]) for r in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(3.4 * len(shapes), 3.2), squeeze=False, sharey=True)
    for axis, (k, n) in zip(axes.flat, shapes, strict=True):
        for name in dict.fromkeys(r["op"] for r in rows if r["speedup"] is not None):
            chosen = [r for r in rows if r["op"] == name and (r["shape"]["K"], r["shape"]["N"]) == (k, n)]
            axis.plot([r["shape"]["T"] for r in chosen], [r["speedup"] for r in chosen], "o-", markersize=4, label=name)
        axis.axhline(1, color="black", linewidth=0.5)
        axis.set(title=f"K = {k}, N = {n}", xlabel="tokens", xscale="log")
    axes[0, 0].set_ylabel("times faster than bf16")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    script.run(main)
