"""Blocks compiled ahead of time for a few token counts (buckets), so that any number of tokens runs without compiling.

A call is padded up to the next bucket, runs that bucket's executable, and is cut back. Above the largest bucket it runs
in chunks. Weights are arguments: all layers of one shape share executables. Pads are zeroed inside the executable, so
that nothing can depend on what they hold; a block whose tokens meet (attention, experts with capacities) also gets the
number of tokens.

XLA compiles for one shape: even cutting a device array of a new length compiles. Arrays of exact size therefore go over
the host, where nothing compiles; between blocks, hand on `Bucketed` values, which stay on the device as they are.
"""

import concurrent.futures
import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fp4jax.bucket_planner import check_buckets, plan_buckets as plan_buckets
from fp4jax.bucketed import (
    Argument,
    Bucketed as Bucketed,
    Kinds,
    home_of as home_of,
    home_of_all,
    is_bucketed,
    kind_of,
    leaves_of_axes,
    map_axes,
    map_tokens,
    pad_argument,
    structs_of,
    take_tokens,
    values_of,
)


class CompileSeconds(NamedTuple):
    """Of one executable: tracing and lowering it (Python, one thread at a time), and what XLA took, cache included."""

    bucket: int
    lowering: float
    compiling: float


class BlockStats(NamedTuple):
    """What a block did. calls, tokens, rows: per bucket, runs of its executable, tokens in them, and bucket x runs.

    seconds: of every executable, in the order of compilation. chunked: calls above the largest
    bucket, each of which is a call of every chunk too. misses: compilations after `warm_up` that no `warm_up` made.
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


class BlockGraph:
    """What `block_graph` returns; call it like the function.

    on_compile(name, CompileSeconds), where set, is called after each compilation.
    """

    def __init__(self, fn, buckets, in_axes, out_axes, static_argnames, donate_argnums, count_argname, options, name):
        self.buckets, self.name = check_buckets(buckets), name
        self._fn, self._in_axes, self._out_axes = fn, tuple(in_axes), out_axes
        self._statics, self._donate, self._count = frozenset(static_argnames), tuple(donate_argnums), count_argname
        if negative := [a for a in leaves_of_axes((self._in_axes, out_axes)) if a is not None and a < 0]:
            raise ValueError(f"{name}: token axes count from the front, got {negative[0]}")
        self._options = dict(options or {})
        self._executables: dict[Any, jax.stages.Compiled] = {}
        self._compiling: dict[Any, threading.RLock] = {}
        self._axes: dict[Any, tuple[int | None, ...]] = {}
        self._kinds: dict[Kinds, Kinds] = {}
        # A number that is on the device already costs no copy in the call.
        self._count_of = functools.lru_cache(4096)(lambda tokens, home: jax.device_put(np.int32(tokens), home))
        self._lock = threading.Lock()
        self._warm = False
        self._calls = dict.fromkeys(self.buckets, 0)
        self._tokens = self._chunked = self._misses = 0
        self._seconds: list[CompileSeconds] = []
        self.on_compile: Callable[[str, CompileSeconds], None] | None = None

    # --- calling ---

    def __call__(self, *args: Any, **static: Any) -> Any:
        """The block's outputs for as many tokens as the arguments have.

        Raises:
          ValueError: no argument with a token axis, arguments of different token counts, or no tokens, or more than the
          largest bucket, where outputs that belong to no token, or donated arguments, allow neither.
        """
        return self._call(self._looked_at(args), static)

    def bind(self, *args: Any, **static: Any) -> Callable[..., Any]:
        """This block with its first arguments (weights) and all static ones fixed, as a function of the others.

        The arguments are looked at once and not in every call: with hundreds of weights that is most of a call's time.
        """
        first = self._looked_at(args)

        def bound(*rest: Any) -> Any:
            return self._call([*first, *self._looked_at(rest, len(first))], static)

        return bound

    def _call(self, arguments, static):
        self._check_call(arguments, static)
        tokens, size = self._count_tokens(arguments)
        home = home_of_all(arguments)
        if size is not None:  # Bucketed
            outputs = self._run(arguments, home, tokens, size, static)
            return map_tokens(lambda a, v: Bucketed(v, tokens), self._out_axes, outputs)
        if tokens == 0:
            return self._empty(arguments, home, static)
        if tokens > self.buckets[-1]:
            return self._in_chunks([a.value for a in arguments], home, static, tokens)
        outputs = self._run(arguments, home, tokens, next(b for b in self.buckets if b >= tokens), static)

        def cut(axis, leaf):
            whole = leaf.shape[axis] == tokens
            return leaf if whole else jax.device_put(take_tokens(leaf, axis, slice(0, tokens)), home)

        return map_tokens(cut, self._out_axes, outputs)

    def _run(self, arguments, home, tokens, bucket, static):
        executable = self._executable(arguments, home, bucket, static)
        padded = [pad_argument(argument, bucket, home) for argument in arguments]
        outputs = executable(self._count_of(tokens, home), *padded)
        with self._lock:
            self._calls[bucket] += 1
            self._tokens += tokens
        return outputs

    def _looked_at(self, args, start=0):
        if start + len(args) > len(self._in_axes):
            self._check_call([None] * (start + len(args)), {})
        return [self._argument(start + i, arg) for i, arg in enumerate(args)]

    def _argument(self, place, value) -> Argument:
        leaves, structure = jax.tree.flatten(value, is_leaf=is_bucketed)
        axes = self._axes.get((place, structure))
        if axes is None:
            found: list[int | None] = []
            map_axes(lambda axis, _: found.append(axis), self._in_axes[place], value)
            axes = self._axes[place, structure] = tuple(found)
        kinds = Kinds(structure, tuple(map(kind_of, leaves, axes)))
        kinds, has_tokens = self._kinds.setdefault(kinds, kinds), any(axis is not None for axis in axes)
        return Argument(value, leaves, axes, kinds, home_of(leaves), has_tokens)

    def _in_chunks(self, args, home, static, tokens):
        self._check_whole(f"{tokens} tokens are above the largest bucket, {self.buckets[-1]}")
        size, parts = self.buckets[-1], []
        for start in range(0, tokens, size):
            some = slice(start, min(start + size, tokens))
            take = lambda axis, leaf, some=some: leaf if axis is None else take_tokens(leaf, axis, some)  # noqa: E731
            chunk = [map_axes(take, axis, arg) for axis, arg in zip(self._in_axes, args, strict=True)]
            parts.append(self(*chunk, **static))
        with self._lock:
            self._chunked += 1

        def join(axis, *leaves):
            return jax.device_put(np.concatenate([np.asarray(v) for v in leaves], axis), home)

        return map_axes(join, self._out_axes, *parts)

    def _empty(self, arguments, home, static):
        """Outputs of size 0 along their token axis; nothing runs."""
        self._check_whole("there are no tokens")
        bucket = self.buckets[0]
        structs = jax.eval_shape(self._traced(bucket, static), *structs_of(arguments, home, bucket))

        def empty(axis, leaf):
            return jax.device_put(np.zeros([0 if i == axis else n for i, n in enumerate(leaf.shape)], leaf.dtype))

        return map_axes(empty, self._out_axes, structs)

    def _check_whole(self, problem):
        if self._donate or any(axis is None for axis in leaves_of_axes(self._out_axes)):
            raise ValueError(
                f"{self.name}: {problem}, and with donated arguments or outputs that belong to no token a call "
                "takes at least one token and runs as a whole"
            )

    # --- compiling ---

    def warm_up(self, *args: Any, workers: int = 1, progress: bool = True, **static: Any) -> None:
        """Compiles every bucket for arguments like these (arrays or structs, of any token count).

        May be called again for arguments of other shapes or dtypes. workers: threads that compile side by side, which
        settings of this thread alone (`jax.default_matmul_precision(..)` as a context) do not reach; 1: this thread.
        """
        compile_all(self.compilations(*args, **static), workers=workers, progress=progress, name=self.name)

    def compilations(self, *args: Any, **static: Any) -> dict[Any, Callable[[], None]]:
        """What `warm_up` does, one call per executable, the largest first: for `compile_all` of several blocks."""
        self._check_call(args, static)
        arguments = self._looked_at(args)
        home = home_of_all(arguments)

        def compile_one(bucket):
            self._executable(arguments, home, bucket, static, warming=True)
            self._warm = True

        keys = {bucket: (id(self), self._key(arguments, home, bucket, static)) for bucket in reversed(self.buckets)}
        return {key: functools.partial(compile_one, bucket) for bucket, key in keys.items()}

    def _key(self, arguments, home, bucket, static):
        statics = tuple((name, type(static[name]), static[name]) for name in sorted(static))
        return bucket, home, tuple(id(argument.kinds) for argument in arguments), statics

    def _executable(self, arguments, home, bucket, static, warming=False) -> jax.stages.Compiled:
        key = self._key(arguments, home, bucket, static)
        executable = self._executables.get(key)
        if executable is not None:
            return executable
        with self._lock:
            one_at_a_time = self._compiling.setdefault(key, threading.RLock())
        with one_at_a_time:  # a compilation that fails leaves nothing: whoever waited tries again
            executable = self._executables.get(key)
            if executable is not None:
                return executable
            start = time.perf_counter()
            lowered = self._lower(structs_of(arguments, home, bucket), bucket, static, home)
            middle = time.perf_counter()
            executable = lowered.compile(compiler_options=self._options or None)
            seconds = CompileSeconds(bucket, middle - start, time.perf_counter() - middle)
            with self._lock:
                self._executables[key] = executable
                self._seconds.append(seconds)
                self._misses += self._warm and not warming
        if self.on_compile is not None:
            self.on_compile(self.name, seconds)
        return executable

    def _lower(self, structs, bucket, static, home):
        donated = tuple(i + 1 for i in self._donate)
        # Outputs stay where everything else is: what one block gives, the next one takes without another compilation.
        placed = {} if home is None else {"out_shardings": home}
        lowered = jax.jit(self._traced(bucket, static), donate_argnums=donated, **placed).lower(*structs)

        def check(axis, leaf):
            if axis is not None and (axis >= len(leaf.shape) or leaf.shape[axis] != bucket):
                raise ValueError(f"{self.name}: an output {leaf.shape} has no token axis {axis} of {bucket}")

        map_axes(check, self._out_axes, lowered.out_info)
        return lowered

    def _traced(self, bucket, static):
        def run(tokens, *args):
            def clear(axis, leaf):
                if axis is None:
                    return leaf
                valid = jnp.arange(bucket, dtype=jnp.int32) < tokens
                valid = jnp.expand_dims(valid, [i for i in range(leaf.ndim) if i != axis])
                return jnp.where(valid, leaf, jnp.zeros_like(leaf))

            cleared = [map_axes(clear, axis, arg) for axis, arg in zip(self._in_axes, args, strict=True)]
            counted = {} if self._count is None else {self._count: tokens}
            return self._fn(*cleared, **counted, **static)

        return run

    # --- arguments ---

    def _check_call(self, args, static):
        if len(args) != len(self._in_axes):
            raise ValueError(f"{self.name}: takes {len(self._in_axes)} positional arguments, got {len(args)}")
        if static.keys() != self._statics:
            raise ValueError(f"{self.name}: static arguments are {sorted(self._statics)}, got {sorted(static)}")

    def _count_tokens(self, arguments):
        """-> tokens, and of Bucketed arguments their size, else None."""
        found: set[tuple[int, int | None]] = set()

        def note(axis, leaf):
            if axis is None:
                return
            shape = np.shape(values_of(leaf))
            if axis >= len(shape):
                raise ValueError(f"{self.name}: an argument {shape} has no token axis {axis}")
            if not isinstance(leaf, Bucketed):
                found.add((shape[axis], None))
                return
            if shape[axis] not in self.buckets or not 1 <= leaf.tokens <= shape[axis]:
                raise ValueError(
                    f"{self.name}: Bucketed with {leaf.tokens} tokens in {shape}; buckets are {self.buckets}"
                )
            found.add((leaf.tokens, shape[axis]))

        for argument in (a for a in arguments if a.has_tokens):
            for axis, leaf in zip(argument.axes, argument.leaves, strict=True):
                note(axis, leaf)
        if len(found) != 1:
            counts = sorted({tokens for tokens, _ in found}) or "no"
            raise ValueError(
                f"{self.name}: arguments have {counts} tokens; all must have the same, and all be Bucketed or none"
            )
        return found.pop()

    # --- report ---

    @property
    def stats(self) -> BlockStats:
        """What happened so far."""
        with self._lock:
            rows = sum(bucket * calls for bucket, calls in self._calls.items())
            return BlockStats(
                dict(self._calls), self._tokens, rows, self._chunked, self._misses, list(self._seconds)
            )  # fmt: skip


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
            for done in concurrent.futures.as_completed(started):
                done.result()
                bar.update()


def block_graph(
    fn: Callable[..., Any],
    *,
    buckets: Sequence[int],
    in_axes: Sequence[Any],
    out_axes: Any = 0,
    static_argnames: Sequence[str] = (),
    donate_argnums: Sequence[int] = (),
    count_argname: str | None = None,
    compiler_options: Mapping[str, str | bool] | None = None,
    name: str | None = None,
) -> BlockGraph:
    """Wraps `fn(*args, **static)` so that it runs for any number of tokens in executables of fixed token counts.

    Args:
      buckets: token counts to compile, ascending.
      in_axes: for every positional argument the axis of its tokens, counted from the front, None for what has none
        (weights, caches, positions); as for `jax.vmap` an entry may be a tree that is a prefix of the argument. Every
        leaf with tokens is an array or a `Bucketed`. out_axes: the same for what `fn` returns.
      static_argnames: keyword arguments that are part of the program, and so of the key of an executable; hashable.
      donate_argnums: arguments whose memory the outputs may take; they are gone after the call (of arguments with
        tokens, a padded copy is).
      count_argname: keyword under which `fn` gets the number of tokens that count, a traced i32 [].
      compiler_options: for XLA, e.g. {"xla_gpu_enable_command_buffer": ""}.
      name: for messages; None: the function's.

    Arguments that were put on devices (weights on a mesh) stay there; all others, and the outputs, are on all of these
    devices, whole.

    Raises:
      ValueError: buckets that are not positive and ascending, a negative axis.
    """
    return BlockGraph(
        fn, buckets, in_axes, out_axes, static_argnames, donate_argnums, count_argname, compiler_options,
        name or getattr(fn, "__name__", "block"),
    )  # fmt: skip
