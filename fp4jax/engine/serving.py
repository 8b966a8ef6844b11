"""Runs an `ApiServer` as a process: binds an address, serves, and ends in order.

The first SIGTERM or SIGINT refuses new requests with status 503 and lets those that run end; when all have, or time is
up, the server stops. A second signal stops it at once. If the engine fails, the server stops as well.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

from fp4jax.engine.serve_extra import serve_extra
from fp4jax.engine.server import ApiServer

with serve_extra():
    import uvicorn

_FLUSH_SECONDS = 5  # for the last bytes of replies
_POLL_SECONDS = 0.02


def bind(host: str, port: int) -> socket.socket:
    """Takes an address. Until `GracefulServer` serves on it, connections to it are refused.

    Args:
      host: a name or an address of this machine.
      port: 0 takes a free one.

    Raises:
      OSError: the address does not exist here, or somebody else has it.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


class GracefulServer(uvicorn.Server):
    """Serves until a signal comes or the engine fails. `serve_forever` runs it.

    Args:
      api: the routes.
      shutdown_seconds: how long requests may go on after the first signal.
    """

    def __init__(self, api: ApiServer, shutdown_seconds: float | int = 60):
        config = uvicorn.Config(
            api.app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=_FLUSH_SECONDS
        )
        super().__init__(config)
        self._thread, self._shutdown_seconds = api.thread, shutdown_seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_ready: Callable[[], None] = lambda: None
        self._draining: asyncio.Task[None] | None = None
        self._thread.on_failure = self._stop_after_failure

    def serve_forever(self, bound: socket.socket, on_ready: Callable[[], None] | None = None) -> None:
        """Serves on an address of `bind`, and returns when a signal has ended it.

        Args:
          bound: the address; it is closed at the end.
          on_ready: called once connections are accepted.

        Raises:
          BaseException: what ended the engine's thread.
        """
        self._on_ready = on_ready or self._on_ready
        self.run(sockets=[bound])
        if self._thread.error is not None:
            raise self._thread.error

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to accept connections; uvicorn calls this."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end, or ends at once if it has begun; a signal calls this, in whichever thread it came."""
        if self._loop is None:
            self.should_exit = True
            return
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end)

    def _end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        else:
            self._thread.abandon("the server stops at once")
            self.should_exit = True

    async def _drain(self) -> None:
        self._thread.refuse("the server is shutting down")
        try:
            async with asyncio.timeout(self._shutdown_seconds):
                while not self._thread.is_idle:
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            self._thread.abandon("the server has shut down")
        self.should_exit = True

    def _stop_after_failure(self, error: BaseException) -> None:
        self.should_exit = True
