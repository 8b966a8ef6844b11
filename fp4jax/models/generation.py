"""Text generation in one compiled program.

The program runs the model once over the prompt (prefill). A loop then runs it on one token at a time, with a cache of
keys and values, and feeds every new token back in.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from pallas_kernels.attention.config import ALIGNMENT


def generate(
    model: Any, prompt: Int[Array, "B P"], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Int[Array, "B total"]:
    """Continue every prompt by `max_new_tokens` tokens.

    JAX compiles one program per model, prompt shape and `max_new_tokens`; all positive temperatures share it, and
    temperature 0 has a program of its own.

    Args:
      model: a `Decoder`.
      prompt: token ids, B prompts of the same length P.
      max_new_tokens: the number of tokens that are added to every prompt; no token ends the text early.
      temperature: 0 takes the token with the largest logit (the lowest id among equals). A positive value draws tokens
        from softmax(logits / temperature).
      seed: the seed of the draws; the same seed gives the same tokens.

    Returns:
      The prompts and their continuations, i32 [B, P + max_new_tokens].

    Raises:
      ValueError: the prompt is empty, `max_new_tokens` is less than 1, the temperature is negative or NaN, or the
        result would be longer than the model's max_position_embeddings.
    """
    length = prompt.shape[1] + max_new_tokens
    if prompt.shape[1] < 1 or max_new_tokens < 1:
        raise ValueError(f"a prompt of {prompt.shape[1]} and {max_new_tokens} new tokens; both must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if length > model.config.max_position_embeddings:
        raise ValueError(f"{length} tokens exceed max_position_embeddings={model.config.max_position_embeddings}")
    graphdef, state = nnx.split(model)
    traced = None if temperature == 0 else jnp.float32(temperature)  # None makes the program take the argmax
    return _generate(graphdef, state, prompt.astype(jnp.int32), max_new_tokens, traced, jax.random.key(seed))


@partial(jax.jit, static_argnums=(0, 3))
def _generate(
    graphdef: Any,
    state: Any,
    prompt: jax.Array,
    max_new_tokens: int,
    temperature: jax.Array | None,
    key: jax.Array,
) -> jax.Array:
    model = nnx.merge(graphdef, state)

    def choose(logits: jax.Array, step: jax.Array) -> jax.Array:
        if temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.random.categorical(jax.random.fold_in(key, step), logits / temperature).astype(jnp.int32)

    def one_token(carry: tuple[Any, jax.Array], step: jax.Array) -> tuple[tuple[Any, jax.Array], jax.Array]:
        cache, last = carry
        output = model.forward(last[:, None], cache)
        token = choose(output.logits[:, -1], step)
        return (output.cache, token), token

    length = prompt.shape[1] + max_new_tokens
    # A page of another length would be padded for the kernels of attention, by a copy in every layer and step.
    cache = model.init_cache(prompt.shape[0], length + -length % ALIGNMENT)
    output = model.forward(prompt, cache)
    first = choose(output.logits[:, -1], jnp.int32(0))
    _, rest = jax.lax.scan(one_token, (output.cache, first), jnp.arange(1, max_new_tokens, dtype=jnp.int32))
    return jnp.concatenate([prompt, first[:, None], rest.T], axis=1)
