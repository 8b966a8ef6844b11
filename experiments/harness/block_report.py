"""Reports about blocks compiled ahead of time: one line per compilation, and a table when the process ends."""

import atexit
import sys
from collections.abc import Sequence

from fp4jax.block_graph import BlockGraph, CompileSeconds


def watch(graphs: Sequence[BlockGraph]) -> None:
    """Print every compilation of these blocks to stderr from now on, and `summary` of them when the process ends."""

    def line(name: str, took: CompileSeconds) -> None:
        done = "compiled" if took.lowering else "found"  # in a program store
        seconds = took.lowering + took.compiling
        print(f"block graph: {done} {name} for {took.bucket} tokens in {seconds:.2f} s", file=sys.stderr, flush=True)

    for graph in graphs:
        graph.on_compile = line
    atexit.register(lambda: print(summary(graphs), file=sys.stderr))


def summary(graphs: Sequence[BlockGraph]) -> str:
    """A table of what the blocks did, as aligned text with one line per block.

    The columns are the number of executables and the seconds that they took to compile; the calls; the fraction of
    computed rows that were padding; the calls with more tokens than the largest bucket (chunked); the compilations that
    a call had to wait for (misses); and the calls of every bucket.
    """
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
