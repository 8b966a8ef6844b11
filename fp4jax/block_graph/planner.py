"""Which token counts to compile for: the set of buckets with the least padded work for a histogram of token counts."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

# What the serving system that this project re-implements captures unless it is told otherwise.
REFERENCE_BUCKETS = (128, 256, 512, 1024, 2048)
_TOO_MUCH = 2**61  # rows; sums of two stay in 64 bits


class BucketPlan(NamedTuple):
    """buckets: ascending token counts. tokens, padded: of all calls of the histogram, and what runs for them."""

    buckets: tuple[int, ...]
    tokens: int
    padded: int

    @property
    def waste(self) -> float:
        """Part of the padded work that is padding."""
        return 1 - self.tokens / self.padded if self.padded else 0.0


def plan_buckets(
    histogram: Mapping[int, int] | Sequence[int] | np.ndarray,
    max_buckets: int,
    *,
    granularity: int = 1,
    largest: int | None = None,
) -> BucketPlan:
    """The buckets, at most `max_buckets` and up to `largest`, that run the calls of `histogram` with the fewest rows.

    A call of n tokens runs in the smallest bucket that holds it; above the largest, in chunks of the largest and a
    rest. Exact for that largest bucket (by default no call is chunked); a smaller one may do with fewer rows.

    Dynamic programming over the sizes that end where a call does: the cheapest k buckets up to one size are the
    cheapest k - 1 up to a smaller one, and that size for every call between them.

    Args:
      histogram: calls per token count: {tokens: calls}, or a sequence with the calls of n tokens at index n.
      granularity: buckets are multiples of it (the rows of a kernel's tile), but for `largest`.
      largest: the largest bucket; None: the largest count, rounded up.

    Raises:
      ValueError: a negative or fractional entry, no call with tokens, or limits below 1.
    """
    calls = read_histogram(histogram)
    if not calls:
        raise ValueError("plan_buckets: the histogram has no call with tokens")
    for name, value in (("max_buckets", max_buckets), ("granularity", granularity), ("largest", largest)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1):
            raise ValueError(f"plan_buckets: {name} must be a whole number from 1 up, got {value}")
    largest = _round_up(max(calls), granularity) if largest is None else int(largest)
    rests: dict[int, int] = {}  # calls per size, of what is left behind full chunks of the largest
    for tokens, count in calls.items():
        if rest := tokens % largest or (largest if tokens == largest else 0):
            size = min(_round_up(rest, granularity), largest)
            rests[size] = rests.get(size, 0) + count
    rests.setdefault(largest, 0)
    sizes = np.array(sorted(rests))
    if sum(rests.values()) * largest >= _TOO_MUCH:
        raise ValueError(f"plan_buckets: {sum(rests.values())} calls of up to {largest} tokens are too many to add up")
    calls_up_to = np.cumsum([0, *(rests[size] for size in sizes.tolist())])  # that fit one of the first i sizes
    cost = np.full(len(sizes) + 1, _TOO_MUCH)  # of the calls that fit the first i sizes, with the buckets so far
    cost[0] = 0
    choices = []
    for _ in range(min(max_buckets, len(sizes))):
        # One bucket more, sizes[i - 1], for the calls behind the first j sizes.
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
    """-> tokens of all calls, and the rows that run for them with these buckets."""
    ascending, calls = np.array(check_buckets(buckets)), read_histogram(histogram)
    tokens = padded = 0
    for n, count in calls.items():
        full, rest = divmod(n, int(ascending[-1]))
        rows = full * int(ascending[-1]) + (int(ascending[np.searchsorted(ascending, rest)]) if rest else 0)
        tokens, padded = tokens + n * count, padded + rows * count
    return tokens, padded


def powers_of_two(largest: int, number: int) -> tuple[int, ...]:
    """The `number` >= 1 powers of two up to the first that reaches `largest`: the usual choice."""
    top = max(0, int(largest - 1).bit_length())
    return tuple(2**i for i in range(max(0, top - number + 1), top + 1))


def parse_buckets(text: str) -> tuple[int, ...]:
    """'128,256,512', or the path of a plan that `save_plan` wrote -> buckets.

    Raises:
      ValueError: anything but positive numbers in ascending order, naming it.
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
    """The buckets as a tuple; ValueError unless they are positive whole numbers in ascending order."""
    found = tuple(buckets)
    if not found or any(isinstance(b, bool) or not isinstance(b, int | np.integer) or b < 1 for b in found):
        raise ValueError(f"buckets must be positive whole numbers, at least one, got {found}")
    if any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"buckets must be in ascending order, each once, got {found}")
    return tuple(int(b) for b in found)


def save_plan(plan: BucketPlan, path: Path) -> None:
    """Writes what `parse_buckets` reads."""
    path.write_text(json.dumps({"buckets": plan.buckets, "tokens": plan.tokens, "padded": plan.padded}) + "\n")


def read_trace(path: Path) -> dict[int, int]:
    """A file with one token count per call, a line each -> {tokens: calls}."""
    calls: dict[int, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if text := line.strip():
            if not (text.isascii() and text.isdigit()):
                raise ValueError(f"{path}, line {number}: a token count is a whole number, got {text!r}")
            calls[int(text)] = calls.get(int(text), 0) + 1
    return calls


def read_histogram(histogram: Mapping[int, int] | Sequence[int] | np.ndarray) -> dict[int, int]:
    """{tokens: calls} of either form, without what never happens and without calls of no tokens."""
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
