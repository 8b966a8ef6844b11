"""Lines and picture of `plot_speedup`: the grouped GEMM against bf16, over the rows per expert."""

import json
from pathlib import Path
from typing import Any

# (E, K, N) of bench_gemm's shapes: the experts' products of these models, with the experts of one of several GPUs.
_MODELS = {
    (32, 7168, 4096): "DeepSeek-V3 gate and up",
    (32, 2048, 7168): "DeepSeek-V3 down",
    (64, 2048, 1536): "Qwen3-30B gate and up",
    (64, 768, 2048): "Qwen3-30B down",
}
# Dark enough for text on white.
_COLORS = ("#1f4e9c", "#b04a00", "#1b7a3d", "#a01c3c", "#5b3a8e", "#444444")
Lines = dict[str, list[tuple[int, float]]]


def speedups(rows: list[dict[str, Any]]) -> Lines:
    """(Rows per expert, how many times as fast as bf16) in rising order, under the name of each shape."""
    lines: Lines = {}
    for r in rows:
        s = r["shape"]
        if (r["op"], s["distribution"]) == ("masked_grouped_gemm", "multinomial") and r["speedup"] is not None:
            name = _MODELS.get((s["E"], s["K"], s["N"]), f"{s['E']} experts, K={s['K']}, N={s['N']}")
            lines.setdefault(name, []).append((s["m"], r["speedup"]))
    return {name: sorted(points) for name, points in lines.items()}


def plot(lines: Lines, path: Path, device: str) -> None:
    """The picture; its PNG keeps `lines` as JSON under "Description", so that a test can tell an old picture.

    All lines end close to 1x for many rows and begin far apart for few, so the names stand where the lines begin.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted({m for points in lines.values() for m, _ in points})
    top = max(ratio for points in lines.values() for _, ratio in points)
    # A page shows the picture 700 pixels wide, so that 10 points become 14 pixels.
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    # The names take the part left of the first number of rows, which needs a width where there is one number only.
    left = rows[0] / max(rows[-1] / rows[0], 64) ** 0.62
    axis.set(xscale="log", xlim=(left, rows[-1] * 1.6), ylim=(0, 1.08 * top))
    axis.axhline(1, color="black", linewidth=1)
    axis.text(left, 1 - 0.015 * top, " as fast as bf16", va="top", fontsize=10)
    free = 2 * top  # the height below which there is no name yet
    for index, (name, points) in enumerate(sorted(lines.items(), key=lambda line: -line[1][0][1])):
        (start, ratio), color = points[0], _COLORS[index % len(_COLORS)]
        axis.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, linewidth=2)
        height = min(ratio, free)
        axis.annotate(
            f"{name}  {ratio:.1f}x", (start, height), (-8, 0), textcoords="offset points",
            ha="right", va="center", color=color, fontsize=10,
        )  # fmt: skip
        free = height - 0.06 * top
    axis.set_xticks(rows, [str(m) for m in rows], fontsize=10)
    axis.set_yticks(range(int(top) + 1), [f"{ratio}x" for ratio in range(int(top) + 1)], fontsize=10)
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("rows per expert", fontsize=10, loc="right")
    kind = " ".join(device.split()[:2])
    axis.set_title(f"NVFP4 grouped GEMM: times as fast as bf16 ({kind})", fontsize=12, loc="left")
    figure.savefig(path, dpi=160, metadata={"Description": json.dumps(lines)})
    plt.close(figure)
