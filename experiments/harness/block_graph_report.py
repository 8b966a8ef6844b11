"""The tables and pictures of `bench_block_graph`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.harness.graph_kernels import Kernel


def block_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of the first part as aligned text."""
    columns = f"{'us':>11}{'host, us':>10}{'kernels, us':>13}{'in graphs':>11}"
    lines = [f"{'block':<14}{'tokens':>7}{'bucket':>7}{columns}  variant"]
    for r in (r for r in rows if r["part"] == "blocks"):
        kernels = f"{'':>24}"
        if r["us"] is None:
            reason = r["error"].partition(":")[0]
            lines.append(f"{r['block']:<14}{r['tokens']:>7}{'':>7}{reason:>21}{kernels}  {r['variant']}")
            continue
        if "kernel_us" in r:
            of = f"{r['kernels_in_graphs']:.0f} of {r['kernels_outside'] + r['kernels_in_graphs']:.0f}"
            kernels = f"{r['kernel_us']:>13.1f}{of:>11}"
        times = f"{r['us']:>11.1f}{r['host_us']:>10.1f}{kernels}"
        lines.append(f"{r['block']:<14}{r['tokens']:>7}{r['bucket']:>7}{times}  {r['variant']}")
    return "\n".join(lines)


# --- start ---


def plan_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of the third part as aligned text."""
    lines = [f"{'buckets':<20}{'rows':>12}{'padding':>9}"]
    for r in rows:
        padding = 1 - r["tokens"] / r["padded"]
        lines.append(f"{r['plan']:<20}{r['padded']:>12}{padding:>9.1%}  {', '.join(map(str, r['buckets']))}")
    return "\n".join(lines)


def plot_timelines(timelines: dict[str, list[Kernel]], path: Path) -> None:
    """Draw the kernels of two decode steps, with a line per variant; kernels in a CUDA graph are lighter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(13, 1 + 0.6 * len(timelines)))
    for line, kernels in enumerate(timelines.values()):
        begin = kernels[0].begin_us
        colors = ["tab:cyan" if k.in_graph else "tab:blue" for k in kernels]
        axis.broken_barh([(k.begin_us - begin, k.us) for k in kernels], (line - 0.35, 0.7), facecolors=colors)
    axis.set_yticks(range(len(timelines)), list(timelines), fontsize=8)
    axis.set(xlabel="us", title="kernels of two decode steps, light: launched by a graph (under the profiler)")
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the time of every block and variant, and the padding of every set of buckets."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), width_ratios=(3, 1))
    blocks = [r for r in rows if r["part"] == "blocks" and r["us"] is not None]
    groups = list(dict.fromkeys((r["block"], r["tokens"]) for r in blocks))
    variants = list(dict.fromkeys(r["variant"] for r in blocks))
    for i, variant in enumerate(variants):
        some = {(r["block"], r["tokens"]): r["us"] for r in blocks if r["variant"] == variant}
        place = [g + 0.2 * (i - len(variants) / 2) for g, key in enumerate(groups) if key in some]
        left.bar(place, [some[key] for key in groups if key in some], 0.18, label=variant)
    left.set_xticks(range(len(groups)), [f"{block}, {n}" for block, n in groups], fontsize=7, rotation=45, ha="right")
    left.set(yscale="log", ylabel="us per call", title="calls that follow each other")
    left.set_ylim(top=2 * max((r["us"] for r in blocks), default=1))  # room for the legend
    left.legend(fontsize=8, ncols=len(variants), loc="upper left")
    plans = [r for r in rows if r["part"] == "plans"]
    right.bar([r["plan"] for r in plans], [100 * (1 - r["tokens"] / r["padded"]) for r in plans])
    right.set(ylabel="% of the rows", title="padding")
    right.tick_params(axis="x", labelsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
