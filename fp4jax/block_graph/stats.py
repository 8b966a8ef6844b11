"""Counters of a block's compilations and calls, and `compile_all`, which runs many compilations in parallel."""

import concurrent.futures
from collections.abc import Callable
from typing import Any, NamedTuple


class CompileSeconds(NamedTuple):
    """Seconds that the compilation of one executable took.

    bucket: the token count that the executable was compiled for. lowering: seconds to trace the function and lower it
    to StableHLO, which is Python code and runs in one thread at a time; 0 where a `ProgramStore` had the executable.
    compiling: seconds in XLA (less when the executable comes from JAX's compilation cache) and in the block's
    `check_compiled`, or to read the executable from the store.
    """

    bucket: int
    lowering: float
    compiling: float


class BlockStats(NamedTuple):
    """What a block has done so far.

    calls: runs of the executables of each bucket, {bucket: runs}. tokens: valid tokens of all runs together. rows: rows
    that were computed in all runs together, pads included. chunked: calls with more tokens than the largest bucket; the
    run of each of their chunks also counts in `calls`. misses: compilations during calls that happened after a
    `warm_up` had finished, so that a request waited for them. seconds: one entry per executable, in the order in which
    they were compiled.
    """

    calls: dict[int, int]
    tokens: int
    rows: int
    chunked: int
    misses: int
    seconds: list[CompileSeconds]

    @property
    def waste(self) -> float:
        """The fraction of computed rows that were pads, 0 to 1."""
        return 1 - self.tokens / self.rows if self.rows else 0.0


def compile_all(
    compilations: dict[Any, Callable[[], None]], *, workers: int = 1, progress: bool = True, name: str = "blocks"
) -> None:
    """Runs the compilations that `BlockGraph.compilations` returned, of one block or of several blocks together.

    Args:
      compilations: {key: function that compiles one executable}; the dicts of several blocks may be merged.
      workers: how many compilations run at a time, each in a thread of its own; 1 runs all in the calling thread.
      progress: whether to show a progress bar.
      name: what the progress bar says is compiled.

    Raises:
      Exception: the first exception that a compilation raises; compilations that have not started then never start.
    """
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
            except BaseException:  # a compilation failed, or Ctrl-C: compilations that have not started are dropped
                pool.shutdown(wait=False, cancel_futures=True)
                raise
