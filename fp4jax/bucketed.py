"""Arrays padded to the size of a bucket, where they are; trees of them whose token axes are given like vmap's.

And what a block knows about the arguments of a call: `Argument`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Bucketed(NamedTuple):
    """Arrays of one bucket's size along their token axis, of which the first `tokens` count."""

    values: Any
    tokens: int


def pad_tokens(x: Any, axis: int, size: int, place: Any = None) -> jax.Array:
    """An array with zeros appended along `axis` up to `size`, put together on the host: nothing compiles.

    place: a sharding or device, None: the default one. Memory of the caller's is copied, never shared.
    """
    if isinstance(x, jax.Array) and x.shape[axis] == size:
        return x if place is None or x.sharding == place else jax.device_put(x, place)
    host = np.array(x)
    return jax.device_put(np.pad(host, [(0, size - n if i == axis else 0) for i, n in enumerate(host.shape)]), place)


def values_of(leaf: Any) -> Any:
    """The array of a Bucketed, or the array itself."""
    return leaf.values if isinstance(leaf, Bucketed) else leaf


def is_bucketed(leaf: Any) -> bool:
    """For `is_leaf` of tree functions."""
    return isinstance(leaf, Bucketed)


def place_of(leaf: Any) -> jax.sharding.Sharding | None:
    """Where an array has been put on purpose, else None."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def home_of(args: Any) -> jax.sharding.Sharding | None:
    """Where arguments without a place of their own go: to all devices of the first that has one, whole; or None."""
    for leaf in jax.tree.leaves(args, is_leaf=is_bucketed):
        if (place := place_of(values_of(leaf))) is not None:
            return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
    return None


def take_tokens(leaf: Any, axis: int, some: slice) -> np.ndarray:
    """Some of an array's tokens, copied to the host."""
    return np.array(np.asarray(leaf)[(slice(None),) * axis + (some,)])


def map_axes(fn: Callable[..., Any], axes: Any, *trees: Any) -> Any:
    """fn(axis, *leaves) over trees of which `axes` is a prefix; Bucketed counts as a leaf."""

    def below(axis, *subtrees):
        return jax.tree.map(lambda *leaves: fn(axis, *leaves), *subtrees, is_leaf=is_bucketed)

    return jax.tree.map(below, axes, *trees, is_leaf=lambda a: a is None)


def leaves_of_axes(axes: Any) -> list[int | None]:
    """All axes of such a tree."""
    return jax.tree.leaves(axes, is_leaf=lambda a: a is None)


# --- arguments of a block ---


class Kinds(NamedTuple):
    """What an executable knows about an argument: its tree, and of every leaf shape, dtype and place."""

    structure: Any
    leaves: tuple[Any, ...]


class Argument(NamedTuple):
    """One argument of a call, looked at.

    axes: the token axis of each leaf or None. kinds: equal ones are the same object. home: where what has no place of
    its own goes, None: this argument does not tell.
    """

    value: Any
    leaves: list[Any]
    axes: tuple[int | None, ...]
    kinds: Kinds
    home: jax.sharding.Sharding | None
    has_tokens: bool


def kind_of(leaf: Any, axis: int | None) -> tuple[Any, ...]:
    """Shape but for the token axis, dtype, and the place that a leaf keeps: None is where everything else is."""
    leaf = values_of(leaf)
    if isinstance(leaf, jax.Array):
        shape, dtype = leaf.shape, leaf.dtype
    else:
        aval = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
        shape, dtype = aval.shape, jax.dtypes.canonicalize_dtype(aval.dtype, allow_extended_dtype=True)
    return (shape, dtype, place_of(leaf)) if axis is None else ((*shape[:axis], *shape[axis + 1 :]), dtype, None)


def home_of_all(arguments: Sequence[Argument]) -> jax.sharding.Sharding | None:
    """`home_of` for arguments that were looked at."""
    return next((argument.home for argument in arguments if argument.home is not None), None)


def pad_argument(argument: Argument, bucket: int, home: jax.sharding.Sharding | None) -> Any:
    """What an executable takes for an argument."""
    if not argument.has_tokens:
        return argument.value
    leaves = [
        leaf if axis is None else pad_tokens(values_of(leaf), axis, bucket, home)
        for leaf, axis in zip(argument.leaves, argument.axes, strict=True)
    ]
    return jax.tree.unflatten(argument.kinds.structure, leaves)


def structs_of(arguments: Sequence[Argument], home: jax.sharding.Sharding | None, bucket: int) -> tuple[Any, ...]:
    """What an executable takes: the number of tokens, then the arguments."""

    def struct(kind, axis):
        shape, dtype, place = kind
        shape = shape if axis is None else (*shape[:axis], bucket, *shape[axis:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=home if place is None else place)

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=home)
    return count, *(jax.tree.unflatten(a.kinds.structure, map(struct, a.kinds.leaves, a.axes)) for a in arguments)


def map_tokens(fn: Callable[..., Any], axes: Any, tree: Any) -> Any:
    """`map_axes` that leaves what has no token axis as it is: a cache is not walked through."""

    def below(axis, subtree):
        return subtree if axis is None else jax.tree.map(functools.partial(fn, axis), subtree)

    return jax.tree.map(below, axes, tree, is_leaf=lambda a: a is None)
