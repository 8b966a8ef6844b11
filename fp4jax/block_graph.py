"""Blocks compiled ahead of time for a few token counts (buckets), so that any number of tokens runs without compiling.

A call is padded up to the next bucket, runs that bucket's executable, and is cut back. Above the largest bucket it runs
in chunks. Weights are arguments: all layers of one shape share executables. Pads are zeroed inside the executable, so
that nothing can depend on what they hold; a block whose tokens meet (attention, experts with capacities) also gets the
number of tokens.

XLA compiles for one shape: even cutting a device array of a new length compiles. Arrays of exact size therefore go over
the host, where nothing compiles; between blocks, hand on `Bucketed` values, which stay on the device as they are.
"""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fp4jax.bucket_planner import check_buckets, plan_buckets as plan_buckets


class Bucketed(NamedTuple):
    """Arrays of one bucket's size along their token axis, of which the first `tokens` count."""

    values: Any
    tokens: int


class BlockStats(NamedTuple):
    """What a block did. calls, tokens, rows: per bucket, runs of its executable, tokens in them, and bucket x runs.

    seconds: (bucket, what tracing and compiling it took), in the order of compilation. chunked: calls above the largest
    bucket, each of which is a call of every chunk too. misses: compilations after `warm_up` that no `warm_up` made.
    """

    calls: dict[int, int]
    tokens: int
    rows: int
    chunked: int
    misses: int
    seconds: list[tuple[int, float]]

    @property
    def waste(self) -> float:
        """Part of the rows that were pads."""
        return 1 - self.tokens / self.rows if self.rows else 0.0


class _Executable(NamedTuple):
    compiled: jax.stages.Compiled
    outputs: Any  # structs of the whole bucket


class BlockGraph:
    """What `block_graph` returns; call it like the function."""

    def __init__(self, fn, buckets, in_axes, out_axes, static_argnames, donate_argnums, count_argname, options, name):
        self.buckets, self.name = check_buckets(buckets), name
        self._fn, self._in_axes, self._out_axes = fn, tuple(in_axes), out_axes
        self._statics, self._donate, self._count = frozenset(static_argnames), tuple(donate_argnums), count_argname
        self._options = dict(options or {})
        self._executables: dict[Any, concurrent.futures.Future[_Executable]] = {}
        self._lock = threading.Lock()
        self._warm = False
        self._calls = dict.fromkeys(self.buckets, 0)
        self._tokens = self._chunked = self._misses = 0
        self._seconds: list[tuple[int, float]] = []
        self.on_compile: Callable[[str, int, float], None] | None = None

    # --- calling ---

    def __call__(self, *args: Any, **static: Any) -> Any:
        """The block's outputs for as many tokens as the arguments have.

        Raises:
          ValueError: arguments without tokens, of different token counts, or above the largest bucket where outputs
          that belong to no token keep the call from being cut into chunks.
        """
        self._check_call(args, static)
        tokens, as_bucketed = self._count_tokens(args)
        if tokens > self.buckets[-1] or tokens == 0:
            if as_bucketed:
                raise ValueError(f"{self.name}: Bucketed with {tokens} tokens; buckets are {self.buckets}")
            return self._empty(args, static) if tokens == 0 else self._in_chunks(args, static, tokens)
        bucket = next(b for b in self.buckets if b >= tokens)
        if as_bucketed:
            bucket = self._bucket_of(args)
        return self._run(self._padded(args, bucket), tokens, bucket, static, as_bucketed)

    def _run(self, args, tokens, bucket, static, as_bucketed):
        executable = self._executable(args, bucket, static)
        outputs = executable.compiled(np.int32(tokens), *args)
        with self._lock:
            self._calls[bucket] += 1
            self._tokens += tokens

        def cut(axis, leaf):
            if axis is None:
                return leaf
            return Bucketed(leaf, tokens) if as_bucketed else _cut(leaf, axis, tokens)

        return _map_axes(cut, self._out_axes, outputs)

    def _in_chunks(self, args, static, tokens):
        if any(axis is None for axis in _leaves_of_axes(self._out_axes)):
            raise ValueError(
                f"{self.name}: {tokens} tokens are above the largest bucket, {self.buckets[-1]}, and outputs that "
                "belong to no token cannot be put together from chunks"
            )
        size, parts = self.buckets[-1], []
        for start in range(0, tokens, size):
            some = slice(start, min(start + size, tokens))
            take = lambda axis, leaf, some=some: leaf if axis is None else _take(leaf, axis, some)  # noqa: E731
            chunk = [_map_axes(take, axis, arg) for axis, arg in zip(self._in_axes, args, strict=True)]
            parts.append(self(*chunk, **static))
        with self._lock:
            self._chunked += 1
        join = lambda axis, *leaves: jax.device_put(np.concatenate([np.asarray(v) for v in leaves], axis))  # noqa: E731
        return _map_axes(join, self._out_axes, *parts)

    def _empty(self, args, static):
        """No tokens: outputs of size 0 along their token axis, zeros where they belong to no token; nothing runs."""
        structs = self._out_structs(self._structs(args, self.buckets[0]), static)

        def empty(axis, leaf):
            shape = [n if i != axis else 0 for i, n in enumerate(leaf.shape)]
            return jax.device_put(np.zeros(shape, leaf.dtype))

        return _map_axes(empty, self._out_axes, structs)

    # --- compiling ---

    def warm_up(self, *args: Any, workers: int = 1, progress: bool = True, **static: Any) -> None:
        """Compiles every bucket for arguments like these (arrays or structs, of any token count).

        May be called again for arguments of other shapes or dtypes. workers: threads that compile side by side.
        """
        from tqdm import tqdm

        self._check_call(args, static)
        with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
            compile_one = lambda b: self._executable(self._structs(args, b), b, static, warming=True)  # noqa: E731
            jobs = [pool.submit(compile_one, bucket) for bucket in reversed(self.buckets)]
            done = concurrent.futures.as_completed(jobs)
            for job in tqdm(done, total=len(jobs), desc=f"compiling {self.name}", unit="bucket", disable=not progress):
                job.result()
        self._warm = True

    def _executable(self, args, bucket, static, warming=False) -> _Executable:
        key = bucket, self._key(args), tuple(sorted(static.items()))
        with self._lock:
            future = self._executables.get(key)
            mine = future is None
            if future is None:
                future = self._executables[key] = concurrent.futures.Future()
                self._misses += self._warm and not warming
        if mine:
            try:
                future.set_result(self._compile(args, bucket, static))
            except BaseException as error:  # whoever waits gets it too; the next call tries again
                with self._lock:
                    del self._executables[key]
                future.set_exception(error)
        return future.result()

    def _compile(self, args, bucket, static):
        start = time.perf_counter()
        structs = self._structs(args, bucket)
        jitted = jax.jit(self._traced(bucket, static), donate_argnums=tuple(i + 1 for i in self._donate))
        lowered = jitted.lower(jax.ShapeDtypeStruct((), jnp.int32), *structs)
        executable = _Executable(lowered.compile(compiler_options=self._options or None), lowered.out_info)
        seconds = time.perf_counter() - start
        with self._lock:
            self._seconds.append((bucket, seconds))
        if self.on_compile is not None:
            self.on_compile(self.name, bucket, seconds)
        return executable

    def _traced(self, bucket, static):
        def run(tokens, *args):
            def clear(axis, leaf):
                if axis is None:
                    return leaf
                valid = jnp.arange(bucket, dtype=jnp.int32) < tokens
                return jnp.where(jnp.expand_dims(valid, [i for i in range(leaf.ndim) if i != axis]), leaf, 0)

            cleared = [_map_axes(clear, axis, arg) for axis, arg in zip(self._in_axes, args, strict=True)]
            counted = {} if self._count is None else {self._count: tokens}
            return self._fn(*cleared, **counted, **static)

        return run

    def _out_structs(self, structs, static):
        run = self._traced(self.buckets[0], static)
        return jax.eval_shape(run, jax.ShapeDtypeStruct((), jnp.int32), *structs)

    def _structs(self, args, bucket):
        def struct(axis, leaf):
            leaf = leaf.values if isinstance(leaf, Bucketed) else leaf
            shape = tuple(bucket if i == axis else n for i, n in enumerate(leaf.shape))
            sharding = getattr(leaf, "sharding", None)
            committed = (
                sharding if getattr(leaf, "committed", False) or isinstance(leaf, jax.ShapeDtypeStruct) else None
            )
            return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=committed)

        return [_map_axes(struct, axis, arg) for axis, arg in zip(self._in_axes, args, strict=True)]

    def _key(self, args):
        """Everything of the arguments that an executable depends on, but the token count."""
        leaves, structure = jax.tree.flatten(self._structs(args, 0))
        return structure, tuple((s.shape, s.dtype, s.sharding) for s in leaves)

    # --- arguments ---

    def _check_call(self, args, static):
        if len(args) != len(self._in_axes):
            raise ValueError(f"{self.name}: takes {len(self._in_axes)} positional arguments, got {len(args)}")
        if static.keys() != self._statics:
            raise ValueError(f"{self.name}: static arguments are {sorted(self._statics)}, got {sorted(static)}")

    def _tokens_of_leaves(self, args):
        found = []

        def note(axis, leaf):
            if axis is not None:
                found.append(leaf)
                if not isinstance(leaf, Bucketed) and not -1 < axis < np.ndim(leaf):
                    raise ValueError(f"{self.name}: an argument {np.shape(leaf)} has no token axis {axis}")
                sizes.append(leaf.values.shape[axis] if isinstance(leaf, Bucketed) else leaf.shape[axis])

        sizes: list[int] = []
        for axis, arg in zip(self._in_axes, args, strict=True):
            _map_axes(note, axis, arg)
        return found, sizes

    def _count_tokens(self, args):
        found, sizes = self._tokens_of_leaves(args)
        bucketed = [isinstance(leaf, Bucketed) for leaf in found]
        counts = {leaf.tokens if isinstance(leaf, Bucketed) else n for leaf, n in zip(found, sizes, strict=True)}
        if len(counts) != 1:
            raise ValueError(f"{self.name}: arguments have {sorted(counts) or 'no'} tokens; all must have the same")
        if any(bucketed) != all(bucketed):
            raise ValueError(f"{self.name}: either all arguments with tokens are Bucketed or none")
        return counts.pop(), all(bucketed)

    def _bucket_of(self, args):
        sizes = set(self._tokens_of_leaves(args)[1])
        if len(sizes) != 1 or not sizes <= set(self.buckets):
            raise ValueError(f"{self.name}: Bucketed arguments of sizes {sorted(sizes)}; buckets are {self.buckets}")
        return sizes.pop()

    def _padded(self, args, bucket):
        def pad(axis, leaf):
            if isinstance(leaf, Bucketed):
                return leaf.values
            return leaf if axis is None else pad_tokens(leaf, axis, bucket)

        return [_map_axes(pad, axis, arg) for axis, arg in zip(self._in_axes, args, strict=True)]

    # --- report ---

    @property
    def stats(self) -> BlockStats:
        """What happened so far."""
        with self._lock:
            rows = sum(bucket * calls for bucket, calls in self._calls.items())
            return BlockStats(
                dict(self._calls), self._tokens, rows, self._chunked, self._misses, list(self._seconds)
            )  # fmt: skip


def block_graph(
    fn: Callable[..., Any],
    *,
    buckets: Sequence[int],
    in_axes: Sequence[Any],
    out_axes: Any = 0,
    static_argnames: Sequence[str] = (),
    donate_argnums: Sequence[int] = (),
    count_argname: str | None = None,
    compiler_options: dict[str, str] | None = None,
    name: str | None = None,
) -> BlockGraph:
    """Wraps `fn(*args, **static)` so that it runs for any number of tokens in executables of fixed token counts.

    Args:
      buckets: token counts to compile, ascending.
      in_axes: for every positional argument the axis of its tokens, None for what has none (weights, caches,
        positions); like `jax.vmap`'s, an entry may be a tree that is a prefix of the argument. Every leaf with tokens
        is an array or a `Bucketed`. out_axes: the same for what `fn` returns.
      static_argnames: keyword arguments that are part of the program, and so of the key of an executable; hashable.
      donate_argnums: arguments whose memory the outputs may take; they are gone after the call.
      count_argname: keyword under which `fn` gets the number of tokens that count, a traced i32 [].
      compiler_options: for XLA, e.g. {"xla_gpu_enable_command_buffer": ""}.
      name: for messages; None: the function's.

    Raises:
      ValueError: buckets that are not positive and ascending.
    """
    return BlockGraph(
        fn, buckets, in_axes, out_axes, static_argnames, donate_argnums, count_argname, compiler_options,
        name or getattr(fn, "__name__", "block"),
    )  # fmt: skip


def pad_tokens(x: Any, axis: int, size: int) -> jax.Array:
    """An array with zeros appended along `axis` up to `size`, put together on the host: nothing compiles."""
    if x.shape[axis] == size:
        return x if isinstance(x, jax.Array) else jax.device_put(x)  # jnp.asarray would compile
    host = np.asarray(x)
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(host.shape)]
    padded = np.pad(host, widths)
    return jax.device_put(padded, x.sharding if isinstance(x, jax.Array) and x.committed else None)


@contextlib.contextmanager
def count_compilations() -> Iterator[list[str]]:
    """A list that grows by an entry for every program that XLA compiles inside the context."""
    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _cut(leaf, axis, tokens):
    """The first `tokens` along the axis, over the host."""
    return leaf if leaf.shape[axis] == tokens else _take(leaf, axis, slice(0, tokens))


def _take(leaf, axis, some):
    index = tuple(some if i == axis else slice(None) for i in range(np.ndim(leaf)))
    part = np.ascontiguousarray(np.asarray(leaf)[index])
    return jax.device_put(part, leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None)


def _map_axes(fn, axes, *trees):
    """fn(axis, *leaves) over trees of which `axes` is a prefix; Bucketed counts as a leaf."""
    is_leaf = lambda t: isinstance(t, Bucketed)  # noqa: E731

    def below(axis, *subtrees):
        return jax.tree.map(lambda *leaves: fn(axis, *leaves), *subtrees, is_leaf=is_leaf)

    return jax.tree.map(below, axes, *trees, is_leaf=lambda a: a is None)


def _leaves_of_axes(axes):
    return jax.tree.leaves(axes, is_leaf=lambda a: a is None)
