"""The requests of an `Engine`, and what it says about them."""

import dataclasses
from typing import Literal, NamedTuple

from fp4jax.engine.drawing import Sampling
from fp4jax.engine.page_pool import ROOT

FinishReason = Literal["stop", "length", "cancelled"]


class Generated(NamedTuple):
    """New tokens of a request.

    Attributes:
      id: the request, as `Engine.submit` numbered it.
      tokens: its new tokens; they may be none if it was cancelled.
      finish_reason: None while more will come; "stop": the last token is one of its stop tokens; "length": it has as
        many tokens as it may have; "cancelled".
      logprobs: the logarithms of the probabilities that the model gave these tokens, before temperature and the like;
        None if the request did not ask for them.
    """

    id: int
    tokens: list[int]
    finish_reason: FinishReason | None
    logprobs: list[float] | None


class QueueFull(RuntimeError):
    """The engine has as many waiting requests as it may have."""


@dataclasses.dataclass(eq=False)
class Request:
    """A request and where it stands.

    Attributes:
      id: its number, in the order of submission.
      tokens: the prompt, and the tokens that were generated and read.
      prompt_length: tokens of the prompt.
      max_new_tokens: the most tokens to generate.
      sampling: how tokens are drawn.
      wants_logprobs: whether `Generated.logprobs` is filled.
      rank, slot: the device that runs it and its place there; -1: it waits.
      pages: its pages on the device, in the order of their positions.
      computed: positions whose keys and values are computed, or on their way.
      remembered: its first pages that the pool remembers; `chain`: that of the last one.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    max_new_tokens: int
    sampling: Sampling
    wants_logprobs: bool
    rank: int = -1
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0
    remembered: int = 0
    chain: int = ROOT

    @property
    def most_tokens(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self.prompt_length + self.max_new_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all tokens that it began to run with are computed, or on their way."""
        return self.slot >= 0 and self.computed >= self.started_with

    started_with: int = 0  # tokens known when it was admitted: the prompt, or more after a preemption
