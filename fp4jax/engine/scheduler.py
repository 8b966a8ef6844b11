"""Decides which requests an `Engine` runs: on which device, with which pages, and which of their tokens come next.

The schedule is a function of what was submitted, cancelled and generated, in this order. No clock is read.
"""

from collections import deque
from typing import NamedTuple

from fp4jax.engine.page_pool import PagePool
from fp4jax.engine.requests import Request


class Chunk(NamedTuple):
    """Tokens of a request that a prefill computes next.

    Attributes:
      request: the request.
      start: the position of the first token.
      tokens: the tokens.
      is_last: whether no known token of the request comes behind them, so that the next one is chosen.
    """

    request: Request
    start: int
    tokens: list[int]
    is_last: bool


class Scheduler:
    """The waiting requests, and those that run on every device.

    Requests begin in the order of submission: one that finds no room keeps those behind it waiting. It begins on the
    device that runs the fewest requests. A device computes the prompts of its requests one after the other, in chunks.

    Args:
      ranks: devices.
      max_requests: requests that a device runs at a time.
      num_pages: pages of a device.
      page_size: positions of a page.
      chunk: the most tokens of a chunk.
      shares: whether requests may share pages of equal prefixes.
    """

    def __init__(self, ranks: int, max_requests: int, num_pages: int, page_size: int, chunk: int, *, shares: bool):
        self.pools = [PagePool(num_pages, page_size, shares=shares) for _ in range(ranks)]
        self.slots: list[list[Request | None]] = [[None] * max_requests for _ in range(ranks)]
        self.running: list[list[Request]] = [[] for _ in range(ranks)]  # in the order of admission
        self.waiting: deque[Request] = deque()
        self._page_size, self._chunk = page_size, chunk
        self.shared_tokens = self.prompt_tokens = self.preemptions = 0

    def pages_for(self, positions: int) -> int:
        """Returns how many pages so many positions take."""
        return -(-positions // self._page_size)

    def admit(self) -> None:
        """Lets waiting requests begin while there is room."""
        while self.waiting:
            ranks = sorted(range(len(self.running)), key=lambda r: (len(self.running[r]), r))
            if not any(self._begin(self.waiting[0], rank) for rank in ranks):
                return
            self.waiting.popleft()

    def _begin(self, request: Request, rank: int) -> bool:
        """Whether the request found a slot and pages on the device; then it runs there."""
        slot = next((i for i, other in enumerate(self.slots[rank]) if other is None), None)
        if slot is None:
            return False
        pool = self.pools[rank]
        # The last token is always computed, as the next one is chosen from its result.
        shared, chain = pool.share(request.tokens[:-1])
        more = self.pages_for(len(request.tokens)) - len(shared)
        # A page stays free for every running request that may need one, so that this one need not wait again soon.
        growing = sum(self.pages_for(r.most_tokens - 1) > len(r.pages) for r in self.running[rank])
        new = pool.take(more) if more + growing <= pool.available else None
        if new is None:
            pool.release(shared)
            return False
        request.rank, request.slot, request.pages = rank, slot, shared + new
        request.remembered, request.chain = len(shared), chain
        request.computed, request.started_with = len(shared) * self._page_size, len(request.tokens)
        self.slots[rank][slot] = request
        self.running[rank].append(request)
        self.shared_tokens += request.computed
        self.prompt_tokens += len(request.tokens)
        return True

    def next_chunk_tokens(self) -> int:
        """Returns the tokens of the longest of the chunks that `next_chunks` would take; 0: there is none."""
        unfinished = filter(None, map(_first_unfinished, self.running))
        return max((min(self._chunk, request.started_with - request.computed) for request in unfinished), default=0)

    def next_chunks(self) -> list[Chunk | None]:
        """Takes the next chunk of the first unfinished prompt of every device; None for a device without one."""
        found: list[Chunk | None] = []
        for request in map(_first_unfinished, self.running):
            if request is None:
                found.append(None)
                continue
            start = request.computed
            tokens = request.tokens[start : min(start + self._chunk, request.started_with)]
            request.computed += len(tokens)
            self._remember(request, request.computed)
            found.append(Chunk(request, start, tokens, request.is_decoding))
        return found

    def find_pages(self, steps: int) -> int | None:
        """Gives decoding requests the pages for `steps` more tokens.

        Returns:
          None if all got them, else the first device without enough pages.
        """
        for rank, running in enumerate(self.running):
            for request in running:
                if request.is_decoding:
                    # The last token of an answer is never computed.
                    positions = min(request.computed + steps, request.most_tokens - 1)
                    more = self.pages_for(positions) - len(request.pages)
                    if more > 0:
                        new = self.pools[rank].take(more)
                        if new is None:
                            return rank
                        request.pages += new
        return None

    def advance(self, steps: int) -> list[Request]:
        """Counts `steps` tokens of every decoding request as computed, and returns these requests."""
        decoding = [request for running in self.running for request in running if request.is_decoding]
        for request in decoding:
            request.computed = min(request.computed + steps, request.most_tokens - 1)
        return decoding

    def preempt(self, rank: int) -> Request:
        """Stops the request that began last on a device; it waits again, before all others, with its tokens."""
        request = self.running[rank][-1]
        self.leave(request)
        self.waiting.appendleft(request)
        self.preemptions += 1
        return request

    def leave(self, request: Request) -> None:
        """Takes a request from its device. Its full pages are remembered; its tokens must all be known."""
        self._remember(request, min(len(request.tokens) - 1, request.computed))
        self.pools[request.rank].release(request.pages)
        self.slots[request.rank][request.slot] = None
        self.running[request.rank].remove(request)
        request.pages, request.rank, request.slot, request.computed = [], -1, -1, 0

    def _remember(self, request: Request, positions: int) -> None:
        """Has the pool remember the request's full pages among the first `positions`."""
        size = self._page_size
        while (request.remembered + 1) * size <= positions:
            at = request.remembered
            tokens = request.tokens[at * size : (at + 1) * size]
            request.chain = self.pools[request.rank].remember(request.pages[at], request.chain, tokens)
            request.remembered += 1


def _first_unfinished(running: list[Request]) -> Request | None:
    """The first request of a device whose prompt is not complete."""
    return next((request for request in running if not request.is_decoding), None)
