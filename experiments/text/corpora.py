"""Real text without a download: the source files of the running Python's standard library, or any folder of text.

Whole files are held out by a rule that depends on their name only, so that the split is the same on every machine and
no part of a held-out file is ever trained on.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "__pycache__"}
)
_SKIPPED_PREFIX = "_sysconfigdata"  # generated at build time, full of paths of one machine
_HELD_OUT_ONE_IN = 20
SEPARATOR = b"\0"  # ends every file; does not occur inside source text


class Corpus(NamedTuple):
    """Bytes of all training files and of all held-out files, each file ended by `SEPARATOR`."""

    train: np.ndarray
    held_out: np.ndarray
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    digest: str  # sha256 of both parts: equal digests mean comparable numbers


def is_held_out(name: str) -> bool:
    """One file in 20, by the sha256 of its path relative to the corpus root (with forward slashes)."""
    return _name_hash(name) % _HELD_OUT_ONE_IN == 0


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def list_files(folder: str | Path | None = None) -> tuple[Path, list[str]]:
    """Root and sorted relative names: every file of `folder`, or the library's .py files without tests and tools."""
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
    """Read and split the corpus. A small folder in which the rule picks no file holds out the one of smallest hash.

    Raises:
      ValueError: for a folder that does not exist or has fewer than two files.
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
    """Non-overlapping windows [N, length + 1] from the start of `data` (the last byte of one is the first of the next).

    A window's first byte is context only, so every byte but the first of `data` is predicted once. `limit` keeps that
    many windows, evenly spread. Raises ValueError for data shorter than one window.
    """
    count = (len(data) - 1) // length
    if count < 1:
        raise ValueError(f"{len(data)} bytes do not fill one window of {length} + 1")
    chosen = np.arange(count)
    if limit is not None and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    return data[chosen[:, None] * length + np.arange(length + 1)]
