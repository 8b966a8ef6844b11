"""The end of a run that takes hours: a time limit, Ctrl-C and SIGTERM, each noticed within milliseconds."""

import concurrent.futures
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

# The part of a time limit that is kept for saving the state and the plot; at most a quarter of the limit.
_SECONDS_TO_SAVE = 3.0
_POLL_SECONDS = 0.001


class Stopped(Exception):
    """Raised when a run must end now.

    Args:
      reason: what ended the run, for the user.
      status: the exit status of the process; after a signal it is 128 plus the signal's number, as in shells.
    """

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


class RunLimits:
    """Says whether a run may go on.

    Used as a context manager, it catches SIGINT (Ctrl-C) and SIGTERM: the first one makes `check` raise `Stopped`, and
    a SIGINT after it ends the process at once. While C++ code runs in the main thread, such as a compilation, Python
    notices neither signals nor the time. `wait` and `apart` therefore keep the main thread in Python while another
    thread works.

    Args:
      minutes: the time limit, counted from now, within which the state must also be saved; None: no limit.
    """

    def __init__(self, minutes: float | None = None):
        self._began, self._minutes, self._signal = time.monotonic(), minutes, 0
        self._seconds = math.inf if minutes is None else 60 * minutes - min(_SECONDS_TO_SAVE, 15 * minutes)

    def __enter__(self) -> "RunLimits":
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        self._signal = self._signal or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if number == signal.SIGINT:  # not print, which the signal may have interrupted
            os.write(2, b"\nThe state is being saved; another Ctrl-C ends the run at once.\n")

    def elapsed(self) -> float:
        """Seconds since this object was made."""
        return time.monotonic() - self._began

    def check(self) -> None:
        """Check the signals and the time.

        Raises:
          Stopped: a signal came, or only the time that saving takes is left of the limit.
        """
        if self._signal:
            raise Stopped(signal.Signals(self._signal).name, 128 + self._signal)
        if self.elapsed() >= self._seconds:
            raise Stopped(f"--max_minutes={self._minutes:g}", 0)

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until `done()` is true.

        Raises:
          Stopped: the run must end first.
        """
        while not done():
            self.check()
            time.sleep(_POLL_SECONDS)

    def apart(self, work: Callable[[], Any]) -> Any:
        """Call `work` in another thread and return its result.

        Raises:
          Stopped: the run must end first. The thread goes on; it ends with the process.
        """
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        self.wait(future.done)
        return future.result()
