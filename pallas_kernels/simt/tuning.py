"""Tuned configurations: data, keyed by device, kernel and shape class, written by experiments/bench_ops.py."""

import functools
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuned.json")
DEVICE = "sm90"
# Work items (NVFP4 blocks, 16-byte accesses, routes) up to which a shape counts as small, and as medium. A grid of 132
# SMs holds about 2^17 of them at a time.
_SMALL, _MEDIUM = 2**17, 2**20


def shape_class(items: int) -> str:
    """Returns "small" where all items fit on the device at once (decode), "medium" or "large" (prefill)."""
    return "small" if items <= _SMALL else "medium" if items <= _MEDIUM else "large"


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def tuned(kernel: str, items: int, config_type: type) -> Any:
    """The table's configuration of `kernel` for `items` work items, or the defaults of `config_type`."""
    fields = _table().get(DEVICE, {}).get(kernel, {}).get(shape_class(items), {})
    return config_type(**fields)


def save(kernel: str, items: int, fields: dict[str, int]) -> None:
    """Set one entry of the table and write it."""
    table = json.loads(TABLE.read_text())
    table.setdefault(DEVICE, {}).setdefault(kernel, {})[shape_class(items)] = fields
    TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    _table.cache_clear()
