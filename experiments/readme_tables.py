"""Rewrite the tables of README.md from the JSON files under experiments/results: python experiments/readme_tables.py

A table stands between `<!-- NAME -->` and `<!-- end of NAME -->`; a test checks that README.md is what this writes.
"""

import json
import re
from pathlib import Path
from typing import Any

from absl import app

from experiments.harness import script

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"


def demo_table(report: dict[str, Any]) -> str:
    """Bits per byte and wire bytes of every variant of the demo."""
    base = report["rows"][0]["bits_per_byte"]
    lines = [
        "| experts | held-out bits per byte | against bf16 | dispatch: bytes per token and layer | in bf16 | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        cells = [row["name"], f"{row['bits_per_byte']:.4f}", f"{100 * (row['bits_per_byte'] / base - 1):+.2f}%"]
        there = row.get("wire", {}).get("dispatch", 0)
        reference = row.get("wire_bf16", {}).get("dispatch", 0)
        cells += [f"{there:.0f}", f"{reference:.0f}", f"{reference / there:.2f}x"] if there else ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# What the README shows of bench_ops: op, its name in the table, and (model, tokens).
_OPS = (
    ("quantize", "quantize, linear scales", (("deepseek-v3", 8192), ("deepseek-v3", 128))),
    ("quantize_swizzled", "quantize, 128x4 scales", (("deepseek-v3", 8192),)),
    ("swiglu_quantize", "SwiGLU + requantize", (("qwen3-30b", 4096), ("deepseek-v3", 4096))),
    ("route_metadata", "routing metadata", (("ernie-300b", 16384),)),
    ("permute_rows", "permute: rows and scales", (("qwen3-30b", 4096), ("deepseek-v3", 4096))),
    ("permute_decoded", "permute: metadata, rows decoded to bf16", (("qwen3-30b", 4096), ("deepseek-v3", 4096))),
    ("depermute", "depermute and combine", (("qwen3-30b", 4096), ("deepseek-v3", 4096))),
)


def ops_table(report: dict[str, Any]) -> str:
    """Kernels of the memory-bound ops: time, percent of the copy bandwidth, ratio to XLA."""
    rows = {
        (r["op"], r["shape"]["model"], r["shape"]["T"]): r
        for r in report["rows"]
        if r["implementation"] == "mosaic_gpu"
    }
    lines = ["| op | shapes of | tokens | us | of copy bandwidth | XLA, us | faster |", "|---|---|---|---|---|---|---|"]
    for op, name, shapes in _OPS:
        for model, tokens in shapes:
            r = rows[op, model, tokens]
            share = "" if op == "route_metadata" else f"{r['percent_of_floor']:.0f}%"
            cells = (name, model, tokens, f"{r['us']:.1f}", share, f"{r['baseline_us']:.0f}", f"{r['speedup']:.1f}x")
            lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines)


def gemm_table(report: dict[str, Any]) -> str:
    """Grouped GEMM: our time, the fastest bf16 of the same run, the quoted FP4 peer, for every shape and m."""
    rows = [
        r for r in report["rows"]
        if r["op"] == "masked_grouped_gemm" and r["shape"]["distribution"] == "multinomial"
    ]  # fmt: skip
    lines = [
        "| E, K, N | m | us | of floor | TFLOP/s | weights, GB/s | bf16, us | faster | FP4 peer, us | faster |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        s, peer = r["shape"], r["fp4_peer_us"]
        cells = (
            f"{s['E']}, {s['K']}, {s['N']}", s["m"], f"{r['us']:.1f}", f"{r['percent_of_floor']:.0f}%",
            f"{r['tflops']:.0f}", f"{r['weight_gbps']:.0f}", f"{r['baseline_us']:.0f}", f"{r['speedup']:.2f}x",
            f"{peer:.0f}", f"{peer / r['us']:.2f}x",
        )  # fmt: skip
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    return "\n".join(lines)


def swiglu_table(report: dict[str, Any]) -> str:
    """GEMM 1 with SwiGLU in its epilogue against GEMM 1 alone."""
    names = ("bf16", "nvfp4", "nvfp4_as_bf16")
    found = {
        (
            r["op"].removeprefix("grouped_gemm_swiglu "),
            r["shape"]["E"],
            r["shape"]["K"],
            r["shape"]["N"],
            r["shape"]["m"],
        ): r
        for r in report["rows"]
        if r["op"].startswith("grouped_gemm_swiglu")
    }
    lines = [
        "| E, K, N | m | GEMM 1 alone, us | to bf16 | to NVFP4 | to NVFP4's grid in bf16 |",
        "|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys(k[1:] for k in found):
        rows = [found[name, *key] for name in names]
        cells = [f"{key[0]}, {key[1]}, {key[2]}", str(key[3]), f"{rows[0]['baseline_us']:.1f}"]
        cells += [f"{r['us']:.1f} us, {r['us'] / r['baseline_us']:.2f}x" for r in rows]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dispatch_table(reports: dict[str, dict[str, Any]]) -> str:
    """NVFP4 dispatch and the way back by kernels and by NCCL, against NCCL's all_to_all of bf16 rows."""
    lines = [
        "| GPUs | T | bf16 all_to_all, us | dispatch, us | faster | low latency, us | faster | through NCCL, us "
        "| faster | bf16 back + sum, us | combine, us | faster |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for gpus, report in reports.items():
        found = {
            (r["ranks"], r["T"], r["op"], r["implementation"]): r
            for r in report["rows"]
            if r["routing"] == "random" and (r["op"], r["wire_format"]) in (("dispatch", "nvfp4"), ("combine", "bf16"))
        }
        for ranks, tokens in sorted({key[:2] for key in found}):
            row = lambda op, name, found=found, cell=(ranks, tokens): found.get((*cell, op, name))  # noqa: E731
            kernel, back = row("dispatch", "mosaic_gpu"), row("combine", "mosaic_gpu")
            if gpus.startswith(f"{ranks} ") and kernel and back:
                cells = [gpus, f"{tokens}", f"{kernel['baseline_us']:.0f}"]
                for r in (kernel, row("dispatch", "low_latency"), row("dispatch", "nccl")):
                    cells += [f"{r['us']:.1f}", f"{r['speedup']:.2f}x"] if r else ["", ""]
                cells += [f"{back['baseline_us']:.0f}", f"{back['us']:.1f}", f"{back['speedup']:.2f}x"]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def moe_table(reports: dict[str, dict[str, Any]]) -> str:
    """A layer in NVFP4 against the two in bf16, and the ratio that the sums of floors have."""
    lines = [
        "| GPUs | model | T | NVFP4, us | low latency, us | through NCCL, us | bf16, us | bf16 of JAX, us | to bf16 "
        "| floors' ratio | to JAX's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = ("nvfp4", "nvfp4 low latency", "nvfp4 nccl", "bf16", "bf16 jax")
    for gpus, report in reports.items():
        found = {(r["ranks"], r["model"], r["tokens"], r["layer"]): r for r in report["rows"]}
        for cell in sorted({key[:3] for key in found}):
            if not gpus.startswith(f"{cell[0]} "):
                continue
            rows = [found.get((*cell, name)) for name in names]
            ours = min((r for r in rows[:2] if r), key=lambda r: r["us"])
            ratios = [f"{ours[key]:.2f}x" for key in ("against bf16", "against bf16, floors", "against bf16 jax")]
            cells = [gpus, cell[1], str(cell[2]), *(f"{r['us']:.0f}" if r else "" for r in rows), *ratios]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


_STAGES = ("dispatch", "permute", "gemm_1_swiglu", "gemm_2", "depermute", "combine", "other")


def stage_table(report: dict[str, Any]) -> str:
    """Where a layer's time goes, in us: profiled kernel by kernel, so the stages add up to more than a timed layer."""
    lines = ["| model | T | layer | us | " + " | ".join(_STAGES) + " |", "|---" * (4 + len(_STAGES)) + "|"]
    for r in report["rows"]:
        if r["layer"] in ("nvfp4", "nvfp4 low latency", "bf16"):
            stages = [f"{r['stages_us'][stage]:.0f}" for stage in _STAGES]
            lines.append(
                "| " + " | ".join([r["model"], str(r["tokens"]), r["layer"], f"{r['us']:.0f}", *stages]) + " |"
            )
    return "\n".join(lines)


def block_table(report: dict[str, Any]) -> str:
    """Blocks in buckets, with CUDA graphs and without, of exact size and padded to the largest bucket."""
    found = {(r["block"], r["tokens"], r["variant"]): r for r in report["rows"] if r["part"] == "blocks"}
    lines = [
        "| block | tokens | bucket | us | sum of kernels, us | in CUDA graphs | without graphs, us | exact size, us "
        "| largest bucket, us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    shown = {key[:2] for key in found if key[0].startswith("deco") or key[1] == 100}  # embedding and head: any count
    for block, tokens in sorted(shown, key=lambda key: (key[0] != "decoder layer", *key)):
        ours = found[block, tokens, "graph"]
        inside, outside = ours["kernels_in_graphs"], ours["kernels_outside"]
        cells = [block, f"{tokens}", f"{ours['bucket']}", f"{ours['us']:.0f}", f"{ours['kernel_us']:.0f}"]
        cells += [f"{inside:.0f} of {inside + outside:.0f}"]
        for variant in ("graph, no command buffers", "exact", "padded to the largest"):
            other = found.get((block, tokens, variant))
            cells.append("" if other is None else f"{other['us']:.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def dense_table(report: dict[str, Any]) -> str:
    """Times of linear layers and ratios to the library's bf16."""
    rows = {(r["shape"]["K"], r["shape"]["N"], r["shape"]["T"], r["op"]): r for r in report["rows"]}
    forms = ("block_fp8 gemm", "block_fp8", "nvfp4 w4a16", "nvfp4 w4a4")
    lines = [
        "| K | N | tokens | bf16, us | FP8 GEMM, us | block_fp8, us | NVFP4 W4A16, us | NVFP4 W4A4, us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for k, n, tokens in dict.fromkeys(key[:3] for key in rows):
        if (k, n) not in ((7168, 4096), (16384, 7168), (2048, 5120)) or tokens not in (1, 128, 1024, 4096):
            continue
        cells = [k, n, tokens, f"{rows[k, n, tokens, 'bf16']['us']:.0f}"]
        cells += [f"{rows[k, n, tokens, f]['us']:.0f} ({rows[k, n, tokens, f]['speedup']:.2f}x)" for f in forms]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def on_a_node(name: str) -> dict[str, dict[str, Any]]:
    """Results of several GPUs, under how many of which; a file holds rows of other numbers too."""
    files = {"2 H100": "h100", "4 H100": "h100", "4 H200": "h200"}
    return {gpus: json.loads((RESULTS / folder / name).read_text()) for gpus, folder in files.items()}


def tables() -> dict[str, str]:
    """Every table of the README under its name."""
    return {
        "demo": demo_table(json.loads((RESULTS / "cpu" / "demo.json").read_text())),
        "ops": ops_table(json.loads((RESULTS / "h100" / "bench_ops.json").read_text())),
        "gemm": gemm_table(json.loads((RESULTS / "h100" / "bench_gemm.json").read_text())),
        "moe": moe_table(on_a_node("bench_moe.json")),
        "stages": stage_table(json.loads((RESULTS / "h100" / "bench_moe.json").read_text())),
        "blocks": block_table(json.loads((RESULTS / "h100" / "bench_block_graph.json").read_text())),
        "dense": dense_table(json.loads((RESULTS / "h100" / "bench_dense.json").read_text())),
        "dispatch": dispatch_table(on_a_node("bench_dispatch.json")),
        "swiglu": swiglu_table(json.loads((RESULTS / "h100" / "bench_gemm.json").read_text())),
    }


def rewrite(text: str) -> str:
    """README text with every table replaced; ValueError where a table has no place."""
    for name, content in tables().items():
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not place.search(text):
            raise ValueError(f"README.md has no place for the table {name!r}")
        text = place.sub(lambda m, content=content: f"{m.group(1)}\n{content}\n\n{m.group(2)}", text)
    return text


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    readme = ROOT / "README.md"
    readme.write_text(rewrite(readme.read_text()))
    print(f"rewrote {', '.join(tables())} in {readme.name}")


if __name__ == "__main__":
    script.run(main)
