"""Scales of a folder's tensors: read, checked and turned into the decode direction."""

from typing import Any

import numpy as np

from fp4jax.checkpoint.storage.kept_scales import original, reciprocal
from fp4jax.checkpoint.storage.reader import Reader
from pallas_kernels.simt.formats import GLOBAL_SCALE_RANGE


def positive_scales(reader: Reader, name: str) -> np.ndarray:
    """Reads a tensor of scales and returns it in f32.

    Raises:
      ValueError: a scale is NaN, infinite, zero or negative; the message names file, tensor and value.
    """
    values = reader.read(name).astype(np.float32)
    bad = ~(np.isfinite(values) & (values > 0))
    if bad.any():
        refuse(reader, name, values[bad].flat[0], "scales must be positive and finite")
    return values


def refuse(reader: Reader, name: str, value: Any, rule: str) -> None:
    """Raises ValueError with a message that names the file, the tensor, the bad value and the rule that it breaks."""
    raise ValueError(f"{reader.file_of(name)}: tensor {name} has {value}; {rule}")


def decoded(reader: Reader, layout: str, name: str) -> np.ndarray:
    """Reads a tensor of global scales, and returns it in the decode direction (to multiply with), f32, unchecked.

    Args:
      reader: the folder.
      layout: how the tensor is stored, "modelopt" or "compressed_tensors". compressed-tensors stores
        reciprocals; the exact scale comes from the file's metadata if it is kept there (see `kept_scales`).
      name: the name of the tensor.
    """
    values = reader.read(name).astype(np.float32)
    if layout == "modelopt":
        return values
    kept = original(reader.kept_scales.get(name), values)
    return reciprocal(values) if kept is None else kept


def decode_scales(reader: Reader, stored: str, name: str) -> np.ndarray:
    """Reads a tensor of global scales, checks it, and returns it in the decode direction (to multiply with), f32.

    stored: how the tensor is stored, "modelopt" or "compressed_tensors".

    Raises:
      ValueError: a scale is not positive and finite, or lies outside of [2^-100, 2^100], where NVFP4 products would
        leave the normal range of f32. The message names file and tensor.
    """
    values = positive_scales(reader, name)
    low, high = GLOBAL_SCALE_RANGE  # low = 1 / high, so that the range of reciprocals is the same
    bad = (values < low) | (values > high)
    if bad.any():
        refuse(reader, name, values[bad].flat[0], "a global scale must lie in [2^-100, 2^100]")
    return decoded(reader, stored, name)


def block_scales(reader: Reader, name: str) -> np.ndarray:
    """Reads the e4m3 block scales of one NVFP4 layer.

    Raises:
      ValueError: a scale is NaN; the message names the tensor.
    """
    values = reader.read(name)
    check_block_scales(reader, name, values)
    return values


def check_block_scales(reader: Reader, name: str, values: np.ndarray) -> None:
    """Raises ValueError if e4m3 block scales that were read from tensor `name` have a NaN (e4m3 has no infinity)."""
    if ((values.view(np.uint8) & 0x7F) == 0x7F).any():
        refuse(reader, name, "nan", "block scales must be finite")
