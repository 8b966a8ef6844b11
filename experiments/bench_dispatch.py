"""Measures dispatch and combine between devices: kernels over NVLink, NCCL, and three wire formats.

    python experiments/bench_dispatch.py                               # everything; some minutes on a node of GPUs
    python experiments/bench_dispatch.py --tokens=128,4096 --wire_formats=nvfp4 --routings=random
    JAX_NUM_CPU_DEVICES=2 JAX_PLATFORMS=cpu python experiments/bench_dispatch.py     # checks that it runs, not how fast

It measures the time of a whole dispatch (quantizing, computing the place of every row, the exchange), of a whole
combine, and of the all_to_all of bf16 rows that each replaces. Implementations:

    mosaic_gpu     kernels that store into the memory of the other devices
    low_latency    the same kernels, with receive buffers that the program keeps from step to step
    nccl           one all_to_all through NCCL, with this library's kernels before and after it
    xla            plain JAX

On one device (--ranks=1) only nccl and xla run. Two routings: "random" sends each token to --top_k of --experts, in
buffers for the worst case; "even" sends each token to one device, the same number to each, in buffers of that size.

One timed call runs dozens of steps. The ids of a step depend on the result of the step before it, so that the compiler
can neither overlap nor remove steps. Writes bench_dispatch.json and bench_dispatch.png into --output_dir.
"""

import os

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # turns NVLink multicast off

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tqdm import tqdm

from experiments.cases.dispatch import (
    Cell,
    combine_step,
    dispatch_step,
    exchange,
    exchange_and_sum,
    make_routing,
    rows_sent,
)
from experiments.harness import outputs, script, timing
from experiments.harness.chained_steps import ChainedSteps
from experiments.harness.flag_values import choices, integers
from fp4jax.expert_parallel import WIRE_FORMATS, ReceiveBuffers, dispatch

_RANKS = flags.DEFINE_list(
    "ranks", None, "Numbers of devices to measure with; default: those of 2, 4 and 8 that exist."
)
_TOKENS = flags.DEFINE_list("tokens", None, "Tokens per device; default: 16,128,1024,4096,16384 (CPU: 16).")
_FORMATS = flags.DEFINE_list("wire_formats", None, "Wire formats; default: nvfp4,fp8,bf16.")
_IMPLEMENTATIONS = flags.DEFINE_list(
    "implementations", None, "Implementations; default: mosaic_gpu,low_latency,nccl,xla (CPU: xla)."
)
_ROUTINGS = flags.DEFINE_list("routings", None, "Routings, of random and even; default: both.")
_FORM = flags.DEFINE_enum(
    "form",
    "per_peer",
    ["per_peer", "per_slot"],
    "What is sent: one row per token and device, or one row per token and expert.",
)
_HIDDEN = flags.DEFINE_integer("hidden", None, "Hidden size, H; default: 7168 (CPU: 256).", lower_bound=32)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls per implementation; the median counts.", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "output/bench_dispatch", "Folder for the JSON and PNG files.")

_EXPERTS = flags.DEFINE_integer("experts", 64, "Number of experts on all devices together.", lower_bound=1)
_TOP_K = flags.DEFINE_integer("top_k", 8, "Experts per token with random routing.", lower_bound=1)

# Marker and line of every implementation in the plot; the colour stands for the wire format.
_STYLES: dict[str, dict[str, Any]] = {
    "mosaic_gpu": {"marker": "o", "linestyle": "-"},
    "low_latency": {"marker": "^", "linestyle": "-"},
    "nccl": {"marker": "s", "linestyle": "--"},
    "xla": {"marker": "x", "linestyle": ":"},
}
_INPUTS = (
    "normal bf16 tokens; random: each token's experts drawn uniformly with a fixed seed, worst-case buffers; even: "
    "every token to one device, as many to each; wall time per step of a program of many steps, median over calls"
)
AXIS = P("ep")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    folder = outputs.check_folder("output_dir", _OUTPUT_DIR.value, "bench_dispatch.json", "bench_dispatch.png")
    gpu = timing.on_gpu()
    ranks = integers("ranks", _RANKS.value or [n for n in (2, 4, 8) if n <= jax.device_count()])
    if not ranks or max(ranks) > jax.device_count():
        asked = f"asked for {ranks}" if ranks else "of which there must be 2, or --ranks=1"
        raise app.UsageError(f"--ranks: JAX sees {jax.device_count()} devices, {asked}")
    experts, top_k = _EXPERTS.value, _TOP_K.value
    if top_k > experts or any(experts % n for n in ranks):
        raise app.UsageError(f"--experts={experts} must be a multiple of {ranks} and at least --top_k={top_k}")
    tokens = integers("tokens", _TOKENS.value or ((16, 128, 1024, 4096, 16384) if gpu else (16,)))
    formats = choices("wire_formats", _FORMATS.value, WIRE_FORMATS, WIRE_FORMATS)
    routings = choices("routings", _ROUTINGS.value, ("random", "even"), ("random", "even"))
    names = choices(
        "implementations",
        _IMPLEMENTATIONS.value,
        ("mosaic_gpu", "low_latency", "nccl", "xla"),
        ("mosaic_gpu", "low_latency", "nccl", "xla") if gpu else ("xla",),
    )
    hidden = _HIDDEN.value or (7168 if gpu else 256)
    if hidden % 16:
        raise app.UsageError(f"--hidden={hidden} must be a multiple of 16, a block of NVFP4")
    if not gpu and names != ["xla"]:
        raise app.UsageError(f"--implementations={','.join(names)}: kernels need GPUs, without them there is xla")
    if ranks == [1] and not set(names) & {"nccl", "xla"}:
        raise app.UsageError("--ranks=1 has nobody to store to: --implementations=nccl or xla")
    rows: list[dict[str, Any]] = []
    cells = [
        Cell(n, t, routing, hidden, _FORM.value, experts, 1 if routing == "even" else top_k)
        for n, routing, t in itertools.product(ranks, routings, tokens)
    ]
    progress = tqdm(cells, unit="cell")
    for cell in progress:
        progress.set_description(f"{cell.ranks} ranks, T={cell.tokens}, {cell.routing}")
        rows += run_cell(cell, formats, names)
        timing.save_results(folder / "bench_dispatch.json", "bench_dispatch", rows, inputs=_INPUTS)
    print(table(rows))
    plot(rows, folder / "bench_dispatch.png")
    print(f"wrote {folder}/bench_dispatch.json and bench_dispatch.png")


def run_cell(cell: Cell, formats: list[str], names: list[str]) -> list[dict[str, Any]]:
    """Measure one cell: the bf16 all_to_alls, then every wire format and implementation of dispatch, then combine."""
    mesh = jax.make_mesh((cell.ranks,), ("ep",), axis_types=(AxisType.Auto,), devices=jax.devices()[: cell.ranks])
    put = lambda a: jax.device_put(a, NamedSharding(mesh, AXIS))  # noqa: E731
    x = put(jax.random.normal(jax.random.key(0), (cell.ranks * cell.tokens, cell.hidden), jnp.bfloat16))
    ids, weights = (put(a) for a in make_routing(cell))
    copies = float(np.mean(rows_sent(cell, np.asarray(ids))))
    received = cell.ranks * cell.capacity
    fill = jax.shard_map(
        lambda key: jax.random.normal(key[0], (received, cell.hidden), jnp.bfloat16), mesh=mesh, in_specs=AXIS,
        out_specs=AXIS,
    )  # fmt: skip
    y = jax.jit(fill)(put(jax.random.split(jax.random.key(1), cell.ranks)))
    options: dict[str, Any] = dict(
        num_experts=cell.experts, form=cell.form, wire_format="bf16", pair_capacity=cell.capacity
    )
    placed = jax.shard_map(
        lambda *a: dispatch(*a, **options, implementation="xla").send_map, mesh=mesh, in_specs=AXIS, out_specs=AXIS
    )
    send_map = jax.jit(placed)(x, ids, weights)
    unrolled = 12 if cell.tokens <= 512 else 8 if cell.tokens <= 8192 else 4

    def timed(*args):
        failures: dict[str, str] = {}
        with timing.noting_out_of_memory(failures, "error"):
            chain = ChainedSteps(mesh, *args, unrolled=unrolled, about_us=25 + cell.tokens / 20)
            return {"us": round(chain.us(_REPEATS.value), 2)}
        return {"us": None, **failures}

    if cell.ranks == 1:  # the kernels store to other devices
        names = [name for name in names if name in ("nccl", "xla")]
    rows = []

    def add(op, implementation, wire, times, baseline=None):
        row_bytes = {"nvfp4": 9 / 16, "fp8": 1 + 1 / 32, "bf16": 2}[wire] * cell.hidden
        # The kernels send only the rows that exist, an all_to_all sends the whole buffers.
        sent = copies * cell.tokens if implementation in ("mosaic_gpu", "low_latency") else received
        away, us = sent * row_bytes * (cell.ranks - 1) / cell.ranks, times["us"]
        row = {
            "op": op, "implementation": implementation, "wire_format": wire, "ranks": cell.ranks, "T": cell.tokens,
            "routing": cell.routing, "form": cell.form, "H": cell.hidden, "experts": cell.experts,
            "top_k": cell.top_k, **times, "bytes_out": round(away),
            "gbps_out": None if us is None else round(away / us / 1e3, 1),
            "baseline": None, "baseline_us": None, "speedup": None,
        }  # fmt: skip
        # In the per-slot form the baseline's buffers are R times what is sent, so a ratio to it would say nothing.
        if us is not None and baseline is not None and baseline["us"] is not None and cell.form == "per_peer":
            row |= baseline_columns(baseline, us)
        rows.append(row)
        return row

    there = add("all_to_all", "xla", "bf16", timed(exchange, y, ()))
    back = add("all_to_all + sum", "xla", "bf16", timed(exchange_and_sum, y, ()))
    for wire, name in itertools.product(formats, names):
        step = functools.partial(dispatch_step, cell=cell, wire=wire, implementation=name)
        state = (np.zeros(cell.ranks, np.int32), ReceiveBuffers()) if name == "low_latency" else None
        add("dispatch", name, wire, timed(step, state, (x, ids, weights)), there)
    for name in (name for name in names if name != "low_latency"):
        step = functools.partial(combine_step, cell=cell, implementation=name)
        add("combine", name, "bf16", timed(step, None, (y, send_map, weights)), back)
    return rows


def baseline_columns(baseline: dict[str, Any], us: float) -> dict[str, Any]:
    """The columns of a row that name the row it is compared with, and the ratio of their times."""
    name = f"{baseline['op']} bf16"
    return {"baseline": name, "baseline_us": baseline["us"], "speedup": round(baseline["us"] / us, 2)}


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as aligned text."""
    lines = [f"{'':40}{'ranks':>6}{'T':>7}{'us':>14}{'GB/s out':>10}{'against bf16':>14}"]
    for r in rows:
        name = f"{r['op']}, {r['wire_format']}, {r['implementation']}, {r['routing']}"
        rate = "" if r["gbps_out"] is None else f"{r['gbps_out']:.0f}"
        ratio = "" if r["speedup"] is None else f"{r['speedup']:.2f}x"
        us = f"{r['us']:.1f}" if r["us"] is not None else r["error"].partition(":")[0]
        lines.append(f"{name:40}{r['ranks']:>6}{r['T']:>7}{us:>14}{rate:>10}{ratio:>14}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw how many times as fast as the bf16 all_to_all each implementation is, over the tokens per device.

    There is a line of two panels, dispatch and combine, per number of devices.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = sorted({r["ranks"] for r in rows})
    figure, axes = plt.subplots(len(ranks), 2, figsize=(14, 4.2 * len(ranks)), squeeze=False)
    for line, n in zip(axes, ranks, strict=True):
        for axis, op in zip(line, ("dispatch", "combine"), strict=True):
            of = (n, op, rows[0]["routing"])
            chosen = [r for r in rows if (r["ranks"], r["op"], r["routing"]) == of and r["speedup"] is not None]
            chosen.sort(key=lambda r: r["T"])  # rows may come from several runs
            keys = {(r["wire_format"], r["implementation"]) for r in chosen}
            for key in sorted(keys, key=lambda key: (WIRE_FORMATS.index(key[0]), list(_STYLES).index(key[1]))):
                some = [r for r in chosen if (r["wire_format"], r["implementation"]) == key]
                style = {"color": f"C{WIRE_FORMATS.index(key[0])}", **_STYLES[key[1]]}
                axis.plot([r["T"] for r in some], [r["speedup"] for r in some], label=", ".join(key), **style)
            axis.axhline(1, color="black", linewidth=0.8)
            compared = "all_to_all of bf16" + (" and sum" if op == "combine" else "")
            axis.set(xscale="log", xlabel="tokens per device", ylabel=f"times as fast as {compared}")
            axis.set_title(f"{op}, {n} ranks, {rows[0]['routing']} routing")
            if chosen:
                axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    script.run(main)
