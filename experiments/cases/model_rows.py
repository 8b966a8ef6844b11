"""The rows of bench_model: their columns, their floors, and those of transformers, which another process measures."""

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.cases.model_floors import Work, floor_us
from experiments.cases.models import abstract_model, hf_config, model_config
from experiments.harness.timing import Ceilings
from fp4jax.attention.cache_formats import FP8

# Every row has these columns; a row without a time also has `error`, the reason.
COLUMNS = (
    "model", "layers", "phase", "implementation", "experts", "dense", "ranks", "requests", "tokens", "context",
    "us_per_layer", "kernel_us_per_layer", "kernels_per_layer", "in_graph", "tokens_per_s", "floor_us_per_layer",
    "percent_of_floor", "peak_gb", "weights_gb", "cache_gb", "wire_format", "stages", "seconds", "seconds_from_cache",
    "seconds_from_store", "programs", "cache", "page_size", "exchange_us_per_layer", "wall_over_kernels",
)  # fmt: skip
PEERS = ("transformers", "transformers compiled")
_ROOT = Path(__file__).resolve().parents[2]


class PeerAnswers(NamedTuple):
    """What the process with transformers found.

    Attributes:
      about: a sentence for the user: how the peer ran, or why it did not.
      rows: the answers per row, see `transformers_peer.main`.
    """

    about: str
    rows: list[dict[str, Any]]


def make_row(
    model: str, layers: int, work: Work, implementation: str, experts: str, dense: str, ranks: int = 1,
    wire_format: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row without results. `layers` is the number of layers that are measured."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    prefill = work.phase == "prefill"
    return row | {
        "model": model, "layers": layers, "phase": work.phase, "implementation": implementation, "experts": experts,
        "dense": dense, "ranks": ranks, "requests": work.requests, "tokens": work.tokens if prefill else None,
        "context": None if prefill else work.context, "wire_format": wire_format,
    }  # fmt: skip


def make_compile_row(model: str, layers: int, experts: str, dense: str) -> dict[str, Any]:
    """A row without results for the time to compile a model, which belongs to no number of requests or tokens."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    return row | {
        "model": model, "layers": layers, "phase": "compile", "implementation": "fp4jax", "experts": experts,
        "dense": dense, "ranks": 1,
    }  # fmt: skip


def with_floors(rows: Sequence[dict[str, Any]], ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows with their floor, and how many percent of the measured time it is; compiling has no floor."""
    found = []
    for row in rows:
        if row["phase"] == "compile":
            found.append(row)
            continue
        model = _abstract(row["model"], row["layers"], row["cache"])
        floor = floor_us(model, work_of(row), row["experts"], row["dense"], ceilings, row["ranks"])
        us = row["us_per_layer"]
        percent = round(100 * floor / us, 1) if us else None
        found.append(row | {"floor_us_per_layer": round(floor, 2), "percent_of_floor": percent})
    return found


@functools.cache
def _abstract(name: str, layers: int, cache: str | None) -> Any:
    model = abstract_model(model_config(name, layers))
    if cache == "fp8":
        model.set_cache_dtype(FP8)
    return model


def work_of(row: dict[str, Any]) -> Work:
    """The work that a row measures."""
    return Work(row["phase"], row["requests"], row["tokens"] or 0, row["context"] or 0)


# --- transformers ---


def why_no_peer() -> str | None:
    """A sentence that says why transformers cannot be measured here, as far as this process knows; None: it may."""
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        return f"transformers is not measured: {' and '.join(missing)} not installed"
    if (jax.config.jax_platforms or "").split(",")[0] == "cpu":
        return "transformers is not measured: JAX runs on the CPU"
    return None


def ask_peer(model: str, layers: int, works: Sequence[Work], repeats: int, profile: bool) -> PeerAnswers:
    """Let another process measure transformers; see `transformers_peer`, which explains the arguments.

    What was measured before the process failed is kept.
    """
    request = {
        "config": hf_config(model, layers), "cells": [list(work) for work in works],
        "implementations": list(PEERS), "repeats": repeats, "profile": profile,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answers.jsonl"
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "experiments.harness.transformers_peer", str(asked), str(answered)]
        done = subprocess.run(command, cwd=_ROOT, check=False)
        lines = answered.read_text().splitlines() if answered.exists() else []
    answers = [json.loads(line) for line in lines]
    first = answers[0] if answers else {"problem": f"its process ended with status {done.returncode}"}
    if "problem" in first:
        return PeerAnswers(f"transformers is not measured: {first['problem']}", [])
    return PeerAnswers(f"{first['about']}, {layers} layers of {model}", answers[1:])


def peer_rows(model: str, layers: int, whole_layers: int, answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the peer's answers.

    Args:
      model: the name of the model.
      layers: the layers that the peer ran.
      whole_layers: the layers for which `tokens_per_s` is computed, from the time per layer, embedding and head.
      answers: the answers per row.
    """
    rows = []
    for given in answers:
        answer = dict(given)
        work, name, ends_us = Work(*answer.pop("cell")), answer.pop("implementation"), answer.pop("ends_us", None)
        row = make_row(model, layers, work, name, "bf16", "bf16") | answer
        if ends_us is not None:
            row["tokens_per_s"] = round(1e6 * work.rows / (row["us_per_layer"] * whole_layers + ends_us), 1)
        rows.append(row)
    return rows
