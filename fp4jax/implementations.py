"""Which implementations an op has, and the one rule for choosing between them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

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


def run_implementation(
    op: str,
    implementation: str | None,
    operands: Any,
    *,
    xla: Callable[..., Any],
    mosaic_gpu: Callable[..., Any],
    problem: str | None,
) -> Any:
    """Calls `xla(*operands)` or `mosaic_gpu(*operands)`; operands are pytrees of arrays.

    None takes the kernel wherever the program runs on a Hopper GPU, if `problem` (what the kernel does not accept) is
    None; which platform that is, is decided when the program is lowered, so that a jit for CPU devices on a GPU machine
    gets XLA.

    Raises:
      NotImplementedError: "mosaic_gpu" was named and there is a problem.
    """
    chosen = None if implementation is None else resolve_implementation(op, implementation, ("xla", "mosaic_gpu"))
    if chosen == "mosaic_gpu":
        if problem is None and not has_hopper_gpu():
            problem = f"needs a GPU of compute capability 9.0; JAX sees {jax.devices()}"
        if problem is not None:
            raise NotImplementedError(f"{op}: implementation='mosaic_gpu': {problem}")
        return mosaic_gpu(*operands)
    if chosen == "xla" or problem is not None or not has_hopper_gpu():
        return xla(*operands)
    return lax.platform_dependent(*operands, cuda=mosaic_gpu, default=xla)


def has_hopper_gpu() -> bool:
    """Whether JAX sees a GPU of compute capability 9.0, or traces for one (an abstract mesh of H100 or H200)."""
    target = jax.sharding.get_abstract_mesh().abstract_device
    if target is not None:
        return any(name in target.device_kind for name in ("H100", "H200", "GH200"))
    return _sees_hopper_gpu()


@functools.cache
def _sees_hopper_gpu():
    try:
        return any(getattr(device, "compute_capability", "") == "9.0" for device in jax.devices("gpu"))
    except RuntimeError:  # no GPU backend
        return False
