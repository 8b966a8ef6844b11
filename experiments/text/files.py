"""Text that users give, on the command line or in files: UTF-8, and not empty."""

import io
import sys

from absl import app


def read_text(flag: str, name: str, limit: int = -1) -> str:
    """The text of a file, or its first `limit` characters; "-" is standard input. A byte order mark is left out.

    Raises:
      app.UsageError: there is no such file, it is a folder or may not be read, is not UTF-8, or has nothing but blanks.
    """
    try:
        source = sys.stdin.buffer if name == "-" else io.BufferedReader(io.FileIO(name))
        with io.TextIOWrapper(source, encoding="utf-8-sig") as file:
            text = file.read(limit)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise app.UsageError(f"--{flag}={name} is not UTF-8 text: byte 0x{byte:02x}, {error.reason}") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise app.UsageError(f"--{flag}={name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise app.UsageError(f"--{flag}={name} has no text")
    return text


def check_text(flag: str, text: str) -> str:
    """The text of a flag as it is; app.UsageError where it is empty or its bytes were not UTF-8."""
    if not text:
        raise app.UsageError(f"--{flag} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python keeps bytes that it cannot decode as U+DC80 and up
        byte = ord(text[error.start]) & 0xFF
        raise app.UsageError(f"--{flag} is not UTF-8 text: byte 0x{byte:02x} at character {error.start}") from error
    return text
