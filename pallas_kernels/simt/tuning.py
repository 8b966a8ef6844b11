"""Tuned configurations of the memory-bound kernels, a JSON table by device, kernel and class of shapes.

`experiments/bench_ops.py --sweep` measures the configurations and writes the table.
"""

import functools
import json
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tuned.json")
DEVICE = "sm90"
# Limits between small, medium and large shapes, in items: NVFP4 blocks, 16-byte accesses or routes, by kernel. The 132
# SMs of an H100 work on about 2^17 items at a time.
_SMALL, _MEDIUM = 2**17, 2**20


def shape_class(items: int) -> str:
    """Class of a shape: "small" if all items fit on the device at once (decode), else "medium" or "large" (prefill)."""
    return "small" if items <= _SMALL else "medium" if items <= _MEDIUM else "large"


@functools.cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def tuned(kernel: str, items: int, config_type: type) -> Any:
    """The table's configuration of `kernel` for `items` items. Fields that the table lacks have their defaults."""
    fields = _table().get(DEVICE, {}).get(kernel, {}).get(shape_class(items), {})
    return config_type(**fields)


def save(kernel: str, items: int, fields: dict[str, int]) -> None:
    """Sets one entry of the table and writes the file."""
    table = json.loads(TABLE.read_text())
    table.setdefault(DEVICE, {}).setdefault(kernel, {})[shape_class(items)] = fields
    TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    _table.cache_clear()
