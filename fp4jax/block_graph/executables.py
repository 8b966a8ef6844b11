"""The compiled programs of one block, by what they depend on."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fp4jax.block_graph.arguments import Argument, structs_of
from fp4jax.block_graph.block import Block
from fp4jax.block_graph.stats import CompileSeconds

# Whoever traces and lowers a program holds this lock. It is all Python code, so that threads which do it at the same
# time only take the interpreter from each other: for 48 layers 41 s in 16 threads, where one after the other takes 27.
LOWERING = threading.RLock()


class Executables:
    """Compiles a block for arguments of one kind and one bucket when it is asked for, and keeps the program.

    on_compile: a function that the caller may set; it is called with (name, CompileSeconds) after each compilation.
    """

    def __init__(self, block: Block):
        self._block = block
        self._programs: dict[Any, jax.stages.Compiled] = {}
        self._compiling: dict[Any, threading.RLock] = {}
        self._lock = threading.Lock()
        self._seconds: list[CompileSeconds] = []
        self.on_compile: Callable[[str, CompileSeconds], None] | None = None

    def key(self, arguments: Sequence[Argument], home: Any, bucket: int, static: Mapping[str, Any]) -> Any:
        """What a program depends on; the arguments are those of `find`."""
        statics = tuple((name, type(static[name]), static[name]) for name in sorted(static))
        return bucket, home, tuple(argument.kinds(home) for argument in arguments), statics

    def find(
        self, arguments: Sequence[Argument], home: Any, bucket: int, static: Mapping[str, Any]
    ) -> tuple[jax.stages.Compiled, bool]:
        """Returns the program for these arguments, and whether this call had to compile it.

        Args:
          arguments: the arguments of the block.
          home: where arrays go that are not committed to devices.
          bucket: the token count of the program.
          static: the static arguments.
        """
        key = self.key(arguments, home, bucket, static)
        program = self._programs.get(key)
        if program is not None:
            return program, False
        with self._lock:
            one_at_a_time = self._compiling.setdefault(key, threading.RLock())
        try:
            with one_at_a_time:  # if a compilation fails, nothing is stored, and the next thread that waited compiles
                program = self._programs.get(key)
                return (program, False) if program is not None else (
                    self._compile(key, arguments, home, bucket, static), True
                )  # fmt: skip
        finally:
            with self._lock:
                self._compiling.pop(key, None)

    def _compile(self, key, arguments, home, bucket, static):
        with LOWERING:
            start = time.perf_counter()
            lowered = self._block.lower(structs_of(arguments, home, bucket), bucket, static, home)
            middle = time.perf_counter()
        program = lowered.compile(compiler_options=self._block.compiler_options or None)
        if self._block.check_compiled is not None:
            self._block.check_compiled(program)
        seconds = CompileSeconds(bucket, middle - start, time.perf_counter() - middle)
        with self._lock:
            self._programs[key] = program
            self._seconds.append(seconds)
        if self.on_compile is not None:
            self.on_compile(self._block.name, seconds)
        return program

    @property
    def programs(self) -> list[jax.stages.Compiled]:
        """The programs in the order of their compilation."""
        with self._lock:
            return list(self._programs.values())

    @property
    def seconds(self) -> list[CompileSeconds]:
        """What each compilation took, in their order."""
        with self._lock:
            return list(self._seconds)
