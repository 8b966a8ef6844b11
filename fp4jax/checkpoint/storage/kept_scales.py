"""Global scales whose reciprocal is another number: what the metadata of a file keep of them.

compressed-tensors stores the reciprocals of the scales that ModelOpt stores, and 1 / (1 / x) is not always x. Where it
is not, the metadata of a file keep the bytes of x under the name of the tensor that holds 1 / x. A tensor that was
changed since counts as it is: x is taken only while the tensor still holds its reciprocal.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

KEY = "fp4jax.original"  # of a file's metadata


def kept_in(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """What the metadata of a file keep: "scales", {tensor: [the four bytes of x in hex, shape of x]}, and "config"."""
    return json.loads((metadata or {}).get(KEY, "{}"))


def reciprocal(values: np.ndarray) -> np.ndarray:
    """1 / x in f32 without a warning; the caller checks what comes of 0 and of NaN."""
    with np.errstate(all="ignore"):
        return np.float32(1) / values.astype(np.float32)


def original(kept: list[Any] | None, values: np.ndarray) -> np.ndarray | None:
    """The scale x, in the shape of `values`, that an entry keeps of a tensor with these values; None if it is stale."""
    if kept is None or values.size != 1:
        return None
    found = np.frombuffer(bytes.fromhex(kept[0]), "<f4")
    same = reciprocal(found).tobytes() == values.astype("<f4").tobytes()
    return found.reshape(values.shape) if same else None
