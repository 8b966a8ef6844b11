"""A file of answers: a JSON object per line. A run that was killed leaves whole lines, and a part of one at most."""

import fcntl
import json
from pathlib import Path
from typing import Any

from absl import app

from experiments.text.request_lines import RequestId

_START = b'{"id": '  # of every line


class AnswerFile:
    """Reads the answers of earlier runs, and appends further ones.

    The file is locked while it is open, so that two runs do not answer the same requests. The part of a line that a
    killed run left at its end is cut off.

    Args:
      flag: the name of the flag that names the file, for error messages.
      path: the file; it need not exist.

    Attributes:
      found: the ids that the file has at the start -> (number of the line, hash of the request).

    Raises:
      app.UsageError: the file cannot be used, is not one of answers, or another run has it open.
    """

    def __init__(self, flag: str, path: Path):
        self._name = f"--{flag}={path}"
        if path.exists() and not path.is_file():
            raise app.UsageError(f"{self._name} is no plain file, from which a run could be continued")
        try:
            # Without a buffer, a line is one write.
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise app.UsageError(f"{self._name} cannot be opened: {error.strerror}") from error
        self.found: dict[RequestId, tuple[int, str]] = {}
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read(path)
        except OSError as error:
            self.close()
            reason = "another run writes to it" if isinstance(error, BlockingIOError) else error.strerror
            raise app.UsageError(f"{self._name}: {reason}") from error
        except app.UsageError:
            self.close()
            raise

    def append(self, values: dict[str, Any]) -> None:
        """Write a line.

        Args:
          values: what it says, `id` first.

        Raises:
          app.UsageError: it cannot be written, for example because the disk is full.
        """
        data = json.dumps(values).encode() + b"\n"
        try:
            written = self._file.write(data)
        except OSError as error:
            raise app.UsageError(f"{self._name} could not be written: {error.strerror}") from error
        if written != len(data):
            raise app.UsageError(f"{self._name} could not be written: the disk may be full")

    def close(self) -> None:
        """Let other runs have the file."""
        self._file.close()

    def _read(self, path: Path) -> None:
        whole = 0  # bytes of whole lines
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.endswith(b"\n"):
                    whole += len(line)
                    self._remember(line, number)
                else:
                    self._cut(line, number, whole)

    def _remember(self, line: bytes, number: int) -> None:
        try:
            values = json.loads(line)
            id, hash = values["id"], values["request_hash"]
            is_known = id in self.found
        except (ValueError, TypeError, KeyError) as error:
            raise app.UsageError(f"{self._name}: line {number} is no answer, so nothing is added to it") from error
        if is_known:
            raise app.UsageError(f"{self._name}: lines {self.found[id][0]} and {number} have the same id {id!r}")
        self.found[id] = number, hash

    def _cut(self, line: bytes, number: int, whole: int) -> None:
        # A file that only looks like one of answers must not lose anything.
        if not (line.startswith(_START) or _START.startswith(line)):
            raise app.UsageError(f"{self._name}: line {number} is no answer, so nothing is added to it")
        self._file.truncate(whole)
