"""Dispatch of tokens to their experts' devices and the way back: kernels over NVLink, NCCL, wire formats.

    python experiments/bench_dispatch.py                               # every cell; some minutes on a node of GPUs
    python experiments/bench_dispatch.py --tokens=128,4096 --wire_formats=nvfp4 --routings=random
    JAX_NUM_CPU_DEVICES=2 JAX_PLATFORMS=cpu python experiments/bench_dispatch.py     # how it runs, not how fast

Time of one dispatch with everything in it (quantize, which row goes where, the exchange), of one combine, and of the
all_to_all of bf16 rows that they replace, on all devices or on --ranks of them. Implementations: mosaic_gpu (kernels
store into the peers' memory), nccl (our kernels around one all_to_all), xla (no kernel of ours).

A call runs dozens of steps. A step takes its ids from the step before (a zero times one of its results is added), so
that steps neither overlap nor vanish; their results are kept. Two routings: "random", the top 8 of 64 experts, buffers
for the worst case; "even", every token to one device, as many to each, and buffers of exactly that size. Writes
bench_dispatch.json and bench_dispatch.png.
"""

import os

os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # no NVLink multicast

import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from tqdm import tqdm

from experiments.chained_steps import ChainedSteps
from experiments.flag_values import choices, integers
from fp4jax import benchmarking
from fp4jax.all_to_all import combine_all_to_all, dispatch_all_to_all
from fp4jax.expert_parallel import Dispatched, combine, dispatch
from fp4jax.low_latency import ReceiveBuffers
from fp4jax.wire_formats import WIRE_FORMATS
from pallas_kernels.row_plan import Routes

_RANKS = flags.DEFINE_list("ranks", None, "Numbers of devices; default: all of 2, 4, 8 that there are.")
_TOKENS = flags.DEFINE_list("tokens", None, "Tokens per device; default: 16,128,1024,4096,16384 (CPU: 16).")
_FORMATS = flags.DEFINE_list("wire_formats", None, "Default: nvfp4, fp8 and bf16.")
_IMPLEMENTATIONS = flags.DEFINE_list("implementations", None, "Default: mosaic_gpu, nccl and xla (CPU: xla).")
_ROUTINGS = flags.DEFINE_list("routings", None, "random, even; default: both.")
_FORM = flags.DEFINE_enum("form", "per_peer", ["per_peer", "per_slot"], "What a row is: see fp4jax.dispatch.")
_HIDDEN = flags.DEFINE_integer("hidden", None, "H; default: 7168 (CPU: 256).", lower_bound=32)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls per cell, of which the median counts.", lower_bound=1)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for JSON and PNG; default: output/bench_dispatch.")

EXPERTS, TOP_K = 64, 8
_INPUTS = (
    "normal bf16 tokens; random: the top 8 of 64 experts drawn uniformly with a fixed seed, worst-case buffers; even: "
    "every token to one device, as many to each; wall time per step of a program of many steps, median over calls"
)
AXIS = P("ep")


class Cell(NamedTuple):
    """What is measured together: one mesh, number of tokens per device and routing."""

    ranks: int
    tokens: int
    routing: str
    hidden: int
    form: str

    @property
    def capacity(self) -> int:
        """Rows per sender and receiver."""
        if self.routing == "even":
            return -(-self.tokens // self.ranks)
        return self.tokens if self.form == "per_peer" else self.tokens * self.top_k

    @property
    def top_k(self) -> int:
        return 1 if self.routing == "even" else TOP_K


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    gpu = benchmarking.on_gpu()
    ranks = integers("ranks", _RANKS.value or [n for n in (2, 4, 8) if n <= jax.device_count()])
    if not ranks or max(ranks) > jax.device_count() or min(ranks) < 2:
        raise app.UsageError(f"--ranks: needs 2 devices or more, JAX sees {jax.device_count()}, asked for {ranks}")
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
    folder = Path(_OUTPUT_DIR.value or "output/bench_dispatch")
    rows: list[dict[str, Any]] = []
    cells = [Cell(r, t, routing, hidden, _FORM.value) for r, routing, t in itertools.product(ranks, routings, tokens)]
    progress = tqdm(cells, unit="cell")
    for cell in progress:
        progress.set_description(f"{cell.ranks} ranks, T={cell.tokens}, {cell.routing}")
        rows += run_cell(cell, formats, names)
        benchmarking.save_results(folder / "bench_dispatch.json", "bench_dispatch", rows, inputs=_INPUTS)
    print(table(rows))
    plot(rows, folder / "bench_dispatch.png")
    print(f"wrote {folder}/bench_dispatch.json and bench_dispatch.png")


def run_cell(cell: Cell, formats: list[str], names: list[str]) -> list[dict[str, Any]]:
    """Rows of one cell: the all_to_alls of bf16, then every wire format and implementation, then the ways back."""
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
    options = dict(num_experts=EXPERTS, form=cell.form, wire_format="bf16", pair_capacity=cell.capacity)
    placed = jax.shard_map(
        lambda *a: dispatch(*a, **options, implementation="xla").send_map, mesh=mesh, in_specs=AXIS, out_specs=AXIS
    )
    send_map = jax.jit(placed)(x, ids, weights)
    unrolled = 12 if cell.tokens <= 512 else 8 if cell.tokens <= 8192 else 4

    def timed(*args):
        chain = ChainedSteps(mesh, *args, unrolled=unrolled, about_us=25 + cell.tokens / 20)
        return chain.us(_REPEATS.value)

    rows = []

    def add(op, implementation, wire, us, baseline=None):
        row_bytes = {"nvfp4": 9 / 16, "fp8": 1 + 1 / 32, "bf16": 2}[wire] * cell.hidden
        # Kernels of ours send the rows that there are, an all_to_all the whole buffers.
        sent = copies * cell.tokens if implementation in ("mosaic_gpu", "low_latency") else received
        away = sent * row_bytes * (cell.ranks - 1) / cell.ranks
        row = {
            "op": op, "implementation": implementation, "wire_format": wire, "ranks": cell.ranks, "T": cell.tokens,
            "routing": cell.routing, "form": cell.form, "H": cell.hidden, "us": round(us, 2),
            "gbps_out": round(away / us / 1e3, 1), "baseline": None, "baseline_us": None, "speedup": None,
        }  # fmt: skip
        if baseline is not None and cell.form == "per_peer":  # per slot the buffers are R times what is sent
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
    """What a row says of the row that it is compared with."""
    name = f"{baseline['op']} bf16"
    return {"baseline": name, "baseline_us": baseline["us"], "speedup": round(baseline["us"] / us, 2)}


def make_routing(cell: Cell) -> tuple[jax.Array, jax.Array]:
    """ids i32 and weights f32 [ranks * T, k]."""
    rng = np.random.default_rng(0)
    shape = (cell.ranks, cell.tokens)
    if cell.routing == "even":
        local = EXPERTS // cell.ranks
        ids = np.arange(cell.tokens) % cell.ranks * local + rng.integers(0, local, shape)
        ids = ids[..., None]
    else:
        ids = np.argsort(rng.random((*shape, EXPERTS)), axis=-1)[..., :TOP_K]
    ids = jnp.asarray(ids.reshape(-1, cell.top_k), jnp.int32)
    return ids, jnp.asarray(rng.random(ids.shape), jnp.float32)


def rows_sent(cell: Cell, ids: np.ndarray) -> np.ndarray:
    """Rows that each token becomes."""
    if cell.form == "per_slot":
        return np.full(len(ids), cell.top_k)
    owner = ids // (EXPERTS // cell.ranks)
    return (owner[:, :, None] == np.arange(cell.ranks)).any(axis=1).sum(axis=1)


# --- steps: (state, operands, zero) -> (next state, results that must be computed) ---


def exchange(state, operands, zero, *, ranks):
    """bf16 rows of the worst case, without saying which token is where."""
    del operands, zero
    state = lax.all_to_all(state.reshape(ranks, -1, state.shape[-1]), "ep", 0, 0).reshape(state.shape)
    return state, ()


def exchange_and_sum(state, operands, zero, *, ranks):
    """The same, and the rows of all devices added up."""
    state, _ = exchange(state, operands, zero, ranks=ranks)
    wide = state.reshape(ranks, -1, state.shape[-1]).astype(jnp.float32)
    return state, jnp.sum(wide, axis=0).astype(state.dtype)


def dispatch_step(state, operands, zero, *, ranks, cell, wire, implementation):
    """One dispatch; low_latency: state is a number and the buffers that the program keeps."""
    buffers = None
    if implementation == "low_latency":
        implementation, (state, buffers) = None, state
    (x, ids, weights), state = lax.optimization_barrier((operands, state))
    ids = ids + zero * state
    scale = jnp.float32(0.01) if wire == "nvfp4" else None
    if implementation == "nccl":
        routes = Routes(cell.tokens, cell.top_k, ranks, EXPERTS // ranks, cell.capacity, cell.form)
        received = dispatch_all_to_all(
            [x], scale, ids, weights, routes=routes, axis_name="ep", encode=None if wire == "bf16" else wire,
            implementation=None,
        )  # fmt: skip
        return received[1][0, 0], received
    d = dispatch(
        x, ids, weights, num_experts=EXPERTS, form=cell.form, wire_format=wire, global_scale=scale,
        pair_capacity=cell.capacity, buffers=buffers, implementation=implementation,
    )  # fmt: skip
    if buffers is not None:  # what is in them stays there
        return (d.local_ids[:1, 0], d.buffers), (d.send_map,)
    return d.local_ids[0, 0], (jax.tree.leaves(d.x), d.local_ids, d.local_weights, d.send_map)


def combine_step(state, operands, zero, *, ranks, cell, implementation):
    """One combine of rows that are there already."""
    (y, send_map, weights), state = lax.optimization_barrier((operands, state))
    send_map = send_map + zero * state
    home = weights if cell.form == "per_slot" else None
    if implementation == "nccl":
        home = jnp.ones(send_map.shape, jnp.float32) if home is None else home
        out = combine_all_to_all(y, send_map, home, devices=ranks, axis_name="ep", implementation=None)
    else:
        width = 1 if cell.form == "per_slot" else cell.top_k
        ids, ones = jnp.zeros((y.shape[0], width), jnp.int32), jnp.ones((y.shape[0], width))
        d = Dispatched(None, ids, ones, send_map, jnp.int32(0))
        out = combine(y, d, topk_weights=home, implementation=implementation)
    return out[0, 0].astype(jnp.int32), out


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as aligned text."""
    lines = [f"{'':40}{'ranks':>6}{'T':>7}{'us':>10}{'GB/s out':>10}{'against bf16':>14}"]
    for r in rows:
        name = f"{r['op']}, {r['wire_format']}, {r['implementation']}, {r['routing']}"
        rate = "" if r["gbps_out"] is None else f"{r['gbps_out']:.0f}"
        ratio = "" if r["speedup"] is None else f"{r['speedup']:.2f}x"
        lines.append(f"{name:40}{r['ranks']:>6}{r['T']:>7}{r['us']:>10.1f}{rate:>10}{ratio:>14}")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed against the bf16 all_to_all over T: one panel for dispatch and one for the way back per number of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranks = sorted({r["ranks"] for r in rows})
    figure, axes = plt.subplots(len(ranks), 2, figsize=(11, 4.2 * len(ranks)), squeeze=False)
    for line, n in zip(axes, ranks, strict=True):
        for axis, op in zip(line, ("dispatch", "combine"), strict=True):
            of = (n, op, rows[0]["routing"])
            chosen = [r for r in rows if (r["ranks"], r["op"], r["routing"]) == of and r["speedup"] is not None]
            for key in dict.fromkeys((r["wire_format"], r["implementation"]) for r in chosen):
                some = [r for r in chosen if (r["wire_format"], r["implementation"]) == key]
                axis.plot([r["T"] for r in some], [r["speedup"] for r in some], "o-", label=", ".join(key))
            axis.axhline(1, color="black", linewidth=0.8)
            compared = "all_to_all of bf16" + (" and sum" if op == "combine" else "")
            axis.set(xscale="log", xlabel="tokens per device", ylabel=f"times as fast as {compared}")
            axis.set_title(f"{op}, {n} ranks, {rows[0]['routing']} routing")
            axis.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    app.run(main)
