"""Chooses the token counts to compile for (buckets): those with the least padding for a histogram of token counts."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Token counts that the serving system which this project re-implements captures by default.
REFERENCE_BUCKETS = (128, 256, 512, 1024, 2048)
_TOO_MUCH = 2**61  # a number of rows that no plan may reach; the sum of two still fits a signed 64-bit integer


class BucketPlan(NamedTuple):
    """Buckets for a histogram of calls, and what they cost.

    buckets: token counts, ascending. tokens: the tokens of all calls together. padded: the rows that run for all calls
    together, pads included.
    """

    buckets: tuple[int, ...]
    tokens: int
    padded: int

    @property
    def waste(self) -> float:
        """The fraction of the rows that are pads, 0 to 1."""
        return 1 - self.tokens / self.padded if self.padded else 0.0


def plan_buckets(
    histogram: Mapping[int, int] | Sequence[int] | np.ndarray,
    max_buckets: int,
    *,
    granularity: int = 1,
    largest: int | None = None,
) -> BucketPlan:
    """Returns at most `max_buckets` buckets that run all calls of `histogram` with the fewest rows.

    A call of n tokens runs in the smallest bucket of at least n tokens. A call above the largest bucket runs in chunks
    of the largest bucket, and its remainder runs in the smallest bucket that holds it.

    The largest bucket is fixed first: it is `largest`, or else the largest token count, so that no call is chunked.
    For this largest bucket no other choice of the remaining buckets needs fewer rows; another largest bucket might.

    The method is dynamic programming over the candidate sizes: the token counts of the calls (of a chunked call, the
    remainder), rounded up to `granularity`. The cheapest k buckets that hold all calls up to size s are the cheapest
    k - 1 buckets for all calls up to some smaller size, plus the bucket s for the calls between the two sizes.

    Args:
      histogram: how many calls have how many tokens: {tokens: calls}, or a sequence whose entry n counts the calls
        with n tokens.
      max_buckets: the greatest number of buckets.
      granularity: every bucket is a multiple of it, except `largest`. A kernel's tile height is a good value.
      largest: the largest bucket; None takes the largest token count, rounded up to `granularity`.

    Raises:
      ValueError: the histogram has a negative or fractional entry, has no call with tokens, or has more rows than
        64-bit sums can count; or `max_buckets`, `granularity` or `largest` is no whole number from 1 up.
    """
    calls = read_histogram(histogram)
    if not calls:
        raise ValueError("plan_buckets: the histogram has no call with tokens")
    for name, value in (("max_buckets", max_buckets), ("granularity", granularity), ("largest", largest)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"plan_buckets: {name} must be a whole number from 1 up, got {value}")
    largest = _round_up(max(calls), granularity) if largest is None else int(largest)
    rests: dict[int, int] = {}  # size -> calls that need this size, once their full chunks of `largest` are taken off
    for tokens, count in calls.items():
        if rest := tokens % largest or (largest if tokens == largest else 0):
            size = min(_round_up(rest, granularity), largest)
            rests[size] = rests.get(size, 0) + count
    rests.setdefault(largest, 0)
    sizes = np.array(sorted(rests))
    if sum(rests.values()) * largest >= _TOO_MUCH:
        raise ValueError(f"plan_buckets: {sum(rests.values())} calls of up to {largest} tokens are too many to add up")
    calls_up_to = np.cumsum([0, *(rests[size] for size in sizes.tolist())])  # [i]: calls that need one of sizes[:i]
    cost = np.full(len(sizes) + 1, _TOO_MUCH)  # [i]: fewest rows for those calls with the buckets allowed so far
    cost[0] = 0
    choices = []
    for _ in range(min(max_buckets, len(sizes))):
        # Allow one more bucket: sizes[i - 1] is the largest one and serves the calls that need one of sizes[j:i].
        choice = np.zeros(len(cost), np.int64)
        cheapest = cost.copy()
        for i in range(1, len(cost)):
            total = cost[:i] + sizes[i - 1] * (calls_up_to[i] - calls_up_to[:i])
            choice[i] = np.argmin(total)
            cheapest[i] = total[choice[i]]
        choices.append(choice)
        cost = cheapest
    buckets, end = [], len(sizes)
    for choice in reversed(choices):
        if end == 0:
            break
        buckets.append(int(sizes[end - 1]))
        end = int(choice[end])
    found = tuple(sorted(buckets))
    return BucketPlan(found, *work(found, calls))


def work(buckets: Sequence[int], histogram: Mapping[int, int] | Sequence[int] | np.ndarray) -> tuple[int, int]:
    """Returns (tokens of all calls, rows that run for all calls with these buckets), both summed over the histogram.

    Args:
      buckets: token counts, ascending.
      histogram: as in `plan_buckets`. Calls above the largest bucket run in chunks, as `plan_buckets` says.

    Raises:
      ValueError: for buckets that `check_buckets` refuses, or a histogram that `read_histogram` refuses.
    """
    ascending, calls = np.array(check_buckets(buckets)), read_histogram(histogram)
    tokens = padded = 0
    for n, count in calls.items():
        full, rest = divmod(n, int(ascending[-1]))
        rows = full * int(ascending[-1]) + (int(ascending[np.searchsorted(ascending, rest)]) if rest else 0)
        tokens, padded = tokens + n * count, padded + rows * count
    return tokens, padded


def powers_of_two(largest: int, number: int) -> tuple[int, ...]:
    """Returns powers of two as buckets, the usual choice: the smallest one >= `largest` and the `number` - 1 below it.

    Both arguments are at least 1. There are fewer than `number` buckets where the powers of two end at 1.
    """
    top = max(0, int(largest - 1).bit_length())
    return tuple(2**i for i in range(max(0, top - number + 1), top + 1))


def parse_buckets(text: str) -> tuple[int, ...]:
    """Reads buckets from a flag's text: "128,256,512", or the path of a .json file that `save_plan` wrote.

    Raises:
      ValueError: naming the text, where it gives anything but positive whole numbers in ascending order, or names a
        file that cannot be read or holds no plan.
    """
    if text.endswith(".json"):
        try:
            content = json.loads(Path(text).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{text}: {error}") from error
        if not isinstance(content, dict) or not isinstance(content.get("buckets"), list):
            raise ValueError(f"{text}: not a bucket plan; it needs a list 'buckets'")
        return check_buckets(content["buckets"])
    parts = [part.strip() for part in text.split(",")]
    bad = [part for part in parts if not (part.isascii() and part.isdigit())]
    if bad:
        raise ValueError(f"bucket sizes must be numbers such as '128,256,512', got {bad[0]!r} in {text!r}")
    return check_buckets([int(part) for part in parts])


def check_buckets(buckets: Iterable[int]) -> tuple[int, ...]:
    """Returns the buckets as a tuple of Python ints.

    Raises:
      ValueError: unless they are positive whole numbers in ascending order, at least one of them.
    """
    found = tuple(buckets)
    if not found or any(isinstance(b, bool) or not isinstance(b, int | np.integer) or b < 1 for b in found):
        raise ValueError(f"buckets must be positive whole numbers, at least one, got {found}")
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"buckets must be in ascending order, each once, got {found}")
    return tuple(int(b) for b in found)


def save_plan(plan: BucketPlan, path: Path) -> None:
    """Writes a plan to a JSON file; `parse_buckets` reads its buckets if the file's name ends with ".json"."""
    path.write_text(json.dumps({"buckets": plan.buckets, "tokens": plan.tokens, "padded": plan.padded}) + "\n")


def read_trace(path: Path) -> dict[int, int]:
    """Reads a file that has one line per call with the call's token count, and returns {tokens: calls}.

    Empty lines are skipped.

    Raises:
      ValueError: naming the file and the line number, for a line that is no whole number.
    """
    calls: dict[int, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if text := line.strip():
            if not (text.isascii() and text.isdigit()):
                raise ValueError(f"{path}, line {number}: a token count is a whole number, got {text!r}")
            calls[int(text)] = calls.get(int(text), 0) + 1
    return calls


def read_histogram(histogram: Mapping[int, int] | Sequence[int] | np.ndarray) -> dict[int, int]:
    """Returns either form of a histogram as {tokens: calls}, without entries of 0 calls or of 0 tokens.

    Raises:
      ValueError: for a token count, or number of calls, that is no whole number from 0 up.
    """
    pairs = histogram.items() if isinstance(histogram, Mapping) else enumerate(histogram)
    found = {}
    for tokens, calls in pairs:
        numbers = (tokens, calls)
        if any(isinstance(v, bool) or not 0 <= v < _TOO_MUCH or int(v) != v for v in numbers):
            raise ValueError(f"histogram: {calls!r} calls of {tokens!r} tokens; both must be whole numbers from 0 up")
        if tokens and calls:
            found[int(tokens)] = int(calls)
    return found


def _round_up(n, multiple):
    return -(-n // multiple) * multiple
