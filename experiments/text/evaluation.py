"""Held-out bits per byte of a byte-level model."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Evaluation(NamedTuple):
    """The result of `evaluate`.

    Attributes:
      bits_per_byte: the mean over all predicted bytes.
      dropped: the number of routes that the expert layers dropped, over all windows.
    """

    bits_per_byte: float
    dropped: int


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in nats for every position [B, S], from float32 logits [B, S, V] and targets i32 [B, S]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


@partial(jax.jit, static_argnums=(0, 4))
def _evaluate_batch(graphdef: nnx.GraphDef, state: nnx.State, batch: jax.Array, valid: jax.Array, cached: bool):
    ids, model = batch.astype(jnp.int32), nnx.merge(graphdef, state)
    output = model.forward(ids[:, :-1], *([model.init_cache(len(ids), ids.shape[1] - 1)] if cached else []))
    nats = cross_entropy(output.logits, ids[:, 1:])
    return jnp.sum(jnp.where(valid[:, None], nats, 0.0)), output.aux.dropped


def evaluate(model: nnx.Module, windows: np.ndarray, batch_size: int, *, cached: bool = False) -> Evaluation:
    """Evaluate a model on windows [N, length + 1], as `corpora.windows` makes them.

    The last batch is padded to `batch_size` windows; the bits of the padding do not count.

    Args:
      model: the model.
      windows: the text.
      batch_size: windows that are evaluated together.
      cached: whether attention reads the keys and values from the model's cache, in the cache's format.
    """
    graphdef, state = nnx.split(model)
    nats, dropped = 0.0, 0
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        valid = np.arange(batch_size) < len(batch)
        batch = np.pad(batch, ((0, batch_size - len(batch)), (0, 0)))
        batch_nats, batch_dropped = _evaluate_batch(graphdef, state, batch, valid, cached)
        nats, dropped = nats + float(batch_nats), dropped + int(batch_dropped)
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    return Evaluation(nats / predicted / math.log(2), dropped)
