"""Tokens become text while they arrive: characters and stop strings may span several tokens."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

# Decoders write this character for bytes that are not UTF-8, also for those that the next token makes complete.
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so that so many tokens without a complete character are not text at all.
_MOST_INCOMPLETE = 64


@runtime_checkable
class Decoder(Protocol):
    """The part of a tokenizer that a `TextStream` needs."""

    def decode(self, ids: list[int], /) -> str:
        """Returns the text of token ids, in which bytes that are not UTF-8 are U+FFFD."""
        ...


class TextStream:
    """The text of an answer, in pieces that are final.

    All pieces together are the decoded answer up to the first stop string that is complete; of several that end at the
    same character, the longest counts. How tokens are divided between calls of `push` does not change the text.

    Args:
      tokenizer: has `decode`, which maps token ids to text.
      stop: texts that end the answer. They are not part of it.

    Attributes:
      stopped: whether a stop string was found. The tokens behind it are ignored.
      num_tokens: tokens that were pushed, up to and including the one that completed a stop string.

    Raises:
      ValueError: a stop string is empty.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()):
        if isinstance(stop, str) or not all(stop):
            raise ValueError(f"stop must be a list of texts that are not empty, got {stop!r}")
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self.stopped, self.num_tokens = False, 0
        # The text of a token can depend on those before it (a space at its start), so the newest are decoded together
        # with some whose text is known: the first `_known` of `_ids`, with the text `_known_text`.
        self._ids: list[int] = []
        self._known, self._known_text = 0, ""
        self._held = ""  # may be the start of a stop string

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next tokens, and returns the text that is final now. It may be empty."""
        pieces = []
        for token in ids:
            if self.stopped:
                break
            self.num_tokens += 1
            self._ids.append(token)
            pieces.append(self._before_stop(self._decode(is_end=False)))
        return "".join(pieces)

    def finish(self) -> str:
        """Returns the rest of the text; no token may follow."""
        if self.stopped:
            return ""
        text = self._before_stop(self._decode(is_end=True)) + self._held
        self._held = ""
        return text

    def _decode(self, is_end: bool) -> str:
        """The text of the tokens behind the known ones; "" while its last character may be incomplete."""
        new = len(self._ids) - self._known
        text = self._tokenizer.decode(self._ids)
        if text.endswith(_REPLACEMENT) and new < _MOST_INCOMPLETE and not is_end:
            return ""
        found = text[len(self._known_text) :]
        if found:  # tokens without text, which decoders leave out, are no tokens to decode others with
            self._ids = self._ids[self._known :]
            self._known, self._known_text = new, self._tokenizer.decode(self._ids)
        return found

    def _before_stop(self, text: str) -> str:
        """The held text and `text`, up to a stop string or to what may become one, which is held."""
        if not self._stop:
            return text
        text = self._held + text
        places = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)[1]]
        longest = max(map(len, self._stop)) - 1
        starts = range(max(0, len(text) - longest), len(text))
        cut = next((i for i in starts if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))
        self._held = text[cut:]
        return text[:cut]
