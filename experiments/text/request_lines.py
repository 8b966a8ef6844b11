"""A file of requests: a JSON object per line, with exactly one of `prompt`, `ids` and `messages`."""

import dataclasses
import hashlib
import io
import json
import math
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import app

from fp4jax.engine import ChatTemplate, Sampling

PROMPTS = ("prompt", "ids", "messages")
SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "logprobs")
RequestId = str | int | float


class BadLine(ValueError):
    """A line is not a request.

    Args:
      reason: what is wrong with it.

    Attributes:
      id: the line's own id if it has a good one, else its number.
      hash: stands for the text of the line.
    """

    def __init__(self, reason: str, id: RequestId, hash: str):
        super().__init__(reason)
        self.id, self.hash = id, hash


class RequestLine(NamedTuple):
    """A checked line.

    Attributes:
      id: the line's own id, else its number.
      hash: stands for the prompt as it is written and for the settings, those of flags included.
      prompt_ids: the tokens of the prompt.
      max_tokens: the most tokens of the answer.
      sampling: how tokens are drawn, and which tokens end the answer.
      stop: texts that end the answer.
      logprobs: whether the logarithms of the tokens' probabilities are wanted.
    """

    id: RequestId
    hash: str
    prompt_ids: list[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    logprobs: bool


class Lines:
    """The lines of a file, as (number, bytes), without those that are empty. They can be read again and again.

    Args:
      flag: the name of the flag that names the file, for error messages.
      name: the file. What can be read only once, such as standard input ("-") and pipes, is kept in memory.

    Raises:
      app.UsageError: the file cannot be read.
    """

    def __init__(self, flag: str, name: str):
        self._flag, self._name, self._kept = flag, name, None
        try:
            if name == "-":
                self._kept = sys.stdin.buffer.readlines()
            elif not stat.S_ISREG(Path(name).stat().st_mode):
                self._kept = io.BytesIO(Path(name).read_bytes()).readlines()
        except (OSError, ValueError) as error:
            self._refuse(error)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        try:
            if self._kept is not None:
                yield from self._numbered(self._kept)
                return
            with Path(self._name).open("rb") as file:
                yield from self._numbered(file)
        except OSError as error:
            self._refuse(error)

    def _numbered(self, lines: Any) -> Iterator[tuple[int, bytes]]:
        for number, line in enumerate(lines, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # some tools write a byte order mark
            if line.strip():
                yield number, line

    def _refuse(self, error: Exception) -> NoReturn:
        reason = getattr(error, "strerror", None) or error
        raise app.UsageError(f"--{self._flag}={self._name} cannot be read: {reason}") from error


@dataclasses.dataclass
class LineReader:
    """Makes requests from lines.

    Attributes:
      tokenizer: the tokenizer.
      chat_template: gives the chat template, or None; called for the first line with messages.
      vocab_size: tokens that the model knows.
      max_length: the most tokens of prompt and answer together.
      stop_ids: the tokens that end an answer.
      defaults: a value for each of `SETTINGS`, for lines without one.
    """

    tokenizer: Any
    chat_template: Callable[[], ChatTemplate | None]
    vocab_size: int
    max_length: int
    stop_ids: tuple[int, ...]
    defaults: Mapping[str, Any]

    def read(self, number: int, line: bytes) -> RequestLine:
        """The request in a line.

        Raises:
          BadLine: it has none.
        """
        id: RequestId = number
        try:
            values = _json_object(line)
            id = _checked_id(values.pop("id", None), number)
            return self._request(id, values)
        except ValueError as error:
            raise BadLine(str(error), id, _hash(line.strip())) from error

    def _request(self, id: RequestId, values: dict[str, Any]) -> RequestLine:
        if unknown := values.keys() - {*PROMPTS, *SETTINGS}:
            raise ValueError(f"unknown keys: {', '.join(sorted(unknown))}")
        values = {key: value for key, value in values.items() if value is not None}
        if len(given := [key for key in PROMPTS if key in values]) != 1:
            raise ValueError(f"needs one of {', '.join(PROMPTS)}, has {' and '.join(given) or 'none'}")
        settings = check_settings({**self.defaults, **{key: values[key] for key in SETTINGS if key in values}})
        ids = self._prompt_ids(given[0], values[given[0]])
        max_tokens, stop, logprobs = (settings[key] for key in ("max_tokens", "stop", "logprobs"))
        if len(ids) + max_tokens > self.max_length:
            raise ValueError(f"{len(ids)} tokens and {max_tokens} new ones exceed --max_length={self.max_length}")
        text = json.dumps([given[0], values[given[0]], settings], sort_keys=True)
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        sampling = Sampling(**{name: settings[name] for name in names}, stop_ids=self.stop_ids)
        return RequestLine(id, _hash(text.encode()), ids, max_tokens, sampling, stop, logprobs)

    def _prompt_ids(self, key: str, value: Any) -> list[int]:
        if key == "ids":
            if not isinstance(value, list) or not all(type(token) is int for token in value):
                raise ValueError("ids must be a list of token ids")
            ids = value
        elif key == "prompt":
            ids = self.tokenizer.encode(_text("prompt", value))
        else:
            ids = self.tokenizer.encode(_text("messages", self._rendered(value)), special_tokens=False)
        if not ids or min(ids) < 0 or max(ids) >= self.vocab_size:
            span = f", from {min(ids)} to {max(ids)}" if ids else ""
            raise ValueError(f"{key} has {len(ids)} tokens{span}; the model knows {self.vocab_size}")
        return ids

    def _rendered(self, messages: Any) -> str:
        template = self.chat_template()
        if template is None:
            raise ValueError("messages: the model's folder has no chat template")
        is_list = isinstance(messages, list)
        if not is_list or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            raise ValueError("messages must be a list of objects with role and content, both text")
        return template.render(messages)


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a request, with `stop` as a tuple.

    Args:
      settings: a value for each of `SETTINGS`.

    Raises:
      ValueError: a value is not allowed.
    """
    found = dict(settings)
    for key in ("max_tokens", "top_k", "seed"):
        if type(found[key]) is not int:
            raise ValueError(f"{key} must be a whole number, got {found[key]!r}")
    for key in ("temperature", "top_p", "min_p"):
        if type(found[key]) not in (int, float):
            raise ValueError(f"{key} must be a number, got {found[key]!r}")
        found[key] = _float(key, found[key])
    if found["max_tokens"] < 1:
        raise ValueError(f"max_tokens must be at least 1, got {found['max_tokens']}")
    if type(found["logprobs"]) is not bool:
        raise ValueError(f"logprobs must be true or false, got {found['logprobs']!r}")
    stop = [found["stop"]] if isinstance(found["stop"], str) else found["stop"]
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError(f"stop must be text or a list of texts that are not empty, got {stop!r}")
    found["stop"] = tuple(stop)
    Sampling(found["temperature"], found["top_k"], found["top_p"], found["min_p"], found["seed"])
    return found


def _json_object(line: bytes) -> dict[str, Any]:
    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number of JSON")

    try:
        values = json.loads(line.decode(), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: byte 0x{line[error.start]:02x}, {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values


def _checked_id(id: Any, number: int) -> RequestId:
    if id is None:
        return number
    if type(id) in (str, int) or (type(id) is float and math.isfinite(id)):
        return id
    raise ValueError(f"id must be text or a number, got {id!r}")


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be text, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} has half of a surrogate pair at character {error.start}") from error
    return value


def _float(key: str, value: int | float) -> float:
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{key} is too large") from error


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
