"""The choice of the next token, for a batch of requests that each have parameters of their own.

Nothing sorts the vocabulary. Top-k and top-p both keep the logits above a threshold, and a search finds it. The search
fixes the bits of the threshold from the highest to the lowest, two in each pass over the logits. A pass sums what lies
above three candidates: it counts tokens for top-k and adds up probability for top-p. Float32 has 32 bits, hence 16
passes, whatever k, p and the vocabulary are.

Passes over the logits: 1 for the argmax, 2 for the draw, 16 for top-k and 17 for top-p, whatever the requests ask for.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, Num, UInt32

# Bits of a threshold that one pass fixes. More bits need fewer passes and more candidates in each: 3 for 2 bits, 15 for
# 4. Of 1, 2 and 4 bits, 2 were the fastest on a CPU.
_BITS = 2
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
_SIGN = np.uint32(1 << 31)
_PLACE_OF_MINUS_INF = np.uint32(0x007FFFFF)


class SamplingParams(NamedTuple):
    """How the tokens of B requests are drawn. `check_sampling` says which values are allowed.

    Attributes:
      temperature: f32 [B], divides the logits. 0 takes the token with the largest logit instead of drawing one.
      top_k: i32 [B], keeps the k largest logits and all that equal the k-th largest. 0, or the size of the vocabulary
        or more, keeps all.
      top_p: f32 [B], keeps the smallest set of most likely tokens whose probabilities sum to top_p or more, and all
        tokens as likely as the least likely one of them. 1 keeps all.
      min_p: f32 [B], keeps the tokens whose probability is at least min_p times the largest probability. 0 keeps all.
      seed: u32 or i32 [B]. A seed gives the same tokens whenever logits and the other parameters are the same, so
        answers that should differ need different seeds.
    """

    temperature: Float32[Array, " B"]
    top_k: Int32[Array, " B"]
    top_p: Float32[Array, " B"]
    min_p: Float32[Array, " B"]
    seed: Int32[Array, " B"] | UInt32[Array, " B"]


def check_sampling(temperature: float | int, top_k: float | int, top_p: float | int, min_p: float | int) -> None:
    """Raises ValueError, with the name and the value, for the first parameter of a request that `draw` does not serve.

    Args:
      temperature: 0 or positive, and no more than float32 can hold.
      top_k: an integer from 0 to the largest int32.
      top_p: above 0 and at most 1.
      min_p: from 0 to 1.
    """
    # The negated comparisons also refuse NaN.
    if not 0 <= temperature <= _LARGEST_FLOAT32:
        raise ValueError(f"temperature must be 0 or a positive finite float32, got {temperature}")
    if not isinstance(top_k, int) or not 0 <= top_k <= np.iinfo(np.int32).max:
        raise ValueError(f"top_k must be 0 (off) or a positive int32, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (off), got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 (off) to 1, got {min_p}")


def draw(logits: Float32[Array, "B V"], params: SamplingParams, positions: Int32[Array, " B"]) -> Int32[Array, " B"]:
    """Choose the next token of every request.

    A request of temperature 0 gets the token with the largest logit, the lowest id among equals, and its other
    parameters do not matter. Any other request gets a token that is drawn from softmax(logits / temperature) after
    top-k, top-p and min-p, which apply in this order and each to what the one before has kept; see `log_weights`.

    The token of a request depends on its own logits, parameters and position alone: the noise is made from its seed and
    its position by threefry, whichever generator is JAX's default. One rounding remains: XLA may sum probabilities in
    another order in a program for another batch size. A token at the very edge of top-p, where the sum equals top_p to
    float32's accuracy, can then be kept in one program and not in the other.

    Args:
      logits: one row per request. A token of logit -inf is never drawn unless all tokens of its request have -inf; then
        all are equally likely. Of a request that has a NaN logit, the first token with NaN is returned, at every
        temperature, as `jnp.argmax` does.
      params: the parameters of every request, arrays that may be traced. Their values must be ones that
        `check_sampling` allows.
      positions: the positions that the chosen tokens will have in their sequences. They must not repeat within a
        request, whose noise would repeat too.

    Returns:
      Token ids.

    Raises:
      ValueError: `positions` or a field of `params` does not have one entry per request.
    """
    batch = logits.shape[:1]
    for name, value in (*params._asdict().items(), ("positions", positions)):
        if value.shape != batch:
            raise ValueError(f"{name} must have one entry per request, shape {batch}, got {value.shape}")
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    largest = jnp.take_along_axis(logits, likeliest[:, None], axis=1)[:, 0]  # NaN if there is one in the row
    drawn = (params.temperature > 0) & ~jnp.isnan(largest)

    # No branch here and below asks whether a request needs what it computes: on a GPU the host would have to read the
    # condition, and every step would wait for it.
    noise = gumbel_noise(params.seed, positions, logits.shape[1])
    tokens = jnp.argmax(log_weights(logits, params) + noise, axis=-1).astype(jnp.int32)
    return jnp.where(drawn, tokens, likeliest)


def log_weights(logits: Float32[Array, "B V"], params: SamplingParams) -> Float32[Array, "B V"]:
    """The distributions that requests of positive temperature draw from, as logarithms that are not normalised.

    Tokens rank equal if their logits are equal. Top-k keeps all tokens that equal the k-th largest logit, and top-p all
    that equal the last one it needs, so both may keep more than they must. The tokens of the largest logit are always
    kept.

    Args:
      logits: one row per request, without NaN.
      params: the parameters of every request.

    Returns:
      0 for the most likely tokens, log(probability / largest probability) for the other tokens that are kept, and -inf
      for the rest. The rows of requests whose temperature is 0 mean nothing.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)
    drawn = params.temperature > 0
    temperature = jnp.where(drawn, params.temperature, 1.0)[:, None]
    # The largest is subtracted first, so that a small temperature overflows to -inf only. Without the `where`, an
    # infinite largest logit would give inf - inf = NaN.
    scaled = jnp.where(logits == largest, 0.0, (logits - largest) / temperature)
    weights = jnp.exp(scaled)

    threshold = _threshold(logits, jnp.ones(logits.shape, jnp.int32), params.top_k)
    kept = logits >= _where_wanted((params.top_k > 0) & (params.top_k < logits.shape[1]), threshold)
    left = jnp.where(kept, weights, 0.0)
    threshold = _threshold(logits, left, params.top_p * jnp.sum(left, axis=-1))
    # top_p = 1 takes no threshold: it would lose the tail, whose weights vanish in the rounding of a float32 sum.
    kept &= logits >= _where_wanted(params.top_p < 1, threshold)
    kept &= weights >= params.min_p[:, None]  # the largest weight is exp(0) = 1
    return jnp.where(kept | (logits == largest), scaled, -jnp.inf)


def _where_wanted(wanted: Bool[Array, " B"], threshold: Float32[Array, " B"]) -> Float32[Array, "B 1"]:
    """The thresholds of the requests that want one, and -inf for the others."""
    return jnp.where(wanted, threshold, -jnp.inf)[:, None]


def _threshold(
    logits: Float32[Array, "B V"], weights: Num[Array, "B V"], target: Num[Array, " B"]
) -> Float32[Array, " B"]:
    """The largest float t of every row for which the weights of the logits >= t sum to `target` or more.

    This is one of the row's logits, or -inf if all weights together are less than `target`. A target of 0 or less gives
    NaN. Weights must not be negative: the sum then never grows with t, not even in its rounding, because all candidates
    are summed in the same order.
    """
    zero = jnp.zeros((), weights.dtype)
    digits = range(1, 1 << _BITS)

    def fix_bits(place: jax.Array, shift: jax.Array) -> tuple[jax.Array, None]:
        candidates = [_float_at(place | (jnp.uint32(digit) << shift)) for digit in digits]
        masked = tuple(jnp.where(logits >= candidate[:, None], weights, zero) for candidate in candidates)
        # One reduction of all candidates reads the logits once.
        sums = jax.lax.reduce(masked, (zero,) * len(masked), lambda a, b: tuple(map(jax.lax.add, a, b)), (1,))
        digit = sum((total >= target).astype(jnp.uint32) for total in sums)  # the sums fall from digit to digit
        return place | (digit << shift), None

    lowest = jnp.zeros(target.shape, jnp.uint32)
    place, _ = jax.lax.scan(fix_bits, lowest, jnp.arange(32 - _BITS, -1, -_BITS).astype(jnp.uint32))
    return _float_at(place)


def _float_at(place: UInt32[Array, " B"]) -> Float32[Array, " B"]:
    """The float at a place of the order of all floats; NaN above inf, and -inf at all places below that of -inf.

    The order is that of the bits, read as an integer, once those of negative floats are inverted and the sign bit of
    the others is set.
    """
    place = jnp.maximum(place, _PLACE_OF_MINUS_INF)
    bits = jnp.where(place >= _SIGN, place ^ _SIGN, ~place)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def gumbel_noise(
    seed: Int32[Array, " B"] | UInt32[Array, " B"], positions: Int32[Array, " B"], vocabulary: int
) -> Float32[Array, "B V"]:
    """Noise for Gumbel-max: the token whose log-weight plus noise is largest is drawn as the weights say."""

    def one_request(seed: jax.Array, position: jax.Array) -> jax.Array:
        # With another generator, which JAX's settings can choose, the bits of a request may depend on the batch.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        # The default mode is so coarse that the largest of 152,000 values are often equal, and argmax prefers low ids.
        return jax.random.gumbel(key, (vocabulary,), jnp.float32, mode="high")

    return jax.vmap(one_request)(seed.astype(jnp.uint32), positions)
