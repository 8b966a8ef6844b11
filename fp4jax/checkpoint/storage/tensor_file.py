"""Writing a safetensors file tensor by tensor, each at the place that its header gives it, and headers by themselves.

A file appears under its name when it is complete. The safetensors library writes from memory only, and its numpy side
does not know FP8.
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
    """Type (as safetensors names it) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(DTYPES[self.dtype]).itemsize


def spec_of(dtype: Any, shape: tuple[int, ...]) -> Spec:
    """Of an array."""
    return Spec(_NAMES[np.dtype(dtype)], tuple(shape))


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, str] | None, int]:
    """-> {tensor: its entry} in the order of the file, metadata, and where the data begins.

    Raises:
      ValueError: naming the file, where it is shorter or longer than its header says.
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
    """What stands before the data, byte for byte as the safetensors library writes it."""
    header = {_METADATA: dict(metadata), **entries} if metadata else dict(entries)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class TensorFile:
    """A file of tensors of `specs`, written in any order; use as a context. Complete on leaving, or not there at all.

    The widest types come first, so that every tensor is aligned. metadata: beside what other tools want to see.
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
        """Every tensor once."""
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
    """Where a file is written before it is complete."""
    return file.with_name(file.name + ".part")


def publish(content: Any, part: Path, file: Path) -> None:
    """Close an open file and give it its name, once its bytes are on the disk."""
    content.flush()
    os.fsync(content.fileno())
    content.close()
    os.replace(part, file)


def write_text(file: Path, text: str) -> None:
    """A whole file at once."""
    with part_of(file).open("w", encoding="utf-8") as content:
        content.write(text)
        publish(content, part_of(file), file)
