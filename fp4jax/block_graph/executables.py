"""The compiled programs of one block, by what they depend on."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from fp4jax.block_graph.arguments import Argument, structs_of
from fp4jax.block_graph.block import Block
from fp4jax.block_graph.programs import make_program
from fp4jax.block_graph.stats import CompileSeconds
from fp4jax.block_graph.stored import ProgramStore


class Executables:
    """Compiles a block for arguments of one kind and one bucket when it is asked for, and keeps the program.

    store: where programs are looked for and saved. on_compile: a function that the caller may set; it is called with
    (name, CompileSeconds) after each compilation.
    """

    def __init__(self, block: Block, store: ProgramStore | None = None):
        self._block, self._store = block, store
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
        block, structs = self._block, structs_of(arguments, home, bucket)
        made = make_program(
            lambda: block.lower(structs, bucket, static, home), options=block.compiler_options,
            check=block.check_compiled, store=self._store, name=block.name, structs=structs,
            made_from=(block.made_from(bucket, static), home is None),
        )  # fmt: skip
        program, seconds = made.program, CompileSeconds(bucket, made.lowering, made.compiling)
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
