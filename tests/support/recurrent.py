"""A recurrent layer in the place of attention, to test caches of layers that keep a state and no pages."""

import jax
import jax.numpy as jnp
from flax import nnx

from fp4jax.attention import LayerState, StateFormat


class Averaging(nnx.Module):
    """A moving average of the layer's inputs, projected."""

    def __init__(self, size, rngs):
        self.size, self.implementation = size, None
        self.out = nnx.Linear(size, size, use_bias=False, rngs=rngs)

    @property
    def cache_format(self):
        return StateFormat((((self.size,), jnp.float32),))

    def __call__(self, x, start, cache):
        batch, length, size = x.shape
        state = jnp.zeros((batch, size)) if cache is None else cache.arrays[0]
        counts = jnp.full(batch, length) if cache is None or cache.counts is None else cache.counts
        begins = (jnp.broadcast_to(start, batch) == 0) & (counts > 0)
        state = jnp.where(begins[:, None], 0, state)

        def step(state, token):
            new = 0.7 * state + token[0]
            return jnp.where((token[1] < counts)[:, None], new, state), new

        state, found = jax.lax.scan(step, state, (jnp.swapaxes(x, 0, 1), jnp.arange(length)))
        return self.out(jnp.swapaxes(found, 0, 1)), None if cache is None else LayerState((state,))
