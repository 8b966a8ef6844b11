"""Compiles a function ahead of time for a few token counts (buckets) and runs it for any number of tokens.

Such a function is called a block. A call pads its tokens up to the next bucket, runs the executable of that bucket and
cuts the outputs back to the number of tokens. A call above the largest bucket runs in chunks, unless the block mixes
tokens (attention, experts with capacities): then it raises. Weights are arguments of the block, so that all layers of
one shape share executables. The executable sets the pads to zero first, so that no output depends on what they held. A
block that mixes tokens also receives the number of valid tokens.

XLA compiles a program for one shape: even slicing a device array to a new length compiles. Arrays of exact size are
therefore padded and cut on the host, where nothing compiles. Between blocks the caller passes `Bucketed` values, which
stay on the device and are neither padded nor cut.
"""

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fp4jax.block_graph.arguments import (
    Argument,
    Bucketed,
    bucketed_call,
    home_of_all,
    is_bucketed,
    map_axes,
    map_tokens,
    structs_of,
    take_tokens,
)
from fp4jax.block_graph.block import Block
from fp4jax.block_graph.executables import Executables
from fp4jax.block_graph.planner import check_buckets
from fp4jax.block_graph.stats import BlockStats, CompileSeconds, compile_all
from fp4jax.block_graph.stored import ProgramStore


class BlockGraph:
    """A function that runs in executables of fixed token counts; `block_graph` makes it and documents its options.

    It is called like the wrapped function. buckets: the token counts, ascending. name: what messages call the block.
    """

    def __init__(self, block: Block, buckets: Sequence[int], store: ProgramStore | None = None):
        self.buckets, self.name, self._block = check_buckets(buckets), block.name, block
        self._executables = Executables(block, store)
        self._axes: dict[Any, tuple[int | None, ...]] = {}
        self._outputs: dict[Any, Any] = {}  # key of an executable -> ShapeDtypeStructs of its outputs
        # Token counts are kept on the device, so that a call with a known count copies nothing there.
        self._count_of = functools.lru_cache(4096)(lambda tokens, home: jax.device_put(np.int32(tokens), home))
        self._lock = threading.Lock()
        self._warm = False
        self._calls = dict.fromkeys(self.buckets, 0)
        self._tokens = self._chunked = self._misses = 0

    # --- calling ---

    def __call__(self, *args: Any, **static: Any) -> Any:
        """Runs the block on all tokens of the arguments, and returns outputs with the same number of tokens.

        Where the arguments are Bucketed, the outputs with tokens are Bucketed too. A bucket that was not compiled yet
        for arguments like these is compiled first.

        Raises:
          ValueError: no argument has a token axis; the arguments have different token counts; there are no tokens, or
            more than the largest bucket, and the block has donated arguments or outputs without a token axis; there are
            more tokens than the largest bucket, and `chunks` is off.
        """
        return self._call(self._looked_at(args), static)

    def bind(self, *args: Any, **static: Any) -> Callable[..., Any]:
        """Fixes the first arguments (weights) and all static arguments, and returns a function of the other arguments.

        The fixed arguments are flattened and examined only once. The others are examined in the first call with
        `Bucketed` tokens of each bucket; later calls hand theirs to the same program, which compares shapes, dtypes and
        devices itself. To examine all arguments takes more time than to launch a small program.

        Raises:
          ValueError: there are more arguments than the block takes, or one is donated: it would be gone after one call.
        """
        first = self._looked_at(args)
        if donated := [i for i in self._block.donate_argnums if i < len(first)]:
            raise ValueError(f"{self.name}: argument {donated[0]} is donated and cannot be bound")
        found: dict[int, _Shortcut] = {}  # by bucket
        axes = None if any(a.has_tokens for a in first) else self._block.in_axes[len(first) :]

        def bound(*rest: Any) -> Any:
            bucketed = None if axes is None else bucketed_call(axes, rest)
            if bucketed is not None and (shortcut := found.get(bucketed.bucket)) is not None:
                count = self._count_of(bucketed.tokens, shortcut.home)
                try:
                    outputs = shortcut.program(count, *shortcut.weights, *bucketed.arrays)
                except (TypeError, ValueError):  # other shapes, dtypes or devices than those of the program
                    pass
                else:
                    self._count(bucketed.tokens, bucketed.bucket)
                    return self._wrapped(outputs, bucketed.tokens)
            arguments = [*first, *self._looked_at(rest, len(first))]
            outputs = self._call(arguments, static)
            if bucketed is not None and bucketed.bucket in self.buckets:
                home = home_of_all(arguments)
                program, _ = self._executables.find(arguments, home, bucketed.bucket, static)
                found[bucketed.bucket] = _Shortcut(
                    program, home, [a.padded(bucketed.bucket, home, False) for a in first]
                )
            return outputs

        return bound

    def _call(self, arguments, static):
        self._block.check_call(arguments, static)
        tokens, size = self._block.count_tokens(arguments, self.buckets)
        home = home_of_all(arguments)
        if size is not None:  # Bucketed
            return self._wrapped(self._run(arguments, home, tokens, size, static), tokens)
        if tokens == 0:
            return self._empty(arguments, home, static)
        if tokens > self.buckets[-1]:
            return self._in_chunks(arguments, home, static, tokens)
        outputs = self._run(arguments, home, tokens, self._bucket(tokens), static)

        def cut(axis, leaf):
            whole = leaf.shape[axis] == tokens
            return leaf if whole else jax.device_put(take_tokens(leaf, axis, slice(0, tokens)), home)

        return map_tokens(cut, self._block.out_axes, outputs)

    def _bucket(self, tokens):
        return next(b for b in self.buckets if b >= tokens)

    def _run(self, arguments, home, tokens, bucket, static):
        executable = self._executable(arguments, home, bucket, static)
        padded = [a.padded(bucket, home, donated=i in self._block.donate_argnums) for i, a in enumerate(arguments)]
        outputs = executable(self._count_of(tokens, home), *padded)
        self._count(tokens, bucket)
        return outputs

    def _count(self, tokens, bucket):
        with self._lock:
            self._calls[bucket] += 1
            self._tokens += tokens

    def _wrapped(self, outputs, tokens):
        return map_tokens(lambda a, v: Bucketed(v, tokens), self._block.out_axes, outputs)

    def _looked_at(self, args, start=0):
        if start + len(args) > len(self._block.in_axes):
            raise ValueError(
                f"{self.name}: takes {len(self._block.in_axes)} positional arguments, got {start + len(args)}"
            )
        return [self._argument(start + i, arg) for i, arg in enumerate(args)]

    def _argument(self, place, value) -> Argument:
        leaves, structure = jax.tree.flatten(value, is_leaf=is_bucketed)
        axes = self._axes.get((place, structure))
        if axes is None:
            found: list[int | None] = []
            map_axes(lambda axis, _: found.append(axis), self._block.in_axes[place], value)
            axes = self._axes[place, structure] = tuple(found)
        return Argument(leaves, structure, axes)

    def _in_chunks(self, arguments, home, static, tokens):
        problem = f"{tokens} tokens are above the largest bucket, {self.buckets[-1]}"
        self._block.check_whole(problem)
        if not self._block.chunks:
            raise ValueError(
                f"{self.name}: {problem}, and its tokens meet: they cannot run in chunks (chunks=True: they can)"
            )
        size, parts = self.buckets[-1], []
        for start in range(0, tokens, size):
            some = slice(start, min(start + size, tokens))
            length = some.stop - some.start
            outputs = self._run([a.chunk(some) for a in arguments], home, length, self._bucket(length), static)
            parts.append(
                map_axes(lambda axis, v, n=length: take_tokens(v, axis, slice(0, n)), self._block.out_axes, outputs)
            )
        with self._lock:
            self._chunked += 1
        return map_axes(lambda axis, *vs: jax.device_put(np.concatenate(vs, axis), home), self._block.out_axes, *parts)

    def _empty(self, arguments, home, static):
        """Returns outputs of size 0 along their token axis, without running an executable."""
        self._block.check_whole("there are no tokens")
        bucket = self.buckets[0]
        key = self._executables.key(arguments, home, bucket, static)
        if key not in self._outputs:
            self._outputs[key] = jax.eval_shape(
                self._block.traced(bucket, static), *structs_of(arguments, home, bucket)
            )

        def empty(axis, leaf):
            shape = [0 if i == axis else n for i, n in enumerate(leaf.shape)]
            return jax.device_put(np.zeros(shape, leaf.dtype), home)

        return map_axes(empty, self._block.out_axes, self._outputs[key])

    # --- compiling ---

    def warm_up(self, *args: Any, workers: int = 1, progress: bool = True, **static: Any) -> None:
        """Compiles all buckets for arguments of these shapes and dtypes, whatever their token counts.

        It may be called again for arguments of other shapes or dtypes.

        Args:
          *args: arrays or ShapeDtypeStructs, one tree per positional argument of the block.
          workers: threads that compile in parallel; 1 compiles in the calling thread. Other threads do not see settings
            of the calling thread, such as `jax.default_matmul_precision(..)` used as a context.
          progress: whether to show a progress bar.
          **static: the block's static arguments.
        """
        compile_all(self.compilations(*args, **static), workers=workers, progress=progress, name=self.name)

    def compilations(self, *args: Any, **static: Any) -> dict[Any, Callable[[], None]]:
        """Returns the compilations that `warm_up` would run, without running them: {key: function without arguments}.

        There is one entry per bucket, the largest bucket first. The dicts of several blocks can be merged and passed to
        `compile_all`. The arguments are those of `warm_up`.
        """
        self._block.check_call(args, static)
        arguments = self._looked_at(args)
        home = home_of_all(arguments)

        todo = set(self.buckets)

        def compile_one(bucket):
            self._executable(arguments, home, bucket, static, warming=True)
            with self._lock:
                todo.discard(bucket)
                self._warm = self._warm or not todo

        keys = {
            bucket: (id(self), self._executables.key(arguments, home, bucket, static))
            for bucket in reversed(self.buckets)
        }
        return {key: functools.partial(compile_one, bucket) for bucket, key in keys.items()}

    def _executable(self, arguments, home, bucket, static, warming=False) -> jax.stages.Compiled:
        executable, is_new = self._executables.find(arguments, home, bucket, static)
        if is_new and not warming:
            with self._lock:
                self._misses += self._warm
        return executable

    # --- report ---

    @property
    def executables(self) -> list[jax.stages.Compiled]:
        """The programs compiled up to now, in the order of compilation, for their text and their memory analysis."""
        return self._executables.programs

    @property
    def on_compile(self) -> Callable[[str, CompileSeconds], None] | None:
        """A function that is called with (name, CompileSeconds) after each compilation; None: nothing is called."""
        return self._executables.on_compile

    @on_compile.setter
    def on_compile(self, call: Callable[[str, CompileSeconds], None] | None) -> None:
        self._executables.on_compile = call

    @property
    def stats(self) -> BlockStats:
        """Counts of calls, tokens and compilations up to now."""
        with self._lock:
            rows = sum(bucket * calls for bucket, calls in self._calls.items())
            return BlockStats(
                dict(self._calls), self._tokens, rows, self._chunked, self._misses, self._executables.seconds
            )  # fmt: skip


class _Shortcut(NamedTuple):
    """A program that served a call, its home, and the arrays that are fixed."""

    program: jax.stages.Compiled
    home: Any
    weights: list[Any]


def block_graph(
    fn: Callable[..., Any],
    *,
    buckets: Sequence[int],
    in_axes: Sequence[Any],
    out_axes: Any = 0,
    static_argnames: Sequence[str] = (),
    donate_argnums: Sequence[int] = (),
    count_argname: str | None = None,
    chunks: bool | None = None,
    compiler_options: Mapping[str, str | bool] | None = None,
    name: str | None = None,
    check_compiled: Callable[[jax.stages.Compiled], None] | None = None,
    store: ProgramStore | None = None,
) -> BlockGraph:
    """Wraps `fn(*args, **static)` so that it runs for any number of tokens in executables of fixed token counts.

    Args:
      fn: a traceable function.
      buckets: the token counts to compile for, ascending.
      in_axes: one entry per positional argument: the axis of its tokens, counted from the front, or None for an
        argument without tokens (weights, caches, positions). As in `jax.vmap`, an entry may be a tree that is a prefix
        of the argument. Every leaf with tokens is an array or a `Bucketed`.
      out_axes: the token axes of what `fn` returns, in the same form.
      static_argnames: keyword arguments of `fn` that are constants of the program. Their values must be hashable; other
        values need another executable.
      donate_argnums: positions of arguments whose memory the outputs may reuse. A donated argument cannot be used after
        the call; but an array with tokens that is no `Bucketed` is copied first, so that the caller keeps it.
      count_argname: the keyword under which `fn` receives the number of valid tokens, a traced i32 []; None: `fn` does
        not receive it. A block that mixes tokens needs the number.
      chunks: whether a call above the largest bucket runs in chunks, one after the other. This is correct where each
        token's output depends on that token only, and wrong for attention, positions or random numbers per token.
        None: True if `count_argname` is None, else False.
      compiler_options: options for XLA, e.g. {"xla_gpu_enable_command_buffer": ""}.
      name: what messages call the block; None takes the name of `fn`.
      check_compiled: a function that receives every executable before it is first used, and raises to refuse it.
      store: where executables are looked for, and saved for later processes; None: nowhere.

    Arrays that were committed to devices (weights on a mesh) stay there. The other arrays and the outputs are put on
    the devices of the first committed array; on a mesh they are replicated.

    Raises:
      ValueError: the buckets are not positive and ascending, a token axis is negative, or `donate_argnums` names an
        argument that does not exist.
    """
    block = Block(
        name=name or getattr(fn, "__name__", "block"),
        fn=fn,
        in_axes=tuple(in_axes),
        out_axes=out_axes,
        static_argnames=frozenset((static_argnames,) if isinstance(static_argnames, str) else static_argnames),
        donate_argnums=tuple(donate_argnums),
        count_argname=count_argname,
        chunks=count_argname is None if chunks is None else chunks,
        compiler_options=dict(compiler_options or {}),
        check_compiled=check_compiled,
    )
    return BlockGraph(block, buckets, store)
