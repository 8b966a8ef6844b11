"""What a decoder layer keeps of the tokens before: pages of keys and values, or the state of a recurrent layer.

A layer says in its `cache_format` what it keeps. Whoever makes a cache asks the format for arrays of zeros, hands them
to the layer as `format.of(arrays, ..)`, and keeps the `arrays` of what the layer returns. So a model may have layers of
both kinds, and layers whose keys are stored in different types.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fp4jax.attention.pages import KeyValuePages

FP8 = jnp.float8_e4m3fn


class PageFormat(NamedTuple):
    """Pages of keys and values.

    Attributes:
      keys: (heads, size of a key).
      values: (heads, size of a value).
      dtype: of both: bf16, f32, or e4m3, which is stored with one scale for all keys and one for all values of a layer.
    """

    keys: tuple[int, int]
    values: tuple[int, int]
    dtype: Any

    def zeros(self, requests: int, pages: int, page: int) -> tuple[jax.Array, jax.Array]:
        """Returns (keys, values) for requests with `pages` pages of `page` positions each."""
        shapes = ((requests * pages, heads, page, size) for heads, size in (self.keys, self.values))
        keys, values = (jnp.zeros(shape, self.dtype) for shape in shapes)
        return keys, values

    def of(self, arrays: tuple[jax.Array, ...], table: jax.Array, counts: jax.Array | None = None) -> KeyValuePages:
        """Returns the arrays as the layer takes them; the other arguments are those of `KeyValuePages`."""
        keys, values = arrays
        return KeyValuePages(keys, values, table, counts)


class LayerState(NamedTuple):
    """The state of a recurrent layer, which does not grow with the positions.

    Attributes:
      arrays: [B, ...] each, with one entry per request. A request whose first position is 0 and valid starts from
        zeros, whatever its entries hold.
      counts: i32 [B], how many of the tokens of a call are valid; the others come last and leave the state as it is. If
        there is none, the entries stay as they are, whatever the first position is. None: all.
    """

    arrays: tuple[jax.Array, ...]
    counts: jax.Array | None = None


class StateFormat(NamedTuple):
    """The state of a recurrent layer.

    Attributes:
      parts: (shape of one request, dtype) of every array.
    """

    parts: tuple[tuple[tuple[int, ...], Any], ...]

    def zeros(self, requests: int, pages: int, page: int) -> tuple[jax.Array, ...]:
        """Returns the arrays for this many requests, whatever their number of positions is."""
        del pages, page
        return tuple(jnp.zeros((requests, *shape), dtype) for shape, dtype in self.parts)

    def of(self, arrays: tuple[jax.Array, ...], table: jax.Array, counts: jax.Array | None = None) -> LayerState:
        """Returns the arrays as the layer takes them."""
        del table
        return LayerState(tuple(arrays), counts)


CacheFormat = PageFormat | StateFormat


def bytes_of(formats: list[CacheFormat], requests: int, pages: int, page: int) -> int:
    """Returns the bytes of a cache of these layers; the arguments are those of `PageFormat.zeros`."""
    made = jax.eval_shape(lambda: [format.zeros(requests, pages, page) for format in formats])
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made))
