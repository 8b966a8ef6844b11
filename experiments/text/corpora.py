"""Text to train and evaluate byte-level models on: Python's standard library, or any folder of text. No download.

Some whole files are held out for evaluation. Whether a file is held out depends on its name only, so the split is the
same on every machine, and no part of a held-out file is ever trained on.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}
)
_SKIPPED_PREFIX = "_sysconfigdata"  # generated when Python is built, and different on every machine
_HELD_OUT_ONE_IN = 20
SEPARATOR = b"\0"  # follows every file; source text does not contain it


class Corpus(NamedTuple):
    """The bytes of a corpus, split into files to train on and held-out files; `SEPARATOR` follows every file.

    Attributes:
      train: the training bytes, uint8.
      held_out: the held-out bytes, uint8.
      train_files: names of the training files, relative to the corpus' root.
      held_out_files: names of the held-out files.
      digest: a sha256 of both parts. Numbers of two runs are comparable if the digests are equal.
    """

    train: np.ndarray
    held_out: np.ndarray
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    digest: str


def is_held_out(name: str) -> bool:
    """Whether a file is held out: one in 20, by the sha256 of its relative path with forward slashes."""
    return _name_hash(name) % _HELD_OUT_ONE_IN == 0


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def list_files(folder: str | Path | None = None) -> tuple[Path, list[str]]:
    """The root of a corpus and the sorted relative names of its files.

    Args:
      folder: a folder, of which every file counts; None: the standard library of the running Python, of which the .py
        files count, without tests and tools.

    Raises:
      ValueError: the folder does not exist or is a file, or its name is empty.
    """
    if folder == "":
        raise ValueError("--corpus: the name of a folder must not be empty")
    root = Path(sysconfig.get_path("stdlib") if folder is None else folder).resolve()
    if not root.is_dir():
        what = "this is a file, not a folder" if root.exists() else "no such folder"
        raise ValueError(f"--corpus={folder}: {what}; give a folder of text, or none for Python's own library")
    pattern = "*.py" if folder is None else "*"
    names = [path.relative_to(root).as_posix() for path in root.rglob(pattern) if path.is_file()]
    if folder is None:
        names = [n for n in names if not _is_skipped(n)]
    return root, sorted(names)


def _is_skipped(name: str) -> bool:
    *folders, file = name.split("/")
    return not _SKIPPED_FOLDERS.isdisjoint(folders) or file.startswith(_SKIPPED_PREFIX)


def load_corpus(folder: str | Path | None = None) -> Corpus:
    """Read a corpus and split it.

    If the rule holds out no file, the file with the smallest hash is held out; if it holds out all files, only the
    first.

    Raises:
      ValueError: the folder does not exist or has fewer than two files.
    """
    root, names = list_files(folder)
    if len(names) < 2:
        raise ValueError(f"{root} has {len(names)} files; at least 2 are needed, to train and to hold out")
    held_out = tuple(name for name in names if is_held_out(name)) or (min(names, key=_name_hash),)
    if len(held_out) == len(names):
        held_out = held_out[:1]
    train = tuple(name for name in names if name not in held_out)
    parts = [_read(root, group) for group in (train, held_out)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    train_bytes, held_out_bytes = (np.frombuffer(part, np.uint8) for part in parts)
    return Corpus(train_bytes, held_out_bytes, train, held_out, digest)


def _read(root: Path, names: tuple[str, ...]) -> bytes:
    return b"".join((root / name).read_bytes() + SEPARATOR for name in names)


def windows(data: np.ndarray, length: int, limit: int | None = None) -> np.ndarray:
    """Cut bytes into windows of `length` + 1: uint8 [N, length + 1].

    The last byte of a window is also the first byte of the next one. A model gets the first byte of a window as context
    only, so every byte of `data` but the first is predicted once. Bytes that do not fill a window are left out.

    Args:
      data: the bytes.
      length: the number of predicted bytes per window.
      limit: the largest number of windows, which are spread evenly over the data; None: all.

    Raises:
      ValueError: the data is shorter than one window.
    """
    count = (len(data) - 1) // length
    if count < 1:
        raise ValueError(f"{len(data)} bytes do not fill one window of {length} + 1")
    chosen = np.arange(count)
    if limit is not None and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    return data[chosen[:, None] * length + np.arange(length + 1)]
