"""Tables of kernels on one GPU: grouped GEMM, linear layers, and the ops that the memory limits."""

from typing import Any

from experiments.harness.tables.markdown import table

# What the table of ops shows: an op of bench_ops, its name in the table, and (model, tokens).
_OPS = (
    ("quantize", "quantize, linear scales", (("deepseek-v3", 8192), ("deepseek-v3", 128))),
    ("quantize_swizzled", "quantize, 128x4 scales", (("deepseek-v3", 8192),)),
    ("swiglu_quantize", "SwiGLU + requantize", (("qwen3-30b", 4096), ("deepseek-v3", 4096))),
    ("route_metadata", "routing metadata", (("ernie-300b", 16384),)),
    ("permute_rows", "permute: rows and scales", (("qwen3-30b", 4096), ("deepseek-v3", 4096))),
    ("permute_decoded", "permute: metadata, rows decoded to bf16", (("qwen3-30b", 4096), ("deepseek-v3", 4096))),
    ("depermute", "depermute and combine", (("qwen3-30b", 4096), ("deepseek-v3", 4096))),
)
# What the table of linear layers shows of bench_dense.
_DENSE_SHAPES = ((7168, 4096), (16384, 7168), (2048, 5120))
_DENSE_TOKENS = (1, 128, 1024, 4096)
_DENSE_FORMS = ("block_fp8 gemm", "block_fp8", "nvfp4 w4a16", "nvfp4 w4a4")


def ops_table(report: dict[str, Any]) -> str:
    """The kernel of every memory-bound op: its time, its percent of the copy bandwidth, its ratio to XLA."""
    found = {
        (r["op"], r["shape"]["model"], r["shape"]["T"]): r
        for r in report["rows"]
        if r["implementation"] == "mosaic_gpu"
    }
    rows = []
    for op, name, shapes in _OPS:
        for model, tokens in shapes:
            r = found[op, model, tokens]
            share = "" if op == "route_metadata" else f"{r['percent_of_floor']:.0f}%"
            times = (f"{r['us']:.1f}", share, f"{r['baseline_us']:.0f}", f"{r['speedup']:.1f}x")
            rows.append((name, model, tokens, *times))
    return table(("op", "shapes of", "tokens", "us", "of copy bandwidth", "XLA, us", "faster"), rows)


def gemm_table(report: dict[str, Any]) -> str:
    """Grouped GEMM: our time, the fastest bf16 of the same run, the quoted FP4 peer, for every shape and m."""
    rows = []
    for r in report["rows"]:
        s = r["shape"]
        if r["op"] == "masked_grouped_gemm" and s["distribution"] == "multinomial":
            peer = r["fp4_peer_us"]
            ours = (f"{r['us']:.1f}", f"{r['percent_of_floor']:.0f}%", f"{r['tflops']:.0f}", f"{r['weight_gbps']:.0f}")
            others = (f"{r['baseline_us']:.0f}", f"{r['speedup']:.2f}x", f"{peer:.0f}", f"{peer / r['us']:.2f}x")
            rows.append((f"{s['E']}, {s['K']}, {s['N']}", s["m"], *ours, *others))
    columns = ("E, K, N", "m", "us", "of floor", "TFLOP/s", "weights, GB/s")
    return table((*columns, "bf16, us", "faster", "FP4 peer, us", "faster"), rows)


def swiglu_table(report: dict[str, Any]) -> str:
    """GEMM 1 with SwiGLU in its epilogue, for each format it can write, against GEMM 1 alone."""
    prefix = "grouped_gemm_swiglu "
    found = {
        (r["op"].removeprefix(prefix), *(r["shape"][letter] for letter in ("E", "K", "N", "m"))): r
        for r in report["rows"]
        if r["op"].startswith(prefix)
    }
    rows = []
    for key in dict.fromkeys(k[1:] for k in found):
        formats = [found[name, *key] for name in ("bf16", "nvfp4", "nvfp4_as_bf16")]
        cells = [f"{r['us']:.1f} us, {r['us'] / r['baseline_us']:.2f}x" for r in formats]
        rows.append((f"{key[0]}, {key[1]}, {key[2]}", key[3], f"{formats[0]['baseline_us']:.1f}", *cells))
    columns = ("E, K, N", "m", "GEMM 1 alone, us", "to bf16", "to NVFP4", "to NVFP4's grid in bf16")
    return table(columns, rows)


def dense_table(report: dict[str, Any]) -> str:
    """Linear layers: times, and ratios to bf16 of the library that XLA calls."""
    found = {(r["shape"]["K"], r["shape"]["N"], r["shape"]["T"], r["op"]): r for r in report["rows"]}
    rows = []
    for k, n, tokens in dict.fromkeys(key[:3] for key in found):
        if (k, n) in _DENSE_SHAPES and tokens in _DENSE_TOKENS:
            forms = [found[k, n, tokens, form] for form in _DENSE_FORMS]
            cells = [f"{r['us']:.0f} ({r['speedup']:.2f}x)" for r in forms]
            rows.append((k, n, tokens, f"{found[k, n, tokens, 'bf16']['us']:.0f}", *cells))
    columns = ("K", "N", "tokens", "bf16, us", "FP8 GEMM, us", "block_fp8, us", "NVFP4 W4A16, us", "NVFP4 W4A4, us")
    return table(columns, rows)
