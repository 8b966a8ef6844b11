"""Keys and values of requests of different lengths in shuffled pages, with NaN in every place that is not filled."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import oracles
from fp4jax.attention import KeyValuePages

FP8 = jnp.float8_e4m3fn
SCALES = np.asarray([0.21, 0.37], np.float32)  # of keys and values in e4m3


def poisoned_pages(rng, lengths, heads, dim, value_dim, page, places, dtype=jnp.float32):
    """KeyValuePages for requests with `lengths` keys and room for `places` each, and the keys and values of each.

    There are more pages than the table names. The keys and values are numpy float64 [length, heads, ..], exact in
    `dtype`. For e4m3 they are codes times `SCALES`, which the pages have as scales.
    """
    n = -(-places // page)
    pages = len(lengths) * n + 2
    table = rng.permutation(pages)[: len(lengths) * n].reshape(len(lengths), n).astype(np.int32)
    arrays = [np.full((pages, heads, page, size), np.nan, np.float32) for size in (dim, value_dim)]
    rows = []
    for request, length in enumerate(lengths):
        both = [rng.standard_normal((length, heads, size)).astype(np.float32) for size in (dim, value_dim)]
        if dtype == jnp.bfloat16:
            both = [oracles.round_bf16(part) for part in both]
        if dtype == FP8:
            both = [(4 * part).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) for part in both]
        place = np.arange(length)
        for array, part in zip(arrays, both, strict=True):
            array[table[request, place // page], :, place % page] = part
        factors = SCALES if dtype == FP8 else (1, 1)
        rows.append([part.astype(np.float64) * np.float64(by) for part, by in zip(both, factors, strict=True)])
    scales = jnp.asarray(SCALES) if dtype == FP8 else None
    return KeyValuePages(*(jnp.asarray(a, dtype) for a in arrays), jnp.asarray(table), scales=scales), rows


def attention(q, keys, values, start, scale):
    """Causal attention in float64 of queries [S, heads, D] from position `start` on, one query and head at a time."""
    group = q.shape[1] // keys.shape[1]
    out = np.zeros((*q.shape[:2], values.shape[-1]))
    for s in range(q.shape[0]):
        for head in range(q.shape[1]):
            scores = scale * keys[: start + s + 1, head // group] @ q[s, head]
            weights = np.exp(scores - scores.max())
            out[s, head] = weights @ values[: start + s + 1, head // group] / weights.sum()
    return out
