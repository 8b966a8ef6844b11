"""One answer of the HTTP server on its way to the client, which may go away at any time."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from fp4jax.engine.api_errors import ApiError
from fp4jax.engine.api_replies import AnswerText, Piece, Replies, event_of
from fp4jax.engine.engine_thread import Answer, EngineStopped
from fp4jax.engine.serve_extra import serve_extra
from fp4jax.engine.server_metrics import ServerMetrics

with serve_extra():
    from starlette.requests import Request
    from starlette.responses import StreamingResponse


class ClientGone(Exception):
    """Nobody waits for the reply."""


class RunningAnswer:
    """An answer that the engine works on. Whoever makes one calls `whole` or `events`, and `close` at the end.

    Args:
      answer: the engine's tokens.
      text: makes text of them.
      replies: makes JSON of the text.
      metrics: learns how long it took and how it ended.
      began: when the request came, as `time.monotonic` counts.
    """

    def __init__(self, answer: Answer, text: AnswerText, replies: Replies, metrics: ServerMetrics, began: float):
        self._answer, self._text, self._replies, self._metrics = answer, text, replies, metrics
        self._began, self._outcome, self._is_open = began, "cancelled", True

    async def whole(self) -> dict[str, Any]:
        """Waits for the whole answer, and returns the body of the reply.

        Raises:
          ApiError: the engine will not finish it.
        """
        pieces = [piece async for piece in self._pieces()]
        return self._replies.whole(pieces, self._text.num_tokens)

    async def events(self) -> AsyncIterator[str]:
        """Gives server-sent events. An error is one of them, as the status code of the reply is sent already."""
        if event := self._replies.first_event():
            yield event
        try:
            async for piece in self._pieces():
                if event := self._replies.event(piece):
                    yield event
        except ApiError as error:
            yield event_of(error.as_json())
            return
        yield self._replies.last_events(self._text.num_tokens)

    def close(self) -> None:
        """Cancels what has not ended, and counts how the request ended. Does nothing when it is called again."""
        self._answer.cancel()
        if self._is_open:
            self._is_open = False
            self._metrics.requests.labels(self._outcome).inc()

    async def _pieces(self) -> AsyncIterator[Piece]:
        first = None
        try:
            async for generated in self._answer.parts():
                now = time.monotonic()
                if first is None:
                    first = now
                    self._metrics.first_token.observe(now - self._began)
                piece = self._text.push(generated)
                if piece.finish_reason is not None:
                    self._outcome = piece.finish_reason
                    if self._text.num_tokens > 1:
                        self._metrics.per_token.observe((now - first) / (self._text.num_tokens - 1))
                yield piece
                if piece.finish_reason is not None:
                    return
        except EngineStopped as error:
            self._outcome = "failed"
            raise stopped_error(error) from error


class StreamedReply(StreamingResponse):
    """The reply to a client that wants pieces."""

    def __init__(self, running: RunningAnswer):
        super().__init__(running.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._running = running

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also when the client went away, perhaps before the first event
            self._running.close()


def stopped_error(error: EngineStopped) -> ApiError:
    """What a client is told when the engine does not serve it any more."""
    return ApiError(500 if error.has_failed else 503, str(error))


async def until_gone[T](request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns what `work` returns. The body of the request must have been read.

    Raises:
      ClientGone: the client went away before; `work` was cancelled.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for future in (task, gone):
            future.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await future


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
