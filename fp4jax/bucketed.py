"""Arrays padded to the size of a bucket, where they are, and trees of them whose token axes are given like vmap's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
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
