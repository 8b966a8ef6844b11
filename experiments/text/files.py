"""Checks of text that users give on the command line or in files: it must be UTF-8 and not empty."""

import io
import sys

from absl import app


def read_text(flag: str, name: str, limit: int = -1) -> str:
    """Read a file of text that a flag names. A byte order mark at its start is left out.

    Args:
      flag: the name of the flag, for the error message.
      name: the file; "-" is standard input.
      limit: the largest number of characters to read; -1: all.

    Raises:
      app.UsageError: the file does not exist, is a folder, cannot be read, is not UTF-8, or holds only whitespace.
    """
    try:
        source = sys.stdin.buffer if name == "-" else io.BufferedReader(io.FileIO(name))
        with io.TextIOWrapper(source, encoding="utf-8-sig") as file:
            text = file.read(limit)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise app.UsageError(f"--{flag}={name} is not UTF-8 text: byte 0x{byte:02x}, {error.reason}") from error
    except (OSError, ValueError) as error:  # ValueError: the name has a null character
        raise app.UsageError(f"--{flag}={name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise app.UsageError(f"--{flag}={name} has no text")
    return text


def check_text(flag: str, text: str) -> str:
    """Return the text of a flag unchanged.

    Raises:
      app.UsageError: it is empty, or its bytes were not UTF-8.
    """
    if not text:
        raise app.UsageError(f"--{flag} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python turns argument bytes that are not UTF-8 into U+DC80 and up
        byte = ord(text[error.start]) & 0xFF
        raise app.UsageError(f"--{flag} is not UTF-8 text: byte 0x{byte:02x} at character {error.start}") from error
    return text
