"""A function with token axes, as it is lowered for one token count (bucket)."""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp4jax.block_graph.arguments import Argument, Bucketed, leaves_of_axes, map_axes, values_of


@dataclasses.dataclass(frozen=True)
class Block:
    """What `block_graph` was told about a function; its arguments are described there.

    Raises:
      ValueError: a token axis is negative, or `donate_argnums` names an argument that does not exist.
    """

    name: str
    fn: Callable[..., Any]
    in_axes: tuple[Any, ...]
    out_axes: Any
    static_argnames: frozenset[str]
    donate_argnums: tuple[int, ...]
    count_argname: str | None
    chunks: bool
    compiler_options: dict[str, str | bool]
    check_compiled: Callable[[jax.stages.Compiled], None] | None

    def __post_init__(self) -> None:
        if bad := [i for i in self.donate_argnums if not 0 <= i < len(self.in_axes)]:
            raise ValueError(f"{self.name}: donate_argnums has {bad[0]}; arguments are 0 to {len(self.in_axes) - 1}")
        if negative := [a for a in leaves_of_axes((self.in_axes, self.out_axes)) if a is not None and a < 0]:
            raise ValueError(f"{self.name}: token axes count from the front, got {negative[0]}")

    def check_whole(self, problem: str) -> None:
        """Raises ValueError, which says `problem`, if the block cannot run in parts or without tokens."""
        if self.donate_argnums or any(axis is None for axis in leaves_of_axes(self.out_axes)):
            raise ValueError(
                f"{self.name}: {problem}, and with donated arguments or outputs that belong to no token a call "
                "takes at least one token and runs as a whole"
            )

    def lower(self, structs: Any, bucket: int, static: Mapping[str, Any], home: Any) -> jax.stages.Lowered:
        """Lowers the block for one bucket; `structs` describe the number of tokens and the arguments.

        Raises:
          ValueError: an output has no token axis where `out_axes` says so.
        """
        donated = tuple(i + 1 for i in self.donate_argnums)
        # Outputs are placed at the home of the arguments, so that the next block finds them there and needs no other
        # executable for them.
        placed = {} if home is None else {"out_shardings": home}
        lowered = jax.jit(self.traced(bucket, static), donate_argnums=donated, **placed).lower(*structs)

        def check(axis, leaf):
            if axis is not None and (axis >= len(leaf.shape) or leaf.shape[axis] != bucket):
                raise ValueError(f"{self.name}: an output {leaf.shape} has no token axis {axis} of {bucket}")

        map_axes(check, self.out_axes, lowered.out_info)
        return lowered

    def traced(self, bucket: int, static: Mapping[str, Any]) -> Callable[..., Any]:
        """Returns the function that is compiled: (number of tokens, *padded arguments) -> padded outputs."""

        def run(tokens, *args):
            def clear(axis, leaf):
                if axis is None:
                    return leaf
                valid = jnp.arange(bucket, dtype=jnp.int32) < tokens
                valid = jnp.expand_dims(valid, [i for i in range(leaf.ndim) if i != axis])
                return jnp.where(valid, leaf, jnp.zeros_like(leaf))

            cleared = [map_axes(clear, axis, arg) for axis, arg in zip(self.in_axes, args, strict=True)]
            counted = {} if self.count_argname is None else {self.count_argname: tokens}
            return self.fn(*cleared, **counted, **static)

        return run

    def made_from(self, bucket: int, static: Mapping[str, Any]) -> tuple[Any, ...]:
        """What a program of the block depends on, but for the arrays and the options for XLA."""
        statics = tuple(sorted(static.items()))
        return self.fn, bucket, statics, self.in_axes, self.out_axes, self.donate_argnums, self.count_argname

    def check_call(self, args: Sequence[Any], static: Mapping[str, Any]) -> None:
        """Raises ValueError unless a call has as many arguments as the block, and its static ones."""
        if len(args) != len(self.in_axes):
            raise ValueError(f"{self.name}: takes {len(self.in_axes)} positional arguments, got {len(args)}")
        if static.keys() != self.static_argnames:
            raise ValueError(f"{self.name}: static arguments are {sorted(self.static_argnames)}, got {sorted(static)}")

    def count_tokens(self, arguments: Sequence[Argument], buckets: Sequence[int]) -> tuple[int, int | None]:
        """Returns (number of tokens, size of the bucket if the arguments are Bucketed, else None).

        Raises:
          ValueError: the arguments have different token counts or none, or are Bucketed with no bucket's size.
        """
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
            tokens = operator.index(leaf.tokens)
            if shape[axis] not in buckets or not 1 <= tokens <= shape[axis]:
                raise ValueError(f"{self.name}: Bucketed with {tokens} tokens in {shape}; buckets are {buckets}")
            found.add((tokens, shape[axis]))

        for argument in (a for a in arguments if a.has_tokens):
            for axis, leaf in zip(argument.axes, argument.leaves, strict=True):
                note(axis, leaf)
        if len(found) != 1:
            counts = [f"{n}" if size is None else f"{n} in a bucket of {size}" for n, size in sorted(found, key=str)]
            raise ValueError(
                f"{self.name}: arguments have {' and '.join(counts) or 'no'} tokens; all must have the same, and "
                "all be Bucketed, of one size, or none"
            )
        return found.pop()
