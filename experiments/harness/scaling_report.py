"""Rows, table and plot of `plot_scaling`: how ops of bench_dispatch.py scale with the number of ranks."""

from pathlib import Path
from typing import Any


def scaling_rows(rows: list[dict[str, Any]], link_gbps: float) -> list[dict[str, Any]]:
    """One row per op, implementation, wire format, case, T and ranks: per token, and against fewer ranks."""
    found: dict[Any, dict[str, Any]] = {}
    for r in rows:
        if r["routing"] != "random" or r["us"] is None:
            continue
        experts, top_k = r.get("experts", 64), r.get("top_k", 8)  # what files had before they said so
        case = f"top {top_k} of {experts}, H={r['H']}" + ("" if r["form"] == "per_peer" else f", {r['form']}")
        line = (f"{r['op']}, {r['wire_format']}, {r['implementation']}", case, r["T"])
        sent = r.get("bytes_out", r["gbps_out"] * r["us"] * 1e3)
        found[line, r["ranks"]] = {
            "line": line[0], "case": case, "T": r["T"], "ranks": r["ranks"], "us": r["us"],
            "ns_per_token": round(1e3 * r["us"] / r["T"], 2), "bytes_out_per_token": round(sent / r["T"]),
            "percent_of_link": round(sent / r["us"] / 1e3 / link_gbps * 100, 1), "times_fewer_ranks": None,
        }  # fmt: skip
    for (line, ranks), row in found.items():
        # Not against what has nobody to exchange with.
        fewer = [n for other, n in found if other == line and 1 < n < ranks]
        if fewer:
            row["times_fewer_ranks"] = round(row["us"] / found[line, max(fewer)]["us"], 2)
    return sorted(found.values(), key=lambda r: (r["case"], r["line"], r["T"], r["ranks"]))


def table(rows: list[dict[str, Any]]) -> str:
    """All rows as aligned text."""
    head = f"{'T':>41}{'ranks':>6}{'us':>10}{'ns/token':>10}{'bytes/token':>12}{'of link':>9}{'fewer ranks':>13}"
    lines = []
    for i, r in enumerate(rows):
        if i == 0 or r["case"] != rows[i - 1]["case"]:
            lines += [r["case"], head]
        times = "" if r["times_fewer_ranks"] is None else f"{r['times_fewer_ranks']:.2f}x"
        lines.append(
            f"{r['line']:34}{r['T']:>7}{r['ranks']:>6}{r['us']:>10.1f}{r['ns_per_token']:>10.1f}"
            f"{r['bytes_out_per_token']:>12.0f}{r['percent_of_link']:>8.1f}%{times:>13}"
        )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Three panels over the number of ranks: time per token, bytes per token, percent of the link.

    A color per op, a marker per T; what only one number of ranks ran is left out where others ran more.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    panels = (("ns_per_token", "ns per token"), ("bytes_out_per_token", "bytes out per token"))
    panels += (("percent_of_link", "% of NVLink"),)
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.5))
    ranks = sorted({r["ranks"] for r in rows})
    lines: dict[Any, list[dict[str, Any]]] = {}
    for r in rows:
        lines.setdefault((r["line"], r["T"], r["case"]), []).append(r)
    most = max(len(some) for some in lines.values())
    lines = {key: some for key, some in lines.items() if len(some) > 1 or most == 1}
    names, tokens = list(dict.fromkeys((key[0], key[2]) for key in lines)), sorted({key[1] for key in lines})
    several_cases = len({case for _, case in names}) > 1
    for axis, (key, label) in zip(axes, panels, strict=True):
        for (name, t, case), some in lines.items():
            style = dict(color=f"C{names.index((name, case)) % 10}", marker="osv^D<>"[tokens.index(t) % 7])
            axis.plot([r["ranks"] for r in some], [r[key] for r in some], **style)
        axis.set(xscale="log", xlabel="ranks", ylabel=label)
        axis.set_xticks(ranks, [str(n) for n in ranks])
        axis.minorticks_off()
    axes[0].set_yscale("log")
    figure.suptitle(f"{device}, the same tokens per rank")
    colours = [
        Line2D([], [], color=f"C{i % 10}", label=name + (f", {case}" if several_cases else ""))
        for i, (name, case) in enumerate(names)
    ]
    markers = [Line2D([], [], color="grey", marker="osv^D<>"[i % 7], label=f"T={t}") for i, t in enumerate(tokens)]
    figure.legend(handles=colours + markers, fontsize=8, ncols=4, loc="lower center")
    figure.tight_layout(rect=(0, 0.04 + 0.035 * -(-len(colours + markers) // 4), 1, 1))
    figure.savefig(path, dpi=90)
