"""Splits the time of a language model's decoder layer into stages, which scopes or names of kernels tell apart.

The stages are projections (linear layers of attention), attention, router (with what an expert block does beside its
experts), experts (routed and shared ones, and the MLP of layers without experts) and rest.
"""

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

STAGES = ("projections", "attention", "router", "experts", "rest")
# Scopes in the order in which they decide: a projection of shared experts belongs to the experts, and so on. What is in
# none of them is the embedding or the head.
SCOPES = ("experts", "router", "projections", "attention", "layer")

# The first pattern that a kernel's name has decides. All products of two matrices that no other pattern claims count as
# projections.
_KERNELS = (
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    ("experts", r"group|ragged|moe|expert|swiglu|silu|permute"),
    ("router", r"topk|top_k|bitonic|sort|router|routing"),
    ("projections", r"gemm|gemv|nvjet|cublas|cutlass|splitk|xmma|dot|matmul"),
)


def stage_of_kernel(name: str) -> str:
    """The stage that a kernel's name tells. It is a guess, for programs without scopes."""
    return next((stage for stage, pattern in _KERNELS if re.search(pattern, name, re.IGNORECASE)), "rest")


def by_kernel_name(kernels: Mapping[str, float], layers: int) -> dict[str, float]:
    """Microseconds per stage and layer, from the microseconds that the kernels of each name take in one call."""
    found = dict.fromkeys(STAGES, 0.0)
    for name, us in kernels.items():
        found[stage_of_kernel(name)] += us / layers
    return {stage: round(us, 2) for stage, us in found.items()}


def by_scope(scope_us: Mapping[str, float], layers: int) -> dict[str, float]:
    """Microseconds per stage and layer, from the microseconds that each of `SCOPES` takes in one call."""
    found = {stage: scope_us.get("layer" if stage == "rest" else stage, 0.0) for stage in STAGES}
    return {stage: round(us / layers, 2) for stage, us in found.items()}


@contextlib.contextmanager
def scoped_layers() -> Iterator[None]:
    """A context manager within which the modules of a model are traced in scopes named as in `SCOPES`.

    JAX's compilation cache takes programs that differ only in scopes for the same, unless the scopes are a part of its
    key; within the context manager they are.
    """
    import jax

    from fp4jax import layers
    from fp4jax.layers.attention import Attention
    from fp4jax.layers.latent_attention import LatentAttention
    from fp4jax.models.decoder import DecoderLayer

    linear = [(kind, "__call__", "projections") for kind in (layers.Linear, layers.NVFP4Linear, layers.BlockFP8Linear)]
    scoped: list[tuple[Any, str, str]] = [
        *linear, (Attention, "__call__", "attention"), (LatentAttention, "__call__", "attention"),
        (layers.MLP, "__call__", "experts"), (layers.MoEBlock, "experts", "experts"),
        (layers.MoEBlock, "__call__", "router"), (DecoderLayer, "__call__", "layer"),
    ]  # fmt: skip
    key = "jax_compilation_cache_include_metadata_in_key"
    scopes_in_key = getattr(jax.config, key)
    usual = [(owner, name, vars(owner)[name]) for owner, name, _ in scoped]

    def in_scope(method, scope):
        @functools.wraps(method)
        def wrapped(*args, **kwargs):
            with jax.named_scope(scope):
                return method(*args, **kwargs)

        return wrapped

    try:
        jax.config.update(key, True)
        for (owner, name, method), (_, _, scope) in zip(usual, scoped, strict=True):
            setattr(owner, name, in_scope(method, scope))
        yield
    finally:
        jax.config.update(key, scopes_in_key)
        for owner, name, method in usual:
            setattr(owner, name, method)
