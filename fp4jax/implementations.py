"""Which implementations an op has, and the one rule for choosing between them."""

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "triton")


def resolve_implementation(op: str, implementation: str | None, available: tuple[str, ...] = ("xla",)) -> str:
    """The implementation that `op` runs: the first available one for None, else exactly the one that was named.

    Raises:
      ValueError: the name is not one of `IMPLEMENTATIONS`.
      NotImplementedError: the name is known but `op` does not have it. A named implementation never falls back.
    """
    if implementation is None:
        return available[0]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{op}: implementation={implementation!r} is unknown; choose None or one of {IMPLEMENTATIONS}")
    if implementation not in available:
        raise NotImplementedError(f"{op}: implementation={implementation!r} does not exist yet; it has {available}")
    return implementation
