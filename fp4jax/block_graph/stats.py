"""What compiling ahead of time took and what the programs did, and many compilations side by side."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, NamedTuple


class CompileSeconds(NamedTuple):
    """Of one executable: tracing and lowering it (Python, one thread at a time), and what XLA took, cache included."""

    bucket: int
    lowering: float
    compiling: float


class BlockStats(NamedTuple):
    """What a block did. calls, tokens, rows: per bucket, runs of its executable, tokens in them, and bucket x runs.

    seconds: of every executable, in the order of compilation. chunked: calls above the largest bucket, each of which is
    a call of every chunk too. misses: compilations after the end of a `warm_up` that no `warm_up` made.
    """

    calls: dict[int, int]
    tokens: int
    rows: int
    chunked: int
    misses: int
    seconds: list[CompileSeconds]

    @property
    def waste(self) -> float:
        """Part of the rows that were pads."""
        return 1 - self.tokens / self.rows if self.rows else 0.0


def compile_all(
    compilations: dict[Any, Callable[[], None]], *, workers: int = 1, progress: bool = True, name: str = "blocks"
) -> None:
    """Runs what `BlockGraph.compilations` of one or several blocks gave, `workers` at a time; 1: in this thread."""
    from tqdm import tqdm

    with tqdm(total=len(compilations), desc=f"compiling {name}", unit="program", disable=not progress) as bar:
        if workers <= 1:
            for compile_one in compilations.values():
                compile_one()
                bar.update()
            return
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            started = [pool.submit(compile_one) for compile_one in compilations.values()]
            try:
                for done in concurrent.futures.as_completed(started):
                    done.result()
                    bar.update()
            except BaseException:  # a failure, or Ctrl-C: what has not begun does not begin
                pool.shutdown(wait=False, cancel_futures=True)
                raise
