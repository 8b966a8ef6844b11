"""Checks of the values of flags and environment variables; an error names the flag or variable and its value."""

import math
import os
from collections.abc import Iterable, Sequence
from typing import Any

from absl import app

_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}


def integers(name: str, values: Iterable[Any]) -> list[int]:
    """The values of a flag as positive integers, each once.

    Raises:
      app.UsageError: a value is no integer, or less than 1.
    """
    try:
        found = [int(v) for v in values]
    except ValueError as error:
        raise app.UsageError(f"--{name}: {error}") from error
    if found and min(found) < 1:
        raise app.UsageError(f"--{name} must be positive, got {min(found)}")
    return list(dict.fromkeys(found))


def choices(name: str, values: Sequence[str] | None, allowed: Sequence[str], default: Sequence[str]) -> list[str]:
    """The values of a flag, each once; `default` if there are none.

    Raises:
      app.UsageError: a value is not in `allowed`.
    """
    if unknown := set(values or ()) - set(allowed):
        raise app.UsageError(f"--{name}: {sorted(unknown)} unknown; choose of {list(allowed)}")
    return list(dict.fromkeys(values or default))


def finite(name: str, value: float) -> float:
    """The value of a flag.

    Raises:
      app.UsageError: it is NaN or infinite, which the bounds of absl's float flags let through.
    """
    if not math.isfinite(value):
        raise app.UsageError(f"--{name}={value} must be finite")
    return value


def switch(variable: str, default: bool | None) -> bool | None:
    """The value of an environment variable that is on ("1", "true") or off ("0", "false"); `default` if it is not set.

    Raises:
      app.UsageError: the variable has another value.
    """
    value = os.environ.get(variable)
    if value is None:
        return default
    if value.strip().lower() not in _BOOLEANS:
        raise app.UsageError(f"{variable}={value!r} is not one of {sorted(_BOOLEANS)}")
    return _BOOLEANS[value.strip().lower()]
