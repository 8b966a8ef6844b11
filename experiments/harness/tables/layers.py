"""Tables of whole layers and models: the demo, the exchange between GPUs, the expert layer, blocks in buckets."""

from typing import Any

from experiments.harness.tables.markdown import table

_STAGES = ("dispatch", "permute", "gemm_1_swiglu", "gemm_2", "depermute", "combine", "other")


def demo_table(report: dict[str, Any]) -> str:
    """Bits per byte and wire bytes of every variant of the demo."""
    base = report["rows"][0]["bits_per_byte"]
    rows = []
    for row in report["rows"]:
        sent = row.get("wire", {}).get("dispatch", 0)
        reference = row.get("wire_bf16", {}).get("dispatch", 0)
        wire = (f"{sent:.0f}", f"{reference:.0f}", f"{reference / sent:.2f}x") if sent else ("", "", "")
        against = f"{100 * (row['bits_per_byte'] / base - 1):+.2f}%"
        rows.append((row["name"], f"{row['bits_per_byte']:.4f}", against, *wire))
    columns = ("experts", "held-out bits per byte", "against bf16", "dispatch: bytes per token and layer")
    return table((*columns, "in bf16", "ratio"), rows)


def dispatch_table(reports: dict[str, dict[str, Any]]) -> str:
    """NVFP4 dispatch and bf16 combine, by kernels and by NCCL, against NCCL's all_to_all of bf16 rows.

    Args:
      reports: results of bench_dispatch under the number and kind of GPUs whose rows are shown, such as "4 H200".
    """
    columns = ("GPUs", "T", "bf16 all_to_all, us", "dispatch, us", "faster", "low latency, us", "faster")
    columns += ("through NCCL, us", "faster", "bf16 back + sum, us", "combine, us", "faster")
    rows = []
    for gpus, report in reports.items():
        found = {
            (r["ranks"], r["T"], r["op"], r["implementation"]): r
            for r in report["rows"]
            if r["routing"] == "random" and (r["op"], r["wire_format"]) in (("dispatch", "nvfp4"), ("combine", "bf16"))
        }
        for cell in sorted({key[:2] for key in found}):
            kernel, back = (found.get((*cell, op, "mosaic_gpu")) for op in ("dispatch", "combine"))
            if gpus.startswith(f"{cell[0]} ") and kernel and back:
                cells = [gpus, cell[1], f"{kernel['baseline_us']:.0f}"]
                for name in ("mosaic_gpu", "low_latency", "nccl"):
                    r = found.get((*cell, "dispatch", name))
                    cells += [f"{r['us']:.1f}", f"{r['speedup']:.2f}x"] if r else ["", ""]
                rows.append((*cells, f"{back['baseline_us']:.0f}", f"{back['us']:.1f}", f"{back['speedup']:.2f}x"))
    return table(columns, rows)


def moe_table(reports: dict[str, dict[str, Any]]) -> str:
    """An expert layer in NVFP4 against two in bf16, and the ratio that the sums of floors have.

    Args:
      reports: results of bench_moe under the number and kind of GPUs whose rows are shown, such as "4 H200".
    """
    columns = ("GPUs", "model", "T", "NVFP4, us", "low latency, us", "through NCCL, us", "bf16, us", "bf16 of JAX, us")
    names = ("nvfp4", "nvfp4 low latency", "nvfp4 nccl", "bf16", "bf16 jax")
    rows = []
    for gpus, report in reports.items():
        found = {(r["ranks"], r["model"], r["tokens"], r["layer"]): r for r in report["rows"]}
        for cell in sorted({key[:3] for key in found}):
            if not gpus.startswith(f"{cell[0]} "):
                continue
            layers = [found.get((*cell, name)) for name in names]
            ours = min((r for r in layers[:2] if r), key=lambda r: r["us"])
            ratios = [f"{ours[key]:.2f}x" for key in ("against bf16", "against bf16, floors", "against bf16 jax")]
            rows.append((gpus, cell[1], cell[2], *(f"{r['us']:.0f}" if r else "" for r in layers), *ratios))
    return table((*columns, "to bf16", "floors' ratio", "to JAX's"), rows)


def stage_table(report: dict[str, Any]) -> str:
    """Where the time of an expert layer goes, in us.

    The profile times every kernel alone, so the stages of a layer add up to more than the layer takes.
    """
    rows = [
        (r["model"], r["tokens"], r["layer"], f"{r['us']:.0f}", *(f"{r['stages_us'][stage]:.0f}" for stage in _STAGES))
        for r in report["rows"]
        if r["layer"] in ("nvfp4", "nvfp4 low latency", "bf16")
    ]
    return table(("model", "T", "layer", "us", *_STAGES), rows)


def block_table(report: dict[str, Any]) -> str:
    """Blocks in buckets: with CUDA graphs, without, compiled for the exact size, padded to the largest bucket."""
    found = {(r["block"], r["tokens"], r["variant"]): r for r in report["rows"] if r["part"] == "blocks"}
    # The embedding and the head take the same time for any number of tokens: one row shows it.
    shown = {key[:2] for key in found if key[0].startswith("deco") or key[1] == 100}
    rows = []
    for block, tokens in sorted(shown, key=lambda key: (key[0] != "decoder layer", *key)):
        ours = found[block, tokens, "graph"]
        inside, outside = ours["kernels_in_graphs"], ours["kernels_outside"]
        cells = [block, tokens, ours["bucket"], f"{ours['us']:.0f}", f"{ours['kernel_us']:.0f}"]
        cells.append(f"{inside:.0f} of {inside + outside:.0f}")
        for variant in ("graph, no command buffers", "exact", "padded to the largest"):
            other = found.get((block, tokens, variant))
            cells.append("" if other is None else f"{other['us']:.0f}")
        rows.append(cells)
    columns = ("block", "tokens", "bucket", "us", "sum of kernels, us", "in CUDA graphs", "without graphs, us")
    return table((*columns, "exact size, us", "largest bucket, us"), rows)
