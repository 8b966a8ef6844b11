"""The pages of one device: which are free, whose they are, and which hold a prefix that a later request may share.

A full page whose tokens are known is remembered under the page before it and its own tokens. So a chain of remembered
pages stands for one sequence of tokens from its beginning on, and two requests that begin alike find the same pages.
Pages that nobody uses any more keep what they hold until their memory is needed; those that were used longest ago go
first.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence

ROOT = -1  # the chain of no page


class PagePool:
    """Hands out pages, counts how many requests use each, and finds shared prefixes.

    Args:
      num_pages: pages of the device, numbered from 0.
      page_size: positions of a page.
      shares: whether pages are remembered. Without it every request gets pages of its own.
    """

    def __init__(self, num_pages: int, page_size: int, *, shares: bool = True):
        self.page_size, self._shares = page_size, shares
        self._free = deque(range(num_pages))
        self._users = [0] * num_pages
        self._page_of: dict[tuple[int, tuple[int, ...]], int] = {}  # (chain before, tokens) -> page
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._chain_of: dict[int, int] = {}  # page -> number of its chain, which is never used again
        self._next_chain = 0
        self._idle: OrderedDict[int, None] = OrderedDict()  # remembered pages without users, oldest first
        self.num_pages = num_pages

    @property
    def available(self) -> int:
        """Pages that `take` could hand out now."""
        return len(self._free) + len(self._idle)

    def take(self, count: int) -> list[int] | None:
        """Returns `count` pages for one user, or None if there are not as many; then nothing changes."""
        if count > self.available:
            return None
        found = []
        for _ in range(count):
            page = self._free.popleft() if self._free else self._forget_oldest()
            self._users[page] = 1
            found.append(page)
        return found

    def share(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Finds the remembered pages of the longest prefix of `tokens`, and counts one more user for each.

        Returns:
          The pages, and the chain of the last one (ROOT if there is none).
        """
        chain, pages = ROOT, []
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            page = self._page_of.get((chain, tuple(tokens[start : start + self.page_size])))
            if page is None:
                break
            self._idle.pop(page, None)
            self._users[page] += 1
            chain = self._chain_of[page]
            pages.append(page)
        return pages, chain

    def remember(self, page: int, chain: int, tokens: Sequence[int]) -> int:
        """Remembers a full page that comes behind `chain` and holds `tokens`; returns the chain with it.

        If another page holds the same already, that one stays the remembered one.
        """
        if not self._shares:
            return ROOT
        key = chain, tuple(tokens)
        known = self._page_of.setdefault(key, page)
        if known == page and page not in self._chain_of:
            self._key_of[page], self._chain_of[page] = key, self._next_chain
            self._next_chain += 1
        return self._chain_of[known]

    def release(self, pages: Sequence[int]) -> None:
        """Counts one user less for every page of a request, given in the order of their positions."""
        for page in reversed(pages):  # the last page of a chain is forgotten before those that it depends on
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def _forget_oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)], self._chain_of[page]
        return page
