"""The table and the pictures of bench_model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.harness.model_stages import STAGES

_COLORS = ("tab:blue", "tab:orange", "tab:gray", "tab:green", "tab:brown")
_STYLES = ("o-", "x--", "s:", "^-.")


def size_of(row: dict[str, Any]) -> str:
    """What a row measures, in words: all programs, the tokens of a prefill, or the requests and their context."""
    if row["phase"] == "compile":
        return "all programs"
    gpus = "" if row["ranks"] == 1 else f"{row['ranks']} x "
    if row["phase"] == "prefill":
        return f"{gpus}{row['tokens']} tokens"
    return f"{gpus}{row['requests']} x {row['context']}"


def model_text(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as aligned text, with the stages of a layer below its row."""
    head = f"{'model':<12}{'layers':>7} {'phase':<8}{'size':>18}  {'implementation':<22}{'experts':<8}{'dense':<7}"
    lines = [head + f"{'us/layer':>10}{'kernels':>10}{'number':>8}{'graphs':>7}{'floor':>9}{'%':>5}{'tokens/s':>11}"
             f"{'peak GB':>9}"]  # fmt: skip
    for r in rows:
        line = (
            f"{r['model']:<12}{r['layers']:>7} {r['phase']:<8}{size_of(r):>18}  {r['implementation']:<22}"
            f"{r['experts']:<8}{r['dense']:<7}"
        )
        if r["phase"] == "compile" and r["seconds"] is not None:
            peak = "" if r["peak_gb"] is None else f", peak {r['peak_gb']:.1f} GB"
            lines.append(
                f"{line}  {r['seconds']:.1f} s for {r['programs']} programs, "
                f"{r['seconds_from_cache']:.1f} s from JAX's compilation cache, "
                f"{r['seconds_from_store']:.1f} s from a store{peak}"
            )
            continue
        if r["us_per_layer"] is None:
            lines.append(f"{line}  {r.get('error', '')[:80]}")
            continue
        graphs = "" if r["in_graph"] is None else f"{r['in_graph']:.0%}"
        lines.append(
            f"{line}{_number(r['us_per_layer'], 10, 1)}{_number(r['kernel_us_per_layer'], 10, 1)}"
            f"{_number(r['kernels_per_layer'], 8, 1)}{graphs:>7}{_number(r['floor_us_per_layer'], 9, 1)}"
            f"{_number(r['percent_of_floor'], 5, 0)}{_number(r['tokens_per_s'], 11, 1)}{_number(r['peak_gb'], 9, 1)}"
        )
        if r["stages"]:
            lines.append(" " * 20 + ", ".join(f"{stage} {r['stages'][stage]:.1f}" for stage in STAGES))
    return "\n".join(lines)


def _number(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:>{width}.{digits}f}"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a line of pictures per model: tokens/s of decode and of prefill, and where a layer's time goes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["us_per_layer"] is not None]
    models = list(dict.fromkeys(r["model"] for r in rows))
    if not rows:
        return
    bars = {model: [r for r in rows if r["model"] == model and r["stages"] and _ours(r)] for model in models}
    heights = [max(5.0, 1 + 0.25 * len(bars[model])) for model in models]
    figure, axes = plt.subplots(
        len(models), 3, figsize=(19, sum(heights)), width_ratios=(3, 2, 4), height_ratios=heights, squeeze=False
    )
    for line, model in zip(axes, models, strict=True):
        some = [r for r in rows if r["model"] == model]
        _plot_rates(line[0], [r for r in some if r["phase"] == "decode"], "requests", f"{model}, decode")
        _plot_rates(line[1], [r for r in some if r["phase"] == "prefill"], "tokens", f"{model}, prefill")
        _plot_stages(line[2], bars[model], f"{model}: where a layer's time goes (wall time and its floor at the right)")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _plot_rates(axis: Any, rows: Sequence[dict[str, Any]], over: str, title: str) -> None:
    """Draw tokens/s over the column `over`: a color per context, and a style per implementation and formats."""
    contexts = list(dict.fromkeys(r["context"] for r in rows))
    variants = list(dict.fromkeys(_variant(r) for r in rows))
    for color, context in enumerate(contexts):
        for style, variant in enumerate(variants):
            some = [r for r in rows if (r["context"], _variant(r)) == (context, variant)]
            some.sort(key=lambda r: r[over])
            label = variant if context is None else f"{variant}, context {context}"
            axis.plot(
                [r[over] for r in some], [r["tokens_per_s"] for r in some], _STYLES[style % len(_STYLES)],
                color=f"C{color}", label=label,
            )  # fmt: skip
    axis.set(xlabel=over, ylabel="tokens/s", title=title)
    if rows:
        axis.set(xscale="log", yscale="log")
        axis.legend(fontsize=6)


def _plot_stages(axis: Any, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw a bar per row whose parts are the shares of the stages."""
    names = [f"{r['phase']} {size_of(r)}, {r['experts']}, {r['dense']}" for r in rows]
    totals, left = [sum(r["stages"].values()) or 1.0 for r in rows], [0.0] * len(rows)
    for stage, color in zip(STAGES, _COLORS, strict=True):
        part = [100 * r["stages"][stage] / total for r, total in zip(rows, totals, strict=True)]
        axis.barh(names, part, left=left, color=color, label=stage)
        left = [b + p for b, p in zip(left, part, strict=True)]
    for place, r in enumerate(rows):
        axis.text(101, place, f"{r['us_per_layer']:.0f} us, {r['floor_us_per_layer']:.0f}", va="center", fontsize=7)
    if rows:
        axis.invert_yaxis()
        axis.legend(fontsize=7, ncols=len(STAGES), loc="lower left", bbox_to_anchor=(0, -0.2))
    axis.tick_params(axis="y", labelsize=7)
    axis.set(xlabel="% of the kernels' time", title=title, xlim=(0, 120))


def _ours(row: dict[str, Any]) -> bool:
    return row["implementation"] == "fp4jax"


def _variant(row: dict[str, Any]) -> str:
    if not _ours(row):
        return row["implementation"]
    gpus = "" if row["ranks"] == 1 else f", {row['ranks']} GPUs, {row['wire_format']}"
    return f"fp4jax {row['experts']}{gpus}" + ("" if row["dense"] == "bf16" else f", {row['dense']} linear layers")
