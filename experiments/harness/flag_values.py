"""Values of flags and environment switches, checked: the error names the flag or variable and the value."""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from absl import app

_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}


def integers(name: str, values: Iterable[Any]) -> list[int]:
    """Positive integers, each once; app.UsageError where one is not."""
    try:
        found = [int(v) for v in values]
    except ValueError as error:
        raise app.UsageError(f"--{name}: {error}") from error
    if found and min(found) < 1:
        raise app.UsageError(f"--{name} must be positive, got {min(found)}")
    return list(dict.fromkeys(found))


def choices(name: str, values: Sequence[str] | None, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    """Some of `allowed`, each once, `default` where nothing is given; app.UsageError where one is unknown."""
    if unknown := set(values or ()) - set(allowed):
        raise app.UsageError(f"--{name}: {sorted(unknown)} unknown; choose of {list(allowed)}")
    return list(dict.fromkeys(values or default))


def finite(name: str, value: float) -> float:
    """The value; app.UsageError for NaN and infinity, which the bounds of a flag let through."""
    if not math.isfinite(value):
        raise app.UsageError(f"--{name}={value} must be finite")
    return value


def switch(variable: str, default: bool | None) -> bool | None:
    """An environment variable that is on or off; `default` where it is not set."""
    value = os.environ.get(variable)
    if value is None:
        return default
    if value.strip().lower() not in _BOOLEANS:
        raise app.UsageError(f"{variable}={value!r} is not one of {sorted(_BOOLEANS)}")
    return _BOOLEANS[value.strip().lower()]
