"""Reads the tensors of a checkpoint's safetensors files by name.

All headers are read when the reader is made; the data of a tensor is read when it is asked for. The safetensors library
checks each file's header against the file's size. The data is mapped into memory by this module, since the NumPy side
of the library has no FP8 types.
"""

import functools
import json
import math
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fp4jax.checkpoint.storage.kept_scales import kept_in

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
DTYPES = {
    "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64, "F64": np.float64, "BOOL": np.bool_,
}  # fmt: skip
_NAMES_IN_ERROR = 8


class _Entry(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int  # the place of the tensor's first byte in the file


class Reader:
    """The tensors of a checkpoint folder, by name.

    The files are those that model.safetensors.index.json lists, or model.safetensors if there is no index. All tensors
    of these files count, also those that the index does not list. `name in reader` tells whether there is a tensor.

    Raises:
      FileNotFoundError: a file does not exist.
      ValueError: the index or a file cannot be read, the index places a tensor in a file that does not have it, or
        several files have a tensor that the index does not list.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        index = folder / INDEX_NAME
        weight_map = _read_weight_map(index) if index.is_file() else None
        files = [WEIGHTS_NAME] if weight_map is None else sorted(set(weight_map.values()))
        self._metadata: list[Any] = []
        headers = {}
        for file in files:
            headers[file], metadata = _read_header(folder / file, weight_map is not None)
            self._metadata.append(metadata)
        self._entries: dict[str, _Entry] = {}
        for file, header in headers.items():
            for name, entry in header.items():
                if name in self._entries and name not in (weight_map or ()):
                    raise ValueError(f"{folder / file}: tensor {name} is in {self._entries[name].file.name} too")
                self._entries[name] = entry
        absent = sorted(set(weight_map or ()) - self._entries.keys())
        if absent:
            raise ValueError(f"{index} lists tensors that are in no file: {some(absent)}")
        for name, file in (weight_map or {}).items():  # a tensor in several files is read where the index says
            if name not in headers[file]:
                found = self._entries[name].file.name
                raise ValueError(f"{index}: tensor {name} should be in {file}, but it is in {found}")
            self._entries[name] = headers[file][name]
        self._maps: dict[Path, mmap.mmap] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @functools.cached_property
    def kept_scales(self) -> dict[str, list[Any]]:
        """The exact scales that the metadata of all files keep, by tensor name; see the module `kept_scales`."""
        return {name: kept for metadata in self._metadata for name, kept in kept_in(metadata).get("scales", {}).items()}

    def names(self) -> set[str]:
        """Returns the names of all tensors."""
        return set(self._entries)

    def file_of(self, name: str) -> Path:
        """Returns the file that a tensor is read from."""
        return self._entries[name].file

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """Returns the type of a tensor as safetensors names it, "BF16" for example."""
        return self._entries[name].dtype

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns a tensor, or the range `rows` of its first axis, as a read-only view of the mapped file.

        Raises:
          ValueError: the tensor has a type that this project does not support (see `DTYPES`).
        """
        entry = self._entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.file}: tensor {name} has type {entry.dtype}, which is not supported")
        count = math.prod(entry.shape)
        if count == 0:  # an empty tensor has no bytes in the file
            return np.zeros(entry.shape, DTYPES[entry.dtype])[rows]
        whole = np.frombuffer(self._map(entry.file), DTYPES[entry.dtype], count, entry.start).reshape(entry.shape)
        return whole[rows] if entry.shape else whole

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as content:
                self._maps[file] = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]

    def forget_pages(self) -> None:
        """Drops the mapped files from the memory of this process; reading a tensor again loads its pages again."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def check(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        """Checks that a tensor has a shape and one of several types.

        Raises:
          ValueError: the tensor has another shape or type; the message names the file, the tensor, what was found and
            what was expected.
        """
        entry = self._entries[name]
        if entry.shape != tuple(shape) or entry.dtype not in dtypes:
            raise ValueError(
                f"{entry.file}: tensor {name} has shape {entry.shape} and type {entry.dtype}, "
                f"expected {tuple(shape)} and {'one of ' if len(dtypes) > 1 else ''}{', '.join(dtypes)}"
            )


def some(names: list[str]) -> str:
    """Returns the first names of a list as text, and how many more there are; "none" for an empty list."""
    more = f" and {len(names) - _NAMES_IN_ERROR} more" if len(names) > _NAMES_IN_ERROR else ""
    return (", ".join(names[:_NAMES_IN_ERROR]) or "none") + more


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error!r}") from error
    here = set()
    for name, file in weight_map.items():
        if isinstance(file, str) and (file in here or Path(file).name == file):
            here.add(file)
        else:
            raise ValueError(f"{index}: tensor {name} is in {file!r}, expected the name of a file in the same folder")
    return weight_map


def _read_header(file: Path, listed: bool) -> tuple[dict[str, _Entry], dict[str, str] | None]:
    """Returns (entries of a file's tensors by name, the file's metadata or None).

    listed: whether the index names the file; the message about a missing file says so.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist" + (f", but {INDEX_NAME} names it" if listed else ""))
    try:
        with safe_open(file, framework="numpy"):
            pass  # opening checks that the tensors do not overlap and that the file holds all of them
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header: dict[str, Any] = json.loads(content.read(size))
    metadata = header.pop("__metadata__", None)
    entries = {
        name: _Entry(file, tuple(entry["shape"]), entry["dtype"], 8 + size + entry["data_offsets"][0])
        for name, entry in header.items()
    }
    return entries, metadata
