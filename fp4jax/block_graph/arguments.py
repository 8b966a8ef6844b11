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


def pad_tokens(x: Any, axis: int, size: int, place: Any = None, copy: bool = False) -> jax.Array:
    """An array with zeros appended along `axis` up to `size`, put together on the host: nothing compiles.

    place: a sharding or device, None: the default one. Memory of the caller's is copied, never shared, but for a
    jax.Array of that size, which is given back as it is without `copy`.
    """
    if isinstance(x, jax.Array) and x.shape[axis] == size and not copy:
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


class Kinds:
    """What an executable knows about an argument: its tree, and `kind_of` of every leaf. Hashed once."""

    __slots__ = ("_hash", "leaves", "structure")

    def __init__(self, structure: Any, leaves: tuple[Any, ...]):
        self.structure, self.leaves = structure, leaves
        self._hash = hash((structure, leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kinds) and (self.structure, self.leaves) == (other.structure, other.leaves)

    def __hash__(self) -> int:
        return self._hash


class Argument:
    """One argument of a call, looked at: what would be too slow to find out in every call.

    axes: the token axis of each leaf or None. home: where what has no place of its own goes, None: this argument does
    not tell. has_tokens: whether a leaf has tokens.
    """

    __slots__ = ("_kinds", "_whole", "axes", "has_tokens", "home", "leaves", "structure")

    def __init__(self, leaves: list[Any], structure: Any, axes: tuple[int | None, ...]):
        self.leaves, self.structure, self.axes = leaves, structure, axes
        self.home = home_of(leaves)
        self.has_tokens = any(axis is not None for axis in axes)
        self._kinds: dict[Any, Kinds] = {}
        # A tree of its own: what the caller does to his does not reach a bound argument.
        self._whole = None if self.has_tokens else jax.tree.unflatten(structure, leaves)

    def kinds(self, home: Any) -> Kinds:
        """With `home` for what the whole call has as home."""
        found = self._kinds.get(home)
        if found is None:
            kinds = tuple(kind_of(leaf, axis, home) for leaf, axis in zip(self.leaves, self.axes, strict=True))
            found = self._kinds[home] = Kinds(self.structure, kinds)
        return found

    def chunk(self, some: slice) -> "Argument":
        """The same for some of its tokens, on the host; of the same kinds."""
        if not self.has_tokens:
            return self
        leaves = [
            leaf if axis is None else take_tokens(leaf, axis, some)
            for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        part = Argument(leaves, self.structure, self.axes)
        part._kinds = self._kinds
        return part

    def padded(self, bucket: int, home: Any, donated: bool) -> Any:
        """What an executable takes. What is donated is a copy, unless it came as Bucketed."""
        if not self.has_tokens:
            return self._whole

        def pad(leaf, axis):
            if axis is None:
                return leaf
            return pad_tokens(values_of(leaf), axis, bucket, home, copy=donated and not isinstance(leaf, Bucketed))

        return jax.tree.unflatten(self.structure, map(pad, self.leaves, self.axes))


def kind_of(leaf: Any, axis: int | None, home: Any) -> tuple[Any, ...]:
    """Shape but for the token axis, dtype, weak type, and the place that a leaf keeps where it is not at `home`."""
    if axis is None and isinstance(leaf, Bucketed):
        raise ValueError(f"Bucketed {np.shape(leaf.values)} where an argument has no token axis")
    leaf = values_of(leaf)
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        shape, dtype, weak = leaf.shape, leaf.dtype, bool(getattr(leaf, "weak_type", False))
    else:
        aval = jax.typeof(leaf)
        shape, weak = aval.shape, aval.weak_type
        dtype = jax.dtypes.canonicalize_dtype(aval.dtype, allow_extended_dtype=True)
    if axis is not None:
        return (*shape[:axis], *shape[axis + 1 :]), dtype, False, None
    place = place_of(leaf)
    if place is not None and home is not None and (place == home or place.is_equivalent_to(home, len(shape))):
        place = None
    return shape, dtype, weak, place


def home_of_all(arguments: Sequence[Argument]) -> jax.sharding.Sharding | None:
    """`home_of` for arguments that were looked at."""
    return next((argument.home for argument in arguments if argument.home is not None), None)


def structs_of(arguments: Sequence[Argument], home: jax.sharding.Sharding | None, bucket: int) -> tuple[Any, ...]:
    """What an executable takes: the number of tokens, then the arguments."""

    def struct(kind, axis):
        shape, dtype, weak, place = kind
        shape = shape if axis is None else (*shape[:axis], bucket, *shape[axis:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=home if place is None else place, weak_type=weak)

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=home)
    return count, *(jax.tree.unflatten(a.structure, map(struct, a.kinds(home).leaves, a.axes)) for a in arguments)


def map_tokens(fn: Callable[..., Any], axes: Any, tree: Any) -> Any:
    """`map_axes` that leaves what has no token axis as it is: a cache is not walked through."""

    def below(axis, subtree):
        return subtree if axis is None else jax.tree.map(functools.partial(fn, axis), subtree)

    return jax.tree.map(below, axes, tree, is_leaf=lambda a: a is None)
