"""What blocks compiled ahead of time did: a line per compilation as it happens, a table at the end of the process."""

import atexit
import sys
from collections.abc import Sequence

from fp4jax.block_graph import BlockGraph, CompileSeconds


def watch(graphs: Sequence[BlockGraph]) -> None:
    """From now on, prints every compilation to stderr, and `summary` when the process ends."""

    def line(name: str, took: CompileSeconds) -> None:
        seconds = took.lowering + took.compiling
        print(f"block graph: compiled {name} for {took.bucket} tokens in {seconds:.2f} s", file=sys.stderr, flush=True)

    for graph in graphs:
        graph.on_compile = line
    atexit.register(lambda: print(summary(graphs), file=sys.stderr))


def summary(graphs: Sequence[BlockGraph]) -> str:
    """A line per block: executables and their seconds, calls, padding, chunked calls, misses, calls per bucket."""
    head = f"{'block':<20}{'compiled':>9}{'seconds':>9}{'calls':>9}{'padding':>9}{'chunked':>9}{'misses':>8}"
    lines = [f"{head}  calls per bucket"]
    for graph in graphs:
        s = graph.stats
        hits = ", ".join(f"{bucket}: {calls}" for bucket, calls in s.calls.items())
        seconds = sum(t.lowering + t.compiling for t in s.seconds)
        lines.append(
            f"{graph.name:<20}{len(s.seconds):>9}{seconds:>9.1f}{sum(s.calls.values()):>9}{s.waste:>9.1%}{s.chunked:>9}"
            f"{s.misses:>8}  {hits}"
        )
    return "\n".join(lines)
