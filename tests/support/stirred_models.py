"""Models whose norms and biases do something: as they are made, norms are ones, biases zero, and swaps go unnoticed."""

import jax.numpy as jnp
import numpy as np
from flax import nnx


def stirred(model, bias):
    """The model with random norm weights, and correction biases within +-bias that change who is chosen."""
    rng = np.random.default_rng(1)
    for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = param.get_value()
        if "norm" in str(path[-2]):
            param.set_value(jnp.asarray(rng.uniform(0.5, 1.5, value.shape), value.dtype))
        if path[-1] == "correction_bias":
            param.set_value(jnp.asarray(rng.uniform(-bias, bias, value.shape), value.dtype))
    return model
