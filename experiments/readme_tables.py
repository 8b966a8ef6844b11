"""Rewrite the tables of README.md and docs/ from the JSON files of experiments/results.

    python experiments/readme_tables.py

A table stands between the lines `<!-- NAME -->` and `<!-- end of NAME -->` of README.md or of a page below docs/. A
test checks that the committed pages are what this script writes.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app

from experiments.harness import script
from experiments.harness.tables import kernels, layers, models
from experiments.harness.tables.summary import summary_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
# The files with results of several GPUs hold rows of other numbers of GPUs too; these are shown.
_NODES = {"2 H100": "h100", "4 H100": "h100", "4 H200": "h200"}
_MARKER = re.compile(r"<!--\s*(end of )?([\w-]+)\s*-->")


def read(name: str) -> dict[str, Any]:
    """The results in one file of experiments/results."""
    return json.loads((RESULTS / name).read_text())


def read_nodes(name: str) -> dict[str, dict[str, Any]]:
    """The results in the file of this name in each folder of `_NODES`, under what GPUs to show of it."""
    return {gpus: read(f"{folder}/{name}") for gpus, folder in _NODES.items()}


TABLES: dict[str, Callable[[], str]] = {
    "summary": lambda: summary_table(read),
    "demo": lambda: layers.demo_table(read("cpu/demo.json")),
    "ops": lambda: kernels.ops_table(read("h100/bench_ops.json")),
    "gemm": lambda: kernels.gemm_table(read("h100/bench_gemm.json")),
    "swiglu": lambda: kernels.swiglu_table(read("h100/bench_gemm.json")),
    "dense": lambda: kernels.dense_table(read("h100/bench_dense.json")),
    "dispatch": lambda: layers.dispatch_table(read_nodes("bench_dispatch.json")),
    "moe": lambda: layers.moe_table(read_nodes("bench_moe.json")),
    "stages": lambda: layers.stage_table(read("h100/bench_moe.json")),
    "model": lambda: models.model_table(read("h200/bench_model.json")),
    "model-variants": lambda: models.model_table(read("h200/bench_model_variants.json")),
    "model-ranks": lambda: models.ranks_table(read("h200/bench_model_ranks.json")),
    "model-compile": lambda: models.compile_text(read("h200/bench_model.json")),
    "model-transformers": lambda: models.model_table(read("h200/bench_model_transformers.json")),
    "serving": lambda: models.serving_table(read("h200/bench_serving.json")),
    "blocks": lambda: layers.block_table(read("h100/bench_block_graph.json")),
}


def build(name: str, page: str) -> str:
    """Markdown of one table; ValueError names the page and the table if there is no such table or no result for it."""
    if name not in TABLES:
        raise ValueError(f"{page}: no table is called {name!r}; there are {', '.join(TABLES)}")
    try:
        return TABLES[name]()
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{page}: the table {name!r} has no result: {error!r}") from error


def rewrite(text: str, page: str = "README.md") -> str:
    """The text of a page with every table in it made anew.

    Raises:
      ValueError: a marker names no table, a table has no result, or a table's two markers do not follow each other.
    """
    lines, inside = [], None
    for line in text.split("\n"):
        marker = _MARKER.fullmatch(line.strip())
        if marker is None:
            lines += [line] if inside is None else []
            continue
        is_end, name = bool(marker[1]), marker[2]
        if is_end != (inside is not None) or inside not in (None, name):
            raise ValueError(f"{page}: {line.strip()} follows {f'<!-- {inside} -->' if inside else 'no beginning'}")
        table = build(name, page)
        lines += [line] if is_end else [line, "", table, ""]
        inside = None if is_end else name
    if inside is not None:
        raise ValueError(f"{page}: <!-- end of {inside} --> is missing")
    return "\n".join(lines)


def rewrite_pages(root: Path) -> dict[Path, str]:
    """README.md and every page below docs/, each with the text that it should have.

    Raises:
      ValueError: see `rewrite`; also if a table stands on no page.
    """
    found, used = {}, set()
    for path in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        text = path.read_text(encoding="utf-8")
        found[path] = rewrite(text, str(path.relative_to(root)))
        used |= {marker[2] for line in text.split("\n") if (marker := _MARKER.fullmatch(line.strip()))}
    if unused := [name for name in TABLES if name not in used]:
        raise ValueError(f"no page shows the table {', '.join(map(repr, unused))}")
    return found


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    try:
        pages = rewrite_pages(ROOT)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    print(f"rewrote {', '.join(TABLES)} in {', '.join(str(path.relative_to(ROOT)) for path in pages)}")


if __name__ == "__main__":
    script.run(main)
