"""The one way in which a table becomes Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown of a table.

    Args:
      columns: titles, one per column.
      rows: cells of each row; every cell is shown as `str` gives it.

    Raises:
      ValueError: a row has more or fewer cells than there are columns, or a cell would break the table.
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
