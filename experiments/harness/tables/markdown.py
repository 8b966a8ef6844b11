"""Markdown of a table; all tables of README and docs are made by it."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Write a table as Markdown.

    Args:
      columns: the title of every column.
      rows: the cells of every row; a cell is shown as `str` gives it.

    Raises:
      ValueError: a row has more or fewer cells than there are columns, or a cell contains a bar or a line break.
    """
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [str(cell) for cell in row]
        if len(cells) != len(columns):
            raise ValueError(f"{len(cells)} cells for {len(columns)} columns: {cells}")
        if broken := [cell for cell in cells if "|" in cell or "\n" in cell]:
            raise ValueError(f"a cell holds a bar or a line break: {broken[0]!r}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
