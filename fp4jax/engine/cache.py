"""The caches that `BucketedModel` makes: pages of keys and values, for batches of requests of one largest length."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fp4jax.attention.cache_formats import bytes_of
from fp4jax.models.decoder import Decoder

# The arrays of every layer, as `Decoder.cache_formats` says: keys and values [pages, heads, page, size], or states.
Cache = list[tuple[jax.Array, ...]]


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
        self._formats = model.cache_formats
        self._pages = -(-max_length // page_size)
        placed: dict[str, Any] = {} if home is None else {"out_shardings": home}
        self._zeros = jax.jit(self._make_zeros, static_argnums=0, **placed)
        self.insert = jax.jit(_insert_request, donate_argnums=0, **placed)
        self.table = functools.cache(self._make_table)
        self.bytes = functools.cache(self._bytes)  # every prefill asks, and tracing the shapes takes milliseconds

    def _bytes(self, requests: int) -> int:
        """Returns the bytes of a cache for `requests` requests."""
        return bytes_of(self._formats, requests, self._pages, self._page_size)

    def empty(self, requests: int) -> Cache:
        """Returns a cache of zeros.

        Raises:
          MemoryError: a device says that it has less memory left.
        """
        whose = f"{requests} requests of {self._max_length} positions"
        check_free(self.bytes(requests), self._home, whose, "a smaller max_length or fewer requests")
        return self._zeros(requests)

    def _make_zeros(self, requests):
        return [format.zeros(requests, self._pages, self._page_size) for format in self._formats]

    def _make_table(self, requests):
        """The pages of every request, i32 [requests, pages of a request]."""
        table = jnp.arange(requests * self._pages, dtype=jnp.int32).reshape(requests, self._pages)
        return jax.device_put(table, self._home)


def _insert_request(batch, one, slot):
    """Writes the pages and states of one request to those of request `slot` of the batch."""
    return jax.tree.map(lambda b, o: jax.lax.dynamic_update_slice_in_dim(b, o, slot * o.shape[0], 0), batch, one)


def check_free(size: int, home: jax.sharding.Sharding | None, whose: str, advice: str) -> None:
    """Raises MemoryError if a device says that it has less memory left than a cache takes.

    Args:
      size: bytes of the cache on every device.
      home: where the cache will lie; None: where JAX puts new arrays.
      whose: what the cache is for.
      advice: what to take in its place.
    """
    devices = jax.local_devices()[:1] if home is None else home.addressable_devices
    free = min((left for left in map(_free_bytes, devices) if left is not None), default=None)
    if free is not None and size > free:
        needed, left = (f"{number / 1e9:.2f} GB" for number in (size, free))
        raise MemoryError(f"a cache for {whose} takes {needed}, and {left} are free; take {advice}")


def _free_bytes(device):
    """Bytes of a device's memory that are not in use; None if the device does not say."""
    stats = device.memory_stats() or {}
    return None if "bytes_limit" not in stats else stats["bytes_limit"] - stats["bytes_in_use"]
