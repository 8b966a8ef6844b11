"""Tables about whole language models: a decoder layer in prefill and decode, beside its floor and transformers."""

from typing import Any

from experiments.harness.tables.markdown import table


def model_table(report: dict[str, Any]) -> str:
    """Prefill and decode of whole models per decoder layer, with transformers where the same run measured it.

    Transformers' time is that of the faster of eager and compiled. A row that ran out of memory says so instead of its
    time. Rows about compiling are left out.

    Args:
      report: results of bench_model.
    """
    peers: dict[tuple[Any, ...], float] = {}
    for r in report["rows"]:
        if r["implementation"] != "fp4jax" and r["us_per_layer"] is not None:
            peers[_work(r)] = min(r["us_per_layer"], peers.get(_work(r), r["us_per_layer"]))
    columns = ("model", "layers", "experts", "linear layers", "phase", "requests", "tokens or context", "us per layer")
    columns += ("sum of kernels, us", "floor, us", "% of floor", "transformers, us", "faster", "tokens/s", "peak GB")
    rows = []
    for r in (r for r in report["rows"] if r["implementation"] == "fp4jax" and r["phase"] != "compile"):
        us, peer = r["us_per_layer"], peers.get(_work(r))
        rows.append(
            (
                r["model"], r["layers"], r["experts"], ", ".join([r["dense"], *_unusual(r)]), r["phase"], r["requests"],
                r["context"] if r["tokens"] is None else r["tokens"],
                r["error"].partition(":")[0] if us is None else f"{us:.0f}",
                _cell(r["kernel_us_per_layer"], 0), _cell(r["floor_us_per_layer"], 0), _cell(r["percent_of_floor"], 0),
                _cell(peer, 0), f"{peer / us:.2f}x" if us and peer else "", _cell(r["tokens_per_s"], 0),
                _cell(r["peak_gb"], 1),
            )
        )  # fmt: skip
    return table(columns, rows)


def _unusual(row: dict[str, Any]) -> list[str]:
    """What is unusual about the cache of a row."""
    found = ["FP8 cache"] if row.get("cache") == "fp8" else []
    return found + ([f"pages of {row['page_size']}"] if row.get("page_size") not in (None, 64) else [])


def ranks_table(report: dict[str, Any]) -> str:
    """Prefill and decode of whole models on several GPUs, beside one GPU with the same requests per GPU.

    Args:
      report: results of bench_model with --ranks.
    """
    alone = {_work(r): r["tokens_per_s"] for r in report["rows"] if r["ranks"] == 1}
    columns = ("model", "GPUs", "wire format", "phase", "requests per GPU", "tokens or context", "us per layer")
    columns += ("sum of kernels, us", "floor, us", "% of floor", "tokens/s", "times one GPU", "peak GB per GPU")
    rows = []
    for r in report["rows"]:
        one = alone.get(_work(r)) if r["ranks"] > 1 else None
        rows.append(
            (
                r["model"], r["ranks"], r["wire_format"] or "", r["phase"], r["requests"],
                r["context"] if r["tokens"] is None else r["tokens"], f"{r['us_per_layer']:.0f}",
                _cell(r["kernel_us_per_layer"], 0), _cell(r["floor_us_per_layer"], 0), _cell(r["percent_of_floor"], 0),
                _cell(r["tokens_per_s"], 0), "" if one is None else f"{r['tokens_per_s'] / one:.2f}x",
                _cell(r["peak_gb"], 1),
            )
        )  # fmt: skip
    return table(columns, rows)


def serving_table(report: dict[str, Any]) -> str:
    """What users of an engine see of requests that arrive at random, and what the engine adds to its decode program.

    Args:
      report: results of bench_serving.
    """
    columns = ("model", "GPUs", "wire format", "slots per GPU", "requests", "tokens/s", "first token, ms (99%)")
    columns += ("each token behind it, ms (99%)", "pages in use", "engine over program")
    rows = []
    for r in report["rows"]:
        trace = r["phase"] == "trace"
        what = (
            ("all at once" if r["rate"] == "inf" else f"{r['rate']} a second and GPU") if trace else "every slot full"
        )
        times = [_percentiles(r[name]) if trace else "" for name in ("first_token_ms", "token_ms")]
        rows.append(
            (
                r["model"], r["ranks"], r["wire_format"] or "", r["requests"], what, f"{r['tokens_per_s']:.0f}", *times,
                f"{r['most_pages']:.0%}" if trace else "", "" if trace else f"{r['overhead']:+.1%}",
            )
        )  # fmt: skip
    return table(columns, rows)


def _percentiles(ms: dict[str, float]) -> str:
    return f"{ms['p50']:.1f} ({ms['p99']:.1f})"


def _from_store(row: dict[str, Any]) -> str:
    seconds = row.get("seconds_from_store")
    return "" if seconds is None else f", {seconds:.1f} s from a `ProgramStore`"


def compile_text(report: dict[str, Any]) -> str:
    """A list with the seconds to compile all programs of a model, one line per measurement."""
    return "\n".join(
        f"* {r['model']}, {r['layers']} layers: {r['seconds']:.1f} s for {r['programs']} programs, "
        f"{r['seconds_from_cache']:.1f} s where JAX's compilation cache has them"
        f"{_from_store(r)} (at {r['commit']})"
        for r in report["rows"]
        if r["phase"] == "compile"
    )


def _work(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row measures, the same for all implementations."""
    return tuple(row[name] for name in ("model", "phase", "requests", "tokens", "context"))


def _cell(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
