"""The caches that `BucketedModel` makes: pages of keys and values, for batches of requests of one largest length."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fp4jax.models.decoder import Decoder

# (keys, values) of every layer, each [pages, heads, page, dim]; `Decoder.cache_parts` gives heads and dim of both.
Cache = list[tuple[jax.Array, jax.Array]]


class PagedCaches:
    """Makes caches in which every request has `ceil(max_length / page_size)` successive pages.

    Args:
      model: the language model.
      max_length: the most positions of a request.
      page_size: positions of a page.
      home: where the caches lie; None: where JAX puts new arrays.
    """

    def __init__(self, model: Decoder, max_length: int, page_size: int, home: Any):
        self._max_length, self._page_size, self._home = max_length, page_size, home
        self._layers, self._dtype = model.config.num_hidden_layers, jnp.dtype(model.config.dtype)
        self._parts = model.cache_parts(model.config)
        self._pages = -(-max_length // page_size)
        placed: dict[str, Any] = {} if home is None else {"out_shardings": home}
        self._zeros = jax.jit(self._make_zeros, static_argnums=0, **placed)
        self.insert = jax.jit(_insert_request, donate_argnums=0, **placed)
        self.table = functools.cache(self._make_table)

    def bytes(self, requests: int) -> int:
        """Returns the bytes of a cache for `requests` requests."""
        values = sum(heads * dim for heads, dim in self._parts)
        return requests * self._pages * self._page_size * values * self._dtype.itemsize * self._layers

    def empty(self, requests: int) -> Cache:
        """Returns a cache of zeros.

        Raises:
          MemoryError: a device says that it has less memory left.
        """
        devices = jax.devices()[:1] if self._home is None else self._home.device_set
        free = min((left for left in map(_free_bytes, devices) if left is not None), default=None)
        if free is not None and self.bytes(requests) > free:
            needed, left = (f"{size / 1e9:.2f} GB" for size in (self.bytes(requests), free))
            raise MemoryError(
                f"a cache for {requests} requests of {self._max_length} positions takes {needed}, and {left} are free; "
                "take a smaller max_length or fewer requests"
            )
        return self._zeros(requests)

    def _make_zeros(self, requests):
        shape = lambda heads, dim: (requests * self._pages, heads, self._page_size, dim)  # noqa: E731
        return [tuple(jnp.zeros(shape(*part), self._dtype) for part in self._parts) for _ in range(self._layers)]

    def _make_table(self, requests):
        """The pages of every request, i32 [requests, pages of a request]."""
        table = jnp.arange(requests * self._pages, dtype=jnp.int32).reshape(requests, self._pages)
        return jax.device_put(table, self._home)


def _insert_request(batch, one, slot):
    """Writes the pages of one request to those of request `slot` of the batch."""
    return jax.tree.map(lambda b, o: jax.lax.dynamic_update_slice_in_dim(b, o, slot * o.shape[0], 0), batch, one)


def _free_bytes(device):
    """Bytes of a device's memory that are not in use; None if the device does not say."""
    stats = device.memory_stats() or {}
    return None if "bytes_limit" not in stats else stats["bytes_limit"] - stats["bytes_in_use"]
