"""When a run of hours must end: a time limit, Ctrl-C and SIGTERM, each of them answered within a moment."""

import concurrent.futures
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

# Of a time limit, what is kept for saving and for a plot; of a short one a quarter.
_SECONDS_TO_SAVE = 3.0
_POLL_SECONDS = 0.001


class Stopped(Exception):
    """The run must end now. status: what the process exits with; 128 + the number of a signal, as shells have it."""

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


class RunLimits:
    """Knows whether a run may go on. Inside `with`, SIGINT and SIGTERM end nothing by themselves: `check` raises.

    Only the second SIGINT ends the process at once. What runs in C++ for long, such as compiling, keeps Python from
    seeing a signal or a clock: `wait` and `apart` leave it to another thread and look at both meanwhile.
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
        if number == signal.SIGINT:  # print may be in the middle of a line of its own
            os.write(2, b"\nThe state is being saved; another Ctrl-C ends the run at once.\n")

    def elapsed(self) -> float:
        """Seconds since the limits were made."""
        return time.monotonic() - self._began

    def check(self) -> None:
        """Raise Stopped after a signal, and when the time is over but for what saving takes."""
        if self._signal:
            raise Stopped(signal.Signals(self._signal).name, 128 + self._signal)
        if self.elapsed() >= self._seconds:
            raise Stopped(f"--max_minutes={self._minutes:g}", 0)

    def wait(self, done: Callable[[], bool]) -> None:
        """Return when `done()` is true, or raise Stopped when it is time."""
        while not done():
            self.check()
            time.sleep(_POLL_SECONDS)

    def apart(self, work: Callable[[], Any]) -> Any:
        """The result of `work()` in another thread. Where Stopped is raised, the work is left to itself."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        self.wait(future.done)
        return future.result()
