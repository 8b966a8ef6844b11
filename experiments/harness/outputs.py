"""Whether a script will be able to write its results: checked before the work, not found out after it."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import app


def check_file(flag: str, name: str) -> Path:
    """The file that a flag names.

    Raises:
      app.UsageError: it is a folder, its folder does not exist, or one of them may not be written.
    """
    path = Path(name)
    if not name:
        raise app.UsageError(f"--{flag} must not be empty")
    if path.is_dir():
        raise app.UsageError(f"--{flag}={name} is a folder; a file is written")
    if not path.parent.is_dir():
        raise app.UsageError(f"--{flag}={name}: there is no folder {path.parent}")
    if not (os.access(path, os.W_OK) if path.exists() else _takes_files(path.parent)):
        raise app.UsageError(f"--{flag}={name} may not be written")
    return path


def check_folder(flag: str, name: str, *files: str) -> Path:
    """The folder that a flag names, with the files that will be written there; it may still have to be made.

    Raises:
      app.UsageError: it, or a folder above it, is a file or may not be written; or one of the files is a folder.
    """
    path = Path(name)
    if not name:
        raise app.UsageError(f"--{flag} must not be empty")
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if not there.is_dir():
        raise app.UsageError(f"--{flag}={name}: {there} is not a folder")
    if not _takes_files(there):
        raise app.UsageError(f"--{flag}={name}: nothing may be written to {there}")
    for file in files:
        if (path / file).exists():
            check_file(flag, str(path / file))
    return path


def write_json(flag: str, name: str, values: Any) -> None:
    """A file of JSON that a flag names; app.UsageError where it cannot be written after all (the disk is full, say)."""
    try:
        Path(name).write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise app.UsageError(f"--{flag}={name} could not be written: {error.strerror}") from error


def _takes_files(folder: Path) -> bool:
    """Whether a file can be made there, by making one without a name: permissions do not tell of read-only disks."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
