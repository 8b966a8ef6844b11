"""Compiles one program: traces and lowers it one thread at a time, or finds it in a `ProgramStore`."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from fp4jax.block_graph.stored import ProgramStore

# Whoever traces and lowers a program holds this lock. It is all Python code, so that threads which do it at the same
# time only take the interpreter from each other: for 48 layers 41 s in 16 threads, where one after the other takes 27.
_LOWERING = threading.RLock()


class Made(NamedTuple):
    """A program, and the seconds that lowering and compiling it took; one that was found took 0 to lower."""

    program: jax.stages.Compiled
    lowering: float
    compiling: float


def make_program(
    lower: Callable[[], jax.stages.Lowered],
    *,
    options: Mapping[str, Any] | None,
    check: Callable[[jax.stages.Compiled], None] | None = None,
    store: ProgramStore | None = None,
    name: str = "",
    made_from: Any = (),
    structs: Any = (),
) -> Made:
    """Makes a program, or finds it where an earlier process has left it.

    Args:
      lower: traces and lowers it.
      options: for XLA.
      check: receives the program before it is used or saved, and raises to refuse it; a program that is found has
        passed it.
      store: where it is looked for and saved; None: nowhere.
      name, made_from, structs: as in `ProgramStore.path`; `options` and `check` are added to `made_from`.
    """
    start = time.perf_counter()
    path = None if store is None else store.path(name, (made_from, dict(options or {}), check), structs)
    if store is not None and path is not None and (found := store.load(path, structs)) is not None:
        return Made(found, 0.0, time.perf_counter() - start)
    with _LOWERING:
        start = time.perf_counter()
        lowered = lower()
        middle = time.perf_counter()
    program = lowered.compile(compiler_options=dict(options) if options else None)
    if check is not None:
        check(program)
    end = time.perf_counter()
    if store is not None and path is not None:
        store.save(path, program, structs)
    return Made(program, middle - start, end - middle)
