"""Tokens per second of prefill and decoding, for texts that are long enough to measure them."""

from typing import Any

# With fewer tokens, or in less time, a rate would say more about the clock than about the model.
_FEWEST_TOKENS, _SHORTEST_SECONDS = 8, 1e-3


def of_run(
    prompt_tokens: int, new_tokens: int, prefill: float, whole: float, compiled: float
) -> dict[str, float | None]:
    """The rates of one generated text.

    Args:
      prompt_tokens: the number of tokens of the prompt.
      new_tokens: the number of generated tokens.
      prefill: seconds of the prefill, which also gives the first new token.
      whole: seconds of prefill and decoding together; decoding makes the further ones.
      compiled: seconds of compilation, which `prefill` and `whole` do not contain.

    Returns:
      `prefill_tokens_per_s` and `decode_tokens_per_s`, each None if it could not be measured, and `compile_s`.
    """
    decoding = whole - prefill
    # Both times have noise, so a difference of less than a tenth of the whole is not trusted.
    decode_rate = tokens_per_s(new_tokens - 1, decoding) if decoding > 0.1 * whole else None
    return {
        "prefill_tokens_per_s": tokens_per_s(prompt_tokens, prefill),
        "decode_tokens_per_s": decode_rate,
        "compile_s": round(max(compiled, 0.0), 2),
    }


def tokens_per_s(tokens: int, seconds: float) -> float | None:
    """The rate, or None if there are too few tokens or too little time to measure it."""
    if tokens < _FEWEST_TOKENS or seconds < _SHORTEST_SECONDS:
        return None
    return round(tokens / seconds, 1)


def as_text(way: dict[str, Any], numbers: dict[str, float | None]) -> str:
    """Two lines of text for the user: how fast a model ran, and how.

    Args:
      way: how it ran: `ran` (a phrase), `ep` (number of devices) and `wire_format` (None on one device).
      numbers: the result of `of_run`.
    """
    found = {"prefill": numbers["prefill_tokens_per_s"], "decoding": numbers["decode_tokens_per_s"]}
    said = [f"{name}: {'not measured' if r is None else f'{r:.1f} tokens/s'}" for name, r in found.items()]
    crossing = "" if way["wire_format"] is None else f", tokens cross in {way['wire_format']}"
    return f"{', '.join(said)}; compiled in {numbers['compile_s']:.1f} s\nran {way['ran']}, ep={way['ep']}{crossing}"
