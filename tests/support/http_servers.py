"""A server of `fp4jax.engine.server` in a thread of the test's own process, and clients of it."""

import contextlib
import signal
import threading
import time

import openai

from fp4jax.engine.server import ApiServer, ServerOptions
from fp4jax.engine.serving import GracefulServer, bind

__all__ = ["RunningServer", "running_server", "wait_until"]


class RunningServer:
    """A server that runs. `error` is what ended it, or None."""

    def __init__(self, api, shutdown_seconds):
        self.api, self.error = api, None
        self.http = GracefulServer(api, shutdown_seconds)
        bound, ready = bind("127.0.0.1", 0), threading.Event()
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, args=(bound, ready))
        self._thread.start()
        assert ready.wait(20)

    def _serve(self, bound, ready):
        try:
            self.http.serve_forever(bound, ready.set)
        except BaseException as error:
            self.error = error
        finally:
            ready.set()

    def client(self, key="none"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def send_signal(self):
        self.http.handle_exit(signal.SIGTERM, None)

    def join(self, timeout=20):
        self._thread.join(timeout)
        assert not self._thread.is_alive()


@contextlib.contextmanager
def running_server(engine, tokenizer, *, shutdown_seconds=20, template=None, stop_ids=(), **options):
    """A server on a free port. It has ended when the block ends."""
    api = ApiServer(
        engine, tokenizer, ServerOptions("tiny", **options), template=template, stop_ids=stop_ids
    )  # fmt: skip
    server = RunningServer(api, shutdown_seconds)
    try:
        yield server
    finally:
        server.send_signal()
        server.join()


def wait_until(holds, seconds=20):
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
