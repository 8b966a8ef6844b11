"""The arguments of a block: padding their token axes to a bucket, and the facts that select an executable.

A block is a function that `block_graph` wrapped. Token axes are given as `jax.vmap` gives its axes: a tree that is a
prefix of the arguments, with an axis for arrays that have tokens and None for arrays that have none (weights, say).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class Bucketed(NamedTuple):
    """An array (or a tree of arrays) whose token axis has the size of a bucket; only the first `tokens` rows are valid.

    Blocks pass it to one another, so that arrays stay on the device, without padding and cutting in between.
    """

    values: Any
    tokens: int


def pad_tokens(x: Any, axis: int, size: int, place: Any = None, copy: bool = False) -> jax.Array:
    """Returns x with zeros appended along `axis` up to `size`, padded on the host so that nothing compiles.

    Args:
      x: a NumPy or JAX array with at most `size` entries along `axis`.
      axis: the token axis, counted from the front.
      size: the token count of the result.
      place: the sharding or device of the result; None is JAX's default device.
      copy: whether the result must own its memory. Without it, a jax.Array of exactly `size` entries comes back as it
        is (moved to `place` if it is elsewhere); all other arrays are copied in any case.
    """
    if isinstance(x, jax.Array) and x.shape[axis] == size and not copy:
        return x if place is None or x.sharding == place else jax.device_put(x, place)
    host = np.array(x)
    return jax.device_put(np.pad(host, [(0, size - n if i == axis else 0) for i, n in enumerate(host.shape)]), place)


def values_of(leaf: Any) -> Any:
    """Returns `leaf.values` if `leaf` is a Bucketed, else `leaf` itself."""
    return leaf.values if isinstance(leaf, Bucketed) else leaf


def is_bucketed(leaf: Any) -> bool:
    """Whether a node is a Bucketed; passed as `is_leaf` to the functions of `jax.tree`."""
    return isinstance(leaf, Bucketed)


def place_of(leaf: Any) -> jax.sharding.Sharding | None:
    """Returns the sharding of an array that was committed to devices on purpose (`jax.device_put` with a place).

    Returns None for an array that JAX may move (uncommitted), for a NumPy array and for a number. A ShapeDtypeStruct
    gives its `sharding` field.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding
    return leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None


def home_of(args: Any) -> jax.sharding.Sharding | None:
    """Returns the sharding for the arrays that were not committed to devices: the home of this call's arguments.

    It is derived from the first committed array in the tree `args`. If this array has a NamedSharding, the home is
    replication over all devices of its mesh, else the home is the array's own sharding. None: no array is committed.
    """
    for leaf in jax.tree.leaves(args, is_leaf=is_bucketed):
        if (place := place_of(values_of(leaf))) is not None:
            return NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
    return None


def take_tokens(leaf: Any, axis: int, some: slice) -> np.ndarray:
    """Returns the tokens `some` of an array along `axis`, copied to the host."""
    return np.array(np.asarray(leaf)[(slice(None),) * axis + (some,)])


def map_axes(fn: Callable[..., Any], axes: Any, *trees: Any) -> Any:
    """Maps `fn(axis, *leaves)` over trees of the same structure, of which `axes` is a prefix; a Bucketed is a leaf.

    An axis of None is passed to `fn` for every leaf below it. The results come back in a tree of the same structure.
    """

    def below(axis, *subtrees):
        return jax.tree.map(lambda *leaves: fn(axis, *leaves), *subtrees, is_leaf=is_bucketed)

    return jax.tree.map(below, axes, *trees, is_leaf=lambda a: a is None)


def leaves_of_axes(axes: Any) -> list[int | None]:
    """Returns all axes of a prefix tree of axes as a list; None counts as a leaf."""
    return jax.tree.leaves(axes, is_leaf=lambda a: a is None)


# --- arguments of a block ---


class Kinds:
    """The part of an executable's key that one argument contributes: its tree structure, and `kind_of` of every leaf.

    The hash is computed once, since a call looks its executable up by it and an argument may have hundreds of leaves.
    """

    __slots__ = ("_hash", "leaves", "structure")

    def __init__(self, structure: Any, leaves: tuple[Any, ...]):
        self.structure, self.leaves = structure, leaves
        self._hash = hash((structure, leaves))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kinds) and (self.structure, self.leaves) == (other.structure, other.leaves)

    def __hash__(self) -> int:
        return self._hash


class Argument:
    """One argument of a call, flattened, with the facts about it that would be slow to find in every call.

    leaves: the arrays, Bucketed values and numbers of the argument. structure: its treedef. axes: the token axis of
    each leaf, None for a leaf without tokens. home: `home_of` the argument, None if none of its arrays is committed to
    devices. has_tokens: whether any leaf has a token axis.
    """

    __slots__ = ("_kinds", "_whole", "axes", "has_tokens", "home", "leaves", "structure")

    def __init__(self, leaves: list[Any], structure: Any, axes: tuple[int | None, ...]):
        self.leaves, self.structure, self.axes = leaves, structure, axes
        self.home = home_of(leaves)
        self.has_tokens = any(axis is not None for axis in axes)
        self._kinds: dict[Any, Kinds] = {}
        # The tree is rebuilt here, so that later changes to the caller's containers do not reach a bound argument.
        self._whole = None if self.has_tokens else jax.tree.unflatten(structure, leaves)

    def kinds(self, home: Any) -> Kinds:
        """Returns the kinds of this argument's leaves in a call whose home is `home`; see `home_of` and `kind_of`."""
        found = self._kinds.get(home)
        if found is None:
            kinds = tuple(kind_of(leaf, axis, home) for leaf, axis in zip(self.leaves, self.axes, strict=True))
            found = self._kinds[home] = Kinds(self.structure, kinds)
        return found

    def chunk(self, some: slice) -> "Argument":
        """Returns the argument with only the tokens `some`, as arrays on the host; leaves without tokens stay.

        The kinds are the same, since they do not depend on the number of tokens.
        """
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
        """Returns the tree that the executable of `bucket` takes: leaves with tokens are padded to `bucket` rows.

        Args:
          bucket: the token count of the executable.
          home: where padded arrays go; None is JAX's default device.
          donated: whether the executable may overwrite the argument. Then an array with tokens is copied, so that the
            caller keeps his; a Bucketed is handed over without a copy and is gone after the call.
        """
        if not self.has_tokens:
            return self._whole

        def pad(leaf, axis):
            if axis is None:
                return leaf
            return pad_tokens(values_of(leaf), axis, bucket, home, copy=donated and not isinstance(leaf, Bucketed))

        return jax.tree.unflatten(self.structure, map(pad, self.leaves, self.axes))


def kind_of(leaf: Any, axis: int | None, home: Any) -> tuple[Any, ...]:
    """Returns what an executable depends on of one leaf: (shape without the token axis, dtype, weak type, place).

    Args:
      leaf: an array, a Bucketed, a ShapeDtypeStruct or a number.
      axis: the token axis, None if the leaf has none.
      home: the sharding of leaves that are not committed to devices; see `home_of`.

    The place is a sharding. It is None for a leaf at `home`, for an uncommitted leaf, and for every leaf with tokens:
    the call moves these leaves to `home`. Leaves with tokens count as not weakly typed.

    Raises:
      ValueError: a Bucketed where the argument has no token axis.
    """
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
    """Returns the home of the first argument that has one, or None: `home_of` for arguments already wrapped."""
    return next((argument.home for argument in arguments if argument.home is not None), None)


def structs_of(arguments: Sequence[Argument], home: jax.sharding.Sharding | None, bucket: int) -> tuple[Any, ...]:
    """Returns ShapeDtypeStructs of what the executable of `bucket` takes: the token count i32 [], then the arguments.

    Token axes have `bucket` entries. Leaves without a place of their own are at `home`.
    """

    def struct(kind, axis):
        shape, dtype, weak, place = kind
        shape = shape if axis is None else (*shape[:axis], bucket, *shape[axis:])
        return jax.ShapeDtypeStruct(shape, dtype, sharding=home if place is None else place, weak_type=weak)

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=home)
    return count, *(jax.tree.unflatten(a.structure, map(struct, a.kinds(home).leaves, a.axes)) for a in arguments)


def map_tokens(fn: Callable[..., Any], axes: Any, tree: Any) -> Any:
    """Maps `fn(axis, leaf)` over the leaves that have a token axis; subtrees without one come back as they are.

    Unlike `map_axes` it does not walk through a subtree whose axis is None, such as a cache with hundreds of arrays.
    """

    def below(axis, subtree):
        return subtree if axis is None else jax.tree.map(functools.partial(fn, axis), subtree)

    return jax.tree.map(below, axes, tree, is_leaf=lambda a: a is None)


class BucketedCall(NamedTuple):
    """Arguments whose tokens are Bucketed: all arguments as a program takes them, valid tokens, and the bucket."""

    arrays: list[Any]
    tokens: int
    bucket: int


def bucketed_call(axes: Sequence[Any], args: Sequence[Any]) -> BucketedCall | None:
    """The arguments of a call if each is one `Bucketed` array or has no tokens, and all agree; else None."""
    sizes, arrays = set(), []
    if len(axes) != len(args):
        return None
    for axis, arg in zip(axes, args, strict=True):
        if axis is None:
            arrays.append(arg)
        elif isinstance(axis, int) and isinstance(arg, Bucketed) and isinstance(arg.values, jax.Array):
            arrays.append(arg.values)
            sizes.add((arg.tokens, arg.values.shape[axis]))
        else:
            return None
    if len(sizes) != 1:
        return None
    tokens, bucket = sizes.pop()
    return BucketedCall(arrays, tokens, bucket) if 1 <= tokens <= bucket else None
