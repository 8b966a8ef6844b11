"""The routes of an HTTP server with OpenAI's API: completions, chats, models, health and metrics.

A request goes through here: its key and its size are checked, its body becomes an `Ask`, its text tokens, and the
engine's tokens become text again, whole or as server-sent events. A client that goes away cancels its request.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from fp4jax.engine.api_errors import ApiError
from fp4jax.engine.api_replies import AnswerText, Replies
from fp4jax.engine.api_requests import Ask, chat_of, completion_of
from fp4jax.engine.chat_template import ChatTemplate
from fp4jax.engine.drawing import MAX_STOP_IDS
from fp4jax.engine.engine import Engine
from fp4jax.engine.engine_thread import EngineStopped, EngineThread
from fp4jax.engine.requests import QueueFull
from fp4jax.engine.serve_extra import serve_extra
from fp4jax.engine.server_answers import ClientGone, RunningAnswer, StreamedReply, stopped_error, until_gone
from fp4jax.engine.server_metrics import CONTENT_TYPE, ServerMetrics

with serve_extra():
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

_NOBODY_READS_THIS = 499
_READ_TOO_MUCH = 4  # times the largest body


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What a server allows.

    Attributes:
      model_name: the name that requests must give as `model`.
      api_keys: a request must bring one of them; none: no key is needed.
      max_body_bytes: the largest body of a request.
      max_prompt_tokens: the longest prompt; None: as long as the engine allows.
      default_max_tokens: the most tokens of an answer whose request does not say so, if that many have room.
    """

    model_name: str
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    default_max_tokens: int = 256


class ApiServer:
    """The routes, and what they share.

    Args:
      engine: the engine, warmed up; nobody else may use it while the server runs.
      tokenizer: has `encode`, text to token ids, without tokens of its own if `special_tokens=False`, and `decode`,
        which maps ids to text.
      options: what is allowed.
      template: makes the text of a prompt of the messages of a chat; None: chats are refused.
      stop_ids: tokens that end every answer.

    Attributes:
      thread: the engine's thread, which runs while `app` runs.
      app: the application, for an ASGI server.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, options: ServerOptions, *, template: ChatTemplate | None = None,
        stop_ids: Sequence[int] = (),
    ):  # fmt: skip
        self._tokenizer, self._options, self._template = tokenizer, options, template
        self._stop_ids, self._started = tuple(stop_ids), int(time.time())
        self._vocab_size, self._max_length = engine.config.vocab_size, engine.max_length
        self.thread = EngineThread(engine)
        self._metrics = ServerMetrics(lambda: self.thread.report)
        routes = [
            Route("/v1/completions", partial(self._generate, completion_of), methods=["POST"]),
            Route("/v1/chat/completions", partial(self._generate, chat_of), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._tell_metrics, methods=["GET"]),
        ]
        handlers: Any = {ApiError: _error_reply, HTTPException: _http_error_reply, Exception: _failure_reply}
        self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> AsyncIterator[None]:
        self.thread.start()
        yield
        await self.thread.stop()

    # --- routes ---

    async def _models(self, request: Request) -> Response:
        self._check_key(request)
        model = {"id": self._options.model_name, "object": "model", "created": self._started, "owned_by": "fp4jax",
                 "max_model_len": self._max_length}  # fmt: skip
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, request: Request) -> Response:
        if self.thread.refuses is not None:
            raise ApiError(503, self.thread.refuses)
        return JSONResponse({"status": "ok"})

    async def _tell_metrics(self, request: Request) -> Response:
        return Response(self._metrics.as_text(), headers={"Content-Type": CONTENT_TYPE})

    async def _generate(self, read: Callable[[bytes, int], Ask], request: Request) -> Response:
        began = time.monotonic()
        try:
            ask, running = await self._begin(read, request, began)
        except ApiError as error:
            outcome = {429: "queue_full", 500: "failed", 503: "failed"}.get(error.status, "refused")
            self._metrics.requests.labels(outcome).inc()
            raise
        except ClientGone:
            self._metrics.requests.labels("cancelled").inc()
            return Response(status_code=_NOBODY_READS_THIS)
        if ask.stream:
            return StreamedReply(running)
        try:
            return JSONResponse(await until_gone(request, running.whole()))
        except ClientGone:
            return Response(status_code=_NOBODY_READS_THIS)
        finally:
            running.close()

    # --- a request ---

    async def _begin(
        self, read: Callable[[bytes, int], Ask], request: Request, began: float
    ) -> tuple[Ask, RunningAnswer]:
        """Checks a request, and gives it to the engine."""
        self._check_key(request)
        if self.thread.refuses is not None:
            raise ApiError(503, self.thread.refuses)
        ask = read(await self._body(request), self._vocab_size)
        if ask.model != self._options.model_name:
            raise ApiError(404, f"there is no model {ask.model!r}, only {self._options.model_name!r}", "model",
                           "model_not_found")  # fmt: skip
        ids = await self._prompt_ids(ask)
        return ask, await until_gone(request, self._submit(ask, ids, began))

    def _check_key(self, request: Request) -> None:
        if not self._options.api_keys:
            return
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        # Every key is compared, in constant time, so that the time tells nothing about them.
        found = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in self._options.api_keys]
        if kind.lower() != "bearer" or not any(found):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        most, parts, size = self._options.max_body_bytes, [], 0
        try:
            async for part in request.stream():
                size += len(part)
                # A client hears the reply after it has sent its body. So some of what is too much is read, and dropped.
                if size > _READ_TOO_MUCH * most:
                    break
                if size <= most:
                    parts.append(part)
        except ClientDisconnect as error:
            raise ClientGone from error
        if size > most:
            raise ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
        return b"".join(parts)

    async def _prompt_ids(self, ask: Ask) -> list[int]:
        """The tokens of the prompt. Long texts take a while, so threads of their own encode them."""
        if isinstance(ask.prompt, list):
            ids = ask.prompt
        elif ask.prompt is not None:
            ids = await asyncio.to_thread(self._encode, ask.prompt)
        elif self._template is None:
            raise ApiError(400, "the model has no chat template; use /v1/completions", "messages")
        else:
            try:
                text = await asyncio.to_thread(self._template.render, ask.messages or [])
            except ValueError as error:
                raise ApiError(400, str(error), "messages") from error
            ids = await asyncio.to_thread(self._encode, text, special_tokens=False)  # the template writes them
        most = self._max_length - 1
        if self._options.max_prompt_tokens is not None:
            most = min(most, self._options.max_prompt_tokens)
        if len(ids) > most:
            raise ApiError(400, f"the prompt has {len(ids)} tokens, and at most {most} are allowed",
                           "messages" if ask.is_chat else "prompt", "context_length_exceeded")  # fmt: skip
        return ids

    def _encode(self, text: str, **options: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, f"the text is not valid Unicode: {error.reason}") from error
        return self._tokenizer.encode(text, **options)

    async def _submit(self, ask: Ask, ids: list[int], began: float) -> RunningAnswer:
        room, wanted = self._max_length - len(ids), ask.max_tokens
        if wanted is not None and wanted > room:
            raise ApiError(400, f"max_tokens={wanted}: the prompt of {len(ids)} tokens leaves room for {room}",
                           "max_tokens", "context_length_exceeded")  # fmt: skip
        stop_ids = tuple(dict.fromkeys((*self._stop_ids, *ask.stop_ids)))
        if len(stop_ids) > MAX_STOP_IDS:
            raise ApiError(400, f"stop_token_ids: at most {MAX_STOP_IDS - len(self._stop_ids)} besides the model's own",
                           "stop_token_ids")  # fmt: skip
        wanted = min(room, self._options.default_max_tokens) if wanted is None else wanted
        sampling = {**ask.sampling, "stop_ids": stop_ids, "logprobs": ask.logprobs is not None}
        try:
            answer = await self.thread.submit(ids, wanted, **sampling)
        except ValueError as error:
            raise ApiError(400, str(error)) from error
        except QueueFull as error:
            raise ApiError(429, str(error), code="queue_full") from error
        except EngineStopped as error:
            raise stopped_error(error) from error
        text, replies = AnswerText(self._tokenizer, ask, stop_ids), Replies(ask, answer.id, len(ids))
        return RunningAnswer(answer, text, replies, self._metrics, began)


def _reply(error: ApiError) -> Response:
    # Escapes, as text of the client may be no valid Unicode.
    return Response(json.dumps(error.as_json()), error.status, error.headers, "application/json")


def _error_reply(request: Request, error: Any) -> Response:
    return _reply(error)


def _http_error_reply(request: Request, error: Any) -> Response:
    return _reply(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))


def _failure_reply(request: Request, error: Any) -> Response:
    return _reply(ApiError(500, "the server made a mistake; its log says more"))
