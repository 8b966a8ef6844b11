"""Values of list flags, checked: the error names the flag and the value."""

from collections.abc import Iterable, Sequence
from typing import Any

from absl import app


def integers(name: str, values: Iterable[Any]) -> list[int]:
    """Positive integers; app.UsageError where one is not."""
    try:
        found = [int(v) for v in values]
    except ValueError as error:
        raise app.UsageError(f"--{name}: {error}") from error
    if found and min(found) < 1:
        raise app.UsageError(f"--{name} must be positive, got {min(found)}")
    return found


def choices(name: str, values: Sequence[str] | None, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    """Some of `allowed`, `default` where nothing is given; app.UsageError where one is unknown."""
    if unknown := set(values or ()) - set(allowed):
        raise app.UsageError(f"--{name}: {sorted(unknown)} unknown; choose of {list(allowed)}")
    return list(values or default)
