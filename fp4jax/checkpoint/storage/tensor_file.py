"""Writes safetensors files tensor by tensor, in any order, so that not all tensors have to be in memory at once.

A file appears under its name only when it is complete. The safetensors library itself writes a file only when all of
its tensors are in memory, and its NumPy side has no FP8 types.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fp4jax.checkpoint.storage.reader import DTYPES

_NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"


class Spec(NamedTuple):
    """The type (as safetensors names it, "BF16" for example) and the shape of a tensor in a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size of the tensor's data in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(DTYPES[self.dtype]).itemsize


def spec_of(dtype: Any, shape: tuple[int, ...]) -> Spec:
    """Returns the spec of an array with this NumPy dtype and shape."""
    return Spec(_NAMES[np.dtype(dtype)], tuple(shape))


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, str] | None, int]:
    """Reads the header of a safetensors file, and returns (entries, metadata or None, place of the first data byte).

    entries is {tensor name: {"dtype", "shape", "data_offsets"}}, in the order of the header.

    Raises:
      ValueError: the file is shorter or longer than its header says.
    """
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header: dict[str, Any] = json.loads(content.read(size))
    metadata = header.pop(_METADATA, None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if file.stat().st_size != 8 + size + end:
        raise ValueError(f"{file} has {file.stat().st_size} bytes, its header says {8 + size + end}")
    return header, metadata, 8 + size


def header_bytes(entries: Mapping[str, Any], metadata: Mapping[str, str] | None) -> bytes:
    """Returns the header of a safetensors file and the 8 bytes of its length, as the safetensors library writes them.

    Args:
      entries: {tensor name: {"dtype", "shape", "data_offsets"}}.
      metadata: text by key; None or empty writes no metadata.
    """
    header = {_METADATA: dict(metadata), **entries} if metadata else dict(entries)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """A safetensors file that is being written; use it in a `with` statement and write every tensor once, in any order.

    The file gets its name when the `with` block ends. If the block raises, no file is left. The tensors of the widest
    types come first in the file, so that every tensor is aligned to the size of its type.

    Args:
      file: the path of the file.
      specs: type and shape of every tensor, by name.
      metadata: text by key, written into the header beside {"format": "pt"}, which other tools expect there.
    """

    def __init__(self, file: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str] | None = None):
        self._file, self._part, self._specs = file, part_of(file), dict(specs)
        self._missing = set(specs)
        wide = sorted(specs, key=lambda name: (-np.dtype(DTYPES[specs[name].dtype]).itemsize, name))
        entries, end = {}, 0
        for name in wide:
            start, end = end, end + specs[name].nbytes
            entries[name] = {
                "dtype": specs[name].dtype,
                "shape": list(specs[name].shape),
                "data_offsets": [start, end],
            }
        header = header_bytes(entries, {"format": "pt", **(metadata or {})})
        self._starts = {name: len(header) + entry["data_offsets"][0] for name, entry in entries.items()}
        self._out = self._part.open("wb")
        self._out.write(header)
        self._out.truncate(len(header) + end)

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes one tensor; its type and shape must be those of its spec.

        Raises:
          ValueError: the type or the shape differs.
          KeyError: the tensor is not in `specs`, or was written before.
        """
        if spec_of(value.dtype, value.shape) != self._specs[name]:
            raise ValueError(f"{name} is {value.dtype} {value.shape}, announced was {self._specs[name]}")
        self._missing.remove(name)
        self._out.seek(self._starts[name])
        self._out.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._out.close()
            self._part.unlink()
            return
        assert not self._missing, f"not written: {sorted(self._missing)}"
        publish(self._out, self._part, self._file)


def part_of(file: Path) -> Path:
    """Returns the path under which a file is written until it is complete."""
    return file.with_name(file.name + ".part")


def publish(content: Any, part: Path, file: Path) -> None:
    """Closes an open file and renames it from `part` to `file`, once its bytes are on the disk."""
    content.flush()
    os.fsync(content.fileno())
    content.close()
    os.replace(part, file)


def write_text(file: Path, text: str) -> None:
    """Writes a text file so that it appears under its name only when it is complete."""
    with part_of(file).open("w", encoding="utf-8") as content:
        content.write(text)
        publish(content, part_of(file), file)
