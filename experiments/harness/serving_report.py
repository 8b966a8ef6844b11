"""The table and the pictures of bench_serving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def serving_text(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as aligned text."""
    lines = [f"{'model':<12}{'ranks':>6}{'wire':>7}{'requests':>9}  {'phase':<14}{'tokens/s':>10}  what it took"]
    for r in rows:
        phase = f"{r['rate']} a second" if r["phase"] == "trace" else "full batch"
        line = f"{r['model']:<12}{r['ranks']:>6}{r['wire_format'] or '':>7}{r['requests']:>9}  {phase:<14}"
        line += f"{r['tokens_per_s']:>10.1f}  "
        if r["phase"] == "trace":
            first, each = r["first_token_ms"], r["token_ms"] or {"p50": 0.0, "p99": 0.0}
            line += f"first token {first['p50']:.0f} ms (99%: {first['p99']:.0f}), each {each['p50']:.1f} ms "
            line += f"(99%: {each['p99']:.1f}), pages {r['most_pages']:.0%}"
        else:
            line += f"{r['us_per_step_engine']:.0f} us a step, decode program {r['us_per_step']:.0f}, "
            line += f"overhead {r['overhead']:.1%}"
        lines.append(line)
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw, over the rate of arrivals: generated tokens per second, time to the first token, and time per token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    traces = [r for r in rows if r["phase"] == "trace"]
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.5))
    kinds = list(dict.fromkeys((r["model"], r["ranks"], r["wire_format"], r["requests"]) for r in traces))
    ticks = list(dict.fromkeys(r["rate"] for r in traces))
    for color, kind in enumerate(kinds):
        some = [r for r in traces if (r["model"], r["ranks"], r["wire_format"], r["requests"]) == kind]
        places = [ticks.index(r["rate"]) for r in some]
        label = f"{kind[0]}, {kind[1]} devices{f', {kind[2]}' if kind[2] else ''}, {kind[3]} requests each"
        axes[0].plot(places, [r["tokens_per_s"] for r in some], "o-", color=f"C{color}", label=label)
        for axis, name in zip(axes[1:], ("first_token_ms", "token_ms"), strict=True):
            for style, percentile in (("o-", "p50"), ("x--", "p99")):
                values = [(r[name] or {}).get(percentile, float("nan")) for r in some]
                axis.plot(places, values, style, color=f"C{color}", label=f"{label}, {percentile}")
    for axis, title in zip(
        axes, ("generated tokens/s", "ms to the first token", "ms per token behind it"), strict=True
    ):
        axis.set(title=title, xlabel="requests per second and device", xticks=range(len(ticks)), xticklabels=ticks)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
