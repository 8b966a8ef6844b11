"""The summary table of README.md: eight rows for a reader who decides whether to use this library."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from experiments.harness.tables.markdown import table

Row = dict[str, Any]
Read = Callable[[str], dict[str, Any]]

_COLUMNS = ("what", "fp4jax", "what people use instead", "ratio", "lowest to highest ratio", "floor / time", "GPU")
_NOTE = """\
A ratio says how many times as fast, or as small, fp4jax is: below 1x it is the slower one. The floor is the least time
that memory, tensor cores or NVLink allow for the same work, so 100% cannot be exceeded."""
# Up to this many rows per expert the bytes of the weights limit the grouped GEMM (decode). With more rows the FLOPs
# limit it (prefill).
_DECODE_ROWS = 64


def summary_table(read: Read) -> str:
    """The table, and a note on how to read it.

    Args:
      read: a function that returns the contents of a file of experiments/results, such as "h100/bench_gemm.json".

    Raises:
      LookupError: a file lacks a result that the table shows.
      OSError: a file does not exist.
    """
    gemm = read("h100/bench_gemm.json")
    rows = (
        _gemm_row(gemm, "decode", 16),
        _gemm_row(gemm, "prefill", 1024),
        _layer_row(read("h200/bench_moe.json")),
        _dispatch_row(read("h200/dispatch_256_experts.json"), read("h200/scaling.json")),
        _weights_row(gemm),
        _quality_row(read("cpu/demo.json")),
        *_model_rows(read("h200/bench_model.json"), read("h200/bench_model_transformers.json")),
    )
    return f"{table(_COLUMNS, rows)}\n\n{_NOTE}"


# --- rows ---


def _gemm_row(report: Row, phase: str, m: int) -> tuple[str, ...]:
    """The grouped GEMM of DeepSeek-V3's gate and up projections with m rows per expert.

    The parentheses hold the range over all shapes and all m of the phase, "decode" or "prefill".
    """
    ours = _all(report["rows"], op="masked_grouped_gemm", shape=lambda s: s["distribution"] == "multinomial")
    shown = _one(ours, shape=lambda s: (s["E"], s["K"], s["N"], s["m"]) == (32, 7168, 4096, m))
    same_phase = _all(ours, shape=lambda s: (s["m"] <= _DECODE_ROWS) == (phase == "decode"))
    sizes = [r["shape"]["m"] for r in same_phase]
    ratios = _range(r["speedup"] for r in same_phase)
    return (
        f"Grouped GEMM, {phase}: DeepSeek-V3's gate and up, {m} rows per expert",
        _us(shown["us"]),
        f"{_us(shown['baseline_us'])}, bf16 {shown['baseline'].removesuffix(' bf16')}",
        f"{shown['speedup']:.2f}x",
        f"{ratios}: all shapes, {min(sizes)} to {max(sizes)} rows",
        f"{shown['percent_of_floor']:.0f}%",
        _gpu(report),
    )


def _layer_row(report: Row) -> tuple[str, ...]:
    """DeepSeek-V3's expert layer, 128 tokens per GPU on four GPUs, and the range over all models and token counts."""
    cells: dict[Any, dict[str, Row]] = {}
    for r in _all(report["rows"], ranks=4):
        cells.setdefault((r["model"], r["tokens"]), {})[r["layer"]] = r

    def fastest(layers: dict[str, Row], names: Iterable[str]) -> Row:
        return min((layers[name] for name in names if name in layers), key=lambda r: r["us"])

    pairs = {
        cell: (fastest(layers, ("nvfp4", "nvfp4 low latency")), fastest(layers, ("bf16", "bf16 jax")))
        for cell, layers in cells.items()
    }
    ours, bf16 = pairs["deepseek-v3", 128]
    ratios = [other["us"] / mine["us"] for mine, other in pairs.values()]
    tokens = [cell[1] for cell in pairs]
    return (
        "Whole expert layer, exchange included: DeepSeek-V3, 128 tokens per GPU",
        _us(ours["us"]),
        f"{_us(bf16['us'])}, bf16 with JAX's ragged dot",
        f"{bf16['us'] / ours['us']:.2f}x",
        f"{_range(ratios)}: all models, {min(tokens)} to {max(tokens)} tokens",
        f"{100 * ours['floor_us'] / ours['us']:.0f}%",
        f"4 {_gpu(report)}",
    )


def _dispatch_row(report: Row, scaling: Row) -> tuple[str, ...]:
    """Dispatch of 1024 tokens per GPU, and the ranges over all token counts, by kernels and through NCCL."""
    rows = _all(report["rows"], op="dispatch", ranks=4, wire_format="nvfp4", routing="random", form="per_peer")
    kernels, nccl = _all(rows, implementation="mosaic_gpu"), _all(rows, implementation="nccl")
    shown = _one(kernels, T=1024)
    link = _one(scaling["rows"], line="dispatch, nvfp4, mosaic_gpu", T=shown["T"], ranks=4, us=shown["us"])
    tokens = [r["T"] for r in kernels]
    return (
        f"Dispatch to {shown['experts']} experts: {shown['T']} tokens per GPU, H = {shown['H']}",
        _us(shown["us"]),
        f"{_us(shown['baseline_us'])}, bf16 {shown['baseline'].removesuffix(' bf16')} of NCCL",
        f"{shown['speedup']:.2f}x",
        f"{_range(r['speedup'] for r in kernels)}: {min(tokens)} to {max(tokens)} tokens; "
        f"sent through NCCL {_range(r['speedup'] for r in nccl)}",
        f"{link['percent_of_link']:.0f}%",
        f"4 {_gpu(report)}",
    )


def _weights_row(report: Row) -> tuple[str, ...]:
    """Bytes per weight that the grouped GEMM reads if every expert has rows, scales included."""
    shape = {"E": 32, "K": 7168, "N": 4096, "m": 16, "distribution": "multinomial"}
    row = _one(report["rows"], op="masked_grouped_gemm", shape=shape)
    size = row["weight_gbps"] * 1e3 * row["us"] / (shape["E"] * shape["K"] * shape["N"])
    bf16 = np.dtype(bfloat16).itemsize
    cells = ("Memory of expert weights", f"{size:.4f} bytes per weight", f"{bf16} bytes, bf16", f"{bf16 / size:.2f}x")
    return (*cells, "", "", "any")


def _quality_row(report: Row) -> tuple[str, ...]:
    """Bits per byte of the demo's model with NVFP4 weights and bf16 activations, and of the worst variant."""
    rows = {r["name"]: r["bits_per_byte"] for r in report["rows"]}
    bf16, weights = rows["bf16"], rows["W4A16"]
    worst = max(rows, key=lambda name: rows[name])
    return (
        "Quality: bits per byte of unseen text, a model of 4 M parameters",
        f"{weights:.4f}, W4A16",
        f"{bf16:.4f}, bf16",
        f"{100 * (weights / bf16 - 1):+.2f}%",
        f"at worst {100 * (rows[worst] / bf16 - 1):+.2f}%: {worst}",
        "",
        report["device"].upper(),
    )


def _model_rows(report: Row, with_peers: Row) -> list[tuple[str, ...]]:
    """A decoder layer of a whole model in prefill and in a decode step, against the faster way to run transformers.

    Args:
      report: bench_model of the whole model.
      with_peers: bench_model of a few layers, which also measured transformers.
    """
    rows: list[tuple[str, ...]] = []
    for phase, work in (("prefill", {"tokens": 2048}), ("decode", {"requests": 32, "context": 1024})):
        ours = _one(report["rows"], implementation="fp4jax", phase=phase, **work)
        others = _all(with_peers["rows"], phase=phase, implementation=lambda name: name != "fp4jax", **work)
        peer = min(others, key=lambda r: r["us_per_layer"])
        what = "2048 tokens" if phase == "prefill" else "32 requests of 1024 tokens"
        rows.append(
            (
                f"Qwen3-30B in {phase}, {what}: a layer of {ours['layers']}",
                _us(ours["us_per_layer"]),
                f"{_us(peer['us_per_layer'])}, {peer['implementation']}, bf16, a layer of {peer['layers']}",
                f"{peer['us_per_layer'] / ours['us_per_layer']:.2f}x",
                "",
                f"{ours['percent_of_floor']:.0f}%",
                _gpu(report),
            )
        )
    return rows


# --- cells and rows of results ---


def _us(us: float) -> str:
    return f"{us:.0f} us"


def _range(ratios: Iterable[float]) -> str:
    ratios = list(ratios)
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


def _gpu(report: Row) -> str:
    """The kind of GPU, such as "H100" for "NVIDIA H100 80GB HBM3"."""
    return report["device"].split()[1]


def _all(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows that match all fields.

    Args:
      rows: rows of results.
      fields: for every field a value that it must have, or a function of its value that must be true.

    Raises:
      LookupError: no row matches.
    """
    found = [
        r
        for r in rows
        if all(name in r and (want(r[name]) if callable(want) else r[name] == want) for name, want in fields.items())
    ]
    if not found:
        raise LookupError(f"no row of results has {fields}")
    return found


def _one(rows: Iterable[Row], **fields: Any) -> Row:
    """The only row that matches all fields; the fields are those of `_all`.

    Raises:
      LookupError: no row or more than one row matches.
    """
    found = _all(rows, **fields)
    if len(found) > 1:
        raise LookupError(f"{len(found)} rows of results have {fields}")
    return found[0]
