"""Replies of the HTTP server: tokens of the engine become text, and text becomes JSON as OpenAI's API defines it."""

import dataclasses
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from fp4jax.engine.api_requests import Ask
from fp4jax.engine.requests import Generated
from fp4jax.engine.text_stream import TextStream

_LEAST_LOGPROB = -9999.0  # JSON has no infinity


class TokenText(NamedTuple):
    """A token of an answer: its text alone, the logarithm of its probability, and where its text begins."""

    text: str
    logprob: float
    offset: int


@dataclasses.dataclass
class Piece:
    """A piece of an answer: final text, tokens if their logprobs were asked for, and why the answer ends, or None."""

    text: str
    tokens: list[TokenText]
    finish_reason: str | None


class AnswerText:
    """Makes pieces of text of the tokens of one request.

    Attributes:
      num_tokens: tokens of the answer, with the one that ended it.
    """

    def __init__(self, tokenizer: Any, ask: Ask, stop_ids: Sequence[int]):
        self._tokenizer, self._stop_ids = tokenizer, frozenset(stop_ids)
        self._stream, self._length, self.num_tokens = TextStream(tokenizer, ask.stop), 0, 0

    def push(self, generated: Generated) -> Piece:
        """Takes the next tokens. After a piece with a `finish_reason` no other may come."""
        piece = Piece("", [], None)
        for i, token in enumerate(generated.tokens):
            self.num_tokens += 1
            if token in self._stop_ids:
                piece.finish_reason = "stop"
                break
            offset, text = self._length + len(piece.text), self._stream.push([token])
            piece.text += text
            if generated.logprobs is not None:
                logprob = max(generated.logprobs[i], _LEAST_LOGPROB)
                piece.tokens.append(TokenText(self._tokenizer.decode([token]), logprob, offset))
            if self._stream.stopped:
                break
        if piece.finish_reason is None:
            piece.finish_reason = generated.finish_reason
        if piece.finish_reason is not None:
            piece.text += self._stream.finish()
        if self._stream.stopped:
            piece.finish_reason = "stop"
        self._length += len(piece.text)
        return piece


class Replies:
    """The JSON of one answer.

    Args:
      ask: what was asked.
      id: the request's number.
      prompt_tokens: tokens of the prompt.
    """

    def __init__(self, ask: Ask, id: int, prompt_tokens: int):
        self._ask, self._prompt_tokens = ask, prompt_tokens
        kind = "chat.completion" if ask.is_chat else "text_completion"
        if ask.is_chat and ask.stream:
            kind += ".chunk"
        prefix, now = "chatcmpl" if ask.is_chat else "cmpl", int(time.time())
        self._head = {"id": f"{prefix}-{now:x}-{id}", "object": kind, "created": now, "model": ask.model}

    def whole(self, pieces: Sequence[Piece], num_tokens: int) -> dict[str, Any]:
        """The answer that does not come in pieces."""
        piece = Piece(
            "".join(p.text for p in pieces), [t for p in pieces for t in p.tokens], pieces[-1].finish_reason
        )  # fmt: skip
        text = {"message": {"role": "assistant", "content": piece.text}} if self._ask.is_chat else {"text": piece.text}
        return {**self._head, "choices": [self._choice(text, piece)], "usage": self._usage(num_tokens)}

    def first_event(self) -> str:
        """What comes before the first piece of a stream; nothing but in a chat."""
        if not self._ask.is_chat:
            return ""
        return self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, Piece("", [], None))])

    def event(self, piece: Piece) -> str:
        """The event of a piece; nothing for one that says nothing."""
        if not piece.text and not piece.tokens and piece.finish_reason is None:
            return ""
        text = {"text": piece.text}
        if self._ask.is_chat:
            text = {"delta": {"content": piece.text} if piece.text else {}}
        return self._event([self._choice(text, piece)])

    def last_events(self, num_tokens: int) -> str:
        """What comes behind the last piece."""
        usage = self._event([], self._usage(num_tokens)) if self._ask.include_usage else ""
        return f"{usage}data: [DONE]\n\n"

    def _event(self, choices: list[Any], usage: dict[str, int] | None = None) -> str:
        last = {"usage": usage} if self._ask.include_usage else {}
        return event_of({**self._head, "choices": choices, **last})

    def _choice(self, text: dict[str, Any], piece: Piece) -> dict[str, Any]:
        logprobs = None
        if piece.tokens:
            logprobs = self._chat_logprobs(piece) if self._ask.is_chat else self._completion_logprobs(piece)
        return {"index": 0, **text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _completion_logprobs(self, piece: Piece) -> dict[str, Any]:
        return {
            "tokens": [t.text for t in piece.tokens],
            "token_logprobs": [t.logprob for t in piece.tokens],
            "top_logprobs": [{t.text: t.logprob} for t in piece.tokens] if self._ask.logprobs else None,
            "text_offset": [t.offset for t in piece.tokens],
        }

    def _chat_logprobs(self, piece: Piece) -> dict[str, Any]:
        # Bytes of a token that is a part of a character are not known.
        tokens = [
            {"token": t.text, "logprob": t.logprob, "bytes": None if "\ufffd" in t.text else list(t.text.encode())}
            for t in piece.tokens
        ]
        return {"content": [{**token, "top_logprobs": [token] if self._ask.logprobs else []} for token in tokens]}

    def _usage(self, num_tokens: int) -> dict[str, int]:
        total = self._prompt_tokens + num_tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": num_tokens, "total_tokens": total}


def event_of(values: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False, separators=(',', ':'))}\n\n"
