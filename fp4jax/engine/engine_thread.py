"""Runs an `Engine` in a thread of its own, and hands its tokens to coroutines.

A step of the engine waits for the device, which must not keep an event loop from its other work. So the loop never
touches the engine: it puts commands into a queue, the thread carries them out between two steps, and results come back
as callbacks of the loop. Commands and callbacks keep their order, so a request is known before its first tokens come.
"""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fp4jax.engine.engine import Engine, EngineReport
from fp4jax.engine.requests import Generated, QueueFull


class EngineStopped(RuntimeError):
    """The engine takes no requests any more, or will not finish this one.

    Args:
      reason: why.
      has_failed: whether that is an error, and not what somebody asked for.
    """

    def __init__(self, reason: str, has_failed: bool = False):
        super().__init__(reason)
        self.has_failed = has_failed


class Answer:
    """What the engine says about one request. `EngineThread.submit` makes it; everything here belongs to the loop."""

    def __init__(self, id: int, cancel: Callable[[], None]):
        self.id, self._cancel = id, cancel
        self._parts: asyncio.Queue[Generated | EngineStopped] = asyncio.Queue()

    def put(self, part: Generated | EngineStopped) -> None:
        """Adds what `parts` gives next."""
        self._parts.put_nowait(part)

    async def parts(self) -> AsyncIterator[Generated]:
        """Gives the new tokens as they come, up to those with a `finish_reason`.

        Raises:
          EngineStopped: the engine will not finish the request.
        """
        while True:
            part = await self._parts.get()
            if isinstance(part, EngineStopped):
                raise part
            yield part
            if part.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Ends the request, if it has not ended; its pages are free after the next step. `parts` gives no more."""
        self._cancel()


class EngineThread:
    """An engine that many coroutines of one event loop use. All methods are called from this loop.

    Args:
      engine: the engine; nobody else may use it from `start` on.
      on_failure: called in the loop with the exception that ended the thread.

    Attributes:
      report: what the engine had done after its newest step.
      error: the exception that ended the thread, or None.
      refuses: why `submit` raises `EngineStopped`; None: it does not.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[BaseException], None] | None = None):
        self._engine, self.on_failure = engine, on_failure
        self.report: EngineReport = engine.report()
        self.error: BaseException | None = None
        self.refuses: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._pending: set[asyncio.Future[Answer]] = set()
        self._answers: dict[int, Answer] = {}
        self._unfinished: set[int] = set()  # belongs to the thread
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    # --- the side of the loop ---

    def start(self) -> None:
        """Starts the thread."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Cancels the requests that have not ended, tells them so, and ends the thread."""
        self.abandon("the server stops")
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def submit(self, prompt_ids: Sequence[int], max_new_tokens: int, **options: Any) -> Answer:
        """Submits a request; arguments and ValueError are those of `Engine.submit`.

        Raises:
          ValueError: the engine does not serve such a request.
          QueueFull: too many requests wait already.
          EngineStopped: the engine takes no requests any more.
        """
        if self.refuses is not None:
            raise EngineStopped(self.refuses, has_failed=self.error is not None)
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._pending.add(future)
        self._commands.put(partial(self._submit, future, prompt_ids, max_new_tokens, options))
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().cancel()
            raise
        finally:
            self._pending.discard(future)

    def refuse(self, reason: str) -> None:
        """Lets `submit` raise `EngineStopped` from now on. Earlier requests go on."""
        self.refuses = self.refuses or reason

    def abandon(self, reason: str) -> None:
        """Refuses new requests, and ends those that have not ended with `EngineStopped`."""
        self.refuse(reason)
        stopped = EngineStopped(reason, has_failed=self.error is not None)
        for future in self._pending:
            if not future.done():
                future.set_exception(stopped)
        for answer in list(self._answers.values()):
            answer.put(stopped)
            answer.cancel()

    @property
    def is_idle(self) -> bool:
        """Whether every request has ended."""
        return not self._pending and not self._answers

    def _accepted(self, future: asyncio.Future[Answer], id: int) -> None:
        if future.done():  # whoever asked is gone
            self._commands.put(partial(self._engine.cancel, id))
            return
        self._answers[id] = Answer(id, partial(self._cancel, id))
        future.set_result(self._answers[id])

    def _refused(self, future: asyncio.Future[Answer], error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    def _cancel(self, id: int) -> None:
        if self._answers.pop(id, None) is not None:
            self._commands.put(partial(self._engine.cancel, id))

    def _deliver(self, events: Sequence[Generated]) -> None:
        for event in events:
            answer = self._answers.get(event.id)
            if answer is None:  # cancelled
                continue
            if event.finish_reason is not None:
                del self._answers[event.id]
            answer.put(event)

    def _failed(self, error: BaseException) -> None:
        self.error, self.refuses = error, f"the engine has failed: {type(error).__name__}"
        self.abandon(self.refuses)
        if self.on_failure is not None:
            self.on_failure(error)

    # --- the side of the thread ---

    def _work(self) -> None:
        try:
            while self._carry_out_commands():
                self._step()
            for id in self._unfinished:
                self._engine.cancel(id)
            while not self._engine.is_idle:  # a process that ends while the device computes is aborted
                self._step()
        except BaseException as error:
            self._tell(self._failed, error)

    def _step(self) -> None:
        events = self._engine.step()
        self.report = self._engine.report()
        self._unfinished -= {event.id for event in events if event.finish_reason is not None}
        if events:
            self._tell(self._deliver, events)

    def _carry_out_commands(self) -> bool:
        """Carries out the commands that are there, and waits for some while there is nothing else to do.

        Returns:
          Whether the engine has something to do; else the thread shall end.
        """
        while True:
            try:
                command = self._commands.get(block=self._engine.is_idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _submit(
        self, future: asyncio.Future[Answer], prompt_ids: Sequence[int], max_new_tokens: int, options: dict[str, Any]
    ) -> None:
        try:
            id = self._engine.submit(prompt_ids, max_new_tokens, **options)
        except (ValueError, QueueFull) as error:
            self._tell(self._refused, future, error)
        else:
            self._unfinished.add(id)
            self._tell(self._accepted, future, id)

    def _tell(self, callback: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(callback, *arguments)
