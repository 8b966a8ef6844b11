"""The cache of an attention layer: pages of keys and values, and the table that says whose they are.

A page holds the keys of `page` successive positions of one request, for all key heads. Page p of request b is number
table[b, p] of the arrays. So a request takes only the pages that it fills, wherever they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fp4jax.rounding import round_to_e4m3


class KeyValuePages(NamedTuple):
    """Keys and values of one layer.

    Letters of the shapes: B requests, P pages, n pages of a request, D and V sizes of a key and a value.

    Attributes:
      keys: [P, heads, page, D]. Places that are not filled may hold anything.
      values: [P, heads, page, V].
      table: i32 [B, n], the pages of each request. Entries behind the filled ones may be any numbers from 0 to P - 1.
      counts: i32 [B], how many of the tokens of a call are valid; the others come last and are not written. None: all.
      scales: f32 [2], the scales of keys and of values, if both are e4m3 codes: a key is code * scales[0]. None: keys
        and values are stored as they are.
    """

    keys: Float[Array, "P heads page D"]
    values: Float[Array, "P heads page V"]
    table: Int[Array, "B n"]
    counts: Int[Array, "B"] | None = None
    scales: Float[Array, "2"] | None = None

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """What a cache keeps of the layer: keys and values."""
        return self.keys, self.values

    @property
    def page(self) -> int:
        """Places of a page."""
        return self.keys.shape[2]

    def write(self, keys: jax.Array, values: jax.Array, starts: jax.Array) -> "KeyValuePages":
        """Returns the pages with new keys and values in them.

        A value that is not finite is written as 0, and its key as NaN. So a query that sees the place gets NaN, and
        one that does not see it, but computes 0 * value, is not spoiled. In e4m3 a key that is not finite is written as
        NaN too, and what exceeds the largest code, 448, is written as that.

        Args:
          keys: [B, S, heads, D], of S successive positions.
          values: [B, S, heads, V].
          starts: i32 [B], or () for all requests: the first of these positions. Positions beyond the last page are
            dropped.
        """
        batch, length = keys.shape[:2]
        place = positions_from(starts, length)
        entry = jnp.minimum(place // self.page, self.table.shape[1] - 1)
        at = jnp.take_along_axis(jnp.broadcast_to(self.table, (batch, self.table.shape[1])), entry, axis=1)
        valid = place < self.table.shape[1] * self.page
        if self.counts is not None:
            valid &= jnp.arange(length, dtype=jnp.int32)[None, :] < self.counts[:, None]
        at = jnp.where(valid, at, self.keys.shape[0])
        keys, values = seal(keys, values)
        if self.scales is not None:
            keys, values = encode(keys, self.scales[0]), encode(values, self.scales[1])
        put = lambda pages, new: pages.at[at, :, place % self.page].set(new.astype(pages.dtype), mode="drop")  # noqa: E731
        return self._replace(keys=put(self.keys, keys), values=put(self.values, values))


def pages_of(keys: jax.Array, values: jax.Array) -> KeyValuePages:
    """Returns arrays [B, heads, length, ..] as pages: each request has one, of `length` places."""
    return KeyValuePages(keys, values, jnp.arange(keys.shape[0], dtype=jnp.int32)[:, None])


def seal(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Moves what is not finite in a value to its key: the value becomes 0 and the key NaN.

    Args:
      keys: [..., D].
      values: [..., V].
    """
    finite = jnp.all(jnp.isfinite(values), axis=-1, keepdims=True)
    return jnp.where(finite, keys, jnp.full_like(keys, jnp.nan)), jnp.where(finite, values, jnp.zeros_like(values))


def encode(x: Float[Array, "... D"], scale: Float[Array, ""]) -> Float[Array, "... D"]:
    """Returns x / scale as e4m3, computed as x * (1 / scale). A row with a value that is not finite becomes NaN."""
    codes = round_to_e4m3(x.astype(jnp.float32) * (1 / scale))
    finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
    return jnp.where(finite, codes, jnp.full_like(codes, jnp.nan))


def positions_from(start: Any, length: int) -> jax.Array:
    """The positions of `length` tokens from `start` on: i32 [B, length] for a start [B], [1, length] for ()."""
    return jnp.asarray(start, jnp.int32).reshape(-1, 1) + jnp.arange(length, dtype=jnp.int32)[None, :]
