"""Text generation: prompt in one pass, then one token at a time through the cache, all inside one compiled program."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int


def generate(
    model: Any, prompt: Int[Array, "B P"], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> Int[Array, "B total"]:
    """Continue every prompt by `max_new_tokens` tokens: -> the prompt and its continuation, i32 [B, P + new].

    `temperature` 0 takes the most likely token (the lowest id among equals); otherwise tokens are drawn from
    softmax(logits / temperature), the same ones for the same seed. Compiles once per prompt shape and length.

    Raises:
      ValueError: for an empty prompt, a negative temperature or token count, or more positions than the model has.
    """
    length = prompt.shape[1] + max_new_tokens
    if prompt.shape[1] < 1 or max_new_tokens < 1:
        raise ValueError(f"a prompt of {prompt.shape[1]} and {max_new_tokens} new tokens; both must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if length > model.config.max_position_embeddings:
        raise ValueError(f"{length} tokens exceed max_position_embeddings={model.config.max_position_embeddings}")
    graphdef, state = nnx.split(model)
    traced = None if temperature == 0 else jnp.float32(temperature)  # None compiles to argmax
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

    cache = model.init_cache(prompt.shape[0], prompt.shape[1] + max_new_tokens)
    output = model.forward(prompt, cache)
    first = choose(output.logits[:, -1], jnp.int32(0))
    _, rest = jax.lax.scan(one_token, (output.cache, first), jnp.arange(1, max_new_tokens, dtype=jnp.int32))
    return jnp.concatenate([prompt, first[:, None], rest.T], axis=1)
