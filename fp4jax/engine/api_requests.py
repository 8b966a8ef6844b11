"""The bodies of requests to the HTTP server: JSON as OpenAI's API defines it becomes an `Ask`.

Every option is served or refused: one that the server does not know is an error that names it, so that nobody relies on
something that has no effect. Options that are null count as not given.
"""

import dataclasses
import json
import secrets
from typing import Any

from fp4jax.engine.api_errors import ApiError
from fp4jax.engine.drawing import MAX_STOP_IDS

_MOST_STOPS = 4
_LIMITS = ("max_completion_tokens", "max_tokens")  # the new and the old name, in a chat
# Options of OpenAI's API that are not served, each with the values that ask for nothing.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "presence_penalty": (0,), "frequency_penalty": (0,),
    "logit_bias": ({},), "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none", "auto"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Ask:
    """What a client asks for.

    Attributes:
      model: the name of the model.
      prompt: text or token ids; None in a chat.
      messages: the messages of a chat, whose contents are text; None: there is a prompt.
      max_tokens: the most tokens of the answer; None: not given.
      sampling: arguments of `Engine.submit`: temperature, top_p, top_k, min_p, and seed, which is a
        random one if the client gives none.
      stop: texts that end the answer.
      stop_ids: tokens that end the answer, besides those of the model.
      logprobs: None: the client wants none; 0: those of the answer's tokens; 1: also those of the likeliest tokens,
        which are the same ones, as the temperature is 0.
      stream: whether the answer comes in pieces.
      include_usage: whether the last piece of a stream says how many tokens there were.
    """

    model: str
    prompt: str | list[int] | None
    messages: list[dict[str, str]] | None
    max_tokens: int | None
    sampling: dict[str, Any]
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    logprobs: int | None
    stream: bool
    include_usage: bool

    @property
    def is_chat(self) -> bool:
        """Whether the answer is a message."""
        return self.messages is not None


def completion_of(body: bytes, vocab_size: int) -> Ask:
    """Reads the body of a request to /v1/completions.

    Args:
      body: JSON.
      vocab_size: tokens that the model knows.

    Raises:
      ApiError: status 400: it is not an object of JSON, an option is missing, unknown or has a wrong value.
    """
    options = _Options(body)
    prompt = options.take("prompt")
    if isinstance(prompt, list):
        prompt = _token_ids("prompt", prompt, vocab_size)
    if not isinstance(prompt, str | list) or not prompt:
        raise ApiError(400, "prompt must be one text or one list of token ids, and must not be empty", "prompt")
    return _ask(options, vocab_size, options.integer("logprobs", 0), options.integer("max_tokens", 1), prompt, None)


def chat_of(body: bytes, vocab_size: int) -> Ask:
    """Reads the body of a request to /v1/chat/completions; arguments and errors are those of `completion_of`."""
    options = _Options(body)
    messages = options.take("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list of at least one message", "messages")
    messages = [_message(i, message) for i, message in enumerate(messages)]
    limits = [limit for name in _LIMITS if (limit := options.integer(name, 1)) is not None]
    if len(set(limits)) > 1:
        raise ApiError(400, f"{' and '.join(_LIMITS)} contradict each other", _LIMITS[0])
    wants, top = options.boolean("logprobs"), options.integer("top_logprobs", 0)
    if top is not None and not wants:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    logprobs = (top or 0) if wants else None
    return _ask(options, vocab_size, logprobs, limits[0] if limits else None, None, messages)


def _ask(
    options: "_Options", vocab_size: int, logprobs: int | None, max_tokens: int | None, prompt: Any, messages: Any
) -> Ask:
    """The options that both routes have."""
    model, stop = options.take("model"), options.take("stop", [])
    if not isinstance(model, str):
        raise ApiError(400, "model must be the name of the model", "model")
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise ApiError(400, f"stop must be a text or a list of at most {_MOST_STOPS} texts, none empty", "stop")
    stop_ids = _token_ids("stop_token_ids", options.take("stop_token_ids", []), vocab_size)
    if len(stop_ids) > MAX_STOP_IDS:
        raise ApiError(400, f"stop_token_ids: at most {MAX_STOP_IDS}, got {len(stop_ids)}", "stop_token_ids")
    sampling = {
        "temperature": options.number("temperature", 1.0), "top_p": options.number("top_p", 1.0),
        "min_p": options.number("min_p", 0.0), "top_k": options.integer("top_k", 0) or 0,
    }  # fmt: skip
    seed = options.integer("seed", None)
    sampling["seed"] = secrets.randbits(32) if seed is None else seed
    if logprobs and (logprobs > 1 or sampling["temperature"] > 0):
        name = "logprobs" if messages is None else "top_logprobs"
        raise ApiError(400, f"{name}: only those of the answer's own tokens are known; ask for 0, or for 1 with "
                            "temperature 0, where they are the likeliest", name)  # fmt: skip
    stream, include_usage = options.boolean("stream"), False
    if (about := options.take("stream_options")) is not None:
        if not stream:
            raise ApiError(400, "stream_options needs stream: true", "stream_options")
        if not isinstance(about, dict) or set(about) - {"include_usage"}:
            raise ApiError(400, "stream_options may have include_usage only", "stream_options")
        include_usage = about.get("include_usage") or False
        if not isinstance(include_usage, bool):
            raise ApiError(400, "include_usage must be true or false", "stream_options")
    options.refuse_others()
    return Ask(
        model, prompt, messages, max_tokens, sampling, tuple(stop), tuple(stop_ids), logprobs, stream, include_usage
    )


class _Options:
    """The options of a body that nobody has read yet."""

    def __init__(self, body: bytes):
        try:
            values = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ApiError(400, "the body must be an object of JSON")
        self._values = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an option, which counts as read."""
        return self._values.pop(name, default)

    def number(self, name: str, default: float) -> float:
        """The value of an option that is a number. `Engine.submit` knows its range."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ApiError(400, f"{name} must be a number, got {value!r}", name)
        try:
            return float(value)
        except OverflowError as error:
            raise ApiError(400, f"{name} is too large", name) from error

    def integer(self, name: str, least: int | None) -> int | None:
        """The value of an option that is a whole number from `least` on; None: it is not given."""
        value = self.take(name)
        if value is None:
            return None
        if type(value) is not int or (least is not None and value < least):
            raise ApiError(400, f"{name} must be a whole number{'' if least is None else f' from {least} on'}, got "
                                f"{value!r}", name)  # fmt: skip
        return value

    def boolean(self, name: str) -> bool:
        """The value of an option that is true or false; false if it is not given."""
        value = self.take(name, False)
        if not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false, got {value!r}", name)
        return value

    def refuse_others(self) -> None:
        """Raises for the first option that was not read, unless its value asks for nothing."""
        for name, value in self._values.items():
            if name in _WITHOUT_EFFECT and value in _WITHOUT_EFFECT[name]:
                continue
            known = " with this value" if name in _WITHOUT_EFFECT else ""
            raise ApiError(400, f"the option {name!r} is not supported{known}", name, "unsupported_option")


def _token_ids(name: str, ids: Any, vocab_size: int) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise ApiError(400, f"{name} must be token ids, whole numbers from 0 to {vocab_size - 1}", name)
    return ids


def _message(index: int, message: Any) -> dict[str, str]:
    """A message, its content as one text."""
    name = f"messages[{index}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, f"{name} must be an object with a role", "messages")
    message = {key: value for key, value in message.items() if value is not None}
    if unknown := set(message) - {"role", "content", "name"}:
        raise ApiError(400, f"{name}: {sorted(unknown)[0]!r} is not supported", "messages", "unsupported_option")
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content):
            raise ApiError(400, f"{name}: all parts of the content must be text", "messages", "unsupported_option")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{name} must have a content, which is text", "messages")
    return {**message, "content": content}
