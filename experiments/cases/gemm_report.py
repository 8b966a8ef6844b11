"""The table of ratios and the picture of `bench_gemm`."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cases.gemm import GemmShape
from experiments.harness import timing


def ratios(rows: list[dict[str, Any]]) -> str:
    """The weight bandwidth, and the speed compared with the quoted times, as text; empty if no time is quoted."""
    lines = []
    for r in rows:
        if r.get("fp4_peer_us") and r["us"] is not None:
            s, prototype = r["shape"], r["prototype_us"]
            lines.append(
                f"{r['op']:24} {s['E']}x{s['K']}x{s['N']} m={s['m']:<5} {r['weight_gbps']:6.0f} GB/s of weights, "
                f"FP4 peer / ours {r['fp4_peer_us'] / r['us']:.2f}, error {r['error']:.1e}"
                + (f", prototype / ours {prototype / r['us']:.2f}" if prototype else "")
            )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], ceilings: timing.Ceilings, path: Path) -> None:
    """Draw TFLOP/s over FLOP per byte, with the measured roofline.

    Every shape has a colour; our results are circles, the fastest bf16 results are squares.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5))
    ours = [r for r in rows if r["op"] == "masked_grouped_gemm" and r["shape"]["distribution"] == "multinomial"]
    ours = [r for r in ours if r["us"] is not None]
    shapes = sorted({(r["shape"]["E"], r["shape"]["K"], r["shape"]["N"]) for r in ours})
    for colour, key in zip(itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"]), shapes, strict=False):
        chosen = [r for r in ours if (r["shape"]["E"], r["shape"]["K"], r["shape"]["N"]) == key]
        intensity = [
            GemmShape(*key, r["shape"]["m"]).flops / GemmShape(*key, r["shape"]["m"]).num_bytes for r in chosen
        ]
        axis.plot(intensity, [r["tflops"] for r in chosen], "o-", color=colour, label="E={} K={} N={}".format(*key))
        based = [(GemmShape(*key, r["shape"]["m"]), r) for r in chosen if r["baseline_us"]]
        axis.plot(
            [s.flops / s.num_bytes_bf16 for s, _ in based], [s.flops / r["baseline_us"] / 1e6 for s, r in based], "s--",
            color=colour, markersize=3.5, linewidth=0.8, zorder=1,
        )  # fmt: skip
    intensity = np.geomspace(0.5, 4000, 100)
    roof = np.minimum(intensity * ceilings.copy_bytes_per_s, ceilings.bf16_flops) / 1e12
    axis.plot(intensity, roof, color="black", linewidth=1, label="roofline (measured copy, measured bf16 matmul)")
    axis.set(xscale="log", yscale="log", xlabel="FLOP per byte (weights, x and result once)", ylabel="TFLOP/s")
    axis.set_title("Grouped GEMM, NVFP4 weights (circles) and fastest bf16 (squares)")
    axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
