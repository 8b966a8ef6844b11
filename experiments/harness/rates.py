"""Tokens per second of a text that was generated, where there was enough to measure."""

from typing import Any

# A rate of fewer tokens, or of less time, says more about the clock than about the model.
_FEWEST_TOKENS, _SHORTEST_SECONDS = 8, 1e-3


def of_run(
    prompt_tokens: int, new_tokens: int, prefill: float, whole: float, compiled: float
) -> dict[str, float | None]:
    """Rates of prefill and decoding, None where they were not measured, and the seconds that compiling took.

    prefill, whole, compiled: seconds; the whole is the prefill, which gives the first token, and a step per token more.
    """
    decoding = whole - prefill
    # A small difference of two long times is their noise.
    decode_rate = tokens_per_s(new_tokens - 1, decoding) if decoding > 0.1 * whole else None
    return {
        "prefill_tokens_per_s": tokens_per_s(prompt_tokens, prefill),
        "decode_tokens_per_s": decode_rate,
        "compile_s": round(max(compiled, 0.0), 2),
    }


def tokens_per_s(tokens: int, seconds: float) -> float | None:
    """None for fewer tokens or less time than can be measured."""
    if tokens < _FEWEST_TOKENS or seconds < _SHORTEST_SECONDS:
        return None
    return round(tokens / seconds, 1)


def as_text(way: dict[str, Any], numbers: dict[str, float | None]) -> str:
    """How a model ran (way: ran, ep, wire_format) and how fast, for people."""
    found = {"prefill": numbers["prefill_tokens_per_s"], "decoding": numbers["decode_tokens_per_s"]}
    said = [f"{name}: {'not measured' if r is None else f'{r:.1f} tokens/s'}" for name, r in found.items()]
    crossing = "" if way["wire_format"] is None else f", tokens cross in {way['wire_format']}"
    return f"{', '.join(said)}; compiled in {numbers['compile_s']:.1f} s\nran {way['ran']}, ep={way['ep']}{crossing}"
