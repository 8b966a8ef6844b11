"""Measures the expert layer across devices, stage by stage: 4-bit weights, activations and wire against bf16.

    python experiments/bench_moe.py                                    # every model and size; some minutes on a node
    python experiments/bench_moe.py --models=deepseek-v3 --tokens=16,128,4096 --ranks=4
    JAX_NUM_CPU_DEVICES=2 JAX_PLATFORMS=cpu python experiments/bench_moe.py      # a tiny layer: checks that it runs

There is a row per layer:

    nvfp4                fp4jax with the fastest implementation of every stage, and the wire format of --wire_format
    nvfp4 low latency    the same, with receive buffers that the program keeps (fp4jax.expert_parallel.low_latency)
    nvfp4 nccl           the same, with one all_to_all of NCCL instead of kernels that store to other devices
    bf16                 JAX's Pallas ragged dot, between fp4jax's dispatch, permute, SwiGLU, depermute and combine
    bf16 jax             the same ragged dot, with all_to_all and XLA's ops for everything else

The time is per layer, in a program that runs many layers one after the other. The time of the stages comes from a
profile of it. The floor of a layer is the sum of the floors of its stages, which are their bytes or FLOPs at the rates
of the memory, the link, and a large matrix product. Writes bench_moe.json and bench_moe.png into --output_dir.
"""

import os

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # turns NVLink multicast off

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.sharding import AxisType
from tqdm import tqdm

from experiments.cases import moe as moe_cases
from experiments.harness import outputs, process_flags, script, timing, wire_flag
from experiments.harness.chained_steps import ChainedSteps
from experiments.harness.flag_values import choices, integers
from experiments.harness.stages import compiler_options, stage_times
from fp4jax import wire_bytes
from fp4jax.expert_parallel import ReceiveBuffers, WireFormat

_MODELS = flags.DEFINE_list(
    "models", None, f"Models, of {', '.join(moe_cases.MODELS)}; default: all but tiny (CPU: tiny)."
)
_TOKENS = flags.DEFINE_list("tokens", None, "Tokens per device; default: 16,128,1024,4096 (CPU: 32).")
_RANKS = flags.DEFINE_list(
    "ranks", None, "Numbers of devices to measure with; default: those of 2, 4 and 8 that exist."
)
LAYERS = ("nvfp4", "nvfp4 low latency", "nvfp4 nccl", "bf16", "bf16 jax")
_LAYERS = flags.DEFINE_list("layers", None, f"Layers, of {', '.join(LAYERS)}; default: all that can run here.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls per layer; the median counts.", lower_bound=1)
_PROFILE = flags.DEFINE_bool("profile", True, "Also measure the stages of every layer.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_moe", "Folder for the JSON and PNG files.")

_INPUTS = (
    "normal bf16 tokens, distinct experts per token drawn uniformly with a fixed seed, random 4-bit weights and the "
    "same in bf16; worst-case buffers between devices, room for 1.25 x the average rows in front of the experts "
    "(decode of nvfp4: masked, worst case)"
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    folder = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "bench_moe.json", "bench_moe.png")
    process_flags.join_processes()
    wire = wire_flag.wire_format("nvfp4")
    gpu = timing.on_gpu()
    models = choices("models", _MODELS.value, moe_cases.MODELS, moe_cases.MODELS[:-1] if gpu else ("tiny",))
    # Kept receive buffers need the kernels that store to other devices, which run on GPUs of one process.
    usual = LAYERS if gpu and jax.process_count() == 1 else tuple(name for name in LAYERS if "latency" not in name)
    layers = choices("layers", _LAYERS.value, LAYERS, usual)
    tokens = integers("tokens", _TOKENS.value or ((16, 128, 1024, 4096) if gpu else (32,)))
    some = [n for n in (2, 4, 8) if n <= jax.device_count()] if jax.process_count() == 1 else [jax.device_count()]
    ranks = integers("ranks", _RANKS.value or some)
    if not ranks or max(ranks) > jax.device_count() or min(ranks) < 2:
        raise app.UsageError(f"--ranks: needs 2 devices or more, JAX sees {jax.device_count()}, asked for {ranks}")
    if jax.process_count() > 1 and ranks != [jax.device_count()]:
        raise app.UsageError(f"--ranks: several processes use all their {jax.device_count()} devices, got {ranks}")
    for n, model in itertools.product(ranks, models):
        if (experts := moe_cases.make_shape(model, n, 1).experts) % n:
            raise app.UsageError(f"--ranks={n} does not divide the {experts} experts of {model}")
    if "nvfp4 low latency" in layers and "nvfp4 low latency" not in usual:
        raise app.UsageError("--layers: 'nvfp4 low latency' needs kernels that store to peers, on GPUs of one process")
    ceilings = timing.measure_ceilings()
    rows: list[dict[str, Any]] = []
    cells = list(itertools.product(ranks, models, tokens))
    progress = tqdm(cells, unit="cell", disable=jax.process_index() > 0)
    for n, model, t in progress:
        progress.set_description(f"{model}, {n} ranks, T={t}")
        rows += run_cell(moe_cases.make_shape(model, n, t), wire, layers, ceilings)
        if jax.process_index() == 0:
            timing.save_results(folder / "bench_moe.json", "bench_moe", rows, inputs=_INPUTS, ceilings=ceilings)
    if jax.process_index() > 0:
        return
    print(table(rows))
    plot(rows, folder / "bench_moe.png")
    print(f"wrote {folder}/bench_moe.json and bench_moe.png")


def run_cell(shape: moe_cases.Shape, wire: WireFormat, layers: list[str], ceilings) -> list[dict[str, Any]]:
    """One row per layer of one shape. A layer that runs out of memory has no time, and its row says so."""
    rows: list[dict[str, Any]] = []
    for name in layers:
        quantized = name.startswith("nvfp4")
        floors = moe_cases.floors_us(shape, wire if quantized else "bf16", ceilings, quantized=quantized)
        row: dict[str, Any] = {
            "layer": name, "wire_format": wire if quantized else "bf16", **shape._asdict(), "us": None,
            "floor_us": round(sum(floors.values()), 1), "floors_us": {k: round(v, 2) for k, v in floors.items()},
        }  # fmt: skip
        failures: dict[str, str] = {}
        with timing.noting_out_of_memory(failures, "error"):
            row |= measure_layer(shape, wire, name, about_us=sum(floors.values()))
        rows.append(row | failures)
    timed = {row["layer"]: row for row in rows if row["us"] is not None}
    for row in timed.values():
        for name in ("bf16", "bf16 jax"):
            if row["layer"].startswith("nvfp4") and name in timed:
                row[f"against {name}"] = round(timed[name]["us"] / row["us"], 2)
                row["against bf16, floors"] = round(timed[name]["floor_us"] / row["floor_us"], 2)
    return rows


def measure_layer(shape: moe_cases.Shape, wire: WireFormat, name: str, *, about_us: float) -> dict[str, Any]:
    """The measured columns of one row: microseconds, bytes of its collectives, and with --profile its stages."""
    # On a mesh with a second axis fp4jax does not use the kernels that store to other devices, but an all_to_all. The
    # same happens on several hosts.
    axes = {"host": 1, "ep": shape.ranks} if name.endswith("nccl") else {"ep": shape.ranks}
    make_mesh = functools.partial(jax.make_mesh, devices=jax.devices()[: shape.ranks])
    mesh = make_mesh((shape.ranks,), ("ep",), axis_types=(AxisType.Auto,))
    on = make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    quantized = name.startswith("nvfp4")
    weights = moe_cases.make_weights(shape, mesh, with_dense=not quantized)
    if quantized:
        layer, experts = moe_cases.nvfp4_layer(shape, wire), weights.packed
    else:
        layer, experts = moe_cases.bf16_layer(shape, own=name == "bf16"), weights.dense
    step = functools.partial(moe_cases.layer_step, layer=layer)
    state = (np.zeros(shape.ranks, np.int32), ReceiveBuffers() if name.endswith("low latency") else None)
    operands = (*moe_cases.make_tokens(shape, mesh), experts)
    make_chain = functools.partial(ChainedSteps, on, step, state, operands, unrolled=2, about_us=about_us)
    chain = make_chain()
    found: dict[str, Any] = {"us": round(chain.us(_REPEATS.value), 1)}
    exchanged = [a.bytes for a in wire_bytes(chain.compiled).all_to_alls]
    found["all_to_all_bytes"] = exchanged[: len(exchanged) // chain.steps]
    if _PROFILE.value:
        if options := compiler_options():  # another program, whose kernels the profiler can tell apart
            chain = make_chain(compiler_options=options)
        stages = stage_times(chain.compiled, chain.run, moe_cases.STAGES, repeats=1)
        per_layer = jax.process_count() / chain.steps  # a profile sees only the devices of its process
        found["stages_us"] = {stage: round(time * per_layer, 2) for stage, time in stages.items()}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as aligned text, with the stages of a layer below its row."""
    head = f"{'model':<14}{'ranks':>5}{'T':>7}  {'layer':<12}{'us':>10}{'floors':>9}"
    lines = [head + f"{'bf16':>8}{'bf16 jax':>10}{'floors':>8}"]
    ratio = lambda r, key: f"{r[key]:.2f}x" if key in r else ""  # noqa: E731
    for r in rows:
        us = f"{r['us']:.1f}" if r["us"] is not None else r["error"].partition(":")[0]
        lines.append(
            f"{r['model']:<14}{r['ranks']:>5}{r['tokens']:>7}  {r['layer']:<12}{us:>10}{r['floor_us']:>9.1f}"
            f"{ratio(r, 'against bf16'):>8}{ratio(r, 'against bf16 jax'):>10}{ratio(r, 'against bf16, floors'):>8}"
        )
        if "stages_us" in r:
            lines.append(" " * 28 + ", ".join(f"{stage} {time:.1f}" for stage, time in r["stages_us"].items() if time))
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the time per layer as bars, in a group per model and T, with the sum of floors as a line across each bar."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["us"] is not None]
    ranks = sorted({r["ranks"] for r in rows})
    if not rows:
        return
    figure, axes = plt.subplots(len(ranks), 1, figsize=(12, 4.5 * len(ranks)), squeeze=False)
    names = [name for name in LAYERS if any(r["layer"] == name for r in rows)]
    width = 0.8 / len(names)
    for (axis,), n in zip(axes, ranks, strict=True):
        groups = list(dict.fromkeys((r["model"], r["tokens"]) for r in rows if r["ranks"] == n))
        for i, name in enumerate(names):
            chosen = {(r["model"], r["tokens"]): r for r in rows if r["ranks"] == n and r["layer"] == name}
            place = np.array([g for g, key in enumerate(groups) if key in chosen]) + (i + 0.5 - len(names) / 2) * width
            some = [chosen[key] for key in groups if key in chosen]
            axis.bar(place, [r["us"] for r in some], width, label=name, color=f"C{i}")
            floors = [r["floor_us"] for r in some]
            axis.hlines(floors, place - width / 2, place + width / 2, color="black", linewidth=1)
        axis.set(yscale="log", ylabel="us per layer", title=f"{n} ranks; lines: sum of floors")
        axis.set_xticks(
            range(len(groups)), [f"{model}, T={t}" for model, t in groups], fontsize=7, rotation=20, ha="right"
        )
        axis.legend(fontsize=8, ncols=len(names), loc="upper right")
        axis.set_ylim(top=2.5 * max(r["us"] for r in rows if r["ranks"] == n))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    script.run(main)
