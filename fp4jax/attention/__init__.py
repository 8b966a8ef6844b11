"""Attention over pages of keys and values, and the cache of a layer in pages."""

from fp4jax.attention.cache_formats import (
    CacheFormat as CacheFormat,
    LayerState as LayerState,
    PageFormat as PageFormat,
    StateFormat as StateFormat,
)
from fp4jax.attention.latents import attend_latents as attend_latents
from fp4jax.attention.paged import attend as attend
from fp4jax.attention.pages import KeyValuePages as KeyValuePages, pages_of as pages_of
