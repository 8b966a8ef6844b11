"""Ctrl-C and SIGTERM as questions that a loop asks, so that a run ends between two steps."""

import os
import signal
from typing import Any


class Interrupts:
    """Used as a context manager, it notes the first SIGINT (Ctrl-C) or SIGTERM; the second one ends the process.

    Args:
      message: what the user is told when the first one comes.

    Attributes:
      status: 0, or after a signal the exit status that shells expect: 128 plus the signal's number.
    """

    def __init__(self, message: str):
        self._message, self.status = message, 0

    def __enter__(self) -> "Interrupts":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self.status = 128 + number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        os.write(2, f"\n{self._message}\n".encode())  # not print, which the signal may have interrupted
