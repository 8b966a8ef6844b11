"""Keeps exact global scales in a file's metadata where the stored reciprocals would lose a bit.

ModelOpt stores a global scale x to multiply with, and compressed-tensors stores its reciprocal 1 / x. In f32,
1 / (1 / x) is not always x. Where it differs, the metadata of the safetensors file keeps the bytes of x under the name
of the tensor that holds 1 / x. A reader uses the kept x only while the tensor still holds exactly 1 / x: if another
tool has changed the tensor since, the entry is stale and the tensor's own value counts.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

KEY = "fp4jax.original"  # the metadata entry, whose value is JSON text


def kept_in(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns what this project keeps in the metadata of a safetensors file; an empty dict if there is nothing.

    The keys are "scales", {tensor name: [the four bytes of x in hex, the shape of x]}, and "config", the fields of the
    `Described` of the folder that this one was converted from. Both are optional.
    """
    return json.loads((metadata or {}).get(KEY, "{}"))


def reciprocal(values: np.ndarray) -> np.ndarray:
    """Returns 1 / x in f32 without NumPy's warnings; 0 and NaN give infinity and NaN, which the caller checks."""
    with np.errstate(all="ignore"):
        return np.float32(1) / values.astype(np.float32)


def original(kept: list[Any] | None, values: np.ndarray) -> np.ndarray | None:
    """Returns the exact scale x that the metadata keeps for a tensor, or None if there is none or it is stale.

    Args:
      kept: the tensor's entry in "scales" of `kept_in`, None if it has none.
      values: the tensor's values, f32, which should be [1 / x].

    Returns:
      x in the shape of `values`, f32.
    """
    if kept is None or values.size != 1:
        return None
    found = np.frombuffer(bytes.fromhex(kept[0]), "<f4")
    same = reciprocal(found).tobytes() == values.astype("<f4").tobytes()
    return found.reshape(values.shape) if same else None
