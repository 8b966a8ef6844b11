"""Checks that a script can write its results.

Scripts run them first, so that a wrong path is reported before the work starts and not after it.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import app


def check_file(flag: str, name: str) -> Path:
    """The path of the file to write that a flag names.

    Args:
      flag: the name of the flag, for the error message.
      name: its value.

    Raises:
      app.UsageError: the name is empty or a folder, its folder does not exist, or the file may not be written.
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
    """The path of the output folder that a flag names. The folder may not exist yet; this function does not make it.

    Args:
      flag: the name of the flag, for the error message.
      name: its value.
      files: names of files that the script will write into the folder.

    Raises:
      app.UsageError: the name is empty; the folder, or the nearest folder above it that exists, is a file or may not be
        written; or one of the files exists and may not be written.
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
    """Write a JSON file that a flag names.

    Raises:
      app.UsageError: the file cannot be written, for example because the disk is full.
    """
    try:
        Path(name).write_text(json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise app.UsageError(f"--{flag}={name} could not be written: {error.strerror}") from error


def _takes_files(folder: Path) -> bool:
    """Whether files can be made in a folder, found out by making a temporary one.

    Permissions alone do not tell: they look the same on a disk that is mounted read-only.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
